"""y = x W_eᵀ + S B_eᵀ + bias_e of rows sorted by expert: a grouped product whose accumulator starts from the low rank.

With the strides of W, and of B's and A's rows, exchanged the same kernel is dx = dy W_e + D'(G A_e).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import device_of
from lorakernels.configs.table import choose
from lorakernels.kernels.launch import cdiv, input_precision, launch, retried
from lorakernels.kernels.linear_expand import multiply_ranks
from lorakernels.kernels.packed import form_of, load_packed_kn, weight_matrix
from lorakernels.kernels.tiles import (
    Matrix,
    descriptor,
    drop,
    fits_descriptor,
    load_tile,
    plane,
    sized,
    store_tile,
    tall,
    tile_of,
)
from lorakernels.plan_layout import num_tiles, plan_layout
from lorakernels.quant.stacks import PackedStack
from lorakernels.route import TALL


class Stack(NamedTuple):
    """A matrix [rows, cols] of each expert, as it goes into a kernel."""

    ptr: Any
    rows: Any
    cols: Any
    strides: Any  # of expert, row and column


def stack(tensor: torch.Tensor) -> Stack:
    """A tensor [E, rows, cols] of any strides."""
    _, rows, cols = tensor.shape
    return Stack(tensor, rows, cols, tensor.stride())


@triton.jit
def _of_expert(stack, expert, num_rows, num_cols):
    return Matrix(stack.ptr + expert * stack.strides[0], num_rows, num_cols, (stack.strides[1], stack.strides[2]))


@triton.jit
def _tile(tiles_ptr, pid_m, num_experts):
    """The expert of a tile, whether there is one, and its first row and its end."""
    slot, first, end = (
        tl.load(tiles_ptr + pid_m * 3),
        tl.load(tiles_ptr + pid_m * 3 + 1),
        tl.load(tiles_ptr + pid_m * 3 + 2),
    )
    return tl.minimum(slot, num_experts - 1).to(tl.int64), slot < num_experts, first, end


@triton.jit
def _start(s, b, mask_ptr, pid_n, rows, offs_n, P, INPUT_PRECISION: tl.constexpr, BLOCK_R: tl.constexpr):
    """What the accumulator starts from: S B_e, through dropout's mask if there is one."""
    acc = tl.zeros((rows.shape[0], offs_n.shape[0]), dtype=tl.float32)
    acc = multiply_ranks(acc, s, b, rows, offs_n, None, INPUT_PRECISION, BLOCK_R)
    if mask_ptr is not None:
        acc = drop(acc, mask_ptr, rows, pid_n, P, b.cols)
    return acc


@triton.jit
def _finish(acc, bias_ptr, y_ptr, expert, is_known, rows, offs_n, end, N):
    if bias_ptr is not None:
        inside = offs_n < tl.where(is_known, N, 0)
        acc += tl.load(bias_ptr + expert * N + offs_n, mask=inside, other=0.0).to(tl.float32)[None, :]
    store_tile(plane(y_ptr, 0, end, N), acc, rows, offs_n)


