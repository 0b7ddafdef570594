"""y += S Bᵀ where each token has its own B, in place, for several y in one launch, or summed over slices into one y.

With A in the place of B, and G in that of S, the same kernels add the backward's D'(Σ G A) to dx.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lorakernels.kernels.adapters import Factor, factor_args, pick_slice, plan_args, rank_mask, rank_offsets, route_args
from lorakernels.kernels.launch import cdiv, input_precision, launch, retried
from lorakernels.kernels.multi_config import choose_multi
from lorakernels.kernels.tiles import load_mask_bytes, load_tile, unpack_mask
from lorakernels.plan import PlanTensors, num_tiles


@triton.jit
def _add_block(
    acc,
    r,
    s_ptr,
    b_ptr,
    pages_ptr,
    slot,
    rank,
    tokens,
    offs_n,
    slice_index,
    T,
    R,
    N,
    max_rank,
    stride_slot,
    stride_rank,
    stride_col,
    NUM_SLICES: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    PAGED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """acc + S Bᵀ over ranks r … r + BLOCK_R - 1; the planes of S are added in a fixed order as they are loaded."""
    offs_r = r + tl.arange(0, BLOCK_R)
    s_slice = s_ptr + tl.cast(slice_index, tl.int64) * T * R
    s = load_tile(s_slice, tokens, offs_r, T, R, R, 1)
    for plane in range(1, NUM_PLANES):
        s += load_tile(s_slice + tl.cast(plane, tl.int64) * NUM_SLICES * T * R, tokens, offs_r, T, R, R, 1)
    rows = rank_offsets(pages_ptr, slot, offs_r, max_rank, stride_slot, stride_rank, PAGED)
    within = offs_r < rank
    inside = rank_mask(offs_r, rank, R, PAGED)[:, None] & (offs_n[None, :] < N)
    b = tl.load(b_ptr + rows[:, None] + offs_n.to(tl.int64)[None, :] * stride_col, mask=inside, other=0.0)
    s = tl.where(within[None, :], s, 0.0).to(DTYPE)
    b = tl.where(within[:, None], b, 0.0).to(DTYPE)
    acc = tl.dot(s, b, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def _add_product(
    acc,
    s_ptr,
    b_ptr,
    pages_ptr,
    slot,
    rank,
    tokens,
    offs_n,
    slice_index,
    T,
    R,
    N,
    max_rank,
    stride_slot,
    stride_rank,
    stride_col,
    NUM_SLICES: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    PAGED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """acc + S Bᵀ of one slice."""
    if ONE_BLOCK:
        return _add_block(
            acc, 0, s_ptr, b_ptr, pages_ptr, slot, rank, tokens, offs_n, slice_index, T, R, N, max_rank,
            stride_slot, stride_rank, stride_col, NUM_SLICES, NUM_PLANES, PAGED, INPUT_PRECISION, BLOCK_R, DTYPE,
        )  # fmt: skip
    for r in tl.range(0, rank, BLOCK_R, num_stages=1):
        acc = _add_block(
            acc, r, s_ptr, b_ptr, pages_ptr, slot, rank, tokens, offs_n, slice_index, T, R, N, max_rank,
            stride_slot, stride_rank, stride_col, NUM_SLICES, NUM_PLANES, PAGED, INPUT_PRECISION, BLOCK_R, DTYPE,
        )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["T"])
def multi_expand_kernel(
    s_ptr,
    ys,
    factors,
    plan_ptr,
    pages_ptr,
    mask_ptr,
    T,
    R,
    cols,
    max_rank,
    ranks_at,
    order_at,
    tiles_at,
    strides_ym,
    strides_yn,
    strides_slot,
    strides_rank,
    strides_col,
    NUM_SLICES: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    SUM_SLICES: tl.constexpr,
    PAGED: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """A program a tile of tokens of one slot, block of columns and slice."""
    tile_ptr = plan_ptr + tiles_at + tl.program_id(0) * 3
    slot, first, end = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    rank = tl.load(plan_ptr + ranks_at + slot)
    pid_s = tl.program_id(2)
    # Summed slices have one y, and one width.
    NUM_YS: tl.constexpr = 1 if SUM_SLICES else NUM_SLICES
    y_ptr, b_ptr, N, stride_ym, stride_yn, stride_slot, stride_rank, stride_col = pick_slice(
        pid_s, ys, factors, cols, strides_ym, strides_yn, strides_slot, strides_rank, strides_col, NUM_YS
    )
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows of the base are not read, nor written.
    if (first >= end) | (rank == 0) | (tl.program_id(1) * BLOCK_N >= N):
        return
    places = first + tl.arange(0, BLOCK_M)
    tokens = tl.load(plan_ptr + order_at + places, mask=places < end, other=T)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if SUM_SLICES:
        for i in tl.static_range(NUM_SLICES):
            acc = _add_product(
                acc, s_ptr, factors[i], pages_ptr, slot, rank, tokens, offs_n, i, T, R, N, max_rank,
                strides_slot[i], strides_rank[i], strides_col[i],
                NUM_SLICES, NUM_PLANES, PAGED, INPUT_PRECISION, BLOCK_R, ONE_BLOCK, y_ptr.dtype.element_ty,
            )  # fmt: skip
    else:
        acc = _add_product(
            acc, s_ptr, b_ptr, pages_ptr, slot, rank, tokens, offs_n, pid_s, T, R, N, max_rank,
            stride_slot, stride_rank, stride_col,
            NUM_SLICES, NUM_PLANES, PAGED, INPUT_PRECISION, BLOCK_R, ONE_BLOCK, y_ptr.dtype.element_ty,
        )  # fmt: skip
    if DROPOUT:
        num_mask_bytes = (N + 7) // 8
        byte_cols = tl.program_id(1) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        mask_bytes = load_mask_bytes(mask_ptr, tokens, byte_cols, T, num_mask_bytes)
        acc = tl.where(unpack_mask(mask_bytes, BLOCK_M, BLOCK_N), acc, 0.0)
    y_at = y_ptr + tokens.to(tl.int64)[:, None] * stride_ym + offs_n.to(tl.int64)[None, :] * stride_yn
    inside = (places[:, None] < end) & (offs_n[None, :] < N)
    acc += tl.load(y_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def multi_expand_token_kernel(
    s_ptr,
    ys,
    factors,
    plan_ptr,
    pages_ptr,
    T,
    R,
    cols,
    max_rank,
    ranks_at,
    slots_at,
    strides_ym,
    strides_yn,
    strides_slot,
    strides_rank,
    strides_col,
    NUM_SLICES: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    PAGED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program a token, block of columns and slice."""
    token = tl.program_id(0)
    pid_s = tl.program_id(2)
    slot = tl.load(plan_ptr + slots_at + token)
    rank = tl.load(plan_ptr + ranks_at + slot)
    y_ptr, b_ptr, N, stride_ym, stride_yn, stride_slot, stride_rank, stride_col = pick_slice(
        pid_s, ys, factors, cols, strides_ym, strides_yn, strides_slot, strides_rank, strides_col, NUM_SLICES
    )
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if (rank == 0) | (tl.program_id(1) * BLOCK_N >= N):
        return
    y_at = y_ptr + token.to(tl.int64) * stride_ym + offs_n.to(tl.int64) * stride_yn
    acc = tl.load(y_at, mask=offs_n < N, other=0.0).to(tl.float32)
    s_row = s_ptr + (pid_s.to(tl.int64) * T + token) * R
    for r in tl.range(0, rank, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        s = tl.zeros((BLOCK_R,), dtype=tl.float32)
        for plane in range(NUM_PLANES):
            s += tl.load(s_row + tl.cast(plane, tl.int64) * NUM_SLICES * T * R + offs_r, mask=offs_r < R, other=0.0)
        rows = rank_offsets(pages_ptr, slot, offs_r, max_rank, stride_slot, stride_rank, PAGED)
        within = offs_r < rank
        inside = (offs_n[:, None] < N) & rank_mask(offs_r, rank, R, PAGED)[None, :]
        b = tl.load(b_ptr + rows[None, :] + offs_n.to(tl.int64)[:, None] * stride_col, mask=inside, other=0.0)
        products = b.to(y_ptr.dtype.element_ty).to(tl.float32) * s[None, :]
        acc += tl.sum(tl.where(within[None, :], products, 0.0), axis=1)
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=offs_n < N)


