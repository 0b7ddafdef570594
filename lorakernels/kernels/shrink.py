"""S = D(x) Aᵀ: one pass over x, which also draws dropout's mask and stores it, a bit an element."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorakernels.configs.table import choose
from lorakernels.dropout import inverse_keep
from lorakernels.kernels.launch import cdiv, input_precision, launch, retried
from lorakernels.kernels.sum_planes import planes_for, sum_planes
from lorakernels.kernels.tiles import draw_mask_bytes, load_tile, store_tile, unpack_mask


@triton.jit(do_not_specialize=["M", "threshold"])
def shrink_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    mask_ptr,
    seed_ptr,
    M,
    K,
    R,
    threshold,
    scale,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    pid_m = tl.program_id(0)
    pid_r = tl.program_id(1)
    pid_k = tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    if DROPOUT:
        seed = tl.load(seed_ptr)
        num_mask_bytes = (K + 7) // 8

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(pid_k * BLOCK_K, K, BLOCK_K * tl.num_programs(2)):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk)
        if DROPOUT:
            byte_cols = k // 8 + tl.arange(0, BLOCK_K // 8)
            mask_bytes = draw_mask_bytes(seed, offs_m, byte_cols, threshold)
            if pid_r == 0:
                store_tile(mask_ptr, mask_bytes, offs_m, byte_cols, M, num_mask_bytes, num_mask_bytes)
            x = tl.where(unpack_mask(mask_bytes, BLOCK_M, BLOCK_K), x, 0.0)
        a = load_tile(a_ptr, offs_k, offs_r, K, R, stride_ak, stride_ar).to(x.dtype)
        acc = tl.dot(x, a, acc, input_precision=INPUT_PRECISION)
    s_plane = s_ptr + pid_k.to(tl.int64) * M * R
    store_tile(s_plane, acc * scale, offs_m, offs_r, M, R, R)


@retried("shrink")
def shrink(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    seed: torch.Tensor | None = None,
    threshold: int = 0,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S [M, r] = scale · D(x) Aᵀ and dropout's mask [M, ceil(K / 8)] uint8 (None without dropout) of x [M, K].

    lora_A is [r, K]; S is in `dtype`, or x's: nobody multiplies it in another.
    """
    M, K = x.shape
    R = lora_A.shape[0]
    config = choose("shrink", M, K, K, R, x.element_size(), x.device)
    s = x.new_empty((M, R), dtype=dtype)
    planes = planes_for(s, config.SPLIT)
    mask = x.new_empty((M, cdiv(K, 8)), dtype=torch.uint8) if threshold else None
    launch(
        shrink_kernel,
        (cdiv(M, config.BLOCK_M), cdiv(R, config.BLOCK_R), config.SPLIT),
        {
            "x_ptr": x,
            "a_ptr": lora_A,
            "s_ptr": planes,
            "mask_ptr": mask,
            "seed_ptr": seed,
            "M": M,
            "K": K,
            "R": R,
            "threshold": threshold,
            "scale": scale * inverse_keep(threshold),
            "stride_xm": x.stride(0),
            "stride_xk": x.stride(1),
            "stride_ar": lora_A.stride(0),
            "stride_ak": lora_A.stride(1),
        },
        {
            "DROPOUT": threshold > 0,
            "INPUT_PRECISION": input_precision(x),
            "BLOCK_M": config.BLOCK_M,
            "BLOCK_K": config.BLOCK_K,
            "BLOCK_R": config.BLOCK_R,
        },
        config,
    )
    sum_planes(planes, s)
    return s, mask
