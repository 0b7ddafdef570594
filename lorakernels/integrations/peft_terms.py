"""What PEFT's LoRA layers do, read at each call: the terms of `adapted_linear`, or why they cannot be that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lorakernels.nn.dora import NormCache
from lorakernels.nn.modules import parameter_of, runs_more_than_forward
from lorakernels.nn.terms import Call, Term
from lorakernels.quant.layers import is_transposed, kind_of, read
from lorakernels.quant.packed import PackedWeight

# Of other types are DTensors, quantised weights (torchao keeps nn.Linear and swaps its weight) and the like.
_PLAIN = (torch.Tensor, nn.Parameter)
_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*_AUTOCAST_DTYPES, torch.float64)


# What is kept of a base weight's norm under DoRA, behind the layer's adapters then. Beside the layers, in which nothing
# changes but their class.
_norms: WeakKeyDictionary[nn.Module, tuple[dict[str, nn.Module], NormCache]] = WeakKeyDictionary()


class _Magnitude(NamedTuple):
    """PEFT's magnitude of one layer's adapter [N]."""

    layer: Any
    weight: torch.Tensor

    def row_scale(self, base: Any, matrix: Any, A: torch.Tensor, B: torch.Tensor, scaling: Any) -> torch.Tensor:
        """magnitude / ‖W + scaling · B A‖ [N], the norm without a gradient (arXiv 2402.09353, section 4.3)."""
        adapters = self.layer._modules["lora_A"]._modules
        known, cache = _norms.get(self.layer, ({}, None))
        if cache is None or known != adapters:  # a new one's start may edit W through `.data`, as OLoRA's does
            _, cache = _norms[self.layer] = (dict(adapters), NormCache())
        # A and B are edited through `.data` at any time.
        norm = cache.norm(base, matrix, A, B, scaling, keep=False)
        return self.weight / norm.to(torch.promote_types(base.dtype, torch.float32))


def forget_norm(layer: nn.Module) -> None:
    _norms.pop(layer, None)


def linear_call(layer: Any, x: torch.Tensor) -> Call | None:
    """What this layer does with x now; None where PEFT's own forward is to run."""
    if layer._disable_adapters or layer.merged_adapters or not is_plain(x) or x.is_nested:
        return None
    if torch._C._get_tracing_state() is not None:
        return None  # torch.jit can keep no autograd.Function
    terms = adapter_terms(layer)
    if isinstance(terms, str) or not terms:
        return None
    base = layer._modules["base_layer"]
    weight = base_weight(base)
    return (weight, parameter_of(base, "bias"), terms, None) if takes_dtypes(layer, x, weight, terms) else None


def base_weight(base: Any) -> Any:
    """Of a base layer that `adapter_terms` takes."""
    if is_transposed(base):
        return parameter_of(base, "weight").t()
    weight = parameter_of(base, "weight") if type(base) is nn.Linear else None
    return weight if is_plain(weight) else read(base)


def takes_dtypes(layer: Any, x: torch.Tensor, weight: Any, terms: Sequence[Term]) -> bool:
    """Whether the fused path computes what PEFT computes with these dtypes; where not, PEFT's forward may raise."""
    dtype = x.dtype
    if isinstance(weight, PackedWeight):  # which is unpacked in x's dtype
        return dtype in _AUTOCAST_DTYPES
    if dtype not in _DTYPES:
        return False
    if weight.dtype is dtype:
        casting = layer.__dict__.get("cast_input_dtype_enabled", True)
        return casting or autocast_is_on(x) or all(term.A.dtype is term.B.dtype is dtype for term in terms)
    # Autocast leaves float64 and integers, which a quantised weight may be, alone.
    return weight.dtype in _AUTOCAST_DTYPES and dtype in _AUTOCAST_DTYPES and autocast_is_on(x)


