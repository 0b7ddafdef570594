"""PEFT's LoRA layers on the fused path: `accelerate` after the model is built, `restore` to undo it."""

from __future__ import annotations

import importlib
import io
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lorakernels import ops
from lorakernels.integrations.peft_experts import expert_terms, experts_forward
from lorakernels.integrations.peft_mixed import INVARIANT, forget_packs, mixed_call, mixed_forward
from lorakernels.integrations.peft_terms import adapter_terms, forget_norm, linear_call, type_name
from lorakernels.nn import siblings
from lorakernels.nn.adapted import adapted_linear
from lorakernels.nn.whole import whole
from lorakernels.quant.layers import keep_packing, why_refused


@dataclass(frozen=True)
class LayerReport:
    """One LoRA layer: its full name, whether its calls take the fused path, and if not, why not."""

    name: str
    accelerated: bool
    reason: str = ""


@dataclass(frozen=True, repr=False)
class AccelerationReport:
    """The LoRA layers of a model as `accelerate` left them; as text, a table with a line for each kind of layer.

    It tells of the adapters that were active then. `rows` has every layer by its own name.
    """

    rows: tuple[LayerReport, ...]

    @property
    def num_accelerated(self) -> int:
        return sum(row.accelerated for row in self.rows)

    @property
    def num_layers(self) -> int:
        return len(self.rows)

    @property
    def not_accelerated(self) -> tuple[LayerReport, ...]:
        return tuple(row for row in self.rows if not row.accelerated)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def __repr__(self) -> str:
        return f"<AccelerationReport: {self._summary()}>"

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self._summary(), title_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("number", justify="right")
        table.add_column("accelerated")
        table.add_column("why not", overflow="fold")
        # Decoder layers differ by a number only: a line for all of them, or the table has hundreds.
        kinds = Counter(
            (re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name), row.accelerated, row.reason) for row in self.rows
        )
        for (name, accelerated, reason), number in kinds.items():
            # Text and not str: rich would read [0] in a name as markup.
            table.add_row(Text(name), str(number), "yes" if accelerated else "no", Text(reason))
        return table

    def _summary(self) -> str:
        return f"{self.num_accelerated} of {self.num_layers} LoRA layers accelerated"


@whole
def accelerate(
    model: nn.Module, *, group: bool | None = None, groups: Sequence[Sequence[str]] = (), invariant: bool = False
) -> AccelerationReport:
    """Give every PEFT LoRA layer of `model` the fused forward, in place.

    A layer is taken when its type is exactly `peft.tuners.lora.layer.Linear`, or PEFT's for 4 bits of bitsandbytes, HQQ
    or torchao. It then is a subclass of that, and all else about it stays: parameters, hooks, names, state dict, and
    the files that PEFT saves. What the fused path does not cover runs PEFT's own forward, decided at each call.
    Adapters added later to these layers need nothing more; layers that a later adapter is the first to reach need
    another call, which does no harm to the others.

    Args:
        model: a PeftModel, a model with adapters injected, or any module that holds PEFT's LoRA layers.
        group: whether projections that one module calls with the same x (q, k, v; gate, up) are computed together, as
            `lora_linear_group` does: None, where they have no dropout; True, with dropout too, which then is one mask
            for all; False, never. They are found by the names that models give them. In mixed batches on a GPU they are
            slices of one launch.
        groups: further groups, each a list of names of one module's children: [["query_key", "value"]].
        invariant: in mixed batches (`adapter_names=`) what a row gets does not depend, to the bit, on which adapters
            the other rows have. That is slower on a CPU, where each row is then multiplied by itself.

    Returns:
        Every LoRA layer, whether it is accelerated as the adapters stand now, and why not. Print it.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: `model` is not a module, or `groups` not a list of lists of names.
        ValueError: no module has two accelerated layers of the names of a group.
    """
    LoraLayer = _lora_layer()
    modules = _named_modules(model)
    found = siblings.find(model, lambda module: type_name(module) in _TAKEN or _is_fused_linear(module), groups)
    rows = []
    for name, module in modules:
        if isinstance(module, LoraLayer):
            if type_name(module) in (*_TAKEN, _EXPERTS):
                kind: Any = type(module)
                module.__class__ = _fused(kind)
            if is_fused(module):
                forget_packs(module)
                module.__dict__[INVARIANT] = invariant
            reason = _why_not(module)
            rows.append(LayerReport(name, not reason, reason))
    siblings.declare(found, group)
    keep_packing(model)
    if not rows:
        warnings.warn(
            f"{type(model).__name__} has no PEFT LoRA layer, so nothing is accelerated; call accelerate() after "
            "get_peft_model or inject_adapter_in_model",
            stacklevel=3,
        )
    return AccelerationReport(tuple(rows))


