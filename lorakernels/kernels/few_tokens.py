"""The whole layer in one kernel, for so few tokens that launches and reading W are the cost.

x Aᵀ accumulates beside x Wᵀ in the loop over K; both products are linear in that loop, so it may be
split into planes that are added afterwards. Each block of output columns makes x Aᵀ again: r more
columns beside BLOCK_N. With the strides of W exchanged, and B and A in each other's place, the same
kernel is dx = dy W + D'((dy B) A), and the dy B it stores is what dA needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorakernels.configs.table import choose
from lorakernels.dropout import inverse_keep
from lorakernels.kernels.launch import cdiv, input_precision, launch, retried
from lorakernels.kernels.sum_planes import planes_for, sum_planes
from lorakernels.kernels.tiles import draw_mask_bytes, load_mask_bytes, load_tile, store_tile, unpack_mask


@triton.jit(do_not_specialize=["M", "threshold"])
def few_tokens_kernel(
    x_ptr,
    w_ptr,
    a_ptr,
    b_ptr,
    bias_ptr,
    row_scale_ptr,
    s_ptr,
    y_ptr,
    mask_ptr,
    seed_ptr,
    M,
    N,
    K,
    R,
    threshold,
    s_scale,
    y_scale,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    stride_bias,
    HAS_BIAS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    DRAW_MASK: tl.constexpr,
    APPLY_MASK: tl.constexpr,
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
    if DRAW_MASK:
        seed = tl.load(seed_ptr)
        num_mask_bytes = (K + 7) // 8

    y_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    s_acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(pid_k * BLOCK_K, K, BLOCK_K * tl.num_programs(2)):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk)
        w = load_tile(w_ptr, offs_k, offs_n, K, N, stride_wk, stride_wn)
        y_acc = tl.dot(x, w, y_acc, input_precision=INPUT_PRECISION)
        if DRAW_MASK:
            byte_cols = k // 8 + tl.arange(0, BLOCK_K // 8)
            mask_bytes = draw_mask_bytes(seed, offs_m, byte_cols, threshold)
            if pid_n == 0:
                store_tile(mask_ptr, mask_bytes, offs_m, byte_cols, M, num_mask_bytes, num_mask_bytes)
            x = tl.where(unpack_mask(mask_bytes, BLOCK_M, BLOCK_K), x, 0.0)
        a = load_tile(a_ptr, offs_k, offs_r, K, R, stride_ak, stride_ar).to(x.dtype)
        s_acc = tl.dot(x, a, s_acc, input_precision=INPUT_PRECISION)

    s_acc *= s_scale
    if pid_n == 0:
        store_tile(s_ptr + pid_k.to(tl.int64) * M * R, s_acc, offs_m, offs_r, M, R, R)
    b = load_tile(b_ptr, offs_r, offs_n, R, N, stride_br, stride_bn).to(x_ptr.dtype.element_ty)
    low_rank = tl.dot(s_acc.to(x_ptr.dtype.element_ty), b, input_precision=INPUT_PRECISION) * y_scale
    if APPLY_MASK:
        num_out_bytes = (N + 7) // 8
        out_byte_cols = pid_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        out_bytes = load_mask_bytes(mask_ptr, offs_m, out_byte_cols, M, num_out_bytes)
        low_rank = tl.where(unpack_mask(out_bytes, BLOCK_M, BLOCK_N), low_rank, 0.0)
    y_acc += low_rank
    if HAS_ROW_SCALE:
        y_acc *= tl.load(row_scale_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n.to(tl.int64) * stride_bias, mask=offs_n < N, other=0.0).to(tl.float32)
        y_acc += tl.where(pid_k == 0, bias, 0.0)[None, :]
    store_tile(y_ptr + pid_k.to(tl.int64) * M * N, y_acc, offs_m, offs_n, M, N, N)


@retried("few_tokens")
def few_tokens(
    x: torch.Tensor,
    weight: torch.Tensor,
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
    y = x.new_empty((M, N))
    s = x.new_empty((M, R))
    y_planes, s_planes = planes_for(y, config.SPLIT), planes_for(s, config.SPLIT)
    drawn = x.new_empty((M, cdiv(K, 8)), dtype=torch.uint8) if threshold else None
    launch(
        few_tokens_kernel,
        (cdiv(N, config.BLOCK_N), cdiv(M, config.BLOCK_M), config.SPLIT),
        {
            "x_ptr": x,
            "w_ptr": weight,
            "a_ptr": lora_A,
            "b_ptr": lora_B,
            "bias_ptr": bias,
            "row_scale_ptr": None if row_scale is None else row_scale.contiguous(),
            "s_ptr": s_planes,
            "y_ptr": y_planes,
            "mask_ptr": drawn if threshold else mask,
            "seed_ptr": seed,
            "M": M,
            "N": N,
            "K": K,
            "R": R,
            "threshold": threshold,
            "s_scale": s_scale * inverse_keep(threshold),
            "y_scale": y_scale,
            "stride_xm": x.stride(0),
            "stride_xk": x.stride(1),
            "stride_wn": weight.stride(0),
            "stride_wk": weight.stride(1),
            "stride_ar": lora_A.stride(0),
            "stride_ak": lora_A.stride(1),
            "stride_bn": lora_B.stride(0),
            "stride_br": lora_B.stride(1),
            "stride_bias": 0 if bias is None else bias.stride(0),
        },
        {
            "HAS_BIAS": bias is not None,
            "HAS_ROW_SCALE": row_scale is not None,
            "DRAW_MASK": threshold > 0,
            "APPLY_MASK": mask is not None,
            "INPUT_PRECISION": input_precision(x),
            "BLOCK_M": config.BLOCK_M,
            "BLOCK_N": config.BLOCK_N,
            "BLOCK_K": config.BLOCK_K,
            "BLOCK_R": config.BLOCK_R,
        },
        config,
    )
    sum_planes(y_planes, y)
    sum_planes(s_planes, s)
    return y, s, drawn
