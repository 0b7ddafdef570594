"""Which KernelConfig a launch takes: what a caller forces, else a heuristic by shape and dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import torch

from lorakernels.tuning.config import KernelConfig
from lorakernels.tuning.device import device_of

# The few-token form reads A once for every block of output columns, so it stops paying when
# a block of columns is no longer much wider than the rank.
FEW_TOKENS = 256
FEW_TOKENS_MAX_RANK = 64
# Enough programs to fill an H100 or H200 (132 multiprocessors) about once.
_PROGRAMS = 128
# Hopper and Blackwell copy tiles by TMA; elsewhere descriptors become plain loads.
_TMA_ARCHS = ("sm_90", "sm_100")

_forced: Mapping[str, KernelConfig] | None = None


def takes_few_tokens_form(M: int, r: int, itemsize: int) -> bool:
    """Whether the layer is one kernel, which makes x Aᵀ again for each block of output columns."""
    return M <= FEW_TOKENS and r <= (FEW_TOKENS_MAX_RANK if itemsize <= 2 else FEW_TOKENS_MAX_RANK // 2)


def takes_one_pass(N: int, r: int, itemsize: int, block_n: int) -> bool:
    """Whether one read of dy for G and dB costs less than two.

    In one, each block of columns writes a float32 plane of G that is read again: 8 r / block_n bytes an element of
    dy, where reading it a second time takes `itemsize`.
    """
    return block_n >= N or 8 * r < itemsize * block_n


def choose(
    operation: str, M: int, N: int, K: int, r: int, itemsize: int, device: torch.device, tma: bool = False
) -> KernelConfig:
    """The config of `operation` for M tokens, N output and K summed features and rank r.

    `itemsize` is that of x in bytes: float32 products run without tensor cores unless TF32 is
    allowed, and take smaller tiles. `tma` says that the operands fit tensor descriptors.
    """
    if _forced is not None and operation in _forced:
        return _forced[operation]
    return _heuristic(operation, _next_power_of_two(M), N, K, r, itemsize, device_of(device).arch, tma)


@contextmanager
def forced_configs(configs: Mapping[str, KernelConfig]) -> Iterator[None]:
    """Use these configs, by operation, inside the block: for tests and the tuner."""
    global _forced
    outer, _forced = _forced, configs
    try:
        yield
    finally:
        _forced = outer


@lru_cache(maxsize=4096)
def _heuristic(operation: str, M: int, N: int, K: int, r: int, itemsize: int, arch: str, tma: bool) -> KernelConfig:
    # Sixteen-bit tiles are sized for the matrix units. Exact float32 products are made element by element from
    # registers, and rows that start at odd addresses are loaded so: both take smaller tiles, or they spill.
    wide = itemsize <= 2
    easy = wide and N % 8 == 0 and K % 8 == 0
    block_r = min(max(_next_power_of_two(r), 16), 64 if wide else 32)
    if operation == "shrink":
        blocks = _cdiv(M, 64) * _cdiv(r, block_r)
        block_k = 64 if wide else 32
        split = _split(blocks, _cdiv(K, block_k))
        return KernelConfig(BLOCK_M=64, BLOCK_K=block_k, BLOCK_R=block_r, SPLIT=split, num_warps=8)
    if operation == "linear_expand":
        if tma and wide and arch in _TMA_ARCHS:
            # The largest tile whose accumulator, pipeline and epilogues fit: 200 to 255 registers and 213 KiB on sm_90;
            # on sm_100, where the accumulator comes out of tensor memory, it spills.
            block_n = 256 if arch == "sm_90" and M * N >= _PROGRAMS * 128 * 256 else 128
            return KernelConfig(128, block_n, 64, 16, num_warps=8, num_stages=3 if block_n == 256 else 4, tma=True)
        block_r = 16
        if easy and M > 64:
            return KernelConfig(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, BLOCK_R=block_r, num_warps=8, num_stages=3)
        return KernelConfig(
            BLOCK_M=64, BLOCK_N=64 if wide else 32, BLOCK_K=32, BLOCK_R=block_r, num_warps=8 if wide else 4
        )
    if operation == "few_tokens":
        block_m = min(max(M, 16), 64 if easy else 32)
        block_n = 64 if wide else 32
        block_k = 64 if easy else 32 if wide else 16
        split = _split(_cdiv(M, block_m) * _cdiv(N, block_n), _cdiv(K, block_k))
        warps = 8 if block_m == 64 or not wide else 4
        return KernelConfig(block_m, block_n, block_k, block_r, SPLIT=split, num_warps=warps)
    if operation == "outer":
        block_m = 64 if easy else 32
        # Wide enough that one pass over dy pays, see `takes_one_pass`.
        block_n = (128 if easy and block_r == 16 else 64) if wide else 32
        split = _split(_cdiv(N, block_n) * _cdiv(r, block_r), _cdiv(M, 64))
        return KernelConfig(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=block_r, SPLIT=split, num_warps=8 if wide else 4)
    raise ValueError(f"there is no operation {operation!r}; operations: shrink, linear_expand, few_tokens, outer")


def _split(blocks: int, most: int) -> int:
    """Programs that share one sum: as many as fill the device, at most one a tile and 16."""
    return max(1, min(_PROGRAMS // max(blocks, 1), most, 16))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
