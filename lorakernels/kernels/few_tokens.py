"""The whole layer in one kernel, for so few tokens that launches and reading W are the cost.

x Aᵀ accumulates beside x Wᵀ in the loop over K; both products are linear in that loop, so it may be
split into planes that are added afterwards. Each block of output columns makes x Aᵀ again: r more
columns beside BLOCK_N. With the strides of W exchanged, and B and A in each other's place, the same
kernel is dx = dy W + D'((dy B) A), and the dy B it stores is what dA needs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lorakernels.configs.table import choose
from lorakernels.dropout import inverse_keep
from lorakernels.kernels.launch import cdiv, launch, retried
from lorakernels.kernels.packed import form_of, load_packed_kn, weight_matrix
from lorakernels.kernels.tiles import (
    cast_factor,
    dot_factor,
    draw,
    drop,
    epilogue,
    finish,
    load_tile,
    plane,
    planes_for,
    sized,
    store_tile,
    sum_planes,
    summed_columns,
    tall,
    transposed,
)
from lorakernels.low_rank import low_rank_dtype
from lorakernels.quant.packed import Transposed


@triton.jit(do_not_specialize=["M", "threshold"])
def few_tokens_kernel(
    x,  # [M, K]
    w,  # [K, N], or packed
    a,  # [K, R]
    b,  # [R, N]
    epilogue,
    s_ptr,
    y_ptr,
    mask_ptr,
    seed_ptr,  # with it the mask is drawn, on x; else a mask is applied, to the low-rank term
    M,
    threshold,
    s_scale,
    y_scale,
    W_FORM: tl.constexpr,
    PER: tl.constexpr,
    GROUP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    pid_k = tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    K, N, R = x.cols, b.cols, a.cols
    x, a, b = sized(x, M, K), sized(a, K, R), sized(b, R, N)
    if W_FORM == 0:
        w = sized(w, K, N)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    s = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(pid_k * BLOCK_K, K, BLOCK_K * tl.num_programs(2)):
        offs_k = k + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, offs_m, offs_k)
        if W_FORM == 0:
            w_tile = load_tile(w, offs_k, offs_n)
        else:
            w_tile = load_packed_kn(w, offs_k, offs_n, k, pid_n * BLOCK_N, x_tile.dtype, W_FORM, PER, GROUP)
        y = tl.dot(x_tile, w_tile, y, input_precision=INPUT_PRECISION)
        if seed_ptr is not None:
            x_tile = draw(x_tile, mask_ptr, seed, threshold, offs_m, k, M, K, pid_n == 0)
        s = dot_factor(x_tile, load_tile(a, offs_k, offs_r), s, INPUT_PRECISION)

    s *= s_scale
    if pid_n == 0:
        store_tile(plane(s_ptr, pid_k, M, R), s, offs_m, offs_r)
    # Loaded first: after S is rounded it made one config spill 8 bytes on sm_100.
    b_tile = load_tile(b, offs_r, offs_n)
    rounded = cast_factor(s, x.ptr.dtype.element_ty)
    low_rank = tl.dot(rounded, b_tile.to(rounded.dtype), input_precision=INPUT_PRECISION) * y_scale
    if seed_ptr is None and mask_ptr is not None:
        low_rank = drop(low_rank, mask_ptr, offs_m, pid_n, M, N)
    y = finish(y + low_rank, epilogue, offs_n, N, pid_k)
    store_tile(plane(y_ptr, pid_k, M, N), y, offs_m, offs_n)


@retried("few_tokens")
def few_tokens(
    x: torch.Tensor,
    weight: Any,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    s_scale: float = 1.0,
    y_scale: float = 1.0,
    seed: torch.Tensor | None = None,
    threshold: int = 0,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y [M, N] = row_scale ∘ (x Wᵀ + y_scale · s Bᵀ) + bias, s [M, r] = s_scale · x Aᵀ, and the mask.

    A `threshold` above 0 draws dropout's mask on x and returns it; a given `mask` [M, ceil(N / 8)]
    drops elements of the low-rank term of y instead.
    """
    M, K = x.shape
    N, R = lora_B.shape
    config = choose("few_tokens", M, N, K, R, x.element_size(), x.device)
    columns = summed_columns(x, lora_A, config)
    y = x.new_empty((M, N))
    s = x.new_empty((M, R), dtype=low_rank_dtype(x.dtype))
    y_planes, s_planes = planes_for(y, config.SPLIT), planes_for(s, config.SPLIT)
    drawn = x.new_empty((M, cdiv(K, 8)), dtype=torch.uint8) if threshold else None
    launch(
        few_tokens_kernel,
        (cdiv(N, config.BLOCK_N), cdiv(M, config.BLOCK_M), config.SPLIT),
        {
            "x": tall(x),
            "w": weight_matrix(weight),
            "a": transposed(lora_A),
            "b": transposed(lora_B),
            "epilogue": epilogue(row_scale, bias),
            "s_ptr": s_planes,
            "y_ptr": y_planes,
            "mask_ptr": drawn if threshold else mask,
            "seed_ptr": seed if threshold else None,
            "M": M,
            "threshold": threshold,
            "s_scale": s_scale * inverse_keep(threshold),
            "y_scale": y_scale,
        },
        form_of(weight, x.dtype, config.BLOCK_N if isinstance(weight, Transposed) else columns["BLOCK_K"]) | columns,
        config,
    )
    sum_planes(y_planes, y)
    sum_planes(s_planes, s)
    return y, s, drawn
