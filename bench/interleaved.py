"""Times of several functions taken in turns, so that a slow spell of the machine hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np


def interleaved_seconds(functions: Sequence[Callable[[], object]], rounds: int, warm_up: int = 5) -> np.ndarray:
    """[functions, rounds] seconds, after `warm_up` rounds that do not count."""
    times = [[_seconds(function) for function in functions] for _ in range(warm_up + rounds)]
    return np.array(times[warm_up:]).T


def percentiles(ratios: np.ndarray) -> str:
    low, middle, high = np.percentile(ratios, [20, 50, 80])
    return f"{middle:.3f} ({low:.3f} … {high:.3f})"


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
