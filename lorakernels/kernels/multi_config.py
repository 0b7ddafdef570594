"""Which KernelConfig a multi-adapter launch takes. BLOCK_M is the form: 1, a program a token; else a tile's height.

The tokens of a tile share an adapter, and how many do is not known when a launch is made: only how many tokens and
slots there are.
"""

from __future__ import annotations

import dataclasses

import torch

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.heuristic import Batch
from lorakernels.configs.table import choose
from lorakernels.plan_layout import TILE_HEIGHTS


def choose_multi(
    operation: str,
    x: torch.Tensor,
    num_slots: int,
    cols: int,
    max_rank: int,
    slices: int = 1,
    *,
    tiles: bool = False,
) -> KernelConfig:
    """The config of `operation` for the tokens of x [T, ...], of up to `num_slots` adapters.

    `cols` is the longest summed (multi_shrink) or produced (multi_expand, multi_outer) dimension. With `tiles` the form
    of one token will not do.
    """
    batch = Batch(num_slots, slices, tiles)
    config = choose(operation, x.shape[0], cols, cols, max_rank, x.element_size(), x.device, batch=batch)
    # Only a forced one can have the other form.
    return dataclasses.replace(config, BLOCK_M=TILE_HEIGHTS[0]) if tiles and config.BLOCK_M == 1 else config
