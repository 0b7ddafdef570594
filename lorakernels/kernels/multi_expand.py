"""y += S Bᵀ where each token has its own B, in place, for several y in one launch, or summed over slices into one y.

With A in the place of B, and G in that of S, the same kernels add the backward's D'(Σ G A) to dx.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lorakernels.configs.heuristic import next_power_of_two
from lorakernels.kernels.adapters import (
    Factor,
    adapter_of_token,
    pick_slice,
    rank_mask,
    rank_offsets,
    routes,
    tile_of_tokens,
    tokens_from,
)
from lorakernels.kernels.launch import cdiv, input_precision, launch, may_depend, retried
from lorakernels.kernels.multi_config import choose_multi
from lorakernels.kernels.tiles import cast_factor, drop, load_tile, plane, store_tile, tall
from lorakernels.plan import PlanTensors
from lorakernels.plan_layout import num_tiles


@triton.jit
def _add_block(
    acc, r, s_ptr, which, b, routes, slot, rank, tokens, offs_n, T, R, N, dtype: tl.constexpr,
    NUM_SLICES: tl.constexpr, NUM_PLANES: tl.constexpr, INPUT_PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + S Bᵀ over ranks r … r + BLOCK_R - 1; the planes of S are added in a fixed order as they are loaded."""
    offs_r = r + tl.arange(0, BLOCK_R)
    s = load_tile(plane(s_ptr, which, T, R), tokens, offs_r)
    for i in tl.static_range(1, NUM_PLANES):
        s += load_tile(plane(s_ptr, i * NUM_SLICES + which, T, R), tokens, offs_r)
    rows = rank_offsets(routes, b, slot, offs_r, R)
    within = offs_r < rank
    inside = rank_mask(routes, offs_r, rank, R)[:, None] & (offs_n[None, :] < N)
    b_tile = tl.load(b.ptr + rows[:, None] + offs_n.to(tl.int64)[None, :] * b.strides[2], mask=inside, other=0.0)
    s = cast_factor(tl.where(within[None, :], s, 0.0), dtype)
    b_tile = tl.where(within[:, None], b_tile, 0.0).to(s.dtype)
    return tl.dot(s, b_tile, acc, input_precision=INPUT_PRECISION)


