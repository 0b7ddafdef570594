"""One read of a tall matrix z [M, N] for all that the backward needs of it.

    out [N, r]  = scale · zᵀ t          dB from dy and S, dA from x and G
    p [M, r]    = scale · z q           G from dy and B
    column sums = Σ z over tokens       dbias

A program owns a block of columns and every SPLIT-th block of rows, and keeps its part of `out` in
registers. Parts go to float32 planes that a second kernel adds in a fixed order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.table import choose, takes_one_pass
from lorakernels.kernels.launch import cdiv, input_precision, launch, retried
from lorakernels.kernels.shrink import shrink
from lorakernels.kernels.sum_planes import planes_for, sum_planes
from lorakernels.kernels.tiles import load_mask_bytes, load_tile, store_tile, unpack_mask


@triton.jit(do_not_specialize=["M"])
def outer_kernel(
    z_ptr,
    t_ptr,
    q_ptr,
    mask_ptr,
    out_ptr,
    p_ptr,
    sums_ptr,
    M,
    N,
    R,
    scale,
    stride_zm,
    stride_zn,
    stride_tm,
    stride_qn,
    stride_qr,
    stride_on,
    stride_or,
    WITH_OUT: tl.constexpr,
    WITH_P: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    pid_r = tl.program_id(2)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    if WITH_OUT:
        out = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    if WITH_SUMS:
        sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if WITH_P:
        q = load_tile(q_ptr, offs_n, offs_r, N, R, stride_qn, stride_qr).to(z_ptr.dtype.element_ty)
        p_plane = p_ptr + pid_n.to(tl.int64) * M * R

    for m in range(pid_m * BLOCK_M, M, BLOCK_M * tl.num_programs(1)):
        offs_m = m + tl.arange(0, BLOCK_M)
        z = load_tile(z_ptr, offs_m, offs_n, M, N, stride_zm, stride_zn)
        if DROPOUT:
            num_mask_bytes = (N + 7) // 8
            byte_cols = pid_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
            mask_bytes = load_mask_bytes(mask_ptr, offs_m, byte_cols, M, num_mask_bytes)
            z = tl.where(unpack_mask(mask_bytes, BLOCK_M, BLOCK_N), z, 0.0)
        if WITH_OUT:
            t = load_tile(t_ptr, offs_m, offs_r, M, R, stride_tm, 1).to(z.dtype)
            out = tl.dot(tl.trans(z), t, out, input_precision=INPUT_PRECISION)
        if WITH_P:
            p = tl.dot(z, q, input_precision=INPUT_PRECISION) * scale
            store_tile(p_plane, p, offs_m, offs_r, M, R, R)
        if WITH_SUMS:
            sums += tl.sum(z.to(tl.float32), axis=0)

    inside_n = offs_n < N
    if WITH_OUT:
        offsets = offs_n.to(tl.int64)[:, None] * stride_on + offs_r.to(tl.int64)[None, :] * stride_or
        out_plane = out_ptr + pid_m.to(tl.int64) * N * R
        tl.store(
            out_plane + offsets,
            (out * scale).to(out_ptr.dtype.element_ty),
            mask=inside_n[:, None] & (offs_r[None, :] < R),
        )
    if WITH_SUMS:
        if pid_r == 0:
            tl.store(sums_ptr + pid_m.to(tl.int64) * N + offs_n, sums.to(sums_ptr.dtype.element_ty), mask=inside_n)


@retried("outer")
def dy_pass(
    dy: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor,
    scaling: float,
    *,
    need_g: bool,
    need_dB: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """G [M, r] = scaling · dy B, dB [N, r] = scaling · dyᵀ S in B's dtype, dbias [N] = Σ dy.

    The rows of s [M, r] are contiguous. What is not asked for is None and is not computed. dy is read once, or twice
    where G would be written to more planes than that costs.
    """
    M, N = dy.shape
    R = lora_B.shape[1]
    config = choose("outer", M, N, N, R, dy.element_size(), dy.device)
    one_pass = need_g and need_dB and takes_one_pass(N, R, dy.element_size(), config.BLOCK_N)
    g = dy.new_empty((M, R)) if one_pass else shrink(dy, lora_B.t(), scale=scaling)[0] if need_g else None
    dB = dy.new_empty((N, R), dtype=lora_B.dtype) if need_dB else None
    dbias = None if bias_dtype is None else dy.new_empty((N,), dtype=bias_dtype)
    if dB is not None or dbias is not None:
        _outer(dy, s, lora_B, None, dB, (R, 1), g if one_pass else None, dbias, scaling, R, config)
    return g, dB, dbias


@retried("outer")
def grad_A(
    x: torch.Tensor, g: torch.Tensor, mask: torch.Tensor | None, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """dA [r, K] = scale · Gᵀ D(x) of x [M, K], g [M, r] contiguous, mask [M, ceil(K / 8)] uint8."""
    M, K = x.shape
    R = g.shape[1]
    config = choose("outer", M, K, K, R, x.element_size(), x.device)
    dA = x.new_empty((R, K), dtype=dtype)
    _outer(x, g, None, mask, dA, (1, K), None, None, scale, R, config)
    return dA


def _outer(
    z: torch.Tensor,
    t: torch.Tensor,
    q: torch.Tensor | None,
    mask: torch.Tensor | None,
    out: torch.Tensor | None,
    out_strides: tuple[int, int],
    p: torch.Tensor | None,
    sums: torch.Tensor | None,
    scale: float,
    R: int,
    config: KernelConfig,
) -> None:
    M, N = z.shape
    num_blocks_n = cdiv(N, config.BLOCK_N)
    out_planes = None if out is None else planes_for(out, config.SPLIT)
    p_planes = None if p is None else planes_for(p, num_blocks_n)
    sums_planes = None if sums is None else planes_for(sums, config.SPLIT)
    launch(
        outer_kernel,
        (num_blocks_n, config.SPLIT, cdiv(R, config.BLOCK_R)),
        {
            "z_ptr": z,
            "t_ptr": t,
            "q_ptr": q,
            "mask_ptr": mask,
            "out_ptr": out_planes,
            "p_ptr": p_planes,
            "sums_ptr": sums_planes,
            "M": M,
            "N": N,
            "R": R,
            "scale": scale,
            "stride_zm": z.stride(0),
            "stride_zn": z.stride(1),
            "stride_tm": t.stride(0),
            "stride_qn": 0 if q is None else q.stride(0),
            "stride_qr": 0 if q is None else q.stride(1),
            "stride_on": out_strides[0],
            "stride_or": out_strides[1],
        },
        {
            "WITH_OUT": out is not None,
            "WITH_P": p is not None,
            "WITH_SUMS": sums is not None,
            "DROPOUT": mask is not None,
            "INPUT_PRECISION": input_precision(z),
            "BLOCK_M": config.BLOCK_M,
            "BLOCK_N": config.BLOCK_N,
            "BLOCK_R": config.BLOCK_R,
        },
        config,
    )
    for planes, total in ((out_planes, out), (p_planes, p), (sums_planes, sums)):
        if planes is not None and total is not None:
            sum_planes(planes, total)