@triton.jit(do_not_specialize=["P", "num_tiles"])
def expert_expand_kernel(
    x,
    w,  # [K, N] of each expert
    s,
    b,  # [R, N] of each expert
    mask_ptr,
    bias_ptr,
    y_ptr,
    tiles_ptr,
    P,
    num_tiles,
    num_experts,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Any strides and sizes: a program a tile. Rows past an expert's end are the next one's, and are not stored."""
    K, N, R = w.rows, w.cols, b.rows
    x, s = sized(x, P, K), sized(s, P, R)  # behind the branch Triton 3.6 takes no None in a tuple
    pid_m, pid_n = tile_of(tl.program_id(0), num_tiles * BLOCK_M, N, BLOCK_M, BLOCK_N, GROUP_M)
    expert, is_known, first, end = _tile(tiles_ptr, pid_m, num_experts)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _start(s, _of_expert(b, expert, R, N), mask_ptr, pid_n, rows, offs_n, P, INPUT_PRECISION, BLOCK_R)
    w = _of_expert(w, expert, K, N)
    for k in range(0, tl.where(is_known, K, 0), BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        acc = tl.dot(load_tile(x, rows, offs_k), load_tile(w, offs_k, offs_n), acc, input_precision=INPUT_PRECISION)
    _finish(acc, bias_ptr, y_ptr, expert, is_known, rows, offs_n, end, N)


@triton.jit(do_not_specialize=["P", "num_tiles"])
def expert_expand_tma_kernel(
    x_desc,
    w_desc,  # the stack as one matrix, [E · N, K] with W_IS_NK and else [E · K, N]
    s,
    b,
    mask_ptr,
    bias_ptr,
    y_ptr,
    tiles_ptr,
    K,
    P,
    num_tiles,
    num_experts,
    W_IS_NK: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Tiles of x and W through tensor descriptors; programs stay and take tile after tile.

    A tile's rows past an expert's end, and its columns past N, are another expert's, and are not stored.
    """
    R, N = b.rows, b.cols
    s = sized(s, P, R)
    for tile in tl.range(tl.program_id(0), num_tiles * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        pid_m, pid_n = tile_of(tile, num_tiles * BLOCK_M, N, BLOCK_M, BLOCK_N, GROUP_M)
        expert, is_known, first, end = _tile(tiles_ptr, pid_m, num_experts)
        if first < end:
            col = pid_n * BLOCK_N
            rows, offs_n = first + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
            acc = _start(s, _of_expert(b, expert, R, N), mask_ptr, pid_n, rows, offs_n, P, INPUT_PRECISION, BLOCK_R)
            row = expert.to(tl.int32) * (N if W_IS_NK else K)
            for k in range(0, tl.where(is_known, K, 0), BLOCK_K):
                w_tile = w_desc.load([row + col, k]).T if W_IS_NK else w_desc.load([row + k, col])
                acc = tl.dot(x_desc.load([first, k]), w_tile, acc, input_precision=INPUT_PRECISION)
            _finish(acc, bias_ptr, y_ptr, expert, is_known, rows, offs_n, end, N)


@triton.jit(do_not_specialize=["P", "num_tiles"])
def expert_expand_packed_kernel(
    x,
    w,  # the stack as it lies, [E · rows, columns]
    s,
    b,
    mask_ptr,
    bias_ptr,
    y_ptr,
    tiles_ptr,
    K,
    P,
    num_tiles,
    num_experts,
    W_FORM: tl.constexpr,
    PER: tl.constexpr,
    GROUP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """As `expert_expand_kernel`, with tiles of W that are unpacked in registers."""
    N, R = b.cols, b.rows
    x, s = sized(x, P, K), sized(s, P, R)
    pid_m, pid_n = tile_of(tl.program_id(0), num_tiles * BLOCK_M, N, BLOCK_M, BLOCK_N, GROUP_M)
    expert, is_known, first, end = _tile(tiles_ptr, pid_m, num_experts)
    rows = first + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _start(s, _of_expert(b, expert, R, N), mask_ptr, pid_n, rows, offs_n, P, INPUT_PRECISION, BLOCK_R)
    own = w.rows // num_experts
    begin = expert.to(tl.int32) * own
    # No return before W is read: behind a branch Triton 3.6 takes no None in a tuple.
    for k in range(0, tl.where(is_known & (first < end), K, 0), BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, rows, offs_k)
        if W_FORM < 8:  # rows past an expert's are none of it
            at = tl.where(offs_n < own, begin + offs_n, w.rows)
            w_tile = load_packed_kn(w, offs_k, at, k, 0, x_tile.dtype, W_FORM, PER, GROUP)
        else:
            at = tl.where(offs_k < own, begin + offs_k, w.rows)
            w_tile = load_packed_kn(w, at, offs_n, 0, pid_n * BLOCK_N, x_tile.dtype, W_FORM, PER, GROUP)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=INPUT_PRECISION)
    _finish(acc, bias_ptr, y_ptr, expert, is_known, rows, offs_n, end, N)


@retried("linear_expand")
def expert_expand(
    x: torch.Tensor,
    weight: torch.Tensor | PackedStack,
    s: torch.Tensor,
    rank_rows: torch.Tensor,
    plan: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [P, N] of x [P, K] sorted by expert, weight [E, N, K], s [P, r] of `low_rank_dtype`, rank_rows [E, r, N].

    A packed weight is one that `fits_kernel`. `plan` is a route's; `mask` [P, ceil(N / 8)] uint8 drops elements of the
    low-rank term; bias is [E, N].
    """
    (P, K), (E, N, _), R = x.shape, weight.shape, s.shape[1]
    tma = w_is_nk = False
    if isinstance(weight, torch.Tensor):
        w_is_nk = weight.stride(2) == 1
        flat = weight if w_is_nk else weight.mT
        dense = flat.stride(0) == flat.shape[1] * flat.stride(1)
        tma = P > 0 and dense and fits_descriptor(x) and fits_descriptor(flat[0])
    config = _config(x, N, K, R, E, tma)
    # Of a stack [E, K, N] the rows past K are the next expert's, of which x must have none.
    tma = tma and config.tma and (w_is_nk or K % config.BLOCK_K == 0)
    if isinstance(weight, PackedStack):
        block_k = 64 if x.element_size() <= 2 else 16
        config = dataclasses.replace(
            config, BLOCK_M=min(config.BLOCK_M, 64), BLOCK_N=64, BLOCK_K=block_k, num_warps=4, num_stages=2
        )
    y = x.new_empty((P, N))
    layout = plan_layout(E, P)
    tiles_at = {16: layout.tiles[0], 64: layout.tiles[1], TALL: layout.size}[config.BLOCK_M]
    tiles = num_tiles(P, E, config.BLOCK_M)
    args: dict[str, Any] = {
        "s": tall(s),
        "b": stack(rank_rows),
        "mask_ptr": mask,
        "bias_ptr": None if bias is None else bias.contiguous(),
        "y_ptr": y,
        "tiles_ptr": plan[tiles_at:],
        "P": P,
        "num_tiles": tiles,
        "num_experts": E,
    }
    constexprs: dict[str, Any] = {"INPUT_PRECISION": input_precision(x)}
    blocks = tiles * cdiv(N, config.BLOCK_N)
    if isinstance(weight, PackedStack):
        inner = weight.weight.t() if weight.flipped else weight.weight
        constexprs |= form_of(inner, x.dtype, config.BLOCK_N if weight.flipped else config.BLOCK_K)
        packed = {"x": tall(x), "w": weight_matrix(inner), "K": K}
        launch(expert_expand_packed_kernel, (blocks,), packed | args, constexprs, config)
    elif tma:
        w_block = (config.BLOCK_N, config.BLOCK_K) if w_is_nk else (config.BLOCK_K, config.BLOCK_N)
        matrix = flat.flatten(0, 1)
        descs = {"x_desc": descriptor(x, (config.BLOCK_M, config.BLOCK_K)), "w_desc": descriptor(matrix, w_block)}
        grid = (min(blocks, device_of(x.device).processors * config.PROGRAMS_PER_SM),)
        launch(expert_expand_tma_kernel, grid, descs | {"K": K} | args, {"W_IS_NK": w_is_nk} | constexprs, config)
    else:
        launch(expert_expand_kernel, (blocks,), {"x": tall(x), "w": stack(weight.mT)} | args, constexprs, config)
    return y


def _config(x: torch.Tensor, N: int, K: int, R: int, num_experts: int, tma: bool) -> KernelConfig:
    """What `linear_expand` takes of as many rows, in tiles that an expert fills."""
    P, per_expert = x.shape[0], x.shape[0] // num_experts
    config = choose("linear_expand", P, N, K, R, x.element_size(), x.device, tma=tma)
    if per_expert <= 16:
        return dataclasses.replace(config, BLOCK_M=16, BLOCK_N=min(config.BLOCK_N, 64), num_warps=4, tma=False)
    height = TALL if config.BLOCK_M >= TALL and per_expert >= 96 else 64
    # Exact float32 products of 32 features spill 8 bytes on sm_80, by triton 3.6.
    block_k = config.BLOCK_K if x.element_size() <= 2 else min(config.BLOCK_K, 16)
    return dataclasses.replace(config, BLOCK_M=height, BLOCK_K=block_k)
