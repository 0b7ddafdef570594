"""The gradients of every slot's A and B: dA = Gᵀ D(x) and dB = dyᵀ S over the tokens of that slot alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorakernels.kernels.adapters import Factor, pick_slice, rank_offsets, routes, tokens_from
from lorakernels.kernels.launch import cdiv, input_precision, launch, retried
from lorakernels.kernels.multi_config import choose_multi
from lorakernels.kernels.tiles import dot_factor, drop, load_tile, plane, planes_for, sum_planes, tall
from lorakernels.plan import PlanTensors


@triton.jit(do_not_specialize=["T"])
def multi_outer_kernel(
    t_ptr,
    zs,
    factors,
    routes,
    mask_ptr,
    T,
    R,
    num_slots,
    NUM_SLICES: tl.constexpr,
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
    rank = tl.load(routes.buffer + routes.at.ranks + slot)
    first = tl.load(routes.buffer + routes.at.starts + slot)
    end = tl.load(routes.buffer + routes.at.starts + slot + 1)
    z, out = pick_slice(pid_s, zs, factors, T, NUM_SLICES)
    N = z.cols
    if pid_n * BLOCK_N >= N:
        return

    acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    t = plane(t_ptr, pid_s, T, R)
    last = tl.where(pid_r * BLOCK_R < rank, end, first)
    for m in range(first + pid_m * BLOCK_M, last, BLOCK_M * num_parts):
        tokens = tokens_from(routes, m, end, T, BLOCK_M)
        z_tile = load_tile(z, tokens, offs_n)
        if mask_ptr is not None:
            z_tile = drop(z_tile, mask_ptr, tokens, pid_n, T, N)
        acc = dot_factor(tl.trans(z_tile), load_tile(t, tokens, offs_r), acc, INPUT_PRECISION)

    # A stack's rows past the rank get zero, also where a NaN in z makes NaN of it; pages past it are not the slot's.
    acc = tl.where(offs_r[None, :] < rank, acc, 0.0)
    stored = rank if routes.page_table is not None else R
    rows = rank_offsets(routes, out, slot, offs_r, R)
    # A plane is the whole stack: slots, ranks and columns.
    out_plane = out.ptr + pid_m.to(tl.int64) * num_slots * R * N
    tl.store(
        out_plane + offs_n.to(tl.int64)[:, None] * out.strides[2] + rows[None, :],
        acc.to(out.ptr.dtype.element_ty),
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
    paged = plan.page_table is not None
    if not paged:
        # Stacks may hold more slots than the plan: no program writes those.
        for gradient in gradients:
            gradient.ptr[plan.num_slots :].zero_()
        gradients = [gradient._replace(ptr=gradient.ptr[: plan.num_slots]) for gradient in gradients]
    cols = max(factor.cols for factor in gradients)
    config = choose_multi("multi_outer", z, plan.num_slots, cols, R, num_slices)
    split = 1 if paged else config.SPLIT
    planes = [planes_for(gradient.ptr, split) for gradient in gradients]
    args = {
        "t_ptr": t,
        "zs": tuple(map(tall, zs)),
        "factors": tuple(gradient._replace(ptr=part) for gradient, part in zip(gradients, planes, strict=True)),
        "routes": routes(plan, 1),
        "mask_ptr": mask,
        "T": T,
        "R": R,
        "num_slots": plan.num_slots,
    }
    constexprs = {"NUM_SLICES": num_slices, "INPUT_PRECISION": input_precision(z)}
    rank_blocks = plan.num_slots * cdiv(R, config.BLOCK_R)
    # Slots first: a grid's other axes end at 65,535.
    grid = (rank_blocks, cdiv(cols, config.BLOCK_N), num_slices * split)
    launch(multi_outer_kernel, grid, args, constexprs, config)
    for part, gradient in zip(planes, gradients, strict=True):
        sum_planes(part, gradient.ptr)
