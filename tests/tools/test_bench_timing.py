"""How `lorakernels bench` times: in turns, by CUDA graphs or by events, and ratios of one clock only."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lorakernels.tools.bench import run, timing
from lorakernels.tools.bench.registry import Case
from lorakernels.tools.bench.timing import interleaved


def test_rounds_take_turns() -> None:
    order: list[str] = []

    @dataclasses.dataclass
    class Named:
        name: str
        how: str = "test"

        def start(self, turn: int) -> None:
            order.append(self.name)

        def seconds(self) -> float:
            return 1.0

    times = interleaved([Named("a"), Named("b"), Named("c")], rounds=3, warm_up=0)
    assert "".join(order) == "abcbcacab" and np.array_equal(times, np.ones((3, 3)))


class FakeCuda:
    """What `GpuEvents` asks of torch.cuda, with the state that a broken capture leaves behind.

    The order of events is that of torch.cuda.graph and ATen/cuda/CUDAGraph.cpp: a capture that was broken raises at its
    end, before the allocator and the random generator stop capturing and before the stream is left; and a pool whose
    graphs are all gone is still known, and refused. A millisecond passes at every step, a quarter in a replay.
    """

    def __init__(self) -> None:
        self.clock, self.replays, self.captures, self.sync_mode = 0.0, 0, 0, 0
        self.stream_now, self.generator_captures, self.broken = "default", False, False
        self.recording: set[object] = set()
        self.uses: dict[object, int] = {}
        self.Stream = lambda name="side": SimpleNamespace(name=name, wait_stream=lambda other: None)
        self.graph_pool_handle = object

    def current_stream(self) -> Any:
        return self.Stream(self.stream_now)

    def set_stream(self, stream: Any) -> None:
        self.stream_now = stream.name

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.stream_now = self.stream_now, stream.name
        try:
            yield
        finally:
            self.stream_now = before

    def synchronize(self) -> None:
        pass

    def get_sync_debug_mode(self) -> int:
        return self.sync_mode

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.sync_mode = mode if isinstance(mode, int) else ("default", "warn", "error").index(mode)

    def CUDAGraph(self) -> FakeGraph:
        return FakeGraph(self)

    @staticmethod
    def graph(graph: FakeGraph, pool: object = None) -> FakeCapture:
        return FakeCapture(graph, pool or object())

    def step(self) -> None:
        self.clock += 1.0

    def waiting_step(self) -> None:
        """As a copy of a Python list to the device."""
        self.step()
        if self.sync_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.breaking_step()

    def breaking_step(self) -> None:
        """Nothing that the debug mode knows of."""
        self.step()
        if self.stream_now == "capture":
            self.broken = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        at = SimpleNamespace(time=0.0, synchronize=lambda: None)
        at.record = lambda: setattr(at, "time", self.clock)
        at.elapsed_time = lambda other: other.time - at.time
        return at


@dataclasses.dataclass
class FakeGraph:
    cuda: FakeCuda
    pool: object = None

    def replay(self) -> None:
        self.cuda.replays += 1
        self.cuda.clock += 0.25 * 3

    def __del__(self) -> None:
        if self.pool is not None:
            self.cuda.uses[self.pool] -= 1


@dataclasses.dataclass
class FakeCapture:
    graph: FakeGraph
    pool: object
    before: str = ""

    def __enter__(self) -> None:
        cuda = self.graph.cuda
        self.before, cuda.stream_now = cuda.stream_now, "capture"
        cuda.generator_captures = True
        if self.pool in cuda.recording or cuda.uses.get(self.pool) == 0:
            raise RuntimeError("INTERNAL ASSERT FAILED: use_count > 0, or already recording")
        cuda.recording.add(self.pool)
        cuda.uses[self.pool] = cuda.uses.get(self.pool, 0) + 1
        cuda.captures, cuda.broken, self.graph.pool = cuda.captures + 1, False, self.pool

    def __exit__(self, *error: object) -> None:
        cuda = self.graph.cuda
        if cuda.broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        cuda.recording.discard(self.pool)
        cuda.generator_captures, cuda.stream_now = False, self.before


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    made = FakeCuda()
    monkeypatch.setattr(timing.torch, "cuda", made)
    return made


GPU = torch.device("cuda")


def test_timer_of_a_gpu(fake: FakeCuda) -> None:
    """A turn goes over all the buffers by replay; the time is that of one step."""
    measured = timing.timer(GPU, [fake.step] * 3)
    assert measured.how == "cuda graph" and fake.captures == 1
    assert interleaved([measured], rounds=2, warm_up=1) == pytest.approx(0.25e-3)
    assert fake.replays == 1 + 3


def test_what_waits_for_the_device_is_never_captured(fake: FakeCuda) -> None:
    """And takes no later graph along."""
    fake.sync_mode = 1
    waiting = timing.timer(GPU, [fake.waiting_step] * 3)
    assert waiting.how == "events (no CUDA graph: RuntimeError: called a synchronizing CUDA operation)"
    assert (fake.captures, fake.sync_mode, fake.stream_now) == (0, 1, "default")
    assert interleaved([waiting], rounds=2, warm_up=1) == pytest.approx(2e-3)
    assert not fake.generator_captures and not fake.recording
    assert timing.timer(GPU, [fake.step] * 3).how == "cuda graph"


def test_a_capture_that_breaks_leaves_the_stream(fake: FakeCuda) -> None:
    broken = timing.timer(GPU, [fake.breaking_step] * 3)
    assert broken.how.startswith("events (no CUDA graph: RuntimeError: operation failed")
    assert (fake.captures, fake.sync_mode, fake.stream_now) == (1, 0, "default")
    assert interleaved([broken], rounds=2, warm_up=1) == pytest.approx(1e-3)


def test_graphs_of_one_case_after_another(fake: FakeCuda) -> None:
    """When a case's graphs are gone the next case's can still be captured; they go without the garbage collector."""
    gc.disable()
    try:
        for _ in range(3):
            timers = [timing.timer(GPU, [fake.step] * 3) for _ in range(2)]
            assert [each.how for each in timers] == ["cuda graph"] * 2
            assert sum(fake.uses.values()) == 2
            del timers
            assert sum(fake.uses.values()) == 0
    finally:
        gc.enable()


def test_a_ratio_is_of_one_clock(fake: FakeCuda) -> None:
    """Events are held against the frozen layer by events; where that has no graph, a graph has no ratio."""

    def measured(**steps: Any) -> dict[str, dict[str, Any]]:
        heads: dict[str, dict[str, Any]] = {
            name: {"operation": "lora_linear", "label": name, "peer": name, "status": "ok", "floor": 1.0, "flops": 1}
            | Case(9, 24, 40, 4, 0.0, "float32").as_dict()
            for name in steps
        }
        run._time(heads, {name: timing.timer(GPU, [step] * 3) for name, step in steps.items()}, 2)
        return heads

    rows = measured(frozen=fake.step, ours=fake.step, peft=fake.waiting_step)
    assert [row["ratio"][1] for row in rows.values()] == pytest.approx([1, 1, 2])
    assert [row["frozen_seconds"][1] for row in rows.values()] == pytest.approx([0.25e-3, 0.25e-3, 1e-3])
    assert ["(events)" in run.line_of(row) for row in rows.values()] == [False, False, True]
    rows = measured(frozen=fake.waiting_step, ours=fake.step, peft=fake.waiting_step)
    assert ["ratio" in row for row in rows.values()] == [True, False, True]
    assert "share_of_floor" not in rows["ours"] and "no ratio" in run.line_of(rows["ours"])
