"""What there is to tune: the launches that layers of given shapes make."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from lorakernels.backend import TRITON_DTYPES
from lorakernels.configs.config import SMALLEST_BLOCK, KernelConfig
from lorakernels.configs.heuristic import MULTI_OPERATIONS, Batch
from lorakernels.configs.table import Asked, forced_configs, record_choices
from lorakernels.configs.table_file import Key, key_of
from lorakernels.dropout import drop_threshold
from lorakernels.kernels import lora_linear
from lorakernels.kernels.launch import record_launches
from lorakernels.tools.steps import layer_step, multi_step

# M, N, K, r, dtype, dropout; an N that is a tuple has the widths of a group's layers.
Shape = tuple[int, int | tuple[int, ...], int, int, torch.dtype, float]


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


def problems_of(shapes: Iterable[Shape], slots: int | None = None) -> list[Problem]:
    """The launches of forward and backward over layers (M, N, K, r, dtype, dropout): N outputs, K inputs, M tokens.

    They are those that ask for a config when the steps are recorded. Each once: the table knows no dropout and no
    direction. Of shapes that differ in dropout only, or in bfloat16 or float16, the first counts. With `slots` they are
    the launches for so many adapters in a batch of M tokens.

    Raises:
        ValueError: a size, dtype or probability cannot be.
    """
    if slots is not None and slots < 1:
        raise ValueError(f"slots is {slots}; expected at least 1 adapter")
    problems: dict[tuple[Key, int], Problem] = {}
    for M, N, K, r, dtype, dropout in shapes:
        Ns = N if isinstance(N, tuple) else (N,)
        if min(M, *Ns, K, r) < 1:
            raise ValueError(f"shape M={M} N={N} K={K} r={r}; expected numbers of at least 1")
        if dtype not in TRITON_DTYPES:
            raise ValueError(f"dtype is {dtype}; the kernels take float32, float16 and bfloat16")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; expected a probability in [0, 1)")
        for asked in _asked(M, Ns, K, r, dtype, dropout, slots):
            problem = Problem(asked.operation, M, asked.N, asked.K, asked.r, dtype, dropout, slots or 1)
            problems.setdefault((problem.key, M), problem)
    return list(problems.values())


def _asked(
    M: int, Ns: tuple[int, ...], K: int, r: int, dtype: torch.dtype, dropout: float, slots: int | None
) -> list[Asked]:
    threshold = drop_threshold(dropout)
    with record_choices() as asked, record_launches():
        if slots is not None:
            multi_step(dtype, M, slots, r, K, Ns, threshold)
            return asked
        layer_step(lora_linear, dtype, M, K, [(N, r) for N in Ns], threshold)
        # With blocks this small dy is read twice, for G and for dB: which of the two pays is to be found.
        with forced_configs({"outer": KernelConfig(BLOCK_N=SMALLEST_BLOCK)}):
            layer_step(lora_linear, dtype, M, K, [(N, r) for N in Ns], threshold)
    return asked
