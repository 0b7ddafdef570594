"""Which experts take which tokens, in a plan's layout: the experts are its slots, their sorted rows its tokens."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.heuristic import next_power_of_two
from lorakernels.kernels.launch import cdiv, launch
from lorakernels.kernels.tape import taped
from lorakernels.plan import PlanTensors
from lorakernels.plan_layout import TILE_HEIGHTS, PlanLayout, num_tiles, plan_layout
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


@triton.jit(do_not_specialize=["num_slots", "num_pages"])
def expert_adapters_kernel(
    plan_ptr, scales_ptr, table_ptr, ranks_ptr, scalings_ptr, pages_ptr, masked_ptr, at, num_slots, num_adapters, R,
    num_pages, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Each slot's rank, scale and pages: its adapter's, but none where one of them is out of range."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_r = tl.arange(0, BLOCK_R)
    inside = slot < num_slots
    rank = tl.load(ranks_ptr + slot % num_adapters, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scalings_ptr + slot % num_adapters, mask=inside, other=0.0)
    fits = (rank >= 0) & (rank <= R) & (tl.abs(scale) < float("inf"))
    if pages_ptr is not None:
        at_page = slot.to(tl.int64)[:, None] * R + offs_r[None, :]
        used = inside[:, None] & (offs_r[None, :] < tl.minimum(rank, R)[:, None])
        page = tl.load(pages_ptr + at_page, mask=used, other=0).to(tl.int32)
        fits = fits & (tl.max(((page < 0) | (page >= num_pages)).to(tl.int32), 1) == 0)
        page = tl.where(fits[:, None], page, 0)
        tl.store(table_ptr + at_page, page, mask=(slot <= num_slots)[:, None] & (offs_r[None, :] < R))
    used_rank = tl.where(fits & (scale != 0), rank, 0)
    tl.store(plan_ptr + at.ranks + slot, used_rank, mask=slot <= num_slots)
    tl.store(scales_ptr + slot, tl.where(used_rank > 0, scale, 0.0), mask=slot <= num_slots)
    tl.atomic_add(masked_ptr + 1, tl.sum((inside & ~fits).to(tl.int64), 0))


@triton.jit(do_not_specialize=["P", "num_experts"])
def expert_keys_kernel(
    plan_ptr, keys_ptr, experts_ptr, order_ptr, adapters_ptr, masked_ptr, at, P, num_experts, num_adapters, top_k,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The slot of each row of a route, whose experts are known, by its token's adapter."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(order_ptr + i, mask=i < P, other=0)
    expert = tl.load(experts_ptr + i, mask=i < P, other=0)
    adapter = tl.load(adapters_ptr + pair // top_k, mask=i < P, other=-1).to(tl.int32)
    unknown = (adapter < -1) | (adapter >= num_adapters)
    base = num_experts * num_adapters
    slot = tl.where(unknown | (adapter < 0) | (expert >= num_experts), base, expert * num_adapters + adapter)
    rank = tl.load(plan_ptr + at.ranks + slot, mask=i < P, other=0)
    slot = tl.where(rank == 0, base, slot)
    tl.store(keys_ptr + i, slot, mask=i < P)
    tl.store(plan_ptr + at.slots + i, slot, mask=i < P)
    tl.store(plan_ptr + at.token_ranks + i, rank, mask=i < P)
    tl.atomic_add(masked_ptr, tl.sum((unknown & (pair % top_k == 0)).to(tl.int64), 0))


@triton.jit(do_not_specialize=["P", "num_slots", "steps"])
def expert_starts_kernel(
    plan_ptr,
    sorted_ptr,
    starts_ptr,  # with it slots are experts, of any rank
    at,
    P,
    num_slots,
    steps,
    BLOCK: tl.constexpr,
):
    """Where each slot's rows begin."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = _count_below(sorted_ptr, slot, P, steps)
    tl.store(plan_ptr + at.starts + slot, start, mask=slot <= num_slots + 1)
    if starts_ptr is not None:
        tl.store(starts_ptr + slot, start, mask=slot <= num_slots)
        tl.store(plan_ptr + at.ranks + slot, tl.where(slot < num_slots, _ANY_RANK, 0), mask=slot <= num_slots)


