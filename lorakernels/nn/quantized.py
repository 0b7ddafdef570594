"""A linear layer whose frozen weight has 4 or 8 bits a number, and how a plain one becomes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorakernels import ops
from lorakernels.quant import int4, nf4, wide
from lorakernels.quant.packed import PackedWeight

FORMATS = ("nf4", "fp4", "int4", "int8", "fp8")


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + bias, its frozen weight [out_features, in_features] packed; the whole weight is never made.

    `weight` has the packed numbers and `scale`, `zero` what `PackedWeight` says: plain frozen parameters, which move,
    shard and save as any others.
    """

    def __init__(self, packed: PackedWeight, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.text, form = packed.text, packed.form
        self.out_features, self.in_features = packed.shape
        rows = packed.data if form.bits == 8 or form.K % 2 else packed.data.view(form.N, -1)
        for name, tensor in {"weight": rows, "scale": packed.scale, "zero": packed.zero, "bias": bias}.items():
            self.register_parameter(
                name, None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            )

    @property
    def packed(self) -> PackedWeight:
        own: Any = self._parameters
        return PackedWeight(self.text, own["weight"].detach(), own["scale"].detach(), own["zero"])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], in x's dtype."""
        bias = self._parameters["bias"]
        return ops.frozen_linear(input, self.packed, None if bias is None else bias.to(input.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.text}"


def pack(weight: torch.Tensor, kind: str, block: int = 64) -> PackedWeight:
    """weight [N, K] in one of `FORMATS`; `block` numbers share a scale in those of 4 bits, in the others a row does."""
    if kind not in FORMATS:
        raise ValueError(f"the format is {kind!r}; expected one of {', '.join(FORMATS)}")
    if kind == "int4":
        return int4.pack(weight, block)
    return nf4.pack(weight, kind, block) if kind in ("nf4", "fp4") else wide.pack(weight, kind)
