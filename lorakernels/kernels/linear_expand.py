"""y = x Wᵀ + scale · D'(S Bᵀ) + bias: a matrix product whose accumulator starts from the low-rank term.

With the strides of W and of B exchanged the same kernel is dx = dy W + D'(G A), where D'
multiplies by dropout's stored mask. It can also scale y by rows of W (DoRA), or, instead of storing y,
sum its products with another matrix over tokens: the gradient of that scale. The products of up to three
pairs of x and W go into one accumulator: dx of several projections of one input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import num_processors
from lorakernels.configs.table import choose
from lorakernels.kernels.descriptors import descriptor, fits_descriptor
from lorakernels.kernels.launch import cdiv, input_precision, launch, retried
from lorakernels.kernels.sum_planes import planes_for, sum_planes
from lorakernels.kernels.tiles import load_mask_bytes, load_tile, store_tile, unpack_mask

_NUMBERS = ("", "2", "3")  # behind the arguments of each pair of x and weight in the kernels: q, k and v
MAX_PAIRS = len(_NUMBERS)
_POINTERS = {
    i: (f"x{i}_ptr", f"w{i}_ptr", f"K{i}", f"stride_x{i}m", f"stride_x{i}k", f"stride_w{i}n", f"stride_w{i}k")
    for i in _NUMBERS
}
# What a pair is where there is none.
_NO_POINTERS: dict[str, Any] = dict.fromkeys(name for names in _POINTERS.values() for name in names)
_NO_DESCRIPTORS: dict[str, Any] = dict.fromkeys(
    name for i in _NUMBERS for name in (f"x{i}_desc", f"w{i}_desc", f"K{i}")
)


@triton.jit
def _tile_of(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    # Programs that run together share rows of x and of W in L2: GROUP_M blocks of rows at a time.
    num_pid_m = tl.cdiv(M, BLOCK_M)
    num_pid_n = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * num_pid_n)
    rows_in_group = min(num_pid_m - group * GROUP_M, GROUP_M)
    tile_in_group = tile % (GROUP_M * num_pid_n)
    return group * GROUP_M + tile_in_group % rows_in_group, tile_in_group // rows_in_group


@triton.jit
def _low_rank(
    s_ptr,
    b_ptr,
    mask_ptr,
    pid_m,
    pid_n,
    M,
    N,
    R,
    scale,
    stride_sm,
    stride_bn,
    stride_br,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """What the accumulator starts from: scale · D'(S Bᵀ)."""
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Not pipelined: its buffers would come on top of the main loop's (r = 64: 304 KiB, where a block has 227).
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        s = load_tile(s_ptr, offs_m, offs_r, M, R, stride_sm, 1)
        b = load_tile(b_ptr, offs_r, offs_n, R, N, stride_br, stride_bn).to(s.dtype)
        acc = tl.dot(s, b, acc, input_precision=INPUT_PRECISION)
    acc *= scale
    if DROPOUT:
        num_mask_bytes = (N + 7) // 8
        byte_cols = pid_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
        mask_bytes = load_mask_bytes(mask_ptr, offs_m, byte_cols, M, num_mask_bytes)
        acc = tl.where(unpack_mask(mask_bytes, BLOCK_M, BLOCK_N), acc, 0.0)
    return acc


