"""How the multi-adapter kernels find an adapter: by the plan's buffer, and by rows of rank in a stack or in pages."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lorakernels.plan import TILE_HEIGHTS, PlanTensors


@triton.jit
def pick_slice(
    which,
    tensors,
    factors,
    cols,
    strides_row,
    strides_element,
    strides_slot,
    strides_rank,
    strides_col,
    NUM: tl.constexpr,
):
    """Of each tuple the entry `which`, known only when the program runs: a slice's tensors, width and strides."""
    tensor, factor, num_cols = tensors[0], factors[0], cols[0]
    stride_row, stride_element = strides_row[0], strides_element[0]
    stride_slot, stride_rank, stride_col = strides_slot[0], strides_rank[0], strides_col[0]
    for i in tl.static_range(1, NUM):
        here = which == i
        tensor = tl.where(here, tensors[i], tensor)
        factor = tl.where(here, factors[i], factor)
        num_cols = tl.where(here, cols[i], num_cols)
        stride_row = tl.where(here, strides_row[i], stride_row)
        stride_element = tl.where(here, strides_element[i], stride_element)
        stride_slot = tl.where(here, strides_slot[i], stride_slot)
        stride_rank = tl.where(here, strides_rank[i], stride_rank)
        stride_col = tl.where(here, strides_col[i], stride_col)
    return tensor, factor, num_cols, stride_row, stride_element, stride_slot, stride_rank, stride_col


@triton.jit
def rank_offsets(pages_ptr, slot, offs_r, max_rank, stride_slot, stride_rank, PAGED: tl.constexpr):
    """Where the rank rows `offs_r` of a slot begin, in elements, 64-bit. What is past its rank must not be used."""
    if PAGED:
        page = tl.load(pages_ptr + slot.to(tl.int64) * max_rank + offs_r, mask=offs_r < max_rank, other=0)
        return page.to(tl.int64) * stride_rank
    return slot.to(tl.int64) * stride_slot + offs_r.to(tl.int64) * stride_rank


@triton.jit
def rank_mask(offs_r, rank, R, PAGED: tl.constexpr):
    """Which rank rows are loaded. What is past the rank must be put aside afterwards, with `offs_r < rank`.

    Of a stack up to a multiple of 8, for loads of 16 bytes where its rank is the contiguous dimension.
    """
    if PAGED:
        return offs_r < rank
    return (offs_r < (rank + 7) // 8 * 8) & (offs_r < R)


class Factor(NamedTuple):
    """lora_A or lora_B of all slots, as rows of rank: element (slot, rank, col) by strides. Pages have no slot."""

    tensor: torch.Tensor
    cols: int
    stride_slot: int
    stride_rank: int
    stride_col: int


def factor_A(lora_A: torch.Tensor) -> Factor:
    """[S, R, K], or pages [pages, K]."""
    if lora_A.dim() == 2:
        return Factor(lora_A, lora_A.shape[1], 0, *lora_A.stride())
    return Factor(lora_A, lora_A.shape[2], *lora_A.stride())


def factor_B(lora_B: torch.Tensor) -> Factor:
    """[S, N, R], or pages [pages, N]."""
    if lora_B.dim() == 2:
        return Factor(lora_B, lora_B.shape[1], 0, *lora_B.stride())
    stride_slot, stride_col, stride_rank = lora_B.stride()
    return Factor(lora_B, lora_B.shape[1], stride_slot, stride_rank, stride_col)


def factor_args(factors: list[Factor]) -> dict[str, Any]:
    names = ("factors", "cols", "strides_slot", "strides_rank", "strides_col")
    return dict(zip(names, zip(*factors, strict=True), strict=True))


def plan_args(plan: PlanTensors) -> dict[str, Any]:
    return {
        "plan_ptr": plan.buffer,
        "pages_ptr": plan.pages,
        "max_rank": 0 if plan.pages is None else plan.pages.shape[1],
        "ranks_at": plan.layout.ranks,
    }


def route_args(plan: PlanTensors, height: int) -> dict[str, int]:
    """Where a kernel finds its tokens: by tiles of this height, or one by one for height 1."""
    layout = plan.layout
    if height == 1:
        return {"slots_at": layout.slots}
    return {"order_at": layout.order, "tiles_at": layout.tiles[TILE_HEIGHTS.index(height)]}
