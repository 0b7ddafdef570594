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
from lorakernels.kernels.tiles import (
    NO_MATRIX,
    Matrix,
    cast_factor,
    dot_factor,
    drop,
    load_tile,
    matrix,
    plane,
    planes_for,
    sized,
    store_tile,
    sum_planes,
    tall,
)
from lorakernels.low_rank import low_rank_dtype


@triton.jit(do_not_specialize=["M"])
def outer_kernel(
    z,  # [M, N]
    t,  # [M, R]
    q,  # [N, R]
    mask_ptr,
    out,  # [N, R], the first of its planes
    p_ptr,
    sums_ptr,
    M,
    R,
    scale,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """What is not asked for has no pointer: `out` without t, `p` without q."""
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    pid_r = tl.program_id(2)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    N = z.cols
    z = sized(z, M, N)
    if out.ptr is not None:
        t, out = sized(t, M, R), sized(out, N, R)
        acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    if sums_ptr is not None:
        sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if p_ptr is not None:
        q_tile = cast_factor(load_tile(sized(q, N, R), offs_n, offs_r), z.ptr.dtype.element_ty)

    for m in range(pid_m * BLOCK_M, M, BLOCK_M * tl.num_programs(1)):
        offs_m = m + tl.arange(0, BLOCK_M)
        z_tile = load_tile(z, offs_m, offs_n)
        if mask_ptr is not None:
            z_tile = drop(z_tile, mask_ptr, offs_m, pid_n, M, N)
        if out.ptr is not None:
            t_tile = load_tile(t, offs_m, offs_r)
            acc = dot_factor(tl.trans(z_tile), t_tile, acc, INPUT_PRECISION)
        if p_ptr is not None:
            p = dot_factor(z_tile, q_tile, tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32), INPUT_PRECISION)
            store_tile(plane(p_ptr, pid_n, M, R), p * scale, offs_m, offs_r)
        if sums_ptr is not None:
            sums += tl.sum(z_tile.to(tl.float32), axis=0)

    if out.ptr is not None:
        out_plane = plane(out.ptr, pid_m, N, R)
        store_tile(Matrix(out_plane.ptr, N, R, out.strides), acc * scale, offs_n, offs_r)
    if sums_ptr is not None:
        if pid_r == 0:
            sums_at = sums_ptr + pid_m.to(tl.int64) * N + offs_n
            tl.store(sums_at, sums.to(sums_ptr.dtype.element_ty), mask=offs_n < N)


@retried("outer")
def dy_pass(
    dy: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor,
    scaling: float,
    need_g: bool,
    dB: torch.Tensor | None,
    dbias: torch.Tensor | None,
) -> torch.Tensor | None:
    """G [M, r] = scaling · dy B, if it is asked for. Writes dB [N, r] = scaling · dyᵀ S and dbias [N] = Σ dy, if given.

    The rows of s [M, r] are contiguous. dy is read once, or twice where G would be written to more planes than that
    costs.
    """
    M, N = dy.shape
    R = lora_B.shape[1]
    config = choose("outer", M, N, N, R, dy.element_size(), dy.device)
    one_pass = need_g and dB is not None and takes_one_pass(N, R, dy.element_size(), config.BLOCK_N)
    g = None
    if one_pass:
        g = dy.new_empty((M, R), dtype=low_rank_dtype(dy.dtype))
    elif need_g:
        g, _ = shrink(dy, lora_B.t(), scale=scaling)
    if dB is not None or dbias is not None:
        _outer(dy, s, lora_B, None, dB, (R, 1), g if one_pass else None, dbias, scaling, R, config)
    return g


@retried("outer")
def grad_A(x: torch.Tensor, g: torch.Tensor, mask: torch.Tensor | None, scale: float, dA: torch.Tensor) -> None:
    """Writes dA [r, K] = scale · Gᵀ D(x) of x [M, K], g [M, r] contiguous, mask [M, ceil(K / 8)] uint8."""
    M, K = x.shape
    R = g.shape[1]
    config = choose("outer", M, K, K, R, x.element_size(), x.device)
    _outer(x, g, None, mask, dA, (1, K), None, None, scale, R, config)


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
            "z": tall(z),
            "t": NO_MATRIX if out is None else tall(t),
            "q": NO_MATRIX if q is None or p is None else matrix(q),
            "mask_ptr": mask,
            "out": NO_MATRIX if out is None else Matrix(out_planes, N, R, out_strides),
            "p_ptr": p_planes,
            "sums_ptr": sums_planes,
            "M": M,
            "R": R,
            "scale": scale,
        },
        {"INPUT_PRECISION": input_precision(z)},
        config,
    )
    for planes, total in ((out_planes, out), (p_planes, p), (sums_planes, sums)):
        if planes is not None and total is not None:
            sum_planes(planes, total)
