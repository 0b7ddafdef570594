"""Adapters into a base weight and out of it again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorakernels.nn.modules import check_can_change

if TYPE_CHECKING:
    from lorakernels.nn.layer import LoRALayer


@dataclass(frozen=True)
class Merged:
    """What went into the base weight, so that exactly that comes out again, whatever became of the adapter."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    row_scale: torch.Tensor | None
    bias: torch.Tensor | None

    def update(self) -> torch.Tensor:
        return _low_rank(self.A, self.B, self.scaling, self.row_scale)


class KeptBase(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In the dtype that sums are made in: float32, or float64 for float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def delta_weight(layer: LoRALayer, name: str) -> torch.Tensor:
    layer._check_mergeable()
    weight = unmerged_weight(layer)
    row_scale = layer._row_scale(name, weight)
    update = _low_rank(*layer._factors(name), layer.scalings[name], row_scale)
    if row_scale is not None:
        update = update + wide(layer._matrix(weight)) * (row_scale - 1)[:, None]
    return layer._from_matrix(update)


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Where a product must be float32's: autocast would make it in 16 bits, whatever its factors are."""
    device_type = tensor.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def product(B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """B A in float32, or float64 if one of them is float64."""
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    with without_autocast(A):
        return B.to(dtype) @ A.to(dtype)


@torch.no_grad()
def merged_weight(layer: LoRALayer) -> torch.Tensor:
    layer._check_mergeable()
    return _put_in(layer, _records(layer))


@torch.no_grad()
def merge(layer: LoRALayer, keep_base: bool) -> None:
    if layer.merged:
        warnings.warn(f"adapters {layer.merged_adapters} are merged already: nothing to do", stacklevel=3)
        return
    records, weight, bias = _prepared(layer, keep_base)
    if keep_base:
        kept_bias = None if bias is None or layer.bias is None else layer.bias.clone()
        layer._kept_base = KeptBase(layer.weight.detach().clone(), kept_bias)
    layer.weight.copy_(weight)
    if bias is not None and layer.bias is not None:
        layer.bias.copy_(bias)
    layer._merged = records


@torch.no_grad()
def check(layer: LoRALayer, keep_base: bool) -> None:
    _prepared(layer, keep_base)


def _prepared(layer: LoRALayer, keep_base: bool) -> tuple[dict[str, Merged], torch.Tensor, torch.Tensor | None]:
    """What goes into the layer: the records, the weight, and the bias if it changes. Raises where it cannot."""
    layer._check_mergeable()
    check_can_change(layer.base_layer)
    records = _records(layer)
    weight = _put_in(layer, records)
    if not keep_base and (_base_scale(records.values(), wide(layer._matrix(layer.weight))[:, :1]) == 0).any():
        raise ValueError("a magnitude is zero, so merging would lose a row of the base weight; use keep_base=True")
    biases = [record.bias for record in records.values() if record.bias is not None]
    if not biases or layer.bias is None:
        return records, weight, None
    check_can_change(layer.base_layer, "bias")
    bias = sum(biases, wide(layer.bias))
    _check_finite(bias, layer.bias.dtype, records)
    return records, weight, bias


@torch.no_grad()
def unmerge(layer: LoRALayer) -> None:
    if not layer.merged:
        warnings.warn("no adapter is merged: nothing to do", stacklevel=3)
        return
    weight = unmerged_weight(layer)
    biases = [record.bias for record in layer._merged.values() if record.bias is not None]
    if biases:
        assert layer.bias is not None
        kept = layer._kept_base.bias if layer._kept_base is not None else None
        layer.bias.copy_(
            wide(layer.bias) - sum(bias.to(layer.bias.device) for bias in biases) if kept is None else kept
        )
    layer.weight.copy_(weight)
    layer._merged, layer._kept_base = {}, None


@torch.no_grad()
def unmerged_weight(layer: LoRALayer) -> torch.Tensor:
    """The base weight without what is merged into it; the weight itself when nothing is."""
    if layer._kept_base is not None:
        return layer._kept_base.weight.to(layer.weight.device)
    if not layer.merged:
        return layer.weight
    matrix = wide(layer._matrix(layer.weight))
    records = [_on(record, matrix.device) for record in layer._merged.values()]
    for record in records:
        matrix = matrix - record.update().to(matrix.dtype)
    return layer._from_matrix(matrix / _base_scale(records, matrix[:, :1]))


def _records(layer: LoRALayer) -> dict[str, Merged]:
    records = {name: _record(layer, name, layer.weight) for name in layer.active_adapters}
    if layer.bias is None and any(record.bias is not None for record in records.values()):
        raise ValueError("lora_bias cannot be merged into a layer without a bias: give the base layer one of zeros")
    return records


def _record(layer: LoRALayer, name: str, weight: torch.Tensor) -> Merged:
    A, B = (factor.detach().clone() for factor in layer._factors(name))
    scaling, tensors = layer.scalings[name], layer.adapter_tensors(name)
    if isinstance(scaling, torch.Tensor):  # in a slot for hot swaps, where the next value is written into it
        scaling = scaling.clone()
    bias = wide(tensors["lora_B.bias"].detach()) * scaling if layer.lora_bias[name] else None
    return Merged(A, B, scaling, layer._row_scale(name, weight), bias)


def _put_in(layer: LoRALayer, records: dict[str, Merged]) -> torch.Tensor:
    matrix = wide(layer._matrix(layer.weight))
    merged = matrix * _base_scale(records.values(), matrix[:, :1])
    for record in records.values():
        merged = merged + record.update().to(merged.dtype)
    _check_finite(merged, layer.weight.dtype, records)
    return layer._from_matrix(merged)


def _check_finite(merged: torch.Tensor, dtype: torch.dtype, names: Iterable[str]) -> None:
    """In the dtype that it is kept in: float16 ends at 65504."""
    if not torch.isfinite(wide(merged.to(dtype))).all():
        raise ValueError(f"merging {list(names)} would give a {dtype} weight that is not finite; nothing changed")


def _base_scale(records: Iterable[Merged], column: torch.Tensor) -> torch.Tensor:
    """1 + Σ (row_scale - 1) over the adapters with DoRA, [N, 1]."""
    scale = torch.ones_like(column)
    for record in records:
        if record.row_scale is not None:
            scale = scale + (record.row_scale[:, None] - 1)
    return scale


def _low_rank(A: torch.Tensor, B: torch.Tensor, scaling: float, row_scale: torch.Tensor | None) -> torch.Tensor:
    update = product(B, A) * scaling
    return update if row_scale is None else update * row_scale[:, None]


def _on(record: Merged, device: torch.device) -> Merged:
    row_scale = None if record.row_scale is None else record.row_scale.to(device)
    return Merged(record.A.to(device), record.B.to(device), record.scaling, row_scale, None)
