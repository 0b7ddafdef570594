"""PEFT's LoRA layers on the fused path: `accelerate` after the model is built, `restore` to undo it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from lorakernels import ops
from lorakernels.functional import lora_linear
from lorakernels.integrations.peft_report import AccelerationReport, LayerReport
from lorakernels.nn import siblings
from lorakernels.nn.dora import NormCache
from lorakernels.nn.modules import parameter_of, runs_more_than_forward

# Of other types are DTensors, quantised weights (torchao keeps nn.Linear and swaps its weight) and the like.
_PLAIN = (torch.Tensor, nn.Parameter)
_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*_AUTOCAST_DTYPES, torch.float64)


class Term(NamedTuple):
    """What one active adapter adds: the same for every call until somebody changes the adapter."""

    A: torch.Tensor  # [r, K]
    B: torch.Tensor  # [N, r]
    lora_bias: torch.Tensor | None  # [N], PEFT's `lora_bias`
    scaling: float | torch.Tensor
    p: float  # dropout's; 0 where it is off
    magnitude: torch.Tensor | None  # [N], DoRA's


class _Norm(NamedTuple):
    """What is kept of a base weight's norm under DoRA, and the layer's adapters then."""

    adapters: dict[str, nn.Module]
    cache: NormCache


# Beside the layers, in which nothing changes but their class.
_norms: WeakKeyDictionary[nn.Module, _Norm] = WeakKeyDictionary()


def accelerate(
    model: nn.Module, *, group: bool | None = None, groups: Sequence[Sequence[str]] = ()
) -> AccelerationReport:
    """Give every PEFT LoRA layer of `model` the fused forward, in place.

    A layer is taken when its type is exactly `peft.tuners.lora.layer.Linear`; it then is a subclass of that, and all
    else about it stays: parameters, hooks, names, state dict, and the files that PEFT saves. What the fused path does
    not cover runs PEFT's own forward, decided at each call. Adapters added later to these layers need nothing more;
    layers that a later adapter is the first to reach need another call, which does no harm to the others.

    Args:
        model: a PeftModel, a model with adapters injected, or any module that holds PEFT's LoRA layers.
        group: whether projections that one module calls with the same x (q, k, v; gate, up) are computed together, as
            `lora_linear_group` does: None, where they have no dropout; True, with dropout too, which then is one mask
            for all; False, never. They are found by the names that models give them.
        groups: further groups, each a list of names of one module's children: [["query_key", "value"]].

    Returns:
        Every LoRA layer, whether it is accelerated as the adapters stand now, and why not. Print it.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: `model` is not a module, or `groups` not a list of lists of names.
        ValueError: no module has two accelerated layers of the names of a group.
    """
    fused = _fused_linear()
    from peft.tuners.lora.layer import Linear, LoraLayer

    from lorakernels.integrations.peft_mixed import forget_packs

    modules = _named_modules(model)
    found = siblings.find(model, lambda module: type(module) in (Linear, fused), groups)
    rows = []
    for name, module in modules:
        if isinstance(module, LoraLayer):
            if type(module) is Linear:
                module.__class__ = fused
            if type(module) is fused:
                forget_packs(module)
            reason = _why_not(module)
            rows.append(LayerReport(name, not reason, reason))
    siblings.declare(found, group)
    if not rows:
        warnings.warn(
            f"{type(model).__name__} has no PEFT LoRA layer, so nothing is accelerated; call accelerate() after "
            "get_peft_model or inject_adapter_in_model",
            stacklevel=2,
        )
    return AccelerationReport(tuple(rows))


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every layer is of PEFT's own type again. Harmless where nothing is accelerated.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: `model` is not a module.
    """
    fused = _fused_linear()
    from lorakernels.integrations.peft_mixed import forget_packs

    for _, module in _named_modules(model):
        siblings.forget(module)
        if type(module) is fused:
            forget_packs(module)
            _norms.pop(module, None)
            module.__class__ = fused.__base__  # type: ignore[assignment]


