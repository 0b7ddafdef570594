"""y = x Wᵀ + scale · D'(S Bᵀ) + bias: a matrix product whose accumulator starts from, or ends with, the low-rank term.

With the strides of W and of B exchanged the same kernel is dx = dy W + D'(G A), where D'
multiplies by dropout's stored mask. It can also scale y by rows of W (DoRA), or, instead of storing y,
sum its products with another matrix over tokens: the gradient of that scale. The products of up to three
pairs of x and W go into one accumulator: dx of several projections of one input.

With LATE the loop over K starts at once and S joins at the end, so that a launch that is DEPENDENT multiplies while
the pass before it still makes S. With HALVES the tile is stored in two halves of columns, which take half the shared
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lorakernels.backend import interpreter_on
from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import device_of
from lorakernels.configs.table import choose
from lorakernels.kernels.launch import cdiv, input_precision, launch, may_depend, retried
from lorakernels.kernels.packed import unpack
from lorakernels.kernels.tiles import (
    NO_MATRIX,
    descriptor,
    drop,
    epilogue,
    finish,
    fits_descriptor,
    load_tile,
    plane,
    planes_for,
    sized,
    store_tile,
    sum_planes,
    tall,
    tile_of,
    transposed,
)
from lorakernels.weight import sum_products

MAX_PAIRS = 3  # of x and weight in one launch: q, k and v
NO_PAIR = (NO_MATRIX, NO_MATRIX)


class LowRank(NamedTuple):
    """scale · D'(S Bᵀ), as it goes into a kernel."""

    s: Any  # [M, R]
    b: Any  # [R, N]
    mask: Any
    scale: Any


