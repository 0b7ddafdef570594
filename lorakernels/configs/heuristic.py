"""Which KernelConfig a launch takes where nothing was measured: by shape, dtype and architecture."""

from __future__ import annotations

from typing import NamedTuple

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.data_sheet import speed_of

OPERATIONS = ("shrink", "linear_expand", "few_tokens", "outer")
MULTI_OPERATIONS = ("multi_shrink", "multi_expand", "multi_outer")
# BLOCK_M of multi_shrink and multi_expand: a program a token, or one of the heights of a plan's tiles.
TOKEN_FORM, *TILE_FORMS = FORMS = (1, 16, 64)
# Up to this many tokens most adapters of a batch have one token, and a tile would be one row in sixteen.
_MOST_TOKENS = 64
# From this many tokens a slot on, tiles of 64 rows are mostly full.
_FULL_TILES = 32
# Enough programs to fill an H100 or H200 (132 multiprocessors) about once; and of small ones, which take one tile each.
_PROGRAMS, _SMALL_PROGRAMS = 128, 1024
# What x Aᵀ of few tokens takes: two launches, the second adds planes, and 1 µs between them.
_FORKED_SECONDS = 4e-6
# Hopper and Blackwell copy tiles by TMA; elsewhere descriptors become plain loads.
TMA_ARCHS = ("sm_90", "sm_100")


class Batch(NamedTuple):
    """What a launch for many adapters has besides its sizes; the plan's contents are not known to the host."""

    slots: int
    slices: int = 1
    tiles: bool = False  # a program a token will not do: dropout, or slices that are summed


def heuristic(
    operation: str, M: int, N: int, K: int, r: int, itemsize: int, arch: str, tma: bool, batch: Batch | None = None
) -> KernelConfig:
    """The config of `operation` for M tokens, N output and K summed features and rank r; `batch` is for multi_…."""
    # What reads tall matrices keeps three tiles on their way while it multiplies a fourth: with two stages 128 programs
    # of 8 KiB have 1 MB in flight, where 4.8 TB/s at 500 ns ask for 2.4. AMD's compiler keeps tiles in registers.
    fed = 4 if arch.startswith("sm_") else 2
    if batch is not None:
        return _multi(operation, M, K, r, itemsize, batch, fed, arch in TMA_ARCHS)
    M = next_power_of_two(M)
    # Sixteen-bit tiles are sized for the matrix units. Exact float32 products are made element by element from
    # registers, and rows that start at odd addresses are loaded so: both take smaller tiles, or they spill.
    wide = itemsize <= 2
    easy = wide and N % 8 == 0 and K % 8 == 0
    block_r = min(max(next_power_of_two(r), 16), 64 if wide else 32)
    if operation == "shrink":
        blocks = cdiv(M, 64) * cdiv(r, block_r)
        block_k = 64 if wide else 32
        split = _split(blocks, cdiv(K, block_k))
        return KernelConfig(BLOCK_M=64, BLOCK_K=block_k, BLOCK_R=block_r, SPLIT=split, num_warps=8, num_stages=fed)
    if operation == "linear_expand":
        if K == 0:  # what is multiplied already: a pass over y, of as many programs as fill the device
            # Of 64 ranks four warps spill 8 bytes on sm_100 by triton 3.6.
            return KernelConfig(min(max(M, 16), 64), 32, BLOCK_R=block_r, num_warps=8 if block_r == 64 else 4)
        if tma and wide and arch in TMA_ARCHS:
            # The largest tile whose accumulator, pipeline and epilogues fit: 256 columns spill on sm_100, where the
            # accumulator comes out of tensor memory. Stored in halves they leave 14,000 registers and 50 KiB of sm_90's
            # multiprocessor to a pass over x or dy beside it.
            large = arch == "sm_90" and M * N >= _PROGRAMS * 128 * 256
            block_n, stages = (256, 3) if large else (128, 4)
            return KernelConfig(
                128, block_n, 64, 16, num_warps=8, num_stages=stages, tma=True, late=True, halves=True, dependent=True
            )
        block_r = 16
        if easy and M > 64:
            # On sm_80, with blocks of 32, two programs fit a multiprocessor if DoRA's epilogue spills 32 bytes, and the
            # compiler takes the bargain; with 64 one fits, and nothing spills.
            block_k = 64 if arch == "sm_80" else 32
            return KernelConfig(128, 128, block_k, block_r, num_warps=8, num_stages=3)
        if wide:
            return KernelConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, BLOCK_R=block_r, num_warps=8)
        # On sm_100 float32 tiles of 32 spill 8 bytes, with 4 warps by triton 3.9, with 8 by 3.6.
        return KernelConfig(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16 if arch == "sm_100" else 32, BLOCK_R=block_r)
    if operation == "few_tokens":
        block_m = min(max(M, 16), 64 if easy else 32)
        block_n = 64 if wide else 32
        block_k = 64 if easy else 32 if wide else 16
        split = _split(cdiv(M, block_m) * cdiv(N, block_n), cdiv(K, block_k))
        warps = 8 if block_m == 64 or not wide else 4
        # With four stages a config of float32 spills 16 bytes on sm_90.
        stages = fed if wide else 2
        # In a CUDA graph: the library's product, x Aᵀ beside it, and a launch more that adds S Bᵀ, where the one kernel
        # takes two more for the planes of its sum. By `bench/simulate.py` that is 1.26 of the frozen layer for 1.49 (64
        # tokens, 4096 → 4096, H200); with no planes (4096 → 14336) it would be 1.08 for 1.01. And where x Aᵀ is hidden.
        forks = split > 1 and N * K * itemsize >= _FORKED_SECONDS * speed_of(arch).bandwidth
        return KernelConfig(
            block_m, block_n, block_k, block_r, SPLIT=split, num_warps=warps, num_stages=stages, side_stream=forks
        )
    if operation == "outer":
        block_m = 64 if easy else 32
        # A pass of many tokens runs beside dx, small enough for what that leaves of a multiprocessor. By itself it is
        # wide enough that one pass over dy pays, see `takes_one_pass`.
        beside = easy and arch in TMA_ARCHS and M * N >= _PROGRAMS * 128 * 256
        block_n = (128 if easy and block_r == 16 and not beside else 64) if wide else 32
        split = _split(cdiv(N, block_n) * cdiv(r, block_r), cdiv(M, 64))
        # On sm_80 a fourth stage spills 24 bytes, and three feed its 2 TB/s.
        warps, stages = 8 if wide else 4, 3 if arch == "sm_80" or (beside and block_r == 64) else fed
        return KernelConfig(
            block_m, block_n, BLOCK_R=block_r, SPLIT=split, num_warps=warps, num_stages=stages, side_stream=beside
        )
    raise ValueError(f"there is no operation {operation!r}; operations: {', '.join(OPERATIONS)}")


