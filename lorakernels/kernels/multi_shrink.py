"""S = scale · D(x) Aᵀ where each token has its own A, for several x and A in one launch.

With B in the place of A, and dy in that of x, the same kernels are the backward's G = scale · dy B.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

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
from lorakernels.kernels.launch import cdiv, launch, may_depend, retried
from lorakernels.kernels.multi_config import choose_multi
from lorakernels.kernels.tiles import cast_factor, dot_factor, draw, load_tile, plane, store_tile, summed_columns, tall
from lorakernels.plan import PlanTensors
from lorakernels.plan_layout import num_tiles


@triton.jit(do_not_specialize=["T"])
def multi_shrink_kernel(
    s_ptr,
    xs,
    factors,
    routes,
    scales_ptr,
    mask_ptr,
    seed_ptr,  # None without dropout
    thresholds_ptr,
    T,
    R,
    NUM_SLICES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program a tile of tokens of one slot, block of its rank, slice and part of the sum."""
    slot, first, end = tile_of_tokens(routes, tl.program_id(0))
    if first >= end:
        return
    num_blocks_r = tl.cdiv(R, BLOCK_R)
    pid_s = tl.program_id(1) // num_blocks_r
    pid_r = tl.program_id(1) % num_blocks_r
    pid_k = tl.program_id(2)
    rank = tl.minimum(tl.load(routes.buffer + routes.at.ranks + slot), R)  # a shard of adapters has fewer rows
    tokens = tokens_from(routes, first, end, T, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    x, a = pick_slice(pid_s, xs, factors, T, NUM_SLICES)
    rows = rank_offsets(routes, a, slot, offs_r, R)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        threshold = tl.load(thresholds_ptr + slot)

    loaded = rank_mask(routes, offs_r, rank, R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    # Nothing is read for a block past the slot's rank.
    summed = tl.where(pid_r * BLOCK_R < rank, x.cols, 0)
    for k in range(pid_k * BLOCK_K, summed, BLOCK_K * tl.num_programs(2)):
        offs_k = k + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, tokens, offs_k)
        if seed_ptr is not None:
            x_tile = draw(x_tile, mask_ptr, seed, threshold, tokens, k, T, x.cols, tl.program_id(1) == 0)
        inside = (offs_k[:, None] < x.cols) & loaded[None, :]
        a_tile = tl.load(a.ptr + offs_k.to(tl.int64)[:, None] * a.strides[2] + rows[None, :], mask=inside, other=0.0)
        acc = dot_factor(x_tile, a_tile, acc, INPUT_PRECISION)
    # Columns past the rank are of no meaning: each is its own sum.
    acc = tl.where(offs_r[None, :] < rank, acc * tl.load(scales_ptr + slot), 0.0)
    store_tile(plane(s_ptr, pid_k * NUM_SLICES + pid_s, T, R), acc, tokens, offs_r)


@triton.jit(do_not_specialize=["T"])
def multi_shrink_token_kernel(
    s_ptr,
    xs,
    factors,
    routes,
    scales_ptr,
    T,
    R,
    SIGNALS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program a token, block of its rank, slice and part of the sum: products by element, no matrix units."""
    if SIGNALS:  # a launch that is dependent may start while this one still runs
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0)
    num_blocks_r = tl.cdiv(R, BLOCK_R)
    pid_s = tl.program_id(1) // num_blocks_r
    pid_r = tl.program_id(1) % num_blocks_r
    pid_k = tl.program_id(2)
    slot, rank = adapter_of_token(routes, token, R)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    x, a = pick_slice(pid_s, xs, factors, T, NUM_SLICES)
    rows = rank_offsets(routes, a, slot, offs_r, R)
    x_row = x.ptr + token.to(tl.int64) * x.strides[0]
    scale = tl.load(scales_ptr + slot)  # beside A, not after it

    loaded = rank_mask(routes, offs_r, rank, R)
    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    summed = tl.where(pid_r * BLOCK_R < rank, x.cols, 0)
    for k in range(pid_k * BLOCK_K, summed, BLOCK_K * tl.num_programs(2)):
        offs_k = k + tl.arange(0, BLOCK_K)
        # Loaded once a row of A, from L1, as A's tile lies in registers: a row spread over them takes two barriers.
        x_at = x_row + offs_k.to(tl.int64)[None, :] * x.strides[1] + tl.zeros((BLOCK_R, 1), dtype=tl.int64)
        x_tile = tl.load(x_at, mask=offs_k[None, :] < x.cols, other=0.0).to(tl.float32)
        inside = loaded[:, None] & (offs_k[None, :] < x.cols)
        a_tile = tl.load(a.ptr + rows[:, None] + offs_k.to(tl.int64)[None, :] * a.strides[2], mask=inside, other=0.0)
        # In x's dtype first, as the tile form multiplies it.
        acc += cast_factor(a_tile, x.ptr.dtype.element_ty).to(tl.float32) * x_tile
    s = tl.where(offs_r < rank, tl.sum(acc, axis=1) * scale, 0.0)
    s_row = s_ptr + ((pid_k * NUM_SLICES + pid_s).to(tl.int64) * T + token) * R
    tl.store(s_row + offs_r, s, mask=offs_r < R)


@retried("multi_shrink")
def multi_shrink(
    xs: list[torch.Tensor],
    factors: list[Factor],
    plan: PlanTensors,
    scales: torch.Tensor,
    width: int,
    seed: torch.Tensor | None = None,
    thresholds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S [planes, slices, T, width] float32, whose planes are to be added, and dropout's mask of x.

    xs are [T, K], a tensor a factor; scales [S + 1] float32. With thresholds [S + 1] int32 all xs are one, and the
    mask is [T, ceil(K / 8)] uint8, undefined in rows of the base.
    """
    x = xs[0]
    T = x.shape[0]
    dropout = thresholds is not None
    cols = max(f.cols for f in factors)
    config = choose_multi("multi_shrink", x, plan.num_slots, cols, width, len(xs), tiles=dropout)
    s = x.new_empty((config.SPLIT, len(xs), T, width), dtype=torch.float32)
    mask = x.new_empty((T, cdiv(x.shape[1], 8)), dtype=torch.uint8) if dropout else None
    args = {
        "s_ptr": s,
        "xs": tuple(map(tall, xs)),
        "factors": tuple(factors),
        "routes": routes(plan, config.BLOCK_M),
        "scales_ptr": scales,
        "T": T,
        "R": width,
    }
    constexprs: dict[str, Any] = {"NUM_SLICES": len(xs)}
    blocks = len(xs) * cdiv(width, config.BLOCK_R)
    if config.BLOCK_M == 1:
        constexprs["SIGNALS"] = may_depend(x.device)
        launch(multi_shrink_token_kernel, (T, blocks, config.SPLIT), args, constexprs, config)
    else:
        args |= {"mask_ptr": mask, "seed_ptr": seed if dropout else None, "thresholds_ptr": thresholds}
        constexprs |= summed_columns(x, factors[0].ptr, config)
        tiles = num_tiles(T, plan.num_slots, config.BLOCK_M)
        launch(multi_shrink_kernel, (tiles, blocks, config.SPLIT), args, constexprs, config)
    return s, mask
