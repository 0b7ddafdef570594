"""The norms of an adapted weight's rows, for DoRA: operators, so that torch.compile sees one call and no loop."""

from __future__ import annotations

import torch

from lorakernels.eager import weight_norm
from lorakernels.ops.library import implementation, library, without_autocast

library.define("row_norm(Tensor weight) -> Tensor")
library.define(
    "lora_weight_norm(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor base_norm, float scaling, str impl) -> Tensor"
)


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


def _norm_fake(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    base_norm: torch.Tensor,
    scaling: float,
    impl: str,
) -> torch.Tensor:
    return base_norm.new_empty(base_norm.shape)


def _row_norm_fake(weight: torch.Tensor) -> torch.Tensor:
    return weight.new_empty(weight.shape[:1], dtype=weight_norm.sum_dtype(weight))


library.impl("row_norm", weight_norm.row_norm, "CompositeExplicitAutograd")
library.impl("lora_weight_norm", _norm, "CompositeExplicitAutograd")
torch.library.register_fake("lorakernels::row_norm", _row_norm_fake, lib=library)
torch.library.register_fake("lorakernels::lora_weight_norm", _norm_fake, lib=library)
for _device_type in ("cpu", "cuda"):
    without_autocast("lora_weight_norm", _device_type)
    without_autocast("row_norm", _device_type)


@torch.no_grad()
def row_norm(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.lorakernels.row_norm(weight.detach())


@torch.no_grad()
def lora_weight_norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    base_norm: torch.Tensor,
    scaling: float,
    impl: str,
) -> torch.Tensor:
    return torch.ops.lorakernels.lora_weight_norm(
        weight.detach(), lora_A.detach(), lora_B.detach(), base_norm, scaling, impl
    )
