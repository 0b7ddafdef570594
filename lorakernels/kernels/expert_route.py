"""Which experts take which tokens, in a plan's layout: the experts are its slots, their sorted rows its tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorakernels.configs.config import KernelConfig
from lorakernels.kernels.launch import cdiv, launch
from lorakernels.plan_layout import TILE_HEIGHTS, num_tiles, plan_layout
from lorakernels.route import TALL, expert_plan_size

_BLOCK = 256
_CONFIG = KernelConfig(num_warps=4)
_ANY_RANK = tl.constexpr(1 << 20)  # over that of every stack, which is what counts


@triton.jit
def _count_below(sorted_ptr, limits, length, steps):
    """Of sorted numbers, how many are below each limit: a binary search."""
    low = tl.zeros_like(limits)
    high = low + length
    for _ in range(steps):
        is_open = low < high
        middle = (low + high) // 2
        below = is_open & (tl.load(sorted_ptr + middle, mask=is_open, other=0) < limits)
        low, high = tl.where(below, middle + 1, low), tl.where(is_open & ~below, middle, high)
    return low


@triton.jit(do_not_specialize=["P", "steps"])
def expert_starts_kernel(
    plan_ptr, experts_ptr, starts_ptr, ends_ptr, at, P, num_experts, steps, HEIGHTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Where each expert's rows begin, and of each height its tiles end. One program."""
    expert = tl.arange(0, BLOCK)
    start = _count_below(experts_ptr, expert, P, steps)
    end = _count_below(experts_ptr, expert + 1, P, steps)
    tl.store(starts_ptr + expert, start, mask=expert <= num_experts)
    tl.store(plan_ptr + at.starts + expert, start, mask=expert <= num_experts + 1)
    tl.store(plan_ptr + at.ranks + expert, tl.where(expert < num_experts, _ANY_RANK, 0), mask=expert <= num_experts)
    for i in tl.static_range(len(HEIGHTS)):
        tiles = tl.where(expert <= num_experts, (end - start + HEIGHTS[i] - 1) // HEIGHTS[i], 0)
        tl.store(ends_ptr + i * (num_experts + 1) + expert, tl.cumsum(tiles, 0), mask=expert <= num_experts)


@triton.jit(do_not_specialize=["P", "steps"])
def expert_tiles_kernel(
    plan_ptr,
    experts_ptr,
    order_ptr,
    inverse_ptr,
    ends_ptr,
    at,
    tiles_at,
    tiles_count,
    P,
    num_experts,
    steps,
    HEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program some places and as many tiles of each height."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts_ptr + i, mask=i < P, other=0).to(tl.int32)
    tl.store(plan_ptr + at.slots + i, expert, mask=i < P)
    tl.store(plan_ptr + at.token_ranks + i, tl.where(expert < num_experts, _ANY_RANK, 0), mask=i < P)
    tl.store(plan_ptr + at.order + i, i, mask=i < P)
    tl.store(inverse_ptr + tl.load(order_ptr + i, mask=i < P, other=0), i.to(tl.int64), mask=i < P)
    for h in tl.static_range(len(HEIGHTS)):
        inside = i < tiles_count[h]
        ends = ends_ptr + h * (num_experts + 1)
        # The first expert whose tiles end past this one: as many end at it or before.
        expert = tl.minimum(_count_below(ends, i + 1, num_experts + 1, steps), num_experts)
        before = tl.load(ends + expert - 1, mask=inside & (expert > 0), other=0)
        start = tl.load(plan_ptr + at.starts + expert, mask=inside, other=0)
        end = tl.load(plan_ptr + at.starts + expert + 1, mask=inside, other=0)
        first = start + (i - before) * HEIGHTS[h]
        last = tl.minimum(first + HEIGHTS[h], end)
        tile = plan_ptr + tiles_at[h] + i * 3
        tl.store(tile, expert, mask=inside)
        tl.store(tile + 1, tl.minimum(first, last), mask=inside)
        tl.store(tile + 2, last, mask=inside)


def route(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    """`order`, `inverse`, `starts` and `plan` of an `ExpertRoute`: one sort and two launches, and nobody waits.

    A pair of an expert that there is not has the plan's slot of the base: its rows are zero.
    """
    flat = top_k_index.reshape(-1)
    # Negative numbers are then large, and all of them one too many.
    experts, order = torch.sort((flat & 0x7FFFFFFF).clamp_(max=num_experts), stable=True)
    P = len(order)
    layout, inverse = plan_layout(num_experts, P), torch.empty_like(order)
    starts = order.new_empty(num_experts + 1, dtype=torch.int32)
    plan = order.new_empty(expert_plan_size(num_experts, P), dtype=torch.int32)
    heights = (*TILE_HEIGHTS, TALL)
    ends = order.new_empty((len(heights), num_experts + 1), dtype=torch.int32)
    args = {
        "plan_ptr": plan,
        "experts_ptr": experts,
        "ends_ptr": ends,
        "at": layout,
        "P": P,
        "num_experts": num_experts,
    }
    block = 1 << (num_experts + 1).bit_length()
    launch(
        expert_starts_kernel,
        (1,),
        args | {"starts_ptr": starts, "steps": P.bit_length() + 1},
        {"HEIGHTS": heights, "BLOCK": block},
        _CONFIG,
    )
    counts = tuple(num_tiles(P, num_experts, height) for height in heights)
    args |= {"order_ptr": order, "inverse_ptr": inverse, "tiles_count": counts}
    args |= {"tiles_at": (*layout.tiles, layout.size), "steps": (num_experts + 1).bit_length() + 1}
    grid = (cdiv(max(P, *counts), _BLOCK),)
    launch(expert_tiles_kernel, grid, args, {"HEIGHTS": heights, "BLOCK": _BLOCK}, _CONFIG)
    return order, inverse, starts, plan