@lru_cache(maxsize=1)
def _fused_linear() -> type:
    """The subclass of PEFT's Linear; made at the first use, so that this module can be imported without PEFT."""
    try:
        from peft.tuners.lora.layer import Linear
    except ImportError as error:
        raise ImportError(f"accelerate() and restore() need PEFT ({error}): pip install peft") from error
    from lorakernels.integrations.peft_mixed import mixed_forward  # which imports this module

    class FusedLinear(Linear):
        """PEFT's LoRA Linear, its base product and low-rank update in one call where that gives the same."""

        def group_call(self, x: torch.Tensor) -> siblings.Call | None:
            return _group_call(self, x)

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            y = None
            if not args and not kwargs:
                y = _fused_forward(self, x)
            elif not args and len(kwargs) == 1 and kwargs.get("adapter_names") is not None:
                y = mixed_forward(self, x, kwargs["adapter_names"])
            return Linear.forward(self, x, *args, **kwargs) if y is None else y

    FusedLinear.__name__ = "Linear"  # repr and PEFT's get_layer_status say lora.Linear, as before
    FusedLinear.__qualname__ = "FusedLinear"  # a whole pickled model finds it in this module, by __getattr__
    return FusedLinear


def __getattr__(name: str) -> Any:
    if name == "FusedLinear":
        return _fused_linear()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    return list(model.named_modules())


def _why_not(layer: Any) -> str:
    """Why calls of this LoRA layer, its adapters as they are, run PEFT's forward; empty where they do not."""
    if type(layer) is not _fused_linear():
        base = layer.get_base_layer()
        return f"{_type_name(layer)} over {_type_name(base)}: only PEFT's lora.Linear over torch.nn.Linear is fused"
    if "forward" in layer.__dict__:
        return "its forward is replaced on the instance, so its class has no say"
    terms = adapter_terms(layer)
    return terms if isinstance(terms, str) else ""