def autocast_is_on(x: torch.Tensor) -> bool:
    # Of one device raises for meta, and takes 4 µs between the layers of a model.
    return torch._C._is_any_autocast_enabled() and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def adapter_terms(layer: Any, names: Sequence[str] | None = None) -> list[Term] | str:
    """What each of the adapters adds that are named or else active, or why this layer cannot take the fused path.

    It runs at every call, since PEFT and the user may change any of it between two: so it goes through
    `_modules` and `_parameters`, where `nn.Module.__getattr__` takes ten times as long.
    """
    modules = layer._modules
    base = modules["base_layer"]
    is_linear = type(base) is nn.Linear or is_transposed(base)
    is_packed = not (is_linear and is_plain(parameter_of(base, "weight"))) and bool(kind_of(base))
    if not (is_linear or is_packed):
        return f"the base layer is {type_name(base)}, not exactly torch.nn.Linear, nor another that is known"
    if runs_more_than_forward(base):
        return "the base layer has hooks or a replaced forward, which run only when it is called"
    bias = parameter_of(base, "bias")
    if is_packed:
        try:
            read(base)
        except ValueError as error:
            return str(error)
    else:
        weight = parameter_of(base, "weight")
        if not is_plain(weight):
            return f"the base weight is a {type_name(weight)} ({weight.layout}), not a plain tensor"
        if bias is not None and not (is_plain(bias) and bias.dtype is weight.dtype):
            return "the base bias is not a plain tensor of the weight's dtype"
    if getattr(layer, "fan_in_fan_out", False) != is_transposed(base):
        return "fan_in_fan_out is not as the base layer's weight"
    lora_A, lora_B, dropouts = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
    terms: list[Term] = []
    for name in layer.active_adapters if names is None else names:
        if name not in lora_A:
            continue
        magnitude = _magnitude(layer, name) if name in layer.lora_variant else None
        if isinstance(magnitude, str):
            return magnitude
        A, B, dropout, scaling = lora_A[name], lora_B[name], dropouts[name], layer.scaling[name]
        if type(A) is not nn.Linear or type(B) is not nn.Linear or parameter_of(A, "bias") is not None:
            return f"lora_A or lora_B of adapter {name!r} is not the torch.nn.Linear that PEFT makes"
        if type(dropout) is nn.Identity:
            p = 0.0
        elif type(dropout) is nn.Dropout and dropout.p < 1 and not dropout.inplace:
            # DoRA's variant asks the layer and not the dropout whether it trains.
            p = dropout.p if dropout.training and (magnitude is None or layer.training) else 0.0
        else:
            return f"the dropout of adapter {name!r} is {dropout}, not a torch.nn.Dropout with p < 1"
        if runs_more_than_forward(A) or runs_more_than_forward(B) or runs_more_than_forward(dropout):
            return f"lora_A, lora_B or lora_dropout of adapter {name!r} has hooks or a replaced forward"
        weight_A, weight_B, bias_B = parameter_of(A, "weight"), parameter_of(B, "weight"), parameter_of(B, "bias")
        if not (is_plain(weight_A) and is_plain(weight_B)):
            return f"a weight of adapter {name!r} is not a plain tensor"
        if isinstance(scaling, torch.Tensor) and scaling.dim() != 0:
            return f"the scaling of adapter {name!r} is a tensor of shape {list(scaling.shape)}, not a number"
        terms.append(Term(weight_A, weight_B, bias_B, scaling, p, magnitude))
    if len(terms) > 1 and any(term.magnitude is not None for term in terms):
        return "an adapter with DoRA is active beside another"
    return terms


def _magnitude(layer: Any, name: str) -> _Magnitude | str:
    """DoRA's part of an adapter that is a LoRA variant, or why the fused path does not take it."""
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.variants import DoraLinearVariant

    variant = layer.lora_variant[name]
    kind = variant if isinstance(variant, type) else type(variant)
    if kind is not DoraLinearVariant:
        return f"adapter {name!r} is a LoRA variant ({kind.__name__})"
    dora = layer.lora_magnitude_vector[name]
    if type(dora) is not DoraLinearLayer or runs_more_than_forward(dora):
        return f"the magnitude of adapter {name!r} is not as PEFT makes it, or has hooks"
    weight = parameter_of(dora, "weight")
    if not is_plain(weight) or weight.device != layer.lora_A[name].weight.device:
        return f"the magnitude of adapter {name!r} is not a plain tensor beside lora_A"
    if parameter_of(layer.lora_B[name], "bias") is not None:
        return f"adapter {name!r} has DoRA and lora_bias"
    return _Magnitude(layer, weight)


def is_plain(tensor: Any) -> bool:
    return type(tensor) in _PLAIN and tensor.layout is torch.strided


def type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
