"""How a kernel is carried out on a GPU: block sizes, split, warps. Plain data, no Triton."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelConfig:
    """The choices one kernel launch makes. Which of them a kernel reads, its launcher says.

    BLOCK_M, BLOCK_N, BLOCK_K and BLOCK_R tile tokens, output features, input features and rank;
    they are powers of two and at least 16, the smallest operand of a matrix instruction.
    SPLIT is the number of programs that share one sum: each writes a float32 plane, and the
    planes are added in a fixed order, so that a result is bitwise the same on every run.
    With `tma` tiles are copied through tensor descriptors, and PROGRAMS_PER_SM programs a multiprocessor
    take tile after tile; with `cublas` the base product is torch's own and the kernel adds to it;
    with `side_stream` the pass runs beside the products that do not wait for it.
    """

    BLOCK_M: int = 64
    BLOCK_N: int = 64
    BLOCK_K: int = 64
    BLOCK_R: int = 16
    GROUP_M: int = 8
    SPLIT: int = 1
    PROGRAMS_PER_SM: int = 1
    num_warps: int = 4
    num_stages: int = 2
    tma: bool = False
    cublas: bool = False
    side_stream: bool = False
