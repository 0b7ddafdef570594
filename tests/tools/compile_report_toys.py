# mypy: disable-error-code="no-untyped-def"
"""Toy kernels with a known verdict. Run as a script, outside the interpreter, it prints their report as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
import triton
import triton.language as tl
from rich.console import Console

from lorakernels.configs.config import KernelConfig
from lorakernels.kernels.launch import launch, record_launches
from lorakernels.tools.compile_report import _specialise, compile_report, report_table


@triton.jit
def matmul(
    x_ptr, w_ptr, bias_ptr, y_ptr, M, N, K, scale, stride_xk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_m[:, None] * K + offs_k[None, :] * stride_xk, mask=offs_m[:, None] < M, other=0.0)
        w = tl.load(w_ptr + offs_n[None, :] * K + offs_k[:, None], mask=offs_n[None, :] < N, other=0.0)
        acc = tl.dot(x, w, acc)
    acc *= scale
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))


@triton.jit(do_not_specialize=["step"])
def narrow(
    x_ptr, w_ptr, y_ptr, N, K, step,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs_m[:, None] * K + offs_k[None, :] * step)  # nobody knows that step is 1
        acc = tl.dot(x, tl.load(w_ptr + offs_n[None, :] * K + offs_k[:, None]), acc)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty))


@triton.jit
def linear_expand_toy(
    x_ptr, w_ptr, y_ptr, M, N, K, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    offs = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + offs[:, None] * K + offs_k[None, :])
        w = tl.load(w_ptr + offs[None, :] * K + offs_k[:, None])
        if DOT:
            acc = tl.dot(x, w, acc)
        else:
            # Halved inside the sum: of the product alone Triton would make a dot.
            acc += tl.sum(0.5 * (x.to(tl.float32)[:, :, None] * w.to(tl.float32)[None, :, :]), axis=1)
    tl.store(y_ptr + offs[:, None] * N + offs[None, :], acc.to(y_ptr.dtype.element_ty))


@triton.jit
def spiller(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    first = tl.zeros((BLOCK,), dtype=tl.float32)
    second = first + 1
    for k in range(count):
        first = first * second + tl.load(x_ptr + k * BLOCK + offs)
        second += first
    tl.store(y_ptr + offs, first)


@triton.jit
def refused(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 32, "only 32 will do")
    tl.store(x_ptr + tl.arange(0, BLOCK), 0.0)


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def matmul_launch(rows: int, block: int, num_warps: int, num_stages: int) -> None:
    x = meta(rows, 1024, dtype=torch.bfloat16)
    config = KernelConfig(BLOCK_M=block, BLOCK_N=block, BLOCK_K=block, num_warps=num_warps, num_stages=num_stages)
    args = dict(x_ptr=x, w_ptr=x, bias_ptr=None, y_ptr=x, M=rows, N=1024, K=1024, scale=0.5, stride_xk=1)
    launch(matmul, (8, 8), args, dict(BLOCK_M=block, BLOCK_N=block, BLOCK_K=block), config)


def spiller_launch(block: int) -> None:
    x = meta(1 << 20, dtype=torch.float32)
    launch(spiller, (1,), dict(x_ptr=x, y_ptr=x, count=7), dict(BLOCK=block), KernelConfig(num_warps=1))


def narrow_launch(K: int) -> None:
    x = meta(64, K, dtype=torch.bfloat16)
    blocks = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)
    launch(narrow, (1,), dict(x_ptr=x, w_ptr=x, y_ptr=x, N=64, K=K, step=1), blocks, KernelConfig(BLOCK_M=K))


def product_launch(dot: bool, M: int, block: int) -> None:
    x = meta(M, 1024, dtype=torch.bfloat16)
    args = dict(x_ptr=x, w_ptr=x, y_ptr=x, M=M, N=1024, K=1024)
    constexprs = dict(DOT=dot, BLOCK_N=block, BLOCK_K=block)
    launch(linear_expand_toy, (1,), args, constexprs, KernelConfig(BLOCK_M=M, BLOCK_N=block))


if __name__ == "__main__":
    with record_launches() as everywhere:
        matmul_launch(512, block=64, num_warps=4, num_stages=3)
        matmul_launch(1024, block=64, num_warps=4, num_stages=3)  # the same machine code: 1024 is a multiple of 16 too
        launch(refused, (1,), dict(x_ptr=meta(64, dtype=torch.float32)), dict(BLOCK=64), KernelConfig())
    with record_launches() as on_both:  # a compiler each
        matmul_launch(512, block=128, num_warps=8, num_stages=4)
        narrow_launch(1024)
        product_launch(dot=False, M=64, block=16)
    with record_launches() as on_hopper:
        narrow_launch(1000)  # rows that start at multiples of 8: no promise of 16 bytes is broken
        product_launch(dot=True, M=512, block=64)  # the same machine code as the next: the larger is judged
        product_launch(dot=True, M=1024, block=64)
        product_launch(dot=True, M=1008, block=32)
        spiller_launch(8192)
    with record_launches() as on_amd:
        spiller_launch(16384)  # an AMD warp has four times the registers
    rows = compile_report(everywhere) + compile_report(on_both, ["sm_90", "gfx942"])
    rows += compile_report(on_hopper, ["sm_90"]) + compile_report(on_amd, ["gfx942"])
    assert compile_report(everywhere[:2], ["sm_90"], jobs=1) == rows[1:2]
    Console(width=200, stderr=True).print(report_table(rows))
    signature = _specialise(everywhere[0], "sm_90").source.signature
    print(json.dumps({"signature": signature, "rows": [asdict(row) for row in rows]}))
