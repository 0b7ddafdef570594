"""What a model holds of adapters: their layers, copies, parameters and configurations, and what may not be done now."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lorakernels.adapters.saved_modules import SavedModule
from lorakernels.config import LoRAConfig
from lorakernels.nn.expert_layer import LoRAExperts
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.modules import names_of, unwrapped


def configs(model: nn.Module) -> dict[str, LoRAConfig]:
    """The configuration of each adapter that was put into `model` as a whole and is still there, by name."""
    there = names(model)
    return {name: config for name, config in getattr(unwrapped(model), "_lora_configs", {}).items() if name in there}


def config_of(model: nn.Module, adapter_name: str) -> LoRAConfig:
    """The configuration of an adapter; raises KeyError where `model` as a whole was not given it."""
    paths, known = list(layers_with(model, adapter_name)), configs(model)
    if adapter_name not in known:
        where = ", ".join(map(repr, paths[:3])) + (", …" if len(paths) > 3 else "")
        raise KeyError(
            f"adapter {adapter_name!r} is in {where}, but was not put in by inject or load_adapter on this module: "
            "call it on the module that they were given"
        )
    return known[adapter_name]


def remember(model: nn.Module, adapter_name: str, config: LoRAConfig, unused: Iterable[str] = ()) -> None:
    """Keep the configuration of an adapter, and which of its layers its last hot swap has left without it."""
    model._lora_configs = {**configs(model), adapter_name: config}  # type: ignore[assignment]
    model._lora_unused = {**getattr(model, "_lora_unused", {}), adapter_name: [*unused]}  # type: ignore[assignment]


def holders(model: nn.Module, adapter_name: str | None = None) -> dict[str, LoRALayer | SavedModule]:
    """What holds adapters in `model`, or this one, by full names: adapted layers and stacks, and wrapped modules."""
    found = {
        _path(path, one): one for one, path in names_of(model).items() if isinstance(one, (LoRALayer, SavedModule))
    }
    return {path: one for path, one in found.items() if adapter_name is None or adapter_name in one.adapters}


def _path(path: str, holder: nn.Module) -> str:
    """A holder's name in the model without adapters: of a stack of experts the parameter's."""
    if not isinstance(holder, LoRAExperts):
        return path
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return f"{path}.{holder.parameter_name}"


def names(model: nn.Module) -> dict[str, None]:
    """The names of the adapters that there are in `model`."""
    return dict.fromkeys(name for holder in holders(model).values() for name in holder.adapters)


def layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers of `model` by their full names."""
    return {path: one for path, one in holders(model).items() if isinstance(one, LoRALayer)}


def owners(model: nn.Module, adapter_name: str) -> dict[str, LoRALayer]:
    """The layers that have an adapter."""
    return {path: layer for path, layer in layers(model).items() if adapter_name in layer.adapters}


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, LoRALayer]:
    """The layers that have an adapter; raises KeyError where none has."""
    found = owners(model, adapter_name)
    if not found:
        raise KeyError(f"the model has no adapter {adapter_name!r}; its adapters: {sorted(names(model))}")
    return found


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, LoRALayer]:
    """The layers that have an adapter, without those where its last hot swap has left it nothing."""
    unused = getattr(model, "_lora_unused", {}).get(adapter_name, ())
    return {path: layer for path, layer in owners(model, adapter_name).items() if path not in unused}


class TrainableParameters(list[nn.Parameter]):
    """The parameters that train, for an optimizer; as text, their number and share."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(p for p in model.parameters() if p.requires_grad)
        self.num_trainable = sum(p.numel() for p in self)
        self.num_total = sum(p.numel() for p in model.parameters())

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters, the adapters included."""
        return self.num_trainable / self.num_total if self.num_total else 0.0

    def __str__(self) -> str:
        return f"trainable: {self.num_trainable:,} of {self.num_total:,} parameters ({self.share:.2%})"


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """The parameters of `model` that need a gradient, as a list with `num_trainable`, `num_total` and `share`."""
    return TrainableParameters(model)


def parameters(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """The parameters of one adapter, or of all: those in its layers and those of its copies of whole modules."""
    return [
        parameter
        for holder in holders(model, adapter_name).values()
        for name in holder.adapters
        if adapter_name in (None, name)
        for parameter in holder.adapter_tensors(name).values()
    ]


def refuse_merged(model: nn.Module) -> None:
    """Before anything changes."""
    merged = [path for path, layer in layers(model).items() if layer.merged]
    if merged:
        raise RuntimeError(f"adapters are merged into {merged[0]!r} and {len(merged) - 1} more; call unmerge first")


def refuse_shared_biases(model: nn.Module, config: LoRAConfig, adapter_name: str) -> None:
    """Raise ValueError where two adapters would meet in the base model's biases (PEFT's rule)."""
    others = [name for name in names(model) if name != adapter_name]
    with_bias = [name for name, one in {**configs(model), adapter_name: config}.items() if one.bias != "none"]
    if others and with_bias:
        raise ValueError(
            f"adapter {with_bias[0]!r} trains biases, which are the base model's own, so it can only be alone; the "
            f'model has {others}. Set bias="none" for all of several adapters'
        )


def refuse_changed_base(model: nn.Module, but_by: str | None = None) -> None:
    """Raise RuntimeError where PiSSA or OLoRA took a part out of the base: alone, another adapter would miss it."""
    changed = {name for layer in layers(model).values() for name in layer.base_changed_by}
    changed_by = sorted(changed - {but_by})
    if changed_by:
        raise RuntimeError(
            f"adapter {changed_by[0]!r} has changed the base weights (init_lora_weights), so no other can stand beside "
            "it; save_adapter it, delete_adapter it, and load it again as a plain one"
        )


def refuse_tied(model: nn.Module, weights: Iterable[torch.Tensor], what: str) -> None:
    """A weight that another module uses too (a head tied to its embedding) would change there as well."""
    owners: dict[int, list[str]] = {}
    for module, name in names_of(model).items():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    for weight in weights:
        names = owners.get(id(weight), [])
        if len(names) > 1:
            both = " and ".join(map(repr, names))
            raise ValueError(f"{both} share one weight, so {what} would change both; untie them")
