"""Another adapter in the place of one, without moving a parameter: compiled code and CUDA graphs go on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lorakernels.adapters import held
from lorakernels.adapters.bind import Contents, as_named, bind
from lorakernels.adapters.load import check_numbers, copy_whole
from lorakernels.adapters.rank_slices import num_experts, smaller, used_part
from lorakernels.adapters.saved_modules import copies_of, state_of
from lorakernels.config import check_rank
from lorakernels.files.convert import read_for
from lorakernels.files.peft import local_path
from lorakernels.files.reading import AdapterFileError, Tensors
from lorakernels.files.update import Update
from lorakernels.nn.base import DEFAULT, MAGNITUDE
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.modules import unwrapped
from lorakernels.nn.whole import put, whole, write


@whole
@torch.no_grad()
def prepare_for_hotswap(model: nn.Module, max_rank: int, adapter_name: str = DEFAULT) -> nn.Module:
    """Make room in an adapter for others of up to `max_rank`, and for other scalings: call before `torch.compile`.

    A and B are padded with zeros, which the outputs do not show, and the scaling becomes a tensor of no dimensions on
    the layer's device, where the model should be by now. `save_adapter` writes the adapter without the padding.

    Returns:
        `model` itself.

    Raises:
        KeyError: the model has no such adapter.
        ValueError: it has a higher rank than `max_rank`, or a grouped convolution has no such rank.
        RuntimeError: adapters are merged, or this one has changed the base weights.
    """
    check_rank(max_rank, "max_rank")
    owners = held.layers_with(model, adapter_name).values()
    held.refuse_merged(model)
    held.refuse_changed_base(model)
    padded = [(parameter, value) for layer in owners for parameter, value in _padded(layer, adapter_name, max_rank)]
    for parameter, value in padded:
        put(parameter, value)
    for layer in owners:
        adapter = layer.adapters[adapter_name]
        if not isinstance(adapter.scaling, torch.Tensor):
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)
            adapter.scaling = torch.tensor(adapter.scaling, device=layer.weight.device, dtype=dtype)
    return model


@whole
@torch.no_grad()
def hotswap_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = DEFAULT,
    *,
    hub: bool = False,
    revision: str | None = None,
    prefix: str | None = None,
) -> nn.Module:
    """Put the adapter in `folder` in the place of one that `model` has, in the same parameters.

    Nothing moves, so a compiled model is not compiled again; where the scaling differs that takes
    `prepare_for_hotswap`. A smaller rank is padded with zeros, and a layer that the file does not have is
    switched off. The slot keeps its own `lora_dropout`, whether it is active and whether it trains. Everything is
    checked before anything changes.

    Args:
        model: has the adapter `adapter_name`; compiled or not.
        folder, hub, revision, prefix: as for `load_adapter`.
        adapter_name: the slot.

    Returns:
        `model` itself.

    Raises:
        KeyError: the model has no such adapter, or was not given it as a whole.
        AdapterFileError: the files are missing, broken, or do not fit the slot: other layers, a higher rank, another
            kind of adapter, numbers that its dtype would round.
        RuntimeError: adapters are merged, or one has changed the base weights.
    """
    original = unwrapped(model)
    held.config_of(original, adapter_name)
    held.refuse_merged(original)
    held.refuse_changed_base(original)
    contents = bind(original, read_for(local_path(folder, hub, revision), partial(as_named, original), prefix))
    check_numbers(contents)
    _check_fits(original, adapter_name, contents)

    updates = {contents.targets[path]: update for path, update in contents.layers.items()}
    owners = held.owners(original, adapter_name)
    for layer in owners.values():
        _fill(layer, adapter_name, updates.get(layer), contents.config.use_rslora)
    copy_whole(original, adapter_name, contents)
    unused = sorted(path for path, layer in owners.items() if layer not in updates)
    held.remember(original, adapter_name, contents.config, unused)
    return model


def _room(layer: LoRALayer, name: str) -> int:
    """The rank that an adapter's parameters have room for."""
    return next(iter(layer.adapter_tensors(name).values())).shape[0] // num_experts(layer.target)


