"""Choosing and scaling a whole model's adapters while it runs."""

from __future__ import annotations

from torch import nn

from lorakernels.adapters.inject import adapted_layers
from lorakernels.config import check_alpha
from lorakernels.nn.layer import LoRALayer


def set_adapter(model: nn.Module, names: str | list[str]) -> None:
    """Make `names` the active adapters of every layer that has them; their updates add up.

    Raises KeyError for a name that no layer has, before anything changes.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    layers = adapted_layers(model)
    for name in wanted:
        _layers_with(layers, name)
    _refuse_merged(layers)
    for layer in layers.values():
        layer.set_adapter([name for name in wanted if name in layer.r])


def set_scale(model: nn.Module, name: str, scale: float) -> None:
    """Multiply an adapter's own scaling (lora_alpha / r) by `scale`: 1 restores it, 0 switches it off."""
    check_alpha(scale, "scale")
    layers = adapted_layers(model)
    _refuse_merged(layers)
    for layer in _layers_with(layers, name):
        layer.scalings[name] = layer.own_scaling(name) * scale


def _refuse_merged(layers: dict[str, LoRALayer]) -> None:
    """Before anything changes."""
    merged = [path for path, layer in layers.items() if layer.merged]
    if merged:
        raise RuntimeError(f"adapters are merged into {merged[0]!r} and {len(merged) - 1} more; call unmerge first")


def _layers_with(layers: dict[str, LoRALayer], name: str) -> list[LoRALayer]:
    found = [layer for layer in layers.values() if name in layer.r]
    if not found:
        known = sorted({adapter for layer in layers.values() for adapter in layer.r})
        raise KeyError(f"the model has no adapter {name!r}; its adapters: {known}")
    return found
