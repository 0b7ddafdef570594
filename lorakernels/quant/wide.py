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


def read_bitsandbytes(layer: Any) -> PackedWeight:
    """The weight of a `bitsandbytes.nn.Linear8bitLt`: W = CB · SCB / 127."""
    weight = layer.weight
    data, scale = weight.data if weight.CB is None else weight.CB, weight.SCB
    if data.dtype is not torch.int8 or scale is None:
        raise ValueError(
            "the base weight is a bitsandbytes.nn.Int8Params that is not quantised yet: move the layer to its device "
            "first, which packs it"
        )
    N, K = data.shape
    return PackedWeight(str(Form("int8", N, K, 1, K, torch.float16)), data, (scale / 127)[:, None])


def read_torchao(weight: Any) -> PackedWeight:
    """torchao's int8 and float8 weights, with a scale a row, a group of a row, or one.

    Raises ValueError for any other of its tensors, and for one whose product rounds the activations.
    """
    name = type(weight).__qualname__
    if name not in ("Int8Tensor", "Float8Tensor") or weight.qdata.dtype not in (torch.int8, FP8):
        raise ValueError(f"the base weight is torchao's {name}; expected its Int8Tensor, or Float8Tensor of {FP8}")
    if any(getattr(weight, f"act_{what}", None) is not None for what in ("quant_kwargs", "quant_scale", "pre_scale")):
        raise ValueError(
            f"the base weight is torchao's {name} that rounds the activations, and gives them no gradient; quantise "
            "the model with Int8WeightOnlyConfig or Float8WeightOnlyConfig"
        )
    (N, K), (rows, cols) = weight.qdata.shape, weight.block_size
    kind = "int8" if name == "Int8Tensor" else "fp8"
    zero = getattr(weight, "zero_point", None)
    return PackedWeight(str(Form(kind, N, K, rows, cols, weight.dtype)), weight.qdata, weight.scale, zero)


def read_transformers(layer: Any) -> PackedWeight:
    """The weight of transformers' `FP8Linear`: float8 [N, K] and a scale for each block, 128 × 128 as DeepSeek has it.

    Raises ValueError where scales and blocks do not fit.
    """
    weight, scale = layer.weight, layer.weight_scale_inv
    N, K = weight.shape
    rows, cols = layer.block_size or (N, K)
    expected = (-(-N // rows), -(-K // cols))
    if weight.dtype is not FP8 or scale is None or scale.numel() != expected[0] * expected[1]:
        given = None if scale is None else list(scale.shape)
        raise ValueError(
            f"the base weight is {[N, K]} {weight.dtype} with scales {given}; expected {FP8} and scales "
            f"{list(expected)}, one for each block of {rows} × {cols}"
        )
    return PackedWeight(str(Form("fp8", N, K, rows, cols, torch.bfloat16)), weight, scale.view(expected))
