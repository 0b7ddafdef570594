"""What there is to tune: the launches that layers of given shapes make."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch

from lorakernels.configs.heuristic import MULTI_OPERATIONS, Batch
from lorakernels.configs.table import takes_few_tokens_form
from lorakernels.configs.table_file import Key, key_of


class Problem(NamedTuple):
    """One launch to find a config for, with the sizes that the kernel's launcher gives to `choose`."""

    operation: str
    M: int
    N: int
    K: int
    r: int
    dtype: torch.dtype
    dropout: float
    slots: int = 1  # of multi_…, whose N and K are one number

    @property
    def batch(self) -> Batch | None:
        """What else a launch for many adapters gives to `choose`."""
        if self.operation not in MULTI_OPERATIONS:
            return None
        return Batch(self.slots, tiles=self.dropout > 0 and self.operation != "multi_outer")

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def key(self) -> Key:
        return key_of(self.operation, self.N, self.K, self.r, self.itemsize)

    @property
    def tma(self) -> bool:
        """Whether contiguous operands fit tensor descriptors: rows of multiples of 16 bytes."""
        return self.N * self.itemsize % 16 == 0 and self.K * self.itemsize % 16 == 0

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        dropout = f" dropout={self.dropout:g}" if self.dropout else ""
        slots = "" if self.slots == 1 else f" slots={self.slots}"
        return f"{self.operation} M={self.M} N={self.N} K={self.K} r={self.r}{slots} {dtype}{dropout}"


def problems_of(
    shapes: Iterable[tuple[int, int, int, int, torch.dtype, float]], slots: int | None = None
) -> list[Problem]:
    """The launches of forward and backward over layers (M, N, K, r, dtype, dropout): N outputs, K inputs, M tokens.

    Each once: the table knows no dropout and no direction. Of shapes that differ in dropout only, or in bfloat16 or
    float16, the first counts. With `slots` they are the launches for so many adapters in a batch of M tokens.

    Raises:
        ValueError: a size, dtype or probability cannot be.
    """
    if slots is not None and slots < 1:
        raise ValueError(f"slots is {slots}; expected at least 1 adapter")
    problems: dict[tuple[Key, int], Problem] = {}
    for M, N, K, r, dtype, dropout in shapes:
        _check(M, N, K, r, dtype, dropout)
        if slots is not None:
            for operation, width in itertools.product(MULTI_OPERATIONS, (K, N)):
                problem = Problem(operation, M, width, width, r, dtype, dropout, slots)
                problems.setdefault((problem.key, M), problem)
            continue
        few = takes_few_tokens_form(M, r, dtype.itemsize)
        whole = [("few_tokens" if few else "linear_expand", *sizes) for sizes in ((N, K), (K, N))]
        # x is read for S and dA, dy for G and dB.
        passes = [(name, width, width) for name in (("outer",) if few else ("shrink", "outer")) for width in (K, N)]
        for operation, n, k in (*passes, *whole):
            problem = Problem(operation, M, n, k, r, dtype, dropout)
            problems.setdefault((problem.key, M), problem)
    return list(problems.values())


def _check(M: int, N: int, K: int, r: int, dtype: torch.dtype, dropout: float) -> None:
    if min(M, N, K, r) < 1:
        raise ValueError(f"shape M={M} N={N} K={K} r={r}; expected numbers of at least 1")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}; the kernels take float32, float16 and bfloat16")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}; expected a probability in [0, 1)")
