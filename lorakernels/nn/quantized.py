"""A linear layer whose frozen weight has 4 or 8 bits a number, and how a plain one becomes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorakernels import ops
from lorakernels.quant import int4, mx, nf4, wide
from lorakernels.quant.packed import PackedWeight
from lorakernels.quant.stacks import PackedStack

FORMATS = ("nf4", "fp4", "mxfp4", "int4", "int8", "fp8")
PARTS = PackedWeight._fields[2:]


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + bias, its frozen weight [out_features, in_features] packed; the whole weight is never made.

    `weight` has the packed numbers and `scale`, `zero`, `table`, `absmax`, `offset` what `PackedWeight` says: plain
    frozen parameters, which move, shard and save as any others.
    """

    def __init__(self, packed: PackedWeight, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.text, form = packed.text, packed.form
        self.out_features, self.in_features = packed.shape
        rows = packed.data if form.bits == 8 or form.K % 2 else packed.data.view(form.N, -1)
        parts = dict(zip(PARTS, packed.parts, strict=True))
        for name, tensor in {"weight": rows, **parts, "bias": bias}.items():
            self.register_parameter(
                name, None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            )

    @property
    def packed(self) -> PackedWeight:
        own: Any = self._parameters
        return PackedWeight(self.text, own["weight"].detach(), *(own[name] for name in PARTS))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], in x's dtype."""
        bias = self._parameters["bias"]
        return ops.frozen_linear(input, self.packed, None if bias is None else bias.to(input.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.text}"


def pack(weight: torch.Tensor, kind: str, block: int | None = None, double_quant: bool = False) -> PackedWeight:
    """weight [N, K] in one of `FORMATS`; in those of 4 bits `block` numbers share a scale, 64 if nothing is said.

    Of "mxfp4" there are always 32; of 8 bits it is a row. `double_quant` packs the scales of "nf4" and "fp4" too.
    """
    if kind not in FORMATS:
        raise ValueError(f"the format is {kind!r}; expected one of {', '.join(FORMATS)}")
    if double_quant and kind not in ("nf4", "fp4"):
        raise ValueError(f"double_quant is for nf4 and fp4, whose scales are float32; the format is {kind}")
    if kind == "mxfp4":
        if block not in (None, mx.BLOCK):
            raise ValueError(f"{kind} in blocks of {block}; its specification has {mx.BLOCK}")
        return mx.pack(weight)
    if kind in ("nf4", "fp4"):
        return nf4.pack(weight, kind, block or 64, double_quant)
    return int4.pack(weight, block or 64) if kind == "int4" else wide.pack(weight, kind)


def pack_stack(weight: torch.Tensor, kind: str, block: int | None = None, double_quant: bool = False) -> PackedStack:
    """weight [E, N, K] as `pack` packs each expert's.

    Raises what that does, and ValueError where an expert is not of whole blocks.
    """
    return PackedStack.of_packed(pack(weight.flatten(0, 1), kind, block, double_quant), weight.shape[0])
