"""Merging a whole model's adapters into its weights, and taking them out again."""

from __future__ import annotations

from torch import nn

from lorakernels.adapters.inject import activity, adapted_layers, refuse_tied
from lorakernels.adapters.switch import set_adapter


def merge(model: nn.Module, names: str | list[str] | None = None, *, keep_base: bool = False) -> None:
    """Merge the active adapters, or `names` after making them active, into the base weights.

    With `keep_base` every weight is copied first, so that `unmerge` brings it back to the bit. Raises ValueError, and
    changes nothing, when a merged weight would not be finite in its dtype, when DoRA's magnitude of a row is zero and
    the weight not kept, and when a layer cannot be merged.
    """
    restore_activity = activity(model)
    if names is not None:
        set_adapter(model, names)
    layers = {
        path: layer for path, layer in adapted_layers(model).items() if layer.active_adapters and not layer.merged
    }
    try:
        refuse_tied(model, [layer.weight for layer in layers.values()], "merging")
        for path, layer in layers.items():  # all or none: raises before the first layer changes
            try:
                layer.check_merge(keep_base)
            except ValueError as error:
                raise ValueError(f"{path!r}: {error}") from error
    except Exception:
        if names is not None:
            restore_activity()
        raise
    for layer in layers.values():
        layer.merge(keep_base=keep_base)


def unmerge(model: nn.Module) -> None:
    """Take merged adapters out of the base weights again."""
    for layer in adapted_layers(model).values():
        if layer.merged:
            layer.unmerge()
