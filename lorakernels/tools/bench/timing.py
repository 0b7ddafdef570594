"""Times of several functions taken in turns, so that a slow spell of the machine hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

EVENTS = "events"


class WallClock:
    """On the CPU: one step a turn, on the next of the rotated buffers."""

    def __init__(self, steps: Sequence[Callable[[], object]]) -> None:
        self.steps, self.how, self._seconds = steps, "perf_counter", 0.0

    def start(self, turn: int) -> None:
        step = self.steps[turn % len(self.steps)]
        before = time.perf_counter()
        step()
        self._seconds = time.perf_counter() - before

    def seconds(self) -> float:
        """Of the latest start."""
        return self._seconds


class GpuEvents:
    """On a GPU: a turn goes over every buffer, as one CUDA graph where the step can be captured."""

    def __init__(self, steps: Sequence[Callable[[], object]], capture: bool = True) -> None:
        self.steps, self.how = steps, EVENTS
        self._graph: Any = None
        self._before, self._after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream: Any = torch.cuda.current_stream()
        try:
            if capture:
                self._graph = self._captured()
                self.how = "cuda graph"
        except Exception as error:
            torch.cuda.set_stream(stream)  # torch.cuda.graph does not leave its own where the capture's end raises
            torch.cuda.synchronize()
            self.how = f"{EVENTS} (no CUDA graph: {one_line(error, 120)})"

    def _all(self) -> None:
        for step in self.steps:
            step()

    def _captured(self) -> Any:
        # Captured work must have run before, on another stream than the default.
        side: Any = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._all()
            # A step that waits for the device raises here, where it does no harm: a capture that breaks leaves the
            # allocator and the random generator capturing, for the whole process.
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                self._all()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # In memory of its own: a pool that graphs share may not be captured into again once all of them are gone.
        with torch.cuda.graph(graph):
            self._all()
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def start(self, turn: int) -> None:
        self._before.record()
        (self._all if self._graph is None else self._graph.replay)()
        self._after.record()

    def seconds(self) -> float:
        """Of the latest start, a step. Waits for the device."""
        self._after.synchronize()
        return self._before.elapsed_time(self._after) / 1e3 / len(self.steps)


Timer = WallClock | GpuEvents


def one_line(error: Exception, limit: int = 300) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]


def clock(how: str) -> str:
    """What a timer's `how` measures with, less its reason: only times by the same clock make a ratio."""
    return how.partition(" (")[0]


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


def spread(percentiles: Sequence[float]) -> str:
    low, middle, high = percentiles
    return f"{middle:.3f} ({low:.3f} … {high:.3f})"
