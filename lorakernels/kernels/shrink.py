"""S = D(x) Aᵀ: one pass over x, which also draws dropout's mask and stores it, a bit an element."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorakernels.configs.table import choose
from lorakernels.dropout import inverse_keep
from lorakernels.kernels.launch import cdiv, launch, may_depend, retried
from lorakernels.kernels.tiles import (
    dot_factor,
    draw,
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


@triton.jit(do_not_specialize=["M", "threshold"])
def shrink_kernel(
    x,  # [M, K]
    a,  # [K, R]
    s_ptr,
    mask_ptr,
    seed_ptr,  # None without dropout
    M,
    threshold,
    scale,
    SIGNALS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    if SIGNALS:  # a launch that is dependent may start while this one still runs
        tl.extra.cuda.gdc_launch_dependents()
    pid_m = tl.program_id(0)
    pid_r = tl.program_id(1)
    pid_k = tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    K, R = x.cols, a.cols
    x, a = sized(x, M, K), sized(a, K, R)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(pid_k * BLOCK_K, K, BLOCK_K * tl.num_programs(2)):
        offs_k = k + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, offs_m, offs_k)
        if seed_ptr is not None:
            x_tile = draw(x_tile, mask_ptr, seed, threshold, offs_m, k, M, K, pid_r == 0)
        acc = dot_factor(x_tile, load_tile(a, offs_k, offs_r), acc, INPUT_PRECISION)
    store_tile(plane(s_ptr, pid_k, M, R), acc * scale, offs_m, offs_r)


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

    lora_A is [r, K]; S is in `dtype`, or that of `low_rank_dtype`.
    """
    M, K = x.shape
    R = lora_A.shape[0]
    config = choose("shrink", M, K, K, R, x.element_size(), x.device)
    s = x.new_empty((M, R), dtype=dtype or low_rank_dtype(x.dtype))
    planes = planes_for(s, config.SPLIT)
    mask = x.new_empty((M, cdiv(K, 8)), dtype=torch.uint8) if threshold else None
    launch(
        shrink_kernel,
        (cdiv(M, config.BLOCK_M), cdiv(R, config.BLOCK_R), config.SPLIT),
        {
            "x": tall(x),
            "a": transposed(lora_A),
            "s_ptr": planes,
            "mask_ptr": mask,
            "seed_ptr": seed if threshold else None,
            "M": M,
            "threshold": threshold,
            "scale": scale * inverse_keep(threshold),
        },
        {"SIGNALS": may_depend(x.device), **summed_columns(x, lora_A, config, tall=True)},
        config,
    )
    sum_planes(planes, s)
    return s, mask
