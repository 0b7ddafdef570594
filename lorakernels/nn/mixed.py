"""Linears of a batch in which each token has its own adapter, as slices of one launch: a store's, and PEFT's."""

from __future__ import annotations

from typing import Any

import torch

from lorakernels.backend import resolve_impl
from lorakernels.functional import multi_lora_linear
from lorakernels.nn.siblings import Part, Way, from_group
from lorakernels.plan import BatchPlan
from lorakernels.quant.packed import Weight

# What a linear does with an x: its weight [N, K], its bias [N], A and B of all adapters, and which token is whose.
Slice = tuple[Weight, torch.Tensor | None, torch.Tensor, torch.Tensor, BatchPlan]


def slices_pay(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are launches to save. Plain torch has as many products for slices as for linears, and in a model
    of 256 features the groups cost a CPU 0 to 5 % of a pass."""
    return resolve_impl("auto", device, dtype) == "triton"


def mixed_linear(x: torch.Tensor, call: Slice, layer: Any) -> torch.Tensor:
    """y [..., N] of a layer's call, of its group if that has it. Raises what `multi_lora_linear` does."""
    y = from_group(layer, x, call, SLICES)
    if y is None:
        weight, bias, A, B, plan = call
        y = multi_lora_linear(x, weight, A, B, plan, bias=_added(bias, weight, x))
    return y


def _run(x: torch.Tensor, slices: list[Part]) -> list[torch.Tensor]:
    weights, biases, As, Bs, plans = zip(*slices, strict=True)
    biases = tuple(_added(bias, weight, x) for bias, weight in zip(biases, weights, strict=True))
    return multi_lora_linear(x, weights, As, Bs, plans[0], bias=biases)


def _added(bias: torch.Tensor | None, weight: Weight, x: torch.Tensor) -> torch.Tensor | None:
    """A packed weight is unpacked in x's dtype."""
    return bias if bias is None or isinstance(weight, torch.Tensor) else bias.to(x.dtype)


def _call_of(sibling: Any, x: torch.Tensor) -> Slice | None:
    """Layers have `mixed_call(x)`, which says what they would do with x."""
    return sibling.mixed_call(x) if hasattr(sibling, "mixed_call") else None


def _part_of(x: torch.Tensor, call: Slice, with_dropout: bool) -> Part | None:
    """None where an invariant row's bits would depend on whom the group's other members have, and with gradients, for
    which the outputs of a group have one backward."""
    return call if not (call[-1].unit or torch.is_grad_enabled()) and slices_pay(x.device, x.dtype) else None


SLICES = Way(_call_of, _part_of, _run)
