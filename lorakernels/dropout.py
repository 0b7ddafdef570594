"""Dropout's numbers, shared by both implementations.

A random 16-bit number an element decides: it is dropped where the number is below the threshold.
So p is rounded to a 65536th (0.1 becomes 0.100006), and the kept elements are scaled by the exact
inverse of the rounded probability, which keeps dropout unbiased. Sixteen bits instead of 32 halve
the random numbers to be made, which is what limits a pass over x on a GPU.
"""

from __future__ import annotations

LEVELS = 1 << 16


def drop_threshold(dropout_p: float) -> int:
    """How many of the 65536 levels are dropped."""
    return min(round(dropout_p * LEVELS), LEVELS - 1)


def inverse_keep(threshold: int) -> float:
    """1 / (1 - p) for the p that a threshold stands for."""
    return LEVELS / (LEVELS - threshold)