@whole
def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every layer is of PEFT's own type again. Harmless where nothing is accelerated.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: `model` is not a module.
    """
    _lora_layer()
    for _, module in _named_modules(model):
        siblings.forget(module)
        if is_fused(module):
            forget_packs(module)
            forget_norm(module)
            module.__dict__.pop(INVARIANT, None)
            module.__class__ = type(module).__base__  # type: ignore[assignment]


# PEFT's layers for a torch.nn.Linear, and for the packed weights of bitsandbytes, HQQ and torchao.
_TAKEN = tuple(
    f"peft.tuners.lora.{name}"
    for name in ("layer.Linear", "bnb.Linear4bit", "hqq.HqqLoraLinear", "torchao.TorchaoLoraLinear")
)

_EXPERTS = "peft.tuners.lora.layer.ParamWrapper"


def _lora_layer() -> Any:
    try:
        from peft.tuners.lora.layer import LoraLayer
    except ImportError as error:
        raise ImportError(f"accelerate() and restore() need PEFT ({error}): pip install peft") from error
    return LoraLayer


def is_fused(module: nn.Module) -> bool:
    return type(module).__qualname__.startswith("Fused") and type(module).__module__ == __name__


def _is_fused_linear(module: nn.Module) -> bool:
    return is_fused(module) and hasattr(module, "linear_call")


@lru_cache(maxsize=8)
def _fused(kind: Any) -> type:
    """The subclass of one of PEFT's layers; made at the first use, so that this module can be imported without PEFT."""
    if f"{kind.__module__}.{kind.__qualname__}" == _EXPERTS:

        class FusedExperts(kind):
            """PEFT's wrapper of a stack of experts, without a second copy of the stack where that gives the same."""

            def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                y = None if kwargs else experts_forward(self, x, args)
                return kind.forward(self, x, *args, **kwargs) if y is None else y

        return _named_as(FusedExperts, kind)

    class Fused(kind):
        """PEFT's LoRA Linear, its base product and low-rank update in one call where that gives the same."""

        linear_call = linear_call
        mixed_call = mixed_call

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            y = None
            if not args and not kwargs:
                y = _fused_forward(self, x)
            elif not args and len(kwargs) == 1 and kwargs.get("adapter_names") is not None:
                y = mixed_forward(self, x, kwargs["adapter_names"])
            return kind.forward(self, x, *args, **kwargs) if y is None else y

    return _named_as(Fused, kind)


def _named_as(fused: type, kind: type) -> type:
    fused.__name__ = kind.__name__  # repr and PEFT's get_layer_status say lora.Linear, as before; PEFT compares it
    fused.__qualname__ = f"Fused{kind.__name__}"  # a whole pickled model finds it in this module, by __getattr__
    return fused


def __getattr__(name: str) -> Any:
    for full in (*_TAKEN, _EXPERTS):
        module, _, kind = full.rpartition(".")
        if name == f"Fused{kind}":
            return _fused(getattr(importlib.import_module(module), kind))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    return list(model.named_modules())


def _why_not(layer: Any) -> str:
    """Why calls of this LoRA layer, its adapters as they are, run PEFT's forward; empty where they do not."""
    if not is_fused(layer):
        base = layer.get_base_layer()
        why = why_refused(base) or f"only {', '.join((*_TAKEN, _EXPERTS))} are fused"
        return f"{type_name(layer)} over {type_name(base)}: {why}"
    if "forward" in layer.__dict__:
        return "its forward is replaced on the instance, so its class has no say"
    terms = adapter_terms(layer) if _is_fused_linear(layer) else expert_terms(layer)
    return terms if isinstance(terms, str) else ""


def _fused_forward(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """x [..., K] to [..., N] by the fused path, or None where PEFT's own forward is to run."""
    call = linear_call(layer, x)
    if call is None:
        return None
    weight, bias, terms, _ = call
    first = terms[0]
    if first.magnitude is not None and first.p:
        # PEFT's dropout is on the way to both W and A in what DoRA adds, so with it there are two base products:
        # x Wᵀ + bias + (c - 1) ∘ D(x) Wᵀ + c ∘ scaling · (D(x) Aᵀ) Bᵀ with c = magnitude / ‖W + scaling · B A‖.
        dropped = F.dropout(x, first.p)
        update = adapted_linear(dropped, weight, None, [first._replace(p=0.0)])
        return ops.frozen_linear(x - dropped, weight, bias) + update
    return adapted_linear(x, weight, bias, terms, None, layer)
