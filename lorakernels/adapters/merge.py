"""Merging a whole model's adapters into its weights, and taking them out again."""

from __future__ import annotations

from torch import nn

from lorakernels.adapters.inject import adapted_layers
from lorakernels.adapters.switch import set_adapter


def merge(model: nn.Module, names: str | list[str] | None = None, *, keep_base: bool = False) -> None:
    """Merge the active adapters, or `names` after making them active, into the base weights.

    With `keep_base` every weight is copied first, so that `unmerge` brings it back to the bit. Raises ValueError, and
    changes nothing, when a merged weight would not be finite.
    """
    if names is not None:
        set_adapter(model, names)
    layers = [layer for layer in adapted_layers(model).values() if layer.active_adapters and not layer.merged]
    for layer in layers:
        layer.merged_weight()  # all or none: raises before the first layer changes
    for layer in layers:
        layer.merge(keep_base=keep_base)


def unmerge(model: nn.Module) -> None:
    """Take merged adapters out of the base weights again."""
    for layer in adapted_layers(model).values():
        if layer.merged:
            layer.unmerge()