def _padded(layer: LoRALayer, name: str, max_rank: int) -> list[tuple[nn.Parameter, torch.Tensor]]:
    adapter, r, padded = layer.adapters[name], _room(layer, name), []
    shapes = type(layer).adapter_shapes(layer.target, max_rank, adapter.use_dora, adapter.lora_bias, adapter.pooled)
    if r > max_rank:
        raise ValueError(f"adapter {name!r} has rank {r}, more than max_rank={max_rank}")
    for suffix, parameter in layer.adapter_tensors(name).items():
        if tuple(parameter.shape) != shapes[suffix]:
            value = parameter.new_zeros(shapes[suffix])
            _copy_into(suffix, value, smaller(suffix, parameter, r, layer.target), r, layer)
            padded.append((parameter, value))
    return padded


def _copy_into(suffix: str, room: torch.Tensor, value: torch.Tensor, r: int, layer: LoRALayer) -> None:
    used = used_part(suffix, room, r, layer.target)
    used.copy_(value.reshape(used.shape))


def _check_fits(model: nn.Module, name: str, contents: Contents) -> None:
    config, slot, copies = contents.config, held.config_of(model, name), copies_of(model, name)
    for field in ("use_dora", "lora_bias", "pooled", "bias", "modules_to_save"):
        theirs, own = getattr(config, field), getattr(slot, field)
        if field == "modules_to_save":
            theirs, own = sorted(contents.whole), sorted(copies)
        if theirs != own or (field == "bias" and own != "none"):  # biases are the base's, with no slot of their own
            expected = 'bias="none" of both' if field == "bias" else "the same"
            raise AdapterFileError(
                f"the file has {field}={theirs!r} and adapter {name!r} {own!r}; expected {expected}: load it under "
                "another name"
            )
    for path, update in contents.layers.items():
        layer = contents.targets[path]
        if not isinstance(layer, LoRALayer) or name not in layer.adapters:
            raise AdapterFileError(f"the file has {path!r}, where adapter {name!r} is not; load it under another name")
        r, room = update.r, _room(layer, name)
        if r > room:
            raise AdapterFileError(
                f"{path} has rank {r} in the file, and adapter {name!r} has room for {room}; "
                f"prepare_for_hotswap(model, {r}) before compiling"
            )
        _check_exact(path, layer.adapter_tensors(name), update.tensors)
    for path, tensors in contents.whole.items():
        _check_exact(path, state_of(copies[path]), tensors)


def _check_exact(path: str, slot: Mapping[str, torch.Tensor], tensors: Tensors) -> None:
    for suffix, tensor in tensors.items():
        rounded = tensor.to(slot[suffix].dtype)
        if not torch.equal(rounded.to(tensor.dtype), tensor):
            raise AdapterFileError(
                f"{path}.{suffix} is {tensor.dtype}, which the slot's {slot[suffix].dtype} would round; make the slot "
                f"from an adapter in {tensor.dtype}"
            )


def _fill(layer: LoRALayer, name: str, update: Update | None, use_rslora: bool) -> None:
    """Put an update into a slot; none switches it off."""
    tensors, adapter = layer.adapter_tensors(name), layer.adapters[name]
    values = {suffix: torch.zeros_like(parameter) for suffix, parameter in tensors.items()}
    if update is not None:
        for suffix, value in values.items():
            _copy_into(suffix, value, update.tensors[suffix], update.r, layer)
        adapter.r, adapter.lora_alpha, adapter.use_rslora = update.r, update.alpha, use_rslora
        adapter.rescale(adapter.own_scaling)
    elif adapter.use_dora:
        magnitude: Any = layer.lora_magnitude_vector[name]
        A, B = (factor.flatten(1) for factor in list(values.values())[:2])
        norm = magnitude.norm(layer.weight, layer._matrix(layer.weight), A, B, 1.0)
        values[MAGNITUDE] = norm.view_as(tensors[MAGNITUDE])
    for suffix, parameter in tensors.items():
        write(parameter, values[suffix])
