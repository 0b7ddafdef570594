"""Choosing, scaling, merging and deleting a whole model's adapters while it runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial

from torch import nn

from lorakernels.adapters import held
from lorakernels.adapters.inject import activate, replace_modules
from lorakernels.adapters.saved_modules import SavedModule, saved_modules
from lorakernels.adapters.transformers_methods import take_methods
from lorakernels.adapters.uncalled import unwatch
from lorakernels.config import check_alpha
from lorakernels.nn import siblings
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.modules import unwrapped
from lorakernels.nn.whole import Step, in_turn, later, uninterrupted, whole


@whole
def set_adapter(model: nn.Module, names: str | list[str]) -> None:
    """Make `names` the active adapters of every layer that has them; their updates add up.

    Raises KeyError for a name that no layer has, and ValueError for two that each have a copy of one whole module
    (modules_to_save), before anything changes.
    """
    if not isinstance(names, Iterable):
        raise TypeError(f"names is {names!r}; expected a name or a list of names, [] for none")
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        held.layers_with(model, name)
    held.refuse_merged(model)
    for path, wrapper in saved_modules(model).items():
        both = [name for name in dict.fromkeys(wanted) if name in wrapper.modules_to_save]
        if len(both) > 1:
            raise ValueError(f"adapters {both} each have a copy of {path!r}; expected at most one of them active")
    activate(model, wanted)


@whole
def set_scale(model: nn.Module, name: str, scale: float) -> None:
    """Multiply an adapter's own scaling (lora_alpha / r) by `scale`: 1 restores it, 0 switches it off.

    Whole modules (modules_to_save) are not scaled.
    """
    check_alpha(scale, "scale")
    held.refuse_merged(model)
    adapters = [layer.adapters[name] for layer in held.layers_with(model, name).values()]
    for adapter in adapters:
        check_alpha(adapter.own_scaling * scale, "scale times the adapter's scaling")
    for adapter in adapters:
        adapter.rescale(adapter.own_scaling * scale)


@whole
def merge(
    model: nn.Module, names: str | list[str] | None = None, *, keep_base: bool = False, requantize: bool = False
) -> None:
    """Merge the active adapters, or `names` after making them active, into the base weights.

    Packed weights become plain ones until `unmerge`, and with QA-LoRA get other zeros. With `requantize` they are
    packed again: a warning says what that loses, and where less than half of an update would survive it is refused.

    With `keep_base` every weight is copied first, so that `unmerge` brings it back to the bit. Raises ValueError, and
    changes nothing, when a merged weight would not be finite in its dtype, when DoRA's magnitude of a row is zero and
    the weight not kept, and when a layer cannot be merged.
    """
    if names is not None:
        set_adapter(model, names)
    layers = {path: one for path, one in held.layers(model).items() if one.active_adapters and not one.merged}
    held.refuse_tied(model, [layer.weight for layer in layers.values()], "merging")
    lost = {}
    for path, layer in layers.items():  # what cannot be merged, or finds no memory, raises before one layer changes
        try:
            lost[path] = layer.check_merge(keep_base, requantize)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from error
        # One after the other: all merged weights beside all others would take twice the memory.
        later(partial(_merge_layer, layer, keep_base, requantize), layer.unmerge)
    for holder in held.holders(model).values() if layers else ():
        holder.in_merged_model = True
    if any(lost.values()):
        worst = max(lost, key=lost.__getitem__)
        warnings.warn(
            f"packing again loses up to {lost[worst]:.3g} of an update (error / ‖Δ‖, {worst!r})", stacklevel=3
        )


_merge = merge  # for `unload`, which has an argument of that name


def _merge_layer(layer: LoRALayer, keep_base: bool, requantize: bool) -> None:
    if not layer.merged:
        layer.merge(keep_base, requantize)


@whole
def unmerge(model: nn.Module) -> None:
    """Take merged adapters out of the base weights again."""
    for layer in held.layers(model).values():
        if layer.merged:
            later(partial(_unmerge_layer, layer))
    for holder in held.holders(model).values():
        holder.in_merged_model = False


def _unmerge_layer(layer: LoRALayer) -> None:
    if layer.merged:
        layer.unmerge()


def unload(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Take all adapters out of `model`, in place: every layer is of its own type again, with its own names.

    Args:
        model: with adapters from `inject` or `load_adapter`; compiled or not.
        merge: what the active adapters add stays, in the base weights, with their copies of whole modules
            (modules_to_save): the model answers as before. Else it answers as without adapters; what PiSSA or OLoRA
            took out of the base weights goes back, to within rounding. Biases that trained stay as they are.

    Returns:
        `model` itself; of an adapted layer its base layer. What was frozen stays so.

    Raises:
        ValueError: with `merge`, what `merge` raises; nothing changes.
        RuntimeError: some of the adapters are merged and others not.
    """
    compiled, model = model, unwrapped(model)
    layers = held.layers(model)
    steps: list[Step] = []
    if not merge:
        steps = [(partial(unmerge, model), None)]
        steps += [(partial(_delete_if_there, model, name), None) for name in held.names(model)]
    elif not layers or not all(layer.merged for layer in layers.values() if layer.active_adapters):
        held.refuse_merged(model)
        steps = [(partial(_merge, model), partial(unmerge, model))]
    plain: dict[nn.Module, nn.Module] = {}
    with uninterrupted():
        in_turn([*steps, (partial(_strip, model, plain), None)])
    return plain.get(model, compiled)


@whole
def _strip(model: nn.Module, plain: dict[nn.Module, nn.Module]) -> None:
    """Put the base layers in the place of the adapted ones, and into `plain` by these."""
    plain |= {layer: layer.plain_layer for layer in held.layers(model).values()}
    plain |= {wrapper: wrapper.running.requires_grad_(False) for wrapper in saved_modules(model).values()}
    for parent in model.modules():
        if not plain.keys().isdisjoint(parent._modules.values()):
            siblings.forget(parent)
    replace_modules(model, plain)
    for module in model.modules():  # it may have been put into a part of the model
        unwatch(module)
        take_methods(module)
        for known in ("_lora_configs", "_lora_unused"):
            module.__dict__.pop(known, None)


def _delete_if_there(model: nn.Module, name: str) -> None:
    if name in held.names(model):
        delete_adapter(model, name)


@whole
def delete_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter out of every layer, with its copies of whole modules, and forget its configuration.

    If it was active no other takes its place. Adapted layers stay, a layer without adapters being its base. What PiSSA
    or OLoRA took out of the base weights goes back, to within rounding.

    Raises KeyError for a name that the model does not have, RuntimeError while adapters are merged; nothing changes.
    """
    holders = held.holders(model, name) or held.layers_with(model, name)  # which raises
    held.refuse_merged(model)
    for holder in holders.values():
        holder.delete_adapter(name)
        if isinstance(holder, SavedModule) and not holder.adapters:
            replace_modules(model, {holder: holder.original_module})
    for module in model.modules():  # it may have been put into a part of the model
        for known in ("_lora_configs", "_lora_unused"):
            module.__dict__.get(known, {}).pop(name, None)