@triton.jit(do_not_specialize=["num_slots"])
def expert_ends_kernel(plan_ptr, ends_ptr, at, num_slots, HEIGHTS: tl.constexpr, BLOCK: tl.constexpr):
    """Where each slot's tiles end. A program a height."""
    height = HEIGHTS[0]
    for i in tl.static_range(1, len(HEIGHTS)):
        height = tl.where(tl.program_id(0) == i, HEIGHTS[i], height)
    before = 0
    for first in range(0, num_slots + 1, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        start = tl.load(plan_ptr + at.starts + slot, mask=slot <= num_slots, other=0)
        end = tl.load(plan_ptr + at.starts + slot + 1, mask=slot <= num_slots, other=0)
        tiles = (end - start + height - 1) // height
        at_end = ends_ptr + tl.program_id(0) * (num_slots + 1) + slot
        tl.store(at_end, before + tl.cumsum(tiles, 0), mask=slot <= num_slots)
        before += tl.sum(tiles, 0)


@triton.jit(do_not_specialize=["P", "num_slots", "steps"])
def expert_tiles_kernel(
    plan_ptr,
    sorted_ptr,
    order_ptr,
    inverse_ptr,  # with it slots are experts, and the rows lie sorted
    ends_ptr,
    at,
    tiles_at,
    tiles_count,
    P,
    num_slots,
    steps,
    HEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program some places and as many tiles of each height."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    order = tl.load(order_ptr + i, mask=i < P, other=0)
    if inverse_ptr is None:
        tl.store(plan_ptr + at.order + i, order.to(tl.int32), mask=i < P)
    else:
        expert = tl.load(sorted_ptr + i, mask=i < P, other=0).to(tl.int32)
        tl.store(plan_ptr + at.slots + i, expert, mask=i < P)
        tl.store(plan_ptr + at.token_ranks + i, tl.where(expert < num_slots, _ANY_RANK, 0), mask=i < P)
        tl.store(plan_ptr + at.order + i, i, mask=i < P)
        tl.store(inverse_ptr + order, i.to(tl.int64), mask=i < P)
    for h in tl.static_range(len(HEIGHTS)):
        inside = i < tiles_count[h]
        ends = ends_ptr + h * (num_slots + 1)
        # The first slot whose tiles end past this one: as many end at it or before.
        slot = tl.minimum(_count_below(ends, i + 1, num_slots + 1, steps), num_slots)
        before = tl.load(ends + slot - 1, mask=inside & (slot > 0), other=0)
        start = tl.load(plan_ptr + at.starts + slot, mask=inside, other=0)
        end = tl.load(plan_ptr + at.starts + slot + 1, mask=inside, other=0)
        first = start + (i - before) * HEIGHTS[h]
        last = tl.minimum(first + HEIGHTS[h], end)
        tile = plan_ptr + tiles_at[h] + i * 3
        tl.store(tile, slot, mask=inside)
        tl.store(tile + 1, tl.minimum(first, last), mask=inside)
        tl.store(tile + 2, last, mask=inside)


def _start(kernel: Any, size: int, args: dict[str, Any], constexprs: dict[str, Any] | None = None) -> None:
    launch(kernel, (cdiv(size, _BLOCK),), args, {"BLOCK": _BLOCK, **(constexprs or {})}, _CONFIG)


def _write(
    plan: torch.Tensor,
    layout: PlanLayout,
    in_order: torch.Tensor,
    order: torch.Tensor,
    num_slots: int,
    starts: torch.Tensor | None,
    inverse: torch.Tensor | None,
) -> None:
    """Into a plan's buffer what follows from the sorted slots: where they and their tiles begin, and the order."""
    P, heights = len(order), TILE_HEIGHTS if inverse is None else (*TILE_HEIGHTS, TALL)
    ends = plan.new_empty((len(heights), num_slots + 1))
    args = {"plan_ptr": plan, "at": layout, "num_slots": num_slots}
    searched = {"sorted_ptr": in_order, "P": P, "steps": P.bit_length() + 1}
    _start(expert_starts_kernel, num_slots + 2, args | searched | {"starts_ptr": starts})
    constexprs = {"HEIGHTS": heights, "BLOCK": 4 * _BLOCK}
    launch(expert_ends_kernel, (len(heights),), args | {"ends_ptr": ends}, constexprs, _CONFIG)
    counts = tuple(num_tiles(P, num_slots, height) for height in heights)
    args |= {"sorted_ptr": in_order, "order_ptr": order, "inverse_ptr": inverse, "ends_ptr": ends, "P": P}
    args |= {"tiles_count": counts, "tiles_at": (*layout.tiles, layout.size)[: len(heights)]}
    args["steps"] = (num_slots + 1).bit_length() + 1
    _start(expert_tiles_kernel, max(P, *counts), args, {"HEIGHTS": heights})


@taped
def route(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    """`order`, `inverse`, `starts` and `plan` of an `ExpertRoute`: one sort and three launches, and nobody waits.

    A pair of an expert that there is not has the plan's slot of the base: its rows are zero.
    """
    flat = top_k_index.reshape(-1)
    # Negative numbers are then large, and all of them one too many.
    experts, order = torch.sort((flat & 0x7FFFFFFF).clamp_(max=num_experts), stable=True)
    inverse, starts = torch.empty_like(order), order.new_empty(num_experts + 1, dtype=torch.int32)
    plan = order.new_empty(expert_plan_size(num_experts, len(order)), dtype=torch.int32)
    _write(plan, plan_layout(num_experts, len(order)), experts, order, num_experts, starts, inverse)
    return order, inverse, starts, plan


@taped
def route_adapters(
    plan: PlanTensors,
    masked: torch.Tensor,
    experts: torch.Tensor,
    order: torch.Tensor,
    top_k: int,
    num_experts: int,
    adapters: torch.Tensor,
    ranks: torch.Tensor,
    scalings: torch.Tensor,
    page_table: torch.Tensor | None,
    num_pages: int,
    max_rank: int,
) -> None:
    """Write `plan`, of slot expert · S + adapter, for the rows of a route.

    A row of an adapter that there is not, and of a slot whose rank, scaling or pages are out of range, is the
    experts' own; `masked` counts tokens and slots of both kinds.

    Args:
        experts, order: [P] of the route, the expert and the pair of each row.
        adapters: [tokens], -1 for none.
        ranks, scalings: [S]; page_table: [E · S, max_rank] or None.
    """
    S, P, layout = len(ranks), len(order), plan.layout
    args = {"plan_ptr": plan.buffer, "masked_ptr": masked, "at": layout, "num_adapters": S}
    of_slots = {
        "scales_ptr": plan.scales,
        "table_ptr": plan.page_table,
        "ranks_ptr": ranks,
        "scalings_ptr": scalings,
        "pages_ptr": page_table,
        "num_slots": plan.num_slots,
        "num_pages": num_pages,
        "R": max_rank,
    }
    block_r = 1 if page_table is None else next_power_of_two(max_rank)
    block = max(1, _BLOCK // block_r)
    grid = (cdiv(plan.num_slots + 1, block),)
    launch(expert_adapters_kernel, grid, args | of_slots, {"BLOCK": block, "BLOCK_R": block_r}, _CONFIG)
    keys = plan.buffer.new_empty(P)
    of_rows = {"keys_ptr": keys, "experts_ptr": experts, "order_ptr": order, "adapters_ptr": adapters, "P": P}
    _start(expert_keys_kernel, P, args | of_rows | {"num_experts": num_experts, "top_k": top_k})
    in_order, by_slot = torch.sort(keys, stable=True)
    _write(plan.buffer, layout, in_order, by_slot, plan.num_slots, None, None)
