"""S = scale · D(x) Aᵀ where each token has its own A, for several x and A in one launch.

With B in the place of A, and dy in that of x, the same kernels are the backward's G = scale · dy B.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lorakernels.kernels.adapters import Factor, factor_args, pick_slice, plan_args, rank_mask, rank_offsets, route_args
from lorakernels.kernels.launch import cdiv, input_precision, launch, retried
from lorakernels.kernels.multi_config import choose_multi
from lorakernels.kernels.tiles import draw_mask_bytes, load_tile, store_tile, unpack_mask
from lorakernels.plan import PlanTensors, num_tiles


@triton.jit(do_not_specialize=["T"])
def multi_shrink_kernel(
    s_ptr,
    xs,
    factors,
    plan_ptr,
    scales_ptr,
    pages_ptr,
    mask_ptr,
    seed_ptr,
    thresholds_ptr,
    T,
    R,
    cols,
    max_rank,
    ranks_at,
    order_at,
    tiles_at,
    strides_xm,
    strides_xk,
    strides_slot,
    strides_rank,
    strides_col,
    NUM_SLICES: tl.constexpr,
    PAGED: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program a tile of tokens of one slot, block of its rank, slice and part of the sum."""
    tile_ptr = plan_ptr + tiles_at + tl.program_id(0) * 3
    slot, first, end = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    if first >= end:
        return
    num_blocks_r = tl.cdiv(R, BLOCK_R)
    pid_s = tl.program_id(1) // num_blocks_r
    pid_r = tl.program_id(1) % num_blocks_r
    pid_k = tl.program_id(2)
    rank = tl.load(plan_ptr + ranks_at + slot)
    places = first + tl.arange(0, BLOCK_M)
    tokens = tl.load(plan_ptr + order_at + places, mask=places < end, other=T)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    x_ptr, a_ptr, K, stride_xm, stride_xk, stride_slot, stride_rank, stride_col = pick_slice(
        pid_s, xs, factors, cols, strides_xm, strides_xk, strides_slot, strides_rank, strides_col, NUM_SLICES
    )
    rows = rank_offsets(pages_ptr, slot, offs_r, max_rank, stride_slot, stride_rank, PAGED)
    if DROPOUT:
        seed = tl.load(seed_ptr)
        threshold = tl.load(thresholds_ptr + slot)
        num_mask_bytes = (K + 7) // 8

    loaded = rank_mask(offs_r, rank, R, PAGED)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    # Nothing is read for a block past the slot's rank.
    summed = tl.where(pid_r * BLOCK_R < rank, K, 0)
    for k in range(pid_k * BLOCK_K, summed, BLOCK_K * tl.num_programs(2)):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, tokens, offs_k, T, K, stride_xm, stride_xk)
        if DROPOUT:
            byte_cols = k // 8 + tl.arange(0, BLOCK_K // 8)
            mask_bytes = draw_mask_bytes(seed, tokens, byte_cols, threshold)
            if tl.program_id(1) == 0:
                store_tile(mask_ptr, mask_bytes, tokens, byte_cols, T, num_mask_bytes, num_mask_bytes)
            x = tl.where(unpack_mask(mask_bytes, BLOCK_M, BLOCK_K), x, 0.0)
        inside = (offs_k[:, None] < K) & loaded[None, :]
        a = tl.load(a_ptr + offs_k.to(tl.int64)[:, None] * stride_col + rows[None, :], mask=inside, other=0.0)
        acc = tl.dot(x, a.to(x.dtype), acc, input_precision=INPUT_PRECISION)
    # Columns past the rank are of no meaning: each is its own sum.
    acc = tl.where(offs_r[None, :] < rank, acc * tl.load(scales_ptr + slot), 0.0)
    s_plane = s_ptr + (pid_k * NUM_SLICES + pid_s).to(tl.int64) * T * R
    store_tile(s_plane, acc, tokens, offs_r, T, R, R)


