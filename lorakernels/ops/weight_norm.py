"""The norms of an adapted weight's rows, for DoRA: operators, so that torch.compile sees one call and no loop."""

from __future__ import annotations

from typing import Any

import torch

from lorakernels.eager import weight_norm
from lorakernels.ops.operator import Operator, implementation
from lorakernels.quant.packed import PackedWeight
from lorakernels.weight import parts_of


def _norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    base_norm: torch.Tensor,
    scaling: float,
    impl: str,
) -> torch.Tensor:
    projected, multiplied_A = implementation(impl, weight).project(weight, lora_A)
    return weight_norm.from_projection(projected, multiplied_A, lora_B, base_norm, scaling)


ROW_NORM = Operator(
    "row_norm(Tensor weight) -> Tensor",
    weight_norm.row_norm,
    lambda weight: weight.new_empty(weight.shape[:1], dtype=weight_norm.sum_dtype(weight)),
)
WEIGHT_NORM = Operator(
    "lora_weight_norm(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor base_norm, float scaling, str impl) "
    "-> Tensor",
    _norm,
    lambda weight, lora_A, lora_B, base_norm, scaling, impl: base_norm.new_empty(base_norm.shape),
)


@torch.no_grad()
def row_norm(weight: Any) -> torch.Tensor:
    if isinstance(weight, PackedWeight):
        return torch.cat([weight_norm.row_norm(part) for *_, part in parts_of(weight, torch.float32)])
    weight = weight.detach()
    return ROW_NORM((weight,), weight)


@torch.no_grad()
def lora_weight_norm(
    weight: Any,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    base_norm: torch.Tensor,
    scaling: float,
    impl: str,
) -> torch.Tensor:
    if isinstance(weight, PackedWeight):
        wide = lora_A.detach().float()
        projected = torch.cat([weight_norm.project(part, wide)[0] for *_, part in parts_of(weight, torch.float32)])
        return weight_norm.from_projection(projected, wide, lora_B.detach(), base_norm, scaling)
    tensors = (weight.detach(), lora_A.detach(), lora_B.detach(), base_norm)
    return WEIGHT_NORM(tensors, *tensors, scaling, impl)