@triton.jit
def multiply_ranks(acc, s, b, offs_m, offs_n, scale, INPUT_PRECISION: tl.constexpr, BLOCK_R: tl.constexpr):
    """acc + a tile of scale · s [M, R] times b [R, N]; scale may be None."""
    # Not pipelined: its buffers would come on top of the main loop's (r = 64: 304 KiB, where a block has 227).
    for r in tl.range(0, b.rows, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        s_tile, b_tile = load_tile(s, offs_m, offs_r), load_tile(b, offs_r, offs_n)
        if scale is not None:
            s_tile = (s_tile.to(tl.float32) * scale).to(s_tile.dtype)
        acc = tl.dot(s_tile, b_tile.to(s_tile.dtype), acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def _start(
    low_rank, pid_n, offs_m, offs_n, M,
    LATE: tl.constexpr, DEPENDENT: tl.constexpr, INPUT_PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What the accumulator starts from."""
    acc = tl.zeros((offs_m.shape[0], offs_n.shape[0]), dtype=tl.float32)
    if not LATE:
        if DEPENDENT:
            tl.extra.cuda.gdc_wait()
        b = low_rank.b
        acc = multiply_ranks(acc, low_rank.s, b, offs_m, offs_n, None, INPUT_PRECISION, BLOCK_R) * low_rank.scale
        if low_rank.mask is not None:
            acc = drop(acc, low_rank.mask, offs_m, pid_n, M, b.cols)
    return acc


@triton.jit
def _join(
    acc, low_rank, offs_m, offs_n,
    LATE: tl.constexpr, DEPENDENT: tl.constexpr, INPUT_PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The accumulator with what joins it at the end."""
    if LATE:
        if DEPENDENT:
            tl.extra.cuda.gdc_wait()
        # Scaled before it is multiplied: a second accumulator would take 61 registers more, and no pass over x or dy
        # would fit beside this kernel on a multiprocessor of sm_90. And not by halves: of accumulators that are halves
        # of another sm_90's assembler makes a main loop that waits for each of its matrix instructions.
        s, b, scale = low_rank.s, low_rank.b, low_rank.scale
        acc = multiply_ranks(acc, s, b, offs_m, offs_n, scale, INPUT_PRECISION, BLOCK_R)
    return acc


@triton.jit
def _end(acc, N, epilogue, dot, y_ptr, y_desc, row, block, M):
    """The block of this number of the accumulator's columns, finished and stored."""
    offs_m, offs_n = row + tl.arange(0, acc.shape[0]), block * acc.shape[1] + tl.arange(0, acc.shape[1])
    acc = finish(acc, epilogue, offs_n, N, None)
    if dot.ptr is not None:
        # Instead of y: this block's part of Σ over tokens of dot ∘ y. Rows past M are zero in both.
        acc *= load_tile(dot, offs_m, offs_n).to(tl.float32)
        dots_at = y_ptr + (row // acc.shape[0]).to(tl.int64) * N + offs_n
        tl.store(dots_at, tl.sum(acc, axis=0), mask=offs_n < N)
    elif y_desc is None:
        store_tile(plane(y_ptr, 0, M, N), acc, offs_m, offs_n)
    else:
        y_desc.store([row, block * acc.shape[1]], acc.to(y_desc.dtype))


@triton.jit
def _multiply_tma(acc, x, w, K, row, col, W_IS_NK: tl.constexpr, INPUT_PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    for k in range(0, K, BLOCK_K):
        x_tile = x.load([row, k])
        w_tile = w.load([col, k]).T if W_IS_NK else w.load([k, col])
        acc = tl.dot(x_tile, w_tile, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit(do_not_specialize=["M"])
def linear_expand_kernel(
    pairs,  # of x [M, K] and w [K, N]
    low_rank,
    epilogue,
    dot,  # [M, N], or no matrix
    y_ptr,  # with dot the sums of dot ∘ y, a row a block of tokens
    M,
    HAS_BASE: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    LATE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Any strides and sizes: a program a tile. With HAS_BASE y holds Σ x Wᵀ already, and nothing is multiplied."""
    R, N = low_rank.b.rows, low_rank.b.cols
    low_rank = LowRank(sized(low_rank.s, M, R), sized(low_rank.b, R, N), low_rank.mask, low_rank.scale)
    if dot.ptr is not None:
        dot = sized(dot, M, N)
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_BASE:  # asked for beside S and B, not after them
        y_tile = load_tile(plane(y_ptr, 0, M, N), offs_m, offs_n)
    acc = _start(low_rank, pid_n, offs_m, offs_n, M, LATE, DEPENDENT, INPUT_PRECISION, BLOCK_R)
    if HAS_BASE:
        acc += y_tile.to(tl.float32)
    else:
        for i in tl.static_range(NUM_PAIRS):
            x, w = pairs[i]
            K = x.cols
            x, w = sized(x, M, K), sized(w, K, N)
            for k in range(0, K, BLOCK_K):
                offs_k = k + tl.arange(0, BLOCK_K)
                x_tile, w_tile = load_tile(x, offs_m, offs_k), load_tile(w, offs_k, offs_n)
                acc = tl.dot(x_tile, w_tile, acc, input_precision=INPUT_PRECISION)
    acc = _join(acc, low_rank, offs_m, offs_n, LATE, DEPENDENT, INPUT_PRECISION, BLOCK_R)
    _end(acc, N, epilogue, dot, y_ptr, None, pid_m * BLOCK_M, pid_n, M)


@triton.jit(do_not_specialize=["M"])
def linear_expand_tma_kernel(
    x_desc,
    w_desc,
    x2_desc,
    w2_desc,
    x3_desc,
    w3_desc,
    y_desc,
    Ks,
    low_rank,
    epilogue,
    dot,
    dots_ptr,
    M,
    W_IS_NK: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    LATE: tl.constexpr,
    HALVES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Tiles of x, W and y through tensor descriptors; programs stay and take tile after tile.

    Descriptors are arguments by themselves: Triton 3.6 compiles a tuple of them, and cannot launch it.
    """
    R, N = low_rank.b.rows, low_rank.b.cols
    low_rank = LowRank(sized(low_rank.s, M, R), sized(low_rank.b, R, N), low_rank.mask, low_rank.scale)
    if dot.ptr is not None:
        dot = sized(dot, M, N)
    num_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        pid_m, pid_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_n = col + tl.arange(0, BLOCK_N)
        acc = _start(low_rank, pid_n, offs_m, offs_n, M, LATE, DEPENDENT, INPUT_PRECISION, BLOCK_R)
        acc = _multiply_tma(acc, x_desc, w_desc, Ks[0], row, col, W_IS_NK, INPUT_PRECISION, BLOCK_K)
        if NUM_PAIRS > 1:
            acc = _multiply_tma(acc, x2_desc, w2_desc, Ks[1], row, col, W_IS_NK, INPUT_PRECISION, BLOCK_K)
        if NUM_PAIRS > 2:
            acc = _multiply_tma(acc, x3_desc, w3_desc, Ks[2], row, col, W_IS_NK, INPUT_PRECISION, BLOCK_K)
        acc = _join(acc, low_rank, offs_m, offs_n, LATE, DEPENDENT, INPUT_PRECISION, BLOCK_R)
        if HALVES:
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            for half in tl.static_range(2):
                _end(tl.split(halves)[half], N, epilogue, dot, dots_ptr, y_desc, row, 2 * pid_n + half, M)
        else:
            _end(acc, N, epilogue, dot, dots_ptr, y_desc, row, pid_n, M)


@retried("linear_expand")
def linear_expand(
    x: torch.Tensor,
    weight: torch.Tensor,
    s: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    more: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    base: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    scale: float = 1.0,
    mask: torch.Tensor | None = None,
    dot: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M, N] of x [M, K], weight [N, K], s [M, r] of `low_rank_dtype` whose rows are contiguous, lora_B [N, r].

    `more` has further pairs of x [M, K'] and weight [N, K'], whose products are added. Where they are made already,
    `base` [M, N] has them, contiguous, and becomes y.
    `mask` [M, ceil(N / 8)] uint8 drops elements of the low-rank term, `row_scale` [N] multiplies all but the bias.
    With `dot` [M, N] the result is Σ over tokens of dot ∘ y, [N] float32, and y itself is never stored.
    """
    M = x.shape[0]
    N, R = lora_B.shape
    pairs = [(x, weight), *more]
    packed = any([not isinstance(w, torch.Tensor) for _, w in pairs])  # then torch multiplies what is unpacked
    w_is_nk = packed or weight.stride(1) == 1
    tma = (
        M > 0 and not packed and all(fits_descriptor(x) and fits_descriptor(w if w_is_nk else w.t()) for x, w in pairs)
    )
    tma = tma and base is None and (dot is not None or N * x.element_size() % 16 == 0)
    Ks = tuple(x.shape[1] if base is None else 0 for x, _ in pairs)
    config = choose("linear_expand", M, N, sum(Ks), R, x.element_size(), x.device, tma=tma)
    num_blocks_m = cdiv(M, config.BLOCK_M)
    num_tiles = num_blocks_m * cdiv(N, config.BLOCK_N)
    # More pairs than the kernel takes are rare, and a sum in y between two launches would be rounded there too.
    has_base = base is not None or (config.cublas and dot is None) or packed or len(pairs) > MAX_PAIRS
    if dot is not None:
        y = x.new_empty((N,), dtype=torch.float32)
        out = planes_for(y, num_blocks_m)
    elif base is not None:
        y = out = base
    else:
        products = [x for x, _ in pairs], [w for _, w in pairs]
        y = out = sum_products(*products, unpack) if has_base else x.new_empty((M, N))
    args = {
        "low_rank": LowRank(tall(s), transposed(lora_B), mask, scale),
        "epilogue": epilogue(row_scale, bias),
        "dot": NO_MATRIX if dot is None else tall(dot),
        "M": M,
    }
    late = config.late and not has_base and mask is None  # the mask is the low-rank term's alone
    constexprs = {
        "NUM_PAIRS": 1 if has_base else len(pairs),
        "LATE": late,
        # Tiles of x and W, or y, are read before the wait: not where the launch ahead may have written them, and is no
        # shrink.
        "DEPENDENT": config.dependent and may_depend(x.device) and R > 0 and dot is None and not has_base,
        "INPUT_PRECISION": input_precision(x),
    }
    resident = (min(num_tiles, device_of(x.device).processors * config.PROGRAMS_PER_SM),)
    # Of one pair without a mask, with a block of K for each stage but one. The interpreter knows no Gluon.
    gluon = config.gluon and tma and late and dot is None and not more and R > 0 and not interpreter_on()
    if gluon and Ks[0] > (config.num_stages - 2) * config.BLOCK_K:
        from lorakernels.kernels.linear_expand_gluon import linear_expand_gluon  # Triton may have no such Gluon

        w = weight if w_is_nk else weight.t()
        constexprs = {"W_IS_NK": w_is_nk, "DEPENDENT": constexprs["DEPENDENT"]}
        linear_expand_gluon(x, w, y, args["low_rank"], args["epilogue"], resident, constexprs, config)
    elif config.tma and tma and not has_base:
        descriptors = _descriptors(pairs, w_is_nk, config)
        y_desc = None if dot is not None else descriptor(y, (config.BLOCK_M, config.BLOCK_N // (1 + config.halves)))
        args = descriptors | {"y_desc": y_desc, "Ks": Ks, "dots_ptr": None if dot is None else out} | args
        constexprs |= {"W_IS_NK": w_is_nk, "HALVES": config.halves}
        launch(linear_expand_tma_kernel, resident, args, constexprs, config)
    else:
        matrices = (NO_PAIR,) if has_base else tuple((tall(x), transposed(w)) for x, w in pairs)
        args = {"y_ptr": out, "pairs": matrices} | args
        launch(linear_expand_kernel, (num_tiles,), args, {"HAS_BASE": has_base} | constexprs, config)
    sum_planes(out, y)
    return y


def _descriptors(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], w_is_nk: bool, config: KernelConfig
) -> dict[str, Any]:
    """By their names in the kernel; None where there is no pair."""
    x_block = (config.BLOCK_M, config.BLOCK_K)
    w_block = (config.BLOCK_N, config.BLOCK_K) if w_is_nk else (config.BLOCK_K, config.BLOCK_N)
    descs: dict[str, Any] = dict.fromkeys(name for pair in _DESCRIPTORS for name in pair)
    for names, (x, weight) in zip(_DESCRIPTORS, pairs, strict=False):
        w = weight if w_is_nk else weight.t()
        descs |= zip(names, (descriptor(x, x_block), descriptor(w, w_block)), strict=True)
    return descs


_DESCRIPTORS = (("x_desc", "w_desc"), ("x2_desc", "w2_desc"), ("x3_desc", "w3_desc"))
