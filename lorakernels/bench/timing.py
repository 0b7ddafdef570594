"""Times of several functions taken in turns, so that a slow spell of the machine hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch


class Timer(Protocol):
    """Runs a step once and says how long it took."""

    how: str

    def start(self, turn: int) -> None: ...

    def seconds(self) -> float:
        """Of the latest start. May wait for the device."""


@dataclass
class WallClock:
    """On the CPU: one step a turn, on the next of the rotated buffers."""

    steps: Sequence[Callable[[], object]]
    how: str = "perf_counter"
    _seconds: float = 0.0

    def start(self, turn: int) -> None:
        step = self.steps[turn % len(self.steps)]
        before = time.perf_counter()
        step()
        self._seconds = time.perf_counter() - before

    def seconds(self) -> float:
        return self._seconds


class GpuEvents:
    """On a GPU: a turn goes over every buffer, as one CUDA graph where the step can be captured."""

    def __init__(self, steps: Sequence[Callable[[], object]]) -> None:
        self.steps = steps
        self.how = "events"
        self._replay: Callable[[], object] = self._all
        self._before, self._after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            self._capture()
            self.how = "cuda graph"
        except Exception as error:
            torch.cuda.synchronize()
            self.how = f"events (no CUDA graph: {type(error).__name__})"

    def _all(self) -> None:
        for step in self.steps:
            step()

    def _capture(self) -> None:
        # Captured work must have run before, on another stream than the default.
        side: Any = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._all()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_graph_memory()):
            self._all()
        graph.replay()
        torch.cuda.synchronize()
        self._replay = graph.replay

    def start(self, turn: int) -> None:
        self._before.record()
        self._replay()
        self._after.record()

    def seconds(self) -> float:
        self._after.synchronize()
        return self._before.elapsed_time(self._after) / 1e3 / len(self.steps)


@lru_cache(maxsize=1)
def _graph_memory() -> Any:
    """One pool for all graphs: no replay leaves anything that is read later, and they never overlap."""
    return torch.cuda.graph_pool_handle()


def timer(device: torch.device, steps: Sequence[Callable[[], object]]) -> Timer:
    return GpuEvents(steps) if device.type == "cuda" else WallClock(steps)


def interleaved(timers: Sequence[Timer], rounds: int, warm_up: int = 3) -> np.ndarray:
    """[timers, rounds] seconds, after `warm_up` rounds that do not count. Each round starts with another timer."""
    times = np.empty((len(timers), rounds))
    for turn in range(-warm_up, rounds):
        order = [(i + turn) % len(timers) for i in range(len(timers))]
        for i in order:
            timers[i].start(turn + warm_up)
        for i in order if turn >= 0 else ():
            times[i, turn] = timers[i].seconds()
    return times


def interleaved_seconds(functions: Sequence[Callable[[], object]], rounds: int, warm_up: int = 5) -> np.ndarray:
    """[functions, rounds] seconds on the CPU's clock."""
    return interleaved([WallClock([function]) for function in functions], rounds, warm_up)


def p20_50_80(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values, [20, 50, 80])]


def percentiles(ratios: np.ndarray) -> str:
    low, middle, high = p20_50_80(ratios)
    return f"{middle:.3f} ({low:.3f} … {high:.3f})"