def _fused_forward(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """x [..., K] to [..., N] by the fused path, or None where PEFT's own forward is to run."""
    if layer._disable_adapters or layer.merged_adapters or not is_plain(x) or x.is_nested:
        return None
    if torch._C._get_tracing_state() is not None:
        return None  # torch.jit can keep no autograd.Function
    terms = adapter_terms(layer)
    if isinstance(terms, str) or not terms:
        return None
    base = layer._modules["base_layer"]
    weight, bias = parameter_of(base, "weight"), parameter_of(base, "bias")
    first, *others = terms
    if not others and _is_small(x, weight, first):
        return ops.small_lora_linear(x, weight, first.A, first.B, bias, first.scaling)  # type: ignore[arg-type]
    if not takes_dtypes(layer, x, weight, terms):
        return None

    if first.magnitude is not None:
        return _dora(layer, x, weight, bias, first)
    if others and not any(term.p for term in terms):
        # Adapters without dropout are one adapter of their ranks' sum: still one pass over x.
        A = torch.cat([term.A for term in terms])
        B = torch.cat([term.B * term.scaling for term in terms], dim=1)
        return lora_linear(x, weight, A, B, bias=_with_lora_biases(bias, terms, x.dtype))
    A, B, _, scaling, p, _ = first
    if not others and first.lora_bias is None:
        grouped = siblings.from_group(layer, x, siblings.Call(weight, bias, A, B, scaling, p))
        if grouped is not None:
            return grouped
    y = lora_linear(x, weight, A, B, bias=_with_lora_biases(bias, [first], x.dtype), scaling=scaling, dropout_p=p)
    for A, B, lora_bias, scaling, p, _ in others:  # each adapter has a mask of its own
        s = F.linear(F.dropout(x, p), A.to(x.dtype))
        y = y + F.linear(s, B.to(x.dtype), None if lora_bias is None else lora_bias.to(x.dtype)) * scaling
    return y


def _is_small(x: torch.Tensor, weight: torch.Tensor, term: Term) -> bool:
    """Whether what is below would come to `small_lora_linear` too: it takes 20 µs to, between the layers of a model."""
    scaling = term.scaling
    return (
        not term.p
        and term.lora_bias is None
        and term.magnitude is None
        and isinstance(scaling, (int, float))
        and scaling != 0
        and math.isfinite(scaling)
        and weight.dtype is x.dtype
        and x.dtype in _DTYPES
        and weight.shape[1:] == x.shape[-1:]
        and ops.is_small(x, weight, term.A, term.B, "auto")
    )


def _group_call(layer: Any, x: torch.Tensor) -> siblings.Call | None:
    """What this layer does with x where that is one LoRA linear and nothing else."""
    if layer._disable_adapters or layer.merged_adapters:
        return None
    terms = adapter_terms(layer)
    if isinstance(terms, str) or len(terms) != 1:
        return None
    A, B, lora_bias, scaling, p, magnitude = terms[0]
    base = layer._modules["base_layer"]
    weight, bias = parameter_of(base, "weight"), parameter_of(base, "bias")
    if lora_bias is not None or magnitude is not None or not takes_dtypes(layer, x, weight, terms):
        return None
    return siblings.Call(weight, bias, A, B, scaling, p)


def _dora(layer: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, term: Term) -> torch.Tensor:
    """x Wᵀ + bias + (c - 1) ∘ D(x) Wᵀ + c ∘ scaling · (D(x) Aᵀ) Bᵀ with c = magnitude / ‖W + scaling · B A‖.

    PEFT's dropout is on the way to both W and A in what DoRA adds, so with it there are two base products, as in PEFT.
    """
    A, B, _, scaling, p, magnitude = term
    assert magnitude is not None
    adapters = layer._modules["lora_A"]._modules
    kept = _norms.get(layer)
    if kept is None or kept.adapters != adapters:  # a new one's start may edit W through `.data`, as OLoRA's does
        kept = _norms[layer] = _Norm(dict(adapters), NormCache())
    norm = kept.cache.norm(weight, weight, A, B, scaling, keep=False)  # A and B are edited through `.data` at any time
    row_scale = magnitude / norm.to(torch.promote_types(weight.dtype, torch.float32))
    if not p:
        return lora_linear(x, weight, A, B, bias=bias, row_scale=row_scale, scaling=scaling)
    dropped = F.dropout(x, p)
    return F.linear(x - dropped, weight, bias) + lora_linear(
        dropped, weight, A, B, row_scale=row_scale, scaling=scaling
    )


def takes_dtypes(layer: Any, x: torch.Tensor, weight: torch.Tensor, terms: list[Term]) -> bool:
    """Whether the fused path computes what PEFT computes with these dtypes; where not, PEFT's forward may raise."""
    if x.dtype not in _DTYPES:
        return False
    if autocast_is_on(x):
        # It leaves float64 and integers, which a quantised weight may be, alone.
        return weight.dtype is x.dtype or (weight.dtype in _AUTOCAST_DTYPES and x.dtype in _AUTOCAST_DTYPES)
    casting = getattr(layer, "cast_input_dtype_enabled", True)
    return weight.dtype is x.dtype and (casting or all(term.A.dtype is term.B.dtype is x.dtype for term in terms))


def autocast_is_on(x: torch.Tensor) -> bool:
    # Of one device raises for meta, and takes 4 µs between the layers of a model.
    return torch._C._is_any_autocast_enabled() and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _with_lora_biases(bias: torch.Tensor | None, terms: list[Term], dtype: torch.dtype) -> torch.Tensor | None:
    """The base bias [N] and scaling times the bias of each B (PEFT's `lora_bias`)."""
    total = bias
    for term in terms:
        if term.lora_bias is not None:
            scaled = term.lora_bias * term.scaling
            total = scaled if total is None else total + scaled
    return total if total is bias or total is None else total.to(dtype)


def adapter_terms(layer: Any, names: Sequence[str] | None = None) -> list[Term] | str:
    """What each of the adapters adds that are named or else active, or why this layer cannot take the fused path.

    It runs at every call, since PEFT and the user may change any of it between two: so it goes through
    `_modules` and `_parameters`, where `nn.Module.__getattr__` takes ten times as long.
    """
    modules = layer._modules
    base = modules["base_layer"]
    if type(base) is not nn.Linear:
        return f"the base layer is {_type_name(base)}, not exactly torch.nn.Linear"
    if runs_more_than_forward(base):
        return "the base layer has hooks or a replaced forward, which run only when it is called"
    weight, bias = parameter_of(base, "weight"), parameter_of(base, "bias")
    if not is_plain(weight):
        return f"the base weight is a {_type_name(weight)} ({weight.layout}), not a plain tensor"
    if bias is not None and not (is_plain(bias) and bias.dtype is weight.dtype):
        return "the base bias is not a plain tensor of the weight's dtype"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out is set"
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


def _magnitude(layer: Any, name: str) -> torch.Tensor | str:
    """DoRA's magnitude [N] of an adapter that is a LoRA variant, or why the fused path does not take it."""
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
    return weight


def is_plain(tensor: Any) -> bool:
    return type(tensor) in _PLAIN and tensor.layout is torch.strided


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