@retried("multi_expand")
def multi_expand(
    s: torch.Tensor,
    factors: list[Factor],
    plan: PlanTensors,
    ys: list[torch.Tensor],
    mask: torch.Tensor | None = None,
) -> None:
    """Add S Bᵀ to each of ys [T, N], in place; to the one y the sum of all slices, through dropout's mask if given.

    s is [planes, slices, T, R] float32, contiguous. Rows of the base are left as they are.
    """
    num_planes, num_slices, T, R = s.shape
    y = ys[0]
    summed = len(ys) < num_slices
    cols = max(factor.cols for factor in factors)
    config = choose_multi("multi_expand", y, plan.num_slots, cols, R, len(ys), tiles=summed or mask is not None)
    args = {
        "s_ptr": s,
        "ys": tuple(ys),
        "T": T,
        "R": R,
        "strides_ym": tuple(y.stride(0) for y in ys),
        "strides_yn": tuple(y.stride(1) for y in ys),
        **factor_args(factors),
        **plan_args(plan),
        **route_args(plan, config.BLOCK_M),
    }
    constexprs: dict[str, Any] = {
        "NUM_SLICES": num_slices,
        "NUM_PLANES": num_planes,
        "PAGED": plan.pages is not None,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_R": config.BLOCK_R,
    }
    blocks_n = cdiv(cols, config.BLOCK_N)
    if config.BLOCK_M == 1:
        launch(multi_expand_token_kernel, (T, blocks_n, len(ys)), args, constexprs, config)
        return
    constexprs |= {
        "SUM_SLICES": summed,
        "DROPOUT": mask is not None,
        "INPUT_PRECISION": input_precision(y),
        "BLOCK_M": config.BLOCK_M,
        "ONE_BLOCK": R <= config.BLOCK_R,
    }
    tiles = num_tiles(T, plan.num_slots, config.BLOCK_M)
    launch(multi_expand_kernel, (tiles, blocks_n, len(ys)), args | {"mask_ptr": mask}, constexprs, config)
