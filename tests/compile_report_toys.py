# mypy: disable-error-code="no-untyped-def"
"""Toy kernels with a known verdict. Run as a script, outside the interpreter, it prints their report as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
import triton
import triton.language as tl
from rich.console import Console

from lorakernels.kernels.launch import launch, record_launches
from lorakernels.tuning.compile_report import ARCHS, _specialise, compile_launch, compile_report, report_table
from lorakernels.tuning.config import KernelConfig


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


if __name__ == "__main__":
    with record_launches() as everywhere:
        matmul_launch(512, block=64, num_warps=4, num_stages=3)
        matmul_launch(1024, block=64, num_warps=4, num_stages=3)  # the same machine code: 1024 is a multiple of 16 too
        matmul_launch(512, block=128, num_warps=8, num_stages=4)
        launch(refused, (1,), dict(x_ptr=meta(64, dtype=torch.float32)), dict(BLOCK=64), KernelConfig())
    with record_launches() as on_nvidia:
        spiller_launch(8192)
    with record_launches() as on_amd:
        spiller_launch(16384)  # an AMD warp has four times the registers
    nvidia = [arch for arch in ARCHS if arch.startswith("sm_")]
    rows = compile_report(everywhere) + compile_report(on_nvidia, nvidia) + compile_report(on_amd, ["gfx942"])
    assert compile_launch(everywhere[0], "sm_90") == rows[1]
    assert compile_report(everywhere[:2], ["sm_90"], jobs=1) == rows[1:2]
    Console(width=200, stderr=True).print(report_table(rows))
    signature = _specialise(everywhere[0], "sm_90").source.signature
    print(json.dumps({"signature": signature, "rows": [asdict(row) for row in rows]}))
