"""How the multi-adapter kernels find an adapter: by the plan's buffer, and by rows of rank in a stack or in pages."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lorakernels.kernels.tiles import Matrix
from lorakernels.plan import PlanTensors
from lorakernels.plan_layout import TILE_HEIGHTS


class Factor(NamedTuple):
    """lora_A or lora_B of all slots, as rows of rank: element (slot, rank, col) by strides. Pages have no slot."""

    ptr: Any
    cols: int
    strides: tuple[int, ...]  # of slot, rank and col


def factor_A(lora_A: torch.Tensor) -> Factor:
    """[S, R, K], or pages [pages, K]."""
    if lora_A.dim() == 2:
        return Factor(lora_A, lora_A.shape[1], (0, *lora_A.stride()))
    return Factor(lora_A, lora_A.shape[2], lora_A.stride())


def factor_B(lora_B: torch.Tensor) -> Factor:
    """[S, N, R], or pages [pages, N]."""
    if lora_B.dim() == 2:
        return Factor(lora_B, lora_B.shape[1], (0, *lora_B.stride()))
    stride_slot, stride_col, stride_rank = lora_B.stride()
    return Factor(lora_B, lora_B.shape[1], (stride_slot, stride_rank, stride_col))


class Routes(NamedTuple):
    """A plan as it goes into a kernel: its buffer, where in it the parts begin, and its table of pages, if any."""

    buffer: Any
    at: Any  # a PlanLayout
    tiles: int  # where the tiles of this launch's height begin
    page_table: Any  # [slots + 1, R], or None


def routes(plan: PlanTensors, height: int) -> Routes:
    """For tiles of this height; for height 1 token by token."""
    layout = plan.layout
    return Routes(plan.buffer, layout, layout.tiles[TILE_HEIGHTS.index(height)] if height > 1 else 0, plan.page_table)


@triton.jit
def adapter_of_token(routes, token, R):
    """Slot of a token and that slot's rank, in loads that do not wait for each other."""
    rank = tl.load(routes.buffer + routes.at.token_ranks + token)
    return tl.load(routes.buffer + routes.at.slots + token), tl.minimum(rank, R)  # a shard of adapters has fewer rows


@triton.jit
def tile_of_tokens(routes, tile):
    """Slot of a tile of tokens, the tile's first place in the order of tokens and its end."""
    tile_ptr = routes.buffer + routes.tiles + tile * 3
    return tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)


@triton.jit
def tokens_from(routes, first, end, T, BLOCK_M: tl.constexpr):
    """The tokens of a slot from one place to another in their order; T, which is none, past the end."""
    places = first + tl.arange(0, BLOCK_M)
    return tl.load(routes.buffer + routes.at.order + places, mask=places < end, other=T)


@triton.jit
def pick_slice(which, matrices, factors, T, NUM: tl.constexpr):
    """Matrix and factor of the slice `which`, known only when the program runs."""
    m, f = matrices[0], factors[0]
    ptr, cols, row, col = m.ptr, m.cols, m.strides[0], m.strides[1]
    factor, by_slot, by_rank, by_col = f.ptr, f.strides[0], f.strides[1], f.strides[2]
    for i in tl.static_range(1, NUM):
        here = which == i
        ptr = tl.where(here, matrices[i].ptr, ptr)
        cols = tl.where(here, matrices[i].cols, cols)
        row = tl.where(here, matrices[i].strides[0], row)
        col = tl.where(here, matrices[i].strides[1], col)
        factor = tl.where(here, factors[i].ptr, factor)
        by_slot = tl.where(here, factors[i].strides[0], by_slot)
        by_rank = tl.where(here, factors[i].strides[1], by_rank)
        by_col = tl.where(here, factors[i].strides[2], by_col)
    return Matrix(ptr, T, cols, (row, col)), Factor(factor, cols, (by_slot, by_rank, by_col))


@triton.jit
def rank_offsets(routes, factor, slot, offs_r, R):
    """Where the rank rows `offs_r` of a slot begin, in elements, 64-bit. What is past its rank must not be used."""
    if routes.page_table is not None:
        page = tl.load(routes.page_table + slot.to(tl.int64) * R + offs_r, mask=offs_r < R, other=0)
        return page.to(tl.int64) * factor.strides[1]
    return slot.to(tl.int64) * factor.strides[0] + offs_r.to(tl.int64) * factor.strides[1]


@triton.jit
def rank_mask(routes, offs_r, rank, R):
    """Which rank rows are loaded. What is past the rank must be put aside afterwards, with `offs_r < rank`.

    Of a stack up to a multiple of 8, for loads of 16 bytes where its rank is the contiguous dimension.
    """
    if routes.page_table is not None:
        return offs_r < rank
    return (offs_r < (rank + 7) // 8 * 8) & (offs_r < R)
