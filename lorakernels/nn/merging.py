"""Adapters into a base weight and out of it again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from lorakernels.nn.base import LoRABase
from lorakernels.nn.modules import check_can_change
from lorakernels.nn.quantized import QuantizedLinear, pack
from lorakernels.nn.whole import whole, write
from lorakernels.quant.packed import PackedWeight


@dataclass(frozen=True)
class _Merged:
    """What went into the base weight, so that exactly that comes out again, whatever became of the adapter."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float | torch.Tensor
    row_scale: torch.Tensor | None
    bias: torch.Tensor | None

    def update(self) -> torch.Tensor:
        update = product(self.B, self.A) * self.scaling
        return update if self.row_scale is None else update * self.row_scale[:, None]

    def to(self, device: torch.device) -> _Merged:
        parts = (None if part is None else part.to(device) for part in (self.row_scale, self.bias))
        return _Merged(self.A.to(device), self.B.to(device), self.scaling, *parts)


class _KeptBase(NamedTuple):
    weight: Any
    bias: torch.Tensor | None
    layer: nn.Module | None = None  # with a packed weight, which a plain one stands for while adapters are merged


class Mergeable(LoRABase):
    """An adapted layer whose adapters can go into its base weight."""

    _merged: dict[str, _Merged]
    _kept_base: _KeptBase | None

    @whole
    @torch.no_grad()
    def merge(self, keep_base: bool = False, requantize: bool = False) -> None:
        """Add the active adapters to the base weight, summed in float32 and rounded once to its dtype.

        `keep_base` keeps a copy of the weight, so that `unmerge` brings it back to the bit; without it
        the weight comes back within one rounding. A `lora_bias` goes into the base layer's bias.
        A packed weight is kept in any case: until `unmerge` the base layer is a `torch.nn.Linear` with the merged
        weight in the dtype that was packed; or, where QA-LoRA's groups are those of an int4 weight, a packed one whose
        zeros have changed; or, with `requantize`, the merged weight packed again, where most of the update survives.
        """
        if self.merged:
            warnings.warn(f"adapters {self.merged_adapters} are merged already: nothing to do", stacklevel=4)
            return
        records, weight, bias = self._prepared(keep_base)
        if self._is_packed:
            # Packed again, little of a small update would be left: 1.4 % of a trained adapter's survived NF4.
            own_bias = self.bias if bias is None or self.bias is None else bias.to(self.bias.dtype)
            merged: Any = self._in_zeros(records, own_bias)
            if merged is None and requantize:
                merged = QuantizedLinear(self._packed_again(weight)[0], own_bias)
            elif merged is None:
                merged = _plain(weight.to(self.weight.dtype), own_bias)
            self._kept_base, self._merged = _KeptBase(self.weight, None, self.base_layer), records
            self.base_layer, self._is_packed = merged.train(self.training), isinstance(merged, QuantizedLinear)
            return
        if keep_base:
            kept_bias = None if bias is None or self.bias is None else self.bias.clone()
            self._kept_base = _KeptBase(self.weight.detach().clone(), kept_bias)
        write(self.weight, weight)
        if bias is not None and self.bias is not None:
            write(self.bias, bias)
        self._merged = records

    def _in_zeros(self, records: dict[str, _Merged], bias: torch.Tensor | None) -> QuantizedLinear | None:
        """A packed layer with the adapters in its zeros, exactly; None where they do not fit there.

        W = (q - z) · scale, and QA-LoRA adds one number to each group of a row: z - Δ / scale (Xu et al., section 3.3).
        """
        packed, pooled = self.weight, {self.adapters[name].pooled for name in records}
        if packed.zero is None or packed.table is not None or pooled != {packed.form.block}:
            return None
        changes = (record.update()[:, :: packed.form.block] for record in records.values())
        delta = sum(changes, torch.zeros((), device=packed.device))
        zero = packed.zero.float() - delta / packed.scale.float()
        return QuantizedLinear(packed._replace(zero=zero), bias)

    def _packed_again(self, weight: torch.Tensor) -> tuple[PackedWeight, float]:
        """A merged weight in the base's own format, and how much of the update that loses: error / ‖Δ‖.

        Raises ValueError where less than half of it would survive.
        """
        base = self.weight
        again = pack(weight.to(base.dtype), base.form.kind, base.form.block, base.table is not None)
        lost = float((again.dense(torch.float32) - weight).norm() / (weight - base.dense(torch.float32)).norm())
        if not lost <= 0.5:
            raise ValueError(
                f"packed again ({base.text}) the merged weight would be {lost:.3g} of the update's size away; expected "
                "at most 0.5: merge without requantize, which keeps all of it"
            )
        return again, lost

    @torch.no_grad()
    def check_merge(self, keep_base: bool = False, requantize: bool = False) -> float:
        """Raise the ValueError that `merge` would raise; the share of the update that packing again loses."""
        records, weight, _ = self._prepared(keep_base)
        if not requantize or not self._is_packed or self._in_zeros(records, None) is not None:
            return 0.0
        return self._packed_again(weight)[1]

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """The base weight with the active adapters in it, float32 (float64 for a float64 base).

        Raises ValueError when it is not finite in the base's dtype, or when the adapters cannot be merged.
        """
        self._check_mergeable()
        return self._with(self._records())

    @whole
    @torch.no_grad()
    def unmerge(self) -> None:
        """Take out of the base weight what `merge` has put in.

        After PiSSA or OLoRA that is the changed base weight, as before `merge`, and not the original one.
        """
        if not self.merged:
            warnings.warn("no adapter is merged: nothing to do", stacklevel=4)
            return
        if self._kept_base is not None and self._kept_base.layer is not None:
            self.base_layer = self._kept_base.layer.to(self.weight.device)
            self._is_packed, self._merged, self._kept_base = True, {}, None
            return
        weight = self.unmerged_weight()
        biases = [record.bias for record in self._merged.values() if record.bias is not None]
        if biases:
            assert self.bias is not None
            kept = None if self._kept_base is None else self._kept_base.bias
            device = self.bias.device
            write(self.bias, wide(self.bias) - sum(bias.to(device) for bias in biases) if kept is None else kept)
        write(self.weight, weight)
        self._merged, self._kept_base = {}, None

    @torch.no_grad()
    def unmerged_weight(self) -> Any:
        """The base weight without what is merged into it; the weight itself when nothing is."""
        if self._kept_base is not None:
            weight = self._kept_base.weight
            return weight if isinstance(weight, PackedWeight) else weight.to(self.weight.device)
        if not self.merged:
            return self.weight
        matrix = wide(self._matrix(self.weight))
        records = [record.to(matrix.device) for record in self._merged.values()]
        for record in records:
            matrix = matrix - record.update().to(matrix.dtype)
        return self._from_matrix(matrix / _base_scale(records, matrix[:, :1]))

    def delta_weight(self, adapter_name: str | None = None) -> torch.Tensor:
        """What merging one adapter adds to the base weight, in its shape, float32 (float64 for a float64 adapter).

        scaling · B A; with DoRA W' - W, where W' = magnitude / ‖W + scaling · B A‖ · (W + scaling · B A).
        """
        name = self._only_active("delta_weight") if adapter_name is None else adapter_name
        adapter = self._adapter(name)
        self._check_mergeable()
        weight = self.unmerged_weight()
        row_scale = self._row_scale(name, weight)
        update = _Merged(*self._effective(name), adapter.scaling, row_scale, None).update()
        if row_scale is not None:
            update = update + wide(self._matrix(weight)) * (row_scale - 1)[:, None]
        return self._from_matrix(update)

    def _prepared(self, keep_base: bool) -> tuple[dict[str, _Merged], torch.Tensor, torch.Tensor | None]:
        """What goes into the layer: the records, the weight, and the bias if it changes. Raises where it cannot."""
        self._check_mergeable()
        if not self._is_packed:
            self._check_can_change()
        records = self._records()
        weight = self._with(records)
        if (
            not (keep_base or self._is_packed)
            and (_base_scale(records.values(), wide(self._matrix(self.weight))[:, :1]) == 0).any()
        ):
            raise ValueError("a magnitude is zero, so merging would lose a row of the base weight; use keep_base=True")
        biases = [record.bias for record in records.values() if record.bias is not None]
        if not biases or self.bias is None:
            return records, weight, None
        if not self._is_packed:
            check_can_change(self.base_layer, "bias")
        bias = sum(biases, wide(self.bias))
        _check_finite(bias, self.bias.dtype, records)
        return records, weight, bias

    def _check_can_change(self) -> None:
        """Raise ValueError where what is written into the base weight would be lost."""
        check_can_change(self.base_layer)

    def _records(self) -> dict[str, _Merged]:
        records = {}
        for name in self.active_adapters:
            adapter = self.adapters[name]
            A, B = (factor.detach().clone() for factor in self._effective(name))
            scaling = adapter.scaling
            if isinstance(scaling, torch.Tensor):  # in a slot for hot swaps, where the next value is written into it
                scaling = scaling.clone()
            bias = wide(self.adapter_tensors(name)["lora_B.bias"].detach()) * scaling if adapter.lora_bias else None
            records[name] = _Merged(A, B, scaling, self._row_scale(name), bias)
        if self.bias is None and any(record.bias is not None for record in records.values()):
            raise ValueError("lora_bias cannot be merged into a layer without a bias: give the base layer one of zeros")
        return records

    def _with(self, records: dict[str, _Merged]) -> torch.Tensor:
        matrix = wide(self._matrix(self.weight))
        merged = matrix * _base_scale(records.values(), matrix[:, :1])
        for record in records.values():
            merged = merged + record.update().to(merged.dtype)
        _check_finite(merged, self.weight.dtype, records)
        return self._from_matrix(merged)


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    N, K = weight.shape
    plain = nn.Linear(K, N, bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return plain


def wide(tensor: Any) -> torch.Tensor:
    """In the dtype that sums are made in: float32, or float64 for float64; of a packed weight all of it."""
    if isinstance(tensor, PackedWeight):
        return tensor.dense(torch.float32)
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def product(B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """B A in float32, or float64 if one of them is float64."""
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    device_type = A.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return B.to(dtype) @ A.to(dtype)
    with torch.autocast(device_type, enabled=False):  # which would make it in 16 bits, whatever its factors are
        return B.to(dtype) @ A.to(dtype)


def _check_finite(merged: torch.Tensor, dtype: torch.dtype, names: Iterable[str]) -> None:
    """In the dtype that it is kept in: float16 ends at 65504."""
    if not torch.isfinite(wide(merged.to(dtype))).all():
        raise ValueError(f"merging {list(names)} would give a {dtype} weight that is not finite; nothing changed")


def _base_scale(records: Iterable[_Merged], column: torch.Tensor) -> torch.Tensor:
    """1 + Σ (row_scale - 1) over the adapters with DoRA, [N, 1]."""
    scale = torch.ones_like(column)
    for record in records:
        if record.row_scale is not None:
            scale = scale + (record.row_scale[:, None] - 1)
    return scale
