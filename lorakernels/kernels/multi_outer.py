"""The gradients of every slot's A and B: dA = Gᵀ D(x) and dB = dyᵀ S over the tokens of that slot alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorakernels.kernels.adapters import Factor, factor_args, pick_slice, plan_args, rank_offsets
from lorakernels.kernels.launch import cdiv, input_precision, launch, retried
from lorakernels.kernels.multi_config import choose_multi
from lorakernels.kernels.sum_planes import planes_for, sum_planes
from lorakernels.kernels.tiles import load_mask_bytes, load_tile, unpack_mask
from lorakernels.plan import PlanTensors


@triton.jit(do_not_specialize=["T"])
def multi_outer_kernel(
    t_ptr,
    zs,
    factors,
    plan_ptr,
    pages_ptr,
    mask_ptr,
    T,
    R,
    cols,
    num_slots,
    max_rank,
    ranks_at,
    starts_at,
    order_at,
    strides_zm,
    strides_zn,
    strides_slot,
    strides_rank,
    strides_col,
    NUM_SLICES: tl.constexpr,
    PAGED: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A program a slot, block of its rank, block of columns, slice and part of the tokens; `factors` are written."""
    num_blocks_r = tl.cdiv(R, BLOCK_R)
    slot = tl.program_id(0) // num_blocks_r
    pid_r = tl.program_id(0) % num_blocks_r
    pid_n = tl.program_id(1)
    pid_s = tl.program_id(2) % NUM_SLICES
    pid_m = tl.program_id(2) // NUM_SLICES
    num_parts = tl.num_programs(2) // NUM_SLICES
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    rank = tl.load(plan_ptr + ranks_at + slot)
    first = tl.load(plan_ptr + starts_at + slot)
    end = tl.load(plan_ptr + starts_at + slot + 1)
    z_ptr, out_ptr, N, stride_zm, stride_zn, stride_slot, stride_rank, stride_col = pick_slice(
        pid_s, zs, factors, cols, strides_zm, strides_zn, strides_slot, strides_rank, strides_col, NUM_SLICES
    )
    if pid_n * BLOCK_N >= N:
        return

    out = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    t_slice = t_ptr + pid_s.to(tl.int64) * T * R
    last = tl.where(pid_r * BLOCK_R < rank, end, first)
    for m in range(first + pid_m * BLOCK_M, last, BLOCK_M * num_parts):
        places = m + tl.arange(0, BLOCK_M)
        tokens = tl.load(plan_ptr + order_at + places, mask=places < end, other=T)
        z = load_tile(z_ptr, tokens, offs_n, T, N, stride_zm, stride_zn)
        if DROPOUT:
            byte_cols = pid_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
            mask_bytes = load_mask_bytes(mask_ptr, tokens, byte_cols, T, (N + 7) // 8)
            z = tl.where(unpack_mask(mask_bytes, BLOCK_M, BLOCK_N), z, 0.0)
        t = load_tile(t_slice, tokens, offs_r, T, R, R, 1).to(z.dtype)
        out = tl.dot(tl.trans(z), t, out, input_precision=INPUT_PRECISION)

    # A stack's rows past the rank get zero, also where a NaN in z makes NaN of it; pages past it are not the slot's.
    out = tl.where(offs_r[None, :] < rank, out, 0.0)
    stored = rank if PAGED else R
    rows = rank_offsets(pages_ptr, slot, offs_r, max_rank, stride_slot, stride_rank, PAGED)
    # A plane is the whole stack: slots, ranks and columns.
    out_plane = out_ptr + pid_m.to(tl.int64) * num_slots * R * N
    tl.store(
        out_plane + offs_n.to(tl.int64)[:, None] * stride_col + rows[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(offs_n[:, None] < N) & (offs_r[None, :] < stored),
    )


@retried("multi_outer")
def multi_outer(
    zs: list[torch.Tensor],
    t: torch.Tensor,
    gradients: list[Factor],
    plan: PlanTensors,
    mask: torch.Tensor | None = None,
) -> None:
    """Write Σ over each slot's tokens of tᵀ z into `gradients`, contiguous and shaped as what they are gradients of.

    zs are [T, cols], a tensor a slice; t is [slices, T, R] float32. Every element of a stack is written; of pages,
    those that a slot with a rank holds.
    """
    num_slices, T, R = t.shape
    z = zs[0]
    paged = plan.pages is not None
    if not paged:
        # Stacks may hold more slots than the plan: no program writes those.
        for gradient in gradients:
            gradient.tensor[plan.num_slots :].zero_()
        gradients = [gradient._replace(tensor=gradient.tensor[: plan.num_slots]) for gradient in gradients]
    cols = max(factor.cols for factor in gradients)
    config = choose_multi("multi_outer", z, plan.num_slots, cols, R, num_slices)
    split = 1 if paged else config.SPLIT
    planes = [planes_for(gradient.tensor, split) for gradient in gradients]
    args = {
        "t_ptr": t,
        "zs": tuple(zs),
        "mask_ptr": mask,
        "T": T,
        "R": R,
        "num_slots": plan.num_slots,
        "starts_at": plan.layout.starts,
        "order_at": plan.layout.order,
        "strides_zm": tuple(z.stride(0) for z in zs),
        "strides_zn": tuple(z.stride(1) for z in zs),
        **factor_args([gradient._replace(tensor=plane) for gradient, plane in zip(gradients, planes, strict=True)]),
        **plan_args(plan),
    }
    constexprs = {
        "NUM_SLICES": num_slices,
        "PAGED": paged,
        "DROPOUT": mask is not None,
        "INPUT_PRECISION": input_precision(z),
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_R": config.BLOCK_R,
    }
    rank_blocks = plan.num_slots * cdiv(R, config.BLOCK_R)
    # Slots first: a grid's other axes end at 65,535.
    grid = (rank_blocks, cdiv(cols, config.BLOCK_N), num_slices * split)
    launch(multi_outer_kernel, grid, args, constexprs, config)
    for plane, gradient in zip(planes, gradients, strict=True):
        sum_planes(plane, gradient.tensor)
