"""Every launch that the shipped configurations make: what the compile gate compiles."""

from __future__ import annotations

import itertools

import torch

from lorakernels.kernels import lora_linear
from lorakernels.kernels.launch import Launch, record_launches

# float16 compiles to the same instructions as bfloat16, with the other operand type.
DTYPES = (torch.bfloat16, torch.float32)
# The few-token form with its smallest and largest block of rows, then the general form.
TOKENS = (1, 200, 8192)
# The narrowest and the widest BLOCK_R.
RANKS = (8, 64)
ALIGNED, ODD = (4096, 4096), (131, 97)


def shipped_launches() -> list[Launch]:
    """The launches of forward and backward over dtypes, forms, ranks, alignment and dropout, on meta tensors."""
    with record_launches() as launches:
        for dtype, M, r in itertools.product(DTYPES, TOKENS, RANKS):
            _step(dtype, dtype, M, r, ALIGNED, threshold=0, bias=True)
            _step(dtype, torch.float32, M, r, ALIGNED, threshold=6554, bias=False)
            _step(dtype, torch.float32, M, r, ALIGNED, threshold=0, bias=True, row_scale=True)
        for M in TOKENS:
            _step(torch.bfloat16, torch.bfloat16, M, 5, ODD, threshold=6554, bias=True, row_scale=True)
    return launches


def _step(
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    M: int,
    r: int,
    sizes: tuple[int, int],
    *,
    threshold: int,
    bias: bool,
    row_scale: bool = False,
) -> None:
    N, K = sizes

    def meta(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    x, dy, weight = meta(M, K), meta(M, N), meta(N, K)
    lora_A, lora_B = meta(r, K, of=adapter_dtype), meta(N, r, of=adapter_dtype)
    seed = meta(1, of=torch.int64) if threshold else None
    scale = meta(N, of=torch.float32) if row_scale else None
    _, s, mask = lora_linear.forward(x, weight, lora_A, lora_B, meta(N) if bias else None, scale, seed, 0.5, threshold)
    if row_scale:
        lora_linear.grad_row_scale(dy, x, weight, (s, lora_B), 0.5)
        lora_linear.project(weight, lora_A)
    lora_linear.backward(
        dy,
        x,
        weight,
        lora_A,
        lora_B,
        s,
        mask,
        0.5,
        threshold,
        need_dx=True,
        need_dA=True,
        need_dB=True,
        bias_dtype=dtype if bias else None,
    )
