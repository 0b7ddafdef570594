"""Which KernelConfig a launch takes where nothing was measured: by shape, dtype and architecture."""

from __future__ import annotations

from lorakernels.tuning.config import KernelConfig

OPERATIONS = ("shrink", "linear_expand", "few_tokens", "outer")
# Enough programs to fill an H100 or H200 (132 multiprocessors) about once.
_PROGRAMS = 128
# Hopper and Blackwell copy tiles by TMA; elsewhere descriptors become plain loads.
TMA_ARCHS = ("sm_90", "sm_100")


def heuristic(operation: str, M: int, N: int, K: int, r: int, itemsize: int, arch: str, tma: bool) -> KernelConfig:
    """The config of `operation` for M tokens, N output and K summed features and rank r."""
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
        return KernelConfig(BLOCK_M=64, BLOCK_K=block_k, BLOCK_R=block_r, SPLIT=split, num_warps=8)
    if operation == "linear_expand":
        if tma and wide and arch in TMA_ARCHS:
            # The largest tile whose accumulator, pipeline and epilogues fit: 200 to 255 registers and 213 KiB on sm_90;
            # on sm_100, where the accumulator comes out of tensor memory, it spills.
            block_n = 256 if arch == "sm_90" and M * N >= _PROGRAMS * 128 * 256 else 128
            return KernelConfig(128, block_n, 64, 16, num_warps=8, num_stages=3 if block_n == 256 else 4, tma=True)
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
        return KernelConfig(block_m, block_n, block_k, block_r, SPLIT=split, num_warps=warps)
    if operation == "outer":
        block_m = 64 if easy else 32
        # Wide enough that one pass over dy pays, see `takes_one_pass`.
        block_n = (128 if easy and block_r == 16 else 64) if wide else 32
        split = _split(cdiv(N, block_n) * cdiv(r, block_r), cdiv(M, 64))
        return KernelConfig(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=block_r, SPLIT=split, num_warps=8 if wide else 4)
    raise ValueError(f"there is no operation {operation!r}; operations: {', '.join(OPERATIONS)}")


def _split(blocks: int, most: int) -> int:
    """Programs that share one sum: as many as fill the device, at most one a tile and 16."""
    return max(1, min(_PROGRAMS // max(blocks, 1), most, 16))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