def _multi(
    operation: str, T: int, cols: int, max_rank: int, itemsize: int, batch: Batch, fed: int, dependent: bool
) -> KernelConfig:
    """Of T tokens; `cols` is the longest summed (multi_shrink) or produced (the others) dimension of the slices."""
    wide = itemsize <= 2
    easy = wide and cols % 8 == 0
    block_r = min(max(next_power_of_two(max_rank), 16), 64 if wide else 32)
    height = max(_form(T, batch.slots), TILE_FORMS[0] if batch.tiles else TOKEN_FORM)
    if operation == "multi_shrink":
        block_k, warps = (256 if height == 1 else 128) if easy else 64 if height == 1 else 32, 4
        if height == 64:
            # Rows at odd addresses are loaded element by element: 64 of them by 4 warps spill 632 bytes on sm_90.
            block_k, warps = (64, 4) if easy else (32, 8 if wide else 4)
        # A program a token has each lane load x as its rows of A lie: of more than 16 rows that spills.
        block_r = 16 if height == 1 else block_r
        blocks = max(1, T if height == 1 else T // height) * batch.slices
        split = _split(blocks, cdiv(cols, block_k), _SMALL_PROGRAMS if height == 1 else _PROGRAMS)
        # Of 64 tokens and ranks four stages spill 8 bytes on sm_100 by triton 3.6.
        stages = 2 if height == 1 or height == block_r == 64 else fed
        return KernelConfig(height, BLOCK_K=block_k, BLOCK_R=block_r, SPLIT=split, num_warps=warps, num_stages=stages)
    if operation == "multi_expand":
        # Columns that start at odd addresses are loaded element by element, and 128 of them spill.
        block_n = 128 if height == 1 or easy else 64 if wide else 32
        # Nor do 32 rank rows of float32 fit: 8 bytes on sm_80, and by triton 3.6 on sm_100.
        block_r = block_r if wide and height > 1 else 16
        return KernelConfig(height, block_n, BLOCK_R=block_r, dependent=dependent and height == 1)
    if operation == "multi_outer":
        block_n = 64 if wide else 32
        blocks = cdiv(cols, block_n) * cdiv(max_rank, block_r) * min(batch.slots, max(T, 1)) * batch.slices
        split = min(_split(blocks, cdiv(T, 128)), 8)
        # Four warps spill 8 bytes on sm_80.
        return KernelConfig(64 if wide else 32, block_n, BLOCK_R=block_r, SPLIT=split, num_warps=8 if wide else 4)
    raise ValueError(f"there is no operation {operation!r}; operations: {', '.join(MULTI_OPERATIONS)}")


def _form(T: int, slots: int) -> int:
    if _MOST_TOKENS >= T <= 2 * slots:
        return TOKEN_FORM
    return TILE_FORMS[1] if _FULL_TILES * slots <= T else TILE_FORMS[0]


def _split(blocks: int, most: int, programs: int = _PROGRAMS) -> int:
    """Programs that share one sum: as many as fill the device, at most one a tile and 16."""
    return max(1, min(programs // max(blocks, 1), most, 16))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