@triton.jit(do_not_specialize=["T"])
def multi_expand_kernel(
    s_ptr,
    ys,
    factors,
    routes,
    mask_ptr,
    T,
    R,
    NUM_SLICES: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    SUM_SLICES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """A program a tile of tokens of one slot, block of columns and slice."""
    slot, first, end = tile_of_tokens(routes, tl.program_id(0))
    rank = tl.minimum(tl.load(routes.buffer + routes.at.ranks + slot), R)
    pid_n = tl.program_id(1)
    pid_s = tl.program_id(2)
    # Summed slices have one y, and one width.
    y, b = pick_slice(pid_s, ys, factors, T, 1 if SUM_SLICES else NUM_SLICES)
    N = y.cols
    # Rows of the base are not read, nor written.
    if (first >= end) | (rank == 0) | (pid_n * BLOCK_N >= N):
        return
    tokens = tokens_from(routes, first, end, T, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = y.ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in tl.static_range(NUM_SLICES if SUM_SLICES else 1):
        which = i if SUM_SLICES else pid_s
        b = factors[i] if SUM_SLICES else b
        if ONE_BLOCK:
            acc = _add_block(
                acc, 0, s_ptr, which, b, routes, slot, rank, tokens, offs_n, T, R, N, dtype,
                NUM_SLICES, NUM_PLANES, INPUT_PRECISION, BLOCK_R,
            )  # fmt: skip
        else:
            for r in tl.range(0, rank, BLOCK_R, num_stages=1):
                acc = _add_block(
                    acc, r, s_ptr, which, b, routes, slot, rank, tokens, offs_n, T, R, N, dtype,
                    NUM_SLICES, NUM_PLANES, INPUT_PRECISION, BLOCK_R,
                )  # fmt: skip
    if mask_ptr is not None:
        acc = drop(acc, mask_ptr, tokens, pid_n, T, N)
    acc += load_tile(y, tokens, offs_n).to(tl.float32)
    store_tile(y, acc, tokens, offs_n)


@triton.jit
def _of_token(s_tile, r, b, routes, slot, rank, offs_n, R, N, dtype: tl.constexpr, BLOCK_R: tl.constexpr):
    """S Bᵀ of a token [BLOCK_N] float32 over ranks r … r + BLOCK_R - 1, of which s_tile has the planes of S."""
    offs_r = r + tl.arange(0, BLOCK_R)
    rows = rank_offsets(routes, b, slot, offs_r, R)
    inside = (offs_n[:, None] < N) & rank_mask(routes, offs_r, rank, R)[None, :]
    b_tile = tl.load(b.ptr + rows[None, :] + offs_n.to(tl.int64)[:, None] * b.strides[2], mask=inside, other=0.0)
    products = cast_factor(b_tile, dtype).to(tl.float32) * tl.sum(s_tile, axis=0)[None, :]
    return tl.sum(tl.where((offs_r < rank)[None, :], products, 0.0), axis=1)


@triton.jit(do_not_specialize=["T"])
def multi_expand_token_kernel(
    s_ptr,
    ys,
    factors,
    routes,
    T,
    R,
    NUM_SLICES: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    PLANES: tl.constexpr,  # the power of two from there
    DEPENDENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program a token, block of columns and slice."""
    token = tl.program_id(0)
    pid_s = tl.program_id(2)
    y, b = pick_slice(pid_s, ys, factors, T, NUM_SLICES)
    N = y.cols
    if tl.program_id(1) * BLOCK_N >= N:
        return
    slot, rank = adapter_of_token(routes, token, R)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    # All planes at once: one after the other each would wait for its own load.
    planes = tl.arange(0, PLANES)[:, None]
    s_row = s_ptr + ((planes.to(tl.int64) * NUM_SLICES + pid_s) * T + token) * R
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    # S and y are asked for before it is known whether the token has an adapter: then B alone waits for its slot.
    s_tile = tl.load(s_row + offs_r, mask=(planes < NUM_PLANES) & (offs_r < R), other=0.0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    y_at = y.ptr + token.to(tl.int64) * y.strides[0] + offs_n.to(tl.int64) * y.strides[1]
    acc = tl.load(y_at, mask=offs_n < N, other=0.0).to(tl.float32)
    dtype: tl.constexpr = y.ptr.dtype.element_ty
    acc += _of_token(s_tile, 0, b, routes, slot, rank, offs_n, R, N, dtype, BLOCK_R)
    for r in tl.range(BLOCK_R, rank, BLOCK_R, num_stages=1):
        s_tile = tl.load(s_row + r + offs_r, mask=(planes < NUM_PLANES) & (r + offs_r < R), other=0.0)
        acc += _of_token(s_tile, r, b, routes, slot, rank, offs_n, R, N, dtype, BLOCK_R)
    # Masks and no early return: the compiler moves loads behind it, which then wait for the rank.
    tl.store(y_at, acc.to(dtype), mask=offs_n < tl.where(rank > 0, N, 0))


@retried("multi_expand")
def multi_expand(
    s: torch.Tensor,
    factors: list[Factor],
    plan: PlanTensors,
    ys: list[torch.Tensor],
    mask: torch.Tensor | None = None,
    *,
    behind_s: bool = False,
) -> None:
    """Add S Bᵀ to each of ys [T, N], in place; to the one y the sum of all slices, through dropout's mask if given.

    s is [planes, slices, T, R] float32, contiguous. Rows of the base are left as they are. `behind_s`: the launch right
    ahead of this one makes S, and what was ahead of that has ended.
    """
    num_planes, num_slices, T, R = s.shape
    y = ys[0]
    summed = len(ys) < num_slices
    cols = max(factor.cols for factor in factors)
    config = choose_multi("multi_expand", y, plan.num_slots, cols, R, len(ys), tiles=summed or mask is not None)
    args = {
        "s_ptr": s,
        "ys": tuple(map(tall, ys)),
        "factors": tuple(factors),
        "routes": routes(plan, config.BLOCK_M),
        "T": T,
        "R": R,
    }
    constexprs: dict[str, Any] = {"NUM_SLICES": num_slices, "NUM_PLANES": num_planes}
    blocks_n = cdiv(cols, config.BLOCK_N)
    if config.BLOCK_M == 1:
        constexprs["PLANES"] = next_power_of_two(num_planes)
        # The plan is read before the wait: not where the launch ahead may have written it.
        constexprs["DEPENDENT"] = behind_s and config.dependent and may_depend(y.device)
        launch(multi_expand_token_kernel, (T, blocks_n, len(ys)), args, constexprs, config)
        return
    constexprs |= {"SUM_SLICES": summed, "INPUT_PRECISION": input_precision(y), "ONE_BLOCK": R <= config.BLOCK_R}
    tiles = num_tiles(T, plan.num_slots, config.BLOCK_M)
    launch(multi_expand_kernel, (tiles, blocks_n, len(ys)), args | {"mask_ptr": mask}, constexprs, config)