@triton.jit(do_not_specialize=["T"])
def multi_shrink_token_kernel(
    s_ptr,
    xs,
    factors,
    plan_ptr,
    scales_ptr,
    pages_ptr,
    T,
    R,
    cols,
    max_rank,
    ranks_at,
    slots_at,
    strides_xm,
    strides_xk,
    strides_slot,
    strides_rank,
    strides_col,
    NUM_SLICES: tl.constexpr,
    PAGED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program a token, block of its rank, slice and part of the sum: products by element, no matrix units."""
    token = tl.program_id(0)
    num_blocks_r = tl.cdiv(R, BLOCK_R)
    pid_s = tl.program_id(1) // num_blocks_r
    pid_r = tl.program_id(1) % num_blocks_r
    pid_k = tl.program_id(2)
    slot = tl.load(plan_ptr + slots_at + token)
    rank = tl.load(plan_ptr + ranks_at + slot)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    x_ptr, a_ptr, K, stride_xm, stride_xk, stride_slot, stride_rank, stride_col = pick_slice(
        pid_s, xs, factors, cols, strides_xm, strides_xk, strides_slot, strides_rank, strides_col, NUM_SLICES
    )
    rows = rank_offsets(pages_ptr, slot, offs_r, max_rank, stride_slot, stride_rank, PAGED)
    x_row = x_ptr + token.to(tl.int64) * stride_xm

    loaded = rank_mask(offs_r, rank, R, PAGED)
    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    summed = tl.where(pid_r * BLOCK_R < rank, K, 0)
    for k in range(pid_k * BLOCK_K, summed, BLOCK_K * tl.num_programs(2)):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_row + offs_k.to(tl.int64) * stride_xk, mask=offs_k < K, other=0.0).to(tl.float32)
        inside = loaded[:, None] & (offs_k[None, :] < K)
        a = tl.load(a_ptr + rows[:, None] + offs_k.to(tl.int64)[None, :] * stride_col, mask=inside, other=0.0)
        # In x's dtype first, as the tile form multiplies it.
        acc += a.to(x_ptr.dtype.element_ty).to(tl.float32) * x[None, :]
    s = tl.where(offs_r < rank, tl.sum(acc, axis=1) * tl.load(scales_ptr + slot), 0.0)
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
    config = choose_multi(
        "multi_shrink", x, plan.num_slots, max(f.cols for f in factors), width, len(xs), tiles=dropout
    )
    s = x.new_empty((config.SPLIT, len(xs), T, width), dtype=torch.float32)
    mask = x.new_empty((T, cdiv(x.shape[1], 8)), dtype=torch.uint8) if dropout else None
    args = {
        "s_ptr": s,
        "xs": tuple(xs),
        "scales_ptr": scales,
        "T": T,
        "R": width,
        "strides_xm": tuple(x.stride(0) for x in xs),
        "strides_xk": tuple(x.stride(1) for x in xs),
        **factor_args(factors),
        **plan_args(plan),
        **route_args(plan, config.BLOCK_M),
    }
    constexprs: dict[str, Any] = {
        "NUM_SLICES": len(xs),
        "PAGED": plan.pages is not None,
        "BLOCK_K": config.BLOCK_K,
        "BLOCK_R": config.BLOCK_R,
    }
    blocks = len(xs) * cdiv(width, config.BLOCK_R)
    if config.BLOCK_M == 1:
        launch(multi_shrink_token_kernel, (T, blocks, config.SPLIT), args, constexprs, config)
    else:
        args |= {"mask_ptr": mask, "seed_ptr": seed, "thresholds_ptr": thresholds}
        constexprs |= {"DROPOUT": dropout, "INPUT_PRECISION": input_precision(x), "BLOCK_M": config.BLOCK_M}
        tiles = num_tiles(T, plan.num_slots, config.BLOCK_M)
        launch(multi_shrink_kernel, (tiles, blocks, config.SPLIT), args, constexprs, config)
    return s, mask