@triton.jit
def _multiply(
    acc,
    x_ptr,
    w_ptr,
    offs_m,
    offs_n,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, offs_m, offs_k, M, K, stride_xm, stride_xk)
        w = load_tile(w_ptr, offs_k, offs_n, K, N, stride_wk, stride_wn)
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def _multiply_tma(
    acc,
    x_desc,
    w_desc,
    row,
    col,
    K,
    W_IS_NK: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([row, k])
        if W_IS_NK:
            w = w_desc.load([col, k]).T
        else:
            w = w_desc.load([k, col])
        acc = tl.dot(x, w, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def _scale_and_bias(
    acc, row_scale_ptr, bias_ptr, offs_n, N, stride_bias, HAS_ROW_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr
):
    if HAS_ROW_SCALE:
        acc *= tl.load(row_scale_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n.to(tl.int64) * stride_bias, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _store_dot(acc, dot_ptr, out_ptr, pid_m, offs_m, offs_n, M, N, stride_dm, stride_dn):
    # Rows past M are zero in both.
    acc *= load_tile(dot_ptr, offs_m, offs_n, M, N, stride_dm, stride_dn).to(tl.float32)
    tl.store(out_ptr + pid_m.to(tl.int64) * N + offs_n, tl.sum(acc, axis=0), mask=offs_n < N)


@triton.jit(do_not_specialize=["M"])
def linear_expand_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    bias_ptr,
    row_scale_ptr,
    mask_ptr,
    dot_ptr,
    y_ptr,
    x2_ptr,
    w2_ptr,
    x3_ptr,
    w3_ptr,
    M,
    N,
    K,
    K2,
    K3,
    R,
    scale,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_x2m,
    stride_x2k,
    stride_w2n,
    stride_w2k,
    stride_x3m,
    stride_x3k,
    stride_w3n,
    stride_w3k,
    stride_sm,
    stride_bn,
    stride_br,
    stride_bias,
    stride_dm,
    stride_dn,
    HAS_BASE: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    DOT: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Any strides and sizes: a program a tile. With HAS_BASE y holds Σ x Wᵀ already, and nothing is multiplied."""
    pid_m, pid_n = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _low_rank(
        s_ptr, b_ptr, mask_ptr, pid_m, pid_n, M, N, R, scale, stride_sm, stride_bn, stride_br,
        DROPOUT, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    if HAS_BASE:
        acc += load_tile(y_ptr, offs_m, offs_n, M, N, N, 1).to(tl.float32)
    else:
        acc = _multiply(
            acc, x_ptr, w_ptr, offs_m, offs_n, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
            INPUT_PRECISION, BLOCK_K,
        )  # fmt: skip
        if NUM_PAIRS > 1:
            acc = _multiply(
                acc, x2_ptr, w2_ptr, offs_m, offs_n, M, N, K2, stride_x2m, stride_x2k, stride_w2n, stride_w2k,
                INPUT_PRECISION, BLOCK_K,
            )  # fmt: skip
        if NUM_PAIRS > 2:
            acc = _multiply(
                acc, x3_ptr, w3_ptr, offs_m, offs_n, M, N, K3, stride_x3m, stride_x3k, stride_w3n, stride_w3k,
                INPUT_PRECISION, BLOCK_K,
            )  # fmt: skip
    acc = _scale_and_bias(acc, row_scale_ptr, bias_ptr, offs_n, N, stride_bias, HAS_ROW_SCALE, HAS_BIAS)
    if DOT:
        _store_dot(acc, dot_ptr, y_ptr, pid_m, offs_m, offs_n, M, N, stride_dm, stride_dn)
    else:
        store_tile(y_ptr, acc, offs_m, offs_n, M, N, N)


@triton.jit(do_not_specialize=["M"])
def linear_expand_tma_kernel(
    x_desc,
    w_desc,
    x2_desc,
    w2_desc,
    x3_desc,
    w3_desc,
    y_desc,
    s_ptr,
    b_ptr,
    bias_ptr,
    row_scale_ptr,
    mask_ptr,
    dot_ptr,
    dots_ptr,
    M,
    N,
    K,
    K2,
    K3,
    R,
    scale,
    stride_sm,
    stride_bn,
    stride_br,
    stride_bias,
    stride_dm,
    stride_dn,
    W_IS_NK: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    DOT: tl.constexpr,
    DROPOUT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Tiles of x, W and y through tensor descriptors; programs stay and take tile after tile."""
    num_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        pid_m, pid_n = _tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = _low_rank(
            s_ptr, b_ptr, mask_ptr, pid_m, pid_n, M, N, R, scale, stride_sm, stride_bn, stride_br,
            DROPOUT, INPUT_PRECISION, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = _multiply_tma(acc, x_desc, w_desc, row, col, K, W_IS_NK, INPUT_PRECISION, BLOCK_K)
        if NUM_PAIRS > 1:
            acc = _multiply_tma(acc, x2_desc, w2_desc, row, col, K2, W_IS_NK, INPUT_PRECISION, BLOCK_K)
        if NUM_PAIRS > 2:
            acc = _multiply_tma(acc, x3_desc, w3_desc, row, col, K3, W_IS_NK, INPUT_PRECISION, BLOCK_K)
        acc = _scale_and_bias(acc, row_scale_ptr, bias_ptr, offs_n, N, stride_bias, HAS_ROW_SCALE, HAS_BIAS)
        if DOT:
            _store_dot(acc, dot_ptr, dots_ptr, pid_m, offs_m, offs_n, M, N, stride_dm, stride_dn)
        else:
            y_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N], acc.to(y_desc.dtype))


@retried("linear_expand")
def linear_expand(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    more: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    bias: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    scale: float = 1.0,
    mask: torch.Tensor | None = None,
    dot: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M, N] of x [M, K], weight [N, K], s [M, r] of x's dtype whose rows are contiguous, lora_B [N, r].

    `more` has further pairs of x [M, K'] and weight [N, K'], whose products are added.
    `mask` [M, ceil(N / 8)] uint8 drops elements of the low-rank term, `row_scale` [N] multiplies all but the bias.
    With `dot` [M, N] the result is Σ over tokens of dot ∘ y, [N] float32, and y itself is never stored.
    """
    M = x.shape[0]
    N, R = lora_B.shape
    pairs = [(x, weight), *more]
    w_is_nk = weight.stride(1) == 1
    tma = M > 0 and all(fits_descriptor(x) and fits_descriptor(w if w_is_nk else w.t()) for x, w in pairs)
    tma = tma and (dot is not None or N * x.element_size() % 16 == 0)
    summed = sum(x.shape[1] for x, _ in pairs)
    config = choose("linear_expand", M, N, summed, R, x.element_size(), x.device, tma=tma)
    num_blocks_m = cdiv(M, config.BLOCK_M)
    num_tiles = num_blocks_m * cdiv(N, config.BLOCK_N)
    # More pairs than the kernel takes are rare, and a sum in y between two launches would be rounded there too.
    base = (config.cublas and dot is None) or len(pairs) > MAX_PAIRS
    if dot is not None:
        y = x.new_empty((N,), dtype=torch.float32)
        out = planes_for(y, num_blocks_m)
    else:
        y = out = _products(pairs) if base else x.new_empty((M, N))
    args = {
        "s_ptr": s,
        "b_ptr": lora_B,
        "bias_ptr": bias,
        "row_scale_ptr": None if row_scale is None else row_scale.contiguous(),
        "mask_ptr": mask,
        "dot_ptr": dot,
        "M": M,
        "N": N,
        "R": R,
        "scale": scale,
        "stride_sm": s.stride(0),
        "stride_bn": lora_B.stride(0),
        "stride_br": lora_B.stride(1),
        "stride_bias": 0 if bias is None else bias.stride(0),
        "stride_dm": 0 if dot is None else dot.stride(0),
        "stride_dn": 0 if dot is None else dot.stride(1),
    }
    constexprs = {
        "NUM_PAIRS": 1 if base else len(pairs),
        "HAS_BIAS": bias is not None,
        "HAS_ROW_SCALE": row_scale is not None,
        "DOT": dot is not None,
        "DROPOUT": mask is not None,
        "INPUT_PRECISION": input_precision(x),
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "BLOCK_R": config.BLOCK_R,
        "GROUP_M": config.GROUP_M,
    }
    if config.tma and tma and not base:
        descriptors: dict[str, Any] = _NO_DESCRIPTORS | {
            "y_desc": None if dot is not None else descriptor(y, (config.BLOCK_M, config.BLOCK_N)),
            "dots_ptr": None if dot is None else out,
        }
        for i, (x_i, w_i) in zip(_NUMBERS, pairs, strict=False):
            descriptors |= _pair_descriptors(i, x_i, w_i, w_is_nk, config)
        grid = (min(num_tiles, num_processors(x.device) * config.PROGRAMS_PER_SM),)
        launch(linear_expand_tma_kernel, grid, descriptors | args, {"W_IS_NK": w_is_nk} | constexprs, config)
    else:
        pointers: dict[str, Any] = _NO_POINTERS | {"y_ptr": out}
        for i, (x_i, w_i) in zip(_NUMBERS, pairs[:1] if base else pairs, strict=False):
            pointers |= _pair_pointers(i, x_i, w_i)
        launch(linear_expand_kernel, (num_tiles,), pointers | args, {"HAS_BASE": base} | constexprs, config)
    sum_planes(out, y)
    return y


def _products(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Σ x Wᵀ by torch's own product."""
    (x, weight), *more = pairs
    y = torch.mm(x, weight.t())
    for x, weight in more:
        y.addmm_(x, weight.t())
    return y


def _pair_descriptors(
    i: str, x: torch.Tensor, weight: torch.Tensor, w_is_nk: bool, config: KernelConfig
) -> dict[str, Any]:
    w, block = (weight, (config.BLOCK_N, config.BLOCK_K)) if w_is_nk else (weight.t(), (config.BLOCK_K, config.BLOCK_N))
    x_desc = descriptor(x, (config.BLOCK_M, config.BLOCK_K))
    return {f"x{i}_desc": x_desc, f"w{i}_desc": descriptor(w, block), f"K{i}": x.shape[1]}


def _pair_pointers(i: str, x: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    strides = (*x.stride(), *weight.stride())
    return dict(zip(_POINTERS[i], (x, weight, x.shape[1], *strides), strict=True))
