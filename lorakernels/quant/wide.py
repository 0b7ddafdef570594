"""Weights of 8 bits: int8 with a scale a row, and float8 with a scale a row or a block."""

from __future__ import annotations

from typing import Any

import torch

from lorakernels.quant.packed import Form, PackedWeight

FP8 = torch.float8_e4m3fn


@torch.no_grad()
def pack(weight: torch.Tensor, kind: str) -> PackedWeight:
    """weight [N, K] of any float dtype, int8 or fp8 with a scale a row: its largest magnitude is 127, or 448."""
    N, K = weight.shape
    wide = weight.float()
    most = 127.0 if kind == "int8" else torch.finfo(FP8).max
    scale = (wide.abs().amax(1, keepdim=True) / most).clamp(min=1e-12)
    data = wide / scale
    data = data.round().to(torch.int8) if kind == "int8" else data.to(FP8)
    return PackedWeight(str(Form(kind, N, K, 1, K, weight.dtype)), data, scale)


def read_bitsandbytes(weight: Any) -> PackedWeight:
    """The weight of a `bitsandbytes.nn.Linear8bitLt`: W = CB · SCB / 127, its activations left as they are."""
    data, scale = weight.data if weight.CB is None else weight.CB, weight.SCB
    if data.dtype is not torch.int8 or scale is None:
        raise ValueError(
            "the base weight is a bitsandbytes.nn.Int8Params that is not quantised yet: move the layer to its device "
            "first, which packs it"
        )
    N, K = data.shape
    return PackedWeight(str(Form("int8", N, K, 1, K, torch.float16)), data, (scale / 127)[:, None])


def read_blocks(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> PackedWeight:
    """float8 [N, K] and scales [⌈N / b⌉, ⌈K / b⌉], blocks of b × b as DeepSeek ships them (`weight_scale_inv`)."""
    (N, K), (rows, cols) = weight.shape, scale.shape
    block = next((b for b in (128, 64, 32, 256) if -(-N // b) == rows and -(-K // b) == cols), None)
    if weight.dtype is not FP8 or block is None:
        raise ValueError(
            f"the base weight is {list(weight.shape)} {weight.dtype} with scales {list(scale.shape)}; expected {FP8} "
            "and a scale for each block of 128 × 128"
        )
    return PackedWeight(str(Form("fp8", N, K, block, block, dtype)), weight, scale)
