"""Many adapters in one batch as a sequence of kernels. Same signatures as `eager.multi_lora`."""

from __future__ import annotations

from typing import Any

import torch

from lorakernels.configs.table import takes_few_tokens_form
from lorakernels.kernels.adapters import factor_A, factor_B
from lorakernels.kernels.few_tokens import few_tokens
from lorakernels.kernels.launch import is_captured, side_stream
from lorakernels.kernels.multi_expand import multi_expand
from lorakernels.kernels.multi_outer import multi_outer
from lorakernels.kernels.multi_shrink import multi_shrink
from lorakernels.kernels.packed import fits_kernel, unpack
from lorakernels.kernels.tape import taped
from lorakernels.kernels.tiles import sum_planes
from lorakernels.plan import PlanTensors
from lorakernels.weight import linear, sum_products

Tensors = list[torch.Tensor]


@taped
def forward(
    x: torch.Tensor,
    weights: Tensors,
    biases: list[torch.Tensor | None],
    lora_As: Tensors,
    lora_Bs: Tensors,
    plan: PlanTensors,
    *,
    keep_s: bool,
    seed: torch.Tensor | None,
    thresholds: torch.Tensor | None,
) -> tuple[Tensors, torch.Tensor | None, torch.Tensor | None]:
    """A y [T, N] for each slice, S [slices, T, R] if it is to be kept, and dropout's mask [T, ceil(K / 8)] uint8."""
    # Both read x alone. The fork and its join are work for the host, which a graph does once.
    with side_stream(x.device, is_captured(x.device)) as side:
        with side:
            planes, mask = _shrink(x, lora_As, plan, seed, thresholds)
        ys = [_base(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    multi_expand(planes, [factor_B(B) for B in lora_Bs], plan, ys)
    return ys, added(planes) if keep_s else None, mask


def _base(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + bias; of few tokens a packed weight is unpacked inside the product, as beside an adapter of no rank."""
    few = takes_few_tokens_form(x.shape[0], 1, x.element_size())
    if isinstance(weight, torch.Tensor) or not (few and fits_kernel(weight)):
        return linear(x, weight, bias, unpack)
    N, K = weight.shape
    return few_tokens(x, weight, x.new_empty((0, K)), x.new_empty((N, 0)), bias=bias)[0]


@taped
def add(x: torch.Tensor, lora_As: Tensors, lora_Bs: Tensors, plan: PlanTensors, ys: Tensors) -> None:
    """Add each slice's update to its y, in place."""
    multi_expand(_shrink(x, lora_As, plan)[0], [factor_B(B) for B in lora_Bs], plan, ys, behind_s=True)


def _shrink(
    x: torch.Tensor,
    lora_As: Tensors,
    plan: PlanTensors,
    seed: torch.Tensor | None = None,
    thresholds: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    factors = [factor_A(A) for A in lora_As]
    return multi_shrink([x] * len(factors), factors, plan, plan.scales, _width(lora_As, plan), seed, thresholds)


@taped
def backward(
    dys: Tensors,
    x: torch.Tensor | None,
    weights: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    plan: PlanTensors,
    s: torch.Tensor | None,
    mask: torch.Tensor | None,
    *,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[torch.Tensor | None, Tensors, Tensors]:
    """dx [T, K], and for each slice a dA and a dB, as their parameters are shaped; empty lists where not asked for."""
    dx: torch.Tensor | None = None
    dAs: Tensors = []
    dBs: Tensors = []
    if need_dx or need_dA:
        factors = [factor_B(B) for B in lora_Bs]
        planes, _ = multi_shrink(dys, factors, plan, plan.scales, _width(lora_As, plan))
        if need_dx:
            dx = sum_products(dys, [weight.t() for weight in weights], unpack)
            multi_expand(planes, [factor_A(A) for A in lora_As], plan, [dx], mask)
        if need_dA:
            assert x is not None
            dAs = [_gradient(A, plan) for A in lora_As]
            multi_outer([x] * len(dAs), added(planes), [factor_A(dA) for dA in dAs], plan, mask)
    if need_dB:
        assert s is not None
        dBs = [_gradient(B, plan) for B in lora_Bs]
        multi_outer(dys, s, [factor_B(dB) for dB in dBs], plan)
    return dx, dAs, dBs


@taped
def shrink(x: torch.Tensor, lora_As: Tensors, plan: PlanTensors) -> torch.Tensor:
    """S [slices, T, R] float32, zero past each slot's rank and in rows of the base."""
    return added(_shrink(x, lora_As, plan)[0])


@taped
def expand(s: torch.Tensor, lora_Bs: Tensors, plan: PlanTensors, ys: Tensors) -> None:
    """Add S Bᵀ to each y, in place."""
    multi_expand(s.float().contiguous()[None], [factor_B(B) for B in lora_Bs], plan, ys)


def _width(lora_As: Tensors, plan: PlanTensors) -> int:
    return lora_As[0].shape[1] if plan.page_table is None else plan.page_table.shape[1]


def added(planes: torch.Tensor) -> torch.Tensor:
    if planes.shape[0] == 1:
        return planes[0]
    total = planes.new_empty(planes.shape[1:])
    sum_planes(planes, total)
    return total


def _gradient(parameter: torch.Tensor, plan: PlanTensors) -> torch.Tensor:
    """Where a gradient goes: every element of a stack is written, but of pages only those of the batch."""
    make = parameter.new_empty if plan.page_table is None else parameter.new_zeros
    return make(parameter.shape)
