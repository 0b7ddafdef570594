"""Choosing, scaling and deleting a whole model's adapters while it runs."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lorakernels.adapters.inject import adapted_layers, replace_modules
from lorakernels.adapters.saved_modules import saved_modules
from lorakernels.config import check_alpha
from lorakernels.nn.layer import LoRALayer


def set_adapter(model: nn.Module, names: str | list[str]) -> None:
    """Make `names` the active adapters of every layer that has them; their updates add up.

    Raises KeyError for a name that no layer has, and ValueError for two that each have a copy of one whole module
    (modules_to_save), before anything changes.
    """
    if not isinstance(names, Iterable):
        raise TypeError(f"names is {names!r}; expected a name or a list of names, [] for none")
    wanted = [names] if isinstance(names, str) else list(names)
    layers = adapted_layers(model)
    for name in wanted:
        layers_with(layers, name)
    refuse_merged(layers)
    wrappers = saved_modules(model)
    for path, wrapper in wrappers.items():
        both = [name for name in dict.fromkeys(wanted) if name in wrapper.modules_to_save]
        if len(both) > 1:
            raise ValueError(f"adapters {both} each have a copy of {path!r}; expected at most one of them active")
    for layer in layers.values():
        layer.set_adapter([name for name in wanted if name in layer.r])
    for wrapper in wrappers.values():
        wrapper.set_adapter(dict.fromkeys(wanted))


def set_scale(model: nn.Module, name: str, scale: float) -> None:
    """Multiply an adapter's own scaling (lora_alpha / r) by `scale`: 1 restores it, 0 switches it off.

    Whole modules (modules_to_save) are not scaled.
    """
    check_alpha(scale, "scale")
    layers = adapted_layers(model)
    refuse_merged(layers)
    for layer in layers_with(layers, name):
        layer._set_scaling(name, layer.own_scaling(name) * scale)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter out of every layer, with its copies of whole modules, and forget its configuration.

    If it was active no other takes its place. Adapted layers stay, a layer without adapters being its base. What PiSSA
    or OLoRA took out of the base weights goes back, to within rounding.

    Raises KeyError for a name that the model does not have, RuntimeError while adapters are merged; nothing changes.
    """
    layers = adapted_layers(model)
    copies = [wrapper for wrapper in saved_modules(model).values() if name in wrapper.modules_to_save]
    # A layer's own delete_adapter may have left the copies alone.
    owners = [layer for layer in layers.values() if name in layer.r] if copies else layers_with(layers, name)
    refuse_merged(layers)
    for layer in owners:
        layer.delete_adapter(name)
    for wrapper in copies:
        wrapper.delete_adapter(name)
        if not wrapper.modules_to_save:
            replace_modules(model, {wrapper: wrapper.original_module})
    for module in model.modules():  # it may have been put into a part of the model
        for known in ("_lora_configs", "_lora_unused"):
            module.__dict__.get(known, {}).pop(name, None)


def refuse_merged(layers: dict[str, LoRALayer]) -> None:
    """Before anything changes."""
    merged = [path for path, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(f"adapters are merged into {merged[0]!r} and {len(merged) - 1} more; call unmerge first")


def layers_with(layers: dict[str, LoRALayer], name: str) -> list[LoRALayer]:
    """The layers that have an adapter; raises KeyError where none has."""
    found = [layer for layer in layers.values() if name in layer.r]
    if not found:
        known = sorted({adapter for layer in layers.values() for adapter in layer.r})
        raise KeyError(f"the model has no adapter {name!r}; its adapters: {known}")
    return found
