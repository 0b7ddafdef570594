"""Which KernelConfig a multi-adapter launch takes. BLOCK_M is the form: 1, a program a token; else a tile's height.

The tokens of a tile share an adapter, and how many do is not known when a launch is made: only how many tokens and
slots there are.
"""

from __future__ import annotations

import dataclasses

import torch

from lorakernels.plan import TILE_HEIGHTS
from lorakernels.tuning import table
from lorakernels.tuning.config import KernelConfig

OPERATIONS = ("multi_shrink", "multi_expand", "multi_outer")
# Up to this many tokens most adapters of a batch have one token, and a tile would be one row in sixteen.
TOKEN_FORM = 64
# From this many tokens a slot on, tiles of 64 rows are mostly full.
_FULL_TILES = 32
_PROGRAMS = 128


def choose_multi(
    operation: str,
    T: int,
    num_slots: int,
    cols: int,
    max_rank: int,
    dtype: torch.dtype,
    slices: int = 1,
    *,
    tiles: bool = False,
) -> KernelConfig:
    """The config of `operation` for T tokens of up to `num_slots` adapters.

    `cols` is the longest summed (multi_shrink) or produced (multi_expand, multi_outer) dimension. With `tiles` the form
    of one token will not do.
    """
    forced = table._forced
    if forced is not None and operation in forced:
        config = forced[operation]
        return dataclasses.replace(config, BLOCK_M=TILE_HEIGHTS[0]) if tiles and config.BLOCK_M == 1 else config
    return heuristic(operation, T, num_slots, cols, max_rank, dtype.itemsize, slices, tiles)


def heuristic(
    operation: str, T: int, num_slots: int, cols: int, max_rank: int, itemsize: int, slices: int, tiles: bool
) -> KernelConfig:
    wide = itemsize <= 2
    block_r = min(max(1 << max(max_rank - 1, 0).bit_length(), 16), 64 if wide else 32)
    height = max(form(T, num_slots), TILE_HEIGHTS[0] if tiles else 1)
    if operation == "multi_shrink":
        block_k = (128 if wide else 64) if height == 1 else 64 if wide and height == 64 else 128 if wide else 32
        blocks = max(1, T if height == 1 else T // height) * slices
        split = max(1, min(_PROGRAMS // blocks, -(-cols // block_k), 16))
        return KernelConfig(height, BLOCK_K=block_k, BLOCK_R=block_r, SPLIT=split, num_warps=4)
    if operation == "multi_expand":
        # Columns that start at odd addresses are loaded element by element, and 128 of them spill.
        block_n = 128 if height == 1 or (wide and cols % 8 == 0) else 64 if wide else 32
        return KernelConfig(height, block_n, BLOCK_R=min(block_r, 16) if height == 1 else block_r, num_warps=4)
    if operation == "multi_outer":
        block_n = 64 if wide else 32
        blocks = -(-cols // block_n) * -(-max_rank // block_r) * min(num_slots, max(T, 1)) * slices
        split = max(1, min(_PROGRAMS // max(blocks, 1), -(-T // 128), 8))
        return KernelConfig(64 if wide else 32, block_n, BLOCK_R=block_r, SPLIT=split, num_warps=4)
    raise ValueError(f"there is no operation {operation!r}; operations: {', '.join(OPERATIONS)}")


def form(T: int, num_slots: int) -> int:
    """The height of a tile, or 1 for the form without tiles."""
    if TOKEN_FORM >= T <= 2 * num_slots:
        return 1
    return TILE_HEIGHTS[1] if T >= _FULL_TILES * num_slots else TILE_HEIGHTS[0]
