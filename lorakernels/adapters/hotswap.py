"""Another adapter in the place of one, without moving a parameter: compiled code and CUDA graphs go on."""

from __future__ import annotations

import os

import torch
from torch import nn

from lorakernels.adapters.adapter_config import AdapterFileError
from lorakernels.adapters.files import copy_whole, refuse_meta, set_config
from lorakernels.adapters.hub import local_folder
from lorakernels.adapters.inject import adapted_layers, config_of, refuse_changed_base, uncompiled
from lorakernels.adapters.rank_slices import smaller, used_part
from lorakernels.adapters.saved_modules import saved_modules
from lorakernels.adapters.switch import layers_with, refuse_merged
from lorakernels.adapters.tensors import Contents, Tensors, read_contents
from lorakernels.config import check_rank
from lorakernels.nn.base import DEFAULT, MAGNITUDE
from lorakernels.nn.layer import LoRALayer


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
    layers = adapted_layers(model)
    owners = layers_with(layers, adapter_name)
    refuse_merged(layers)
    refuse_changed_base(model)
    for layer in owners:
        # Raises where a layer cannot have such a rank.
        type(layer).adapter_shapes(layer.base_layer, max_rank, layer.adapters[adapter_name].use_dora)
        if _room(layer, adapter_name) > max_rank:
            raise ValueError(
                f"adapter {adapter_name!r} has rank {_room(layer, adapter_name)}, more than max_rank={max_rank}"
            )
    padded = [(parameter, value) for layer in owners for parameter, value in _padded(layer, adapter_name, max_rank)]
    for parameter, value in padded:
        parameter.data = value
    for layer in owners:
        adapter = layer.adapters[adapter_name]
        if not isinstance(adapter.scaling, torch.Tensor):
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)
            adapter.scaling = torch.tensor(adapter.scaling, device=layer.weight.device, dtype=dtype)
    return model


@torch.no_grad()
def hotswap_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = DEFAULT,
    *,
    hub: bool = False,
    revision: str | None = None,
) -> nn.Module:
    """Put the adapter in `folder` in the place of one that `model` has, in the same parameters.

    Nothing is allocated and nothing moves, so a compiled model is not compiled again; where the scaling differs that
    takes `prepare_for_hotswap`. A smaller rank is padded with zeros, and a layer that the file does not have is
    switched off. The slot keeps its own `lora_dropout`, whether it is active and whether it trains. Everything is
    checked before anything changes.

    Args:
        model: has the adapter `adapter_name`; compiled or not.
        folder, hub, revision: as for `load_adapter`.
        adapter_name: the slot.

    Returns:
        `model` itself.

    Raises:
        KeyError: the model has no such adapter, or was not given it as a whole.
        AdapterFileError: the files are missing, broken, or do not fit the slot: other layers, a higher rank, another
            kind of adapter, numbers that its dtype would round.
        RuntimeError: adapters are merged, or one has changed the base weights.
    """
    original = uncompiled(model)
    layers = adapted_layers(original)
    owners = set(layers_with(layers, adapter_name))
    config_of(original, adapter_name)
    refuse_merged(layers)
    refuse_changed_base(original)
    contents = read_contents(original, local_folder(folder, hub, revision))
    _check_fits(original, adapter_name, contents)
    refuse_meta(contents)

    paths = {contents.modules[path]: path for path in contents.layers}
    for layer in owners:
        path = paths.get(layer)
        if path is None:
            _switch_off(layer, adapter_name)
        else:
            _fill(layer, adapter_name, contents, path)
    copy_whole(original, adapter_name, contents)
    names = {layer: path for path, layer in layers.items()}
    unused = sorted(names[layer] for layer in owners - paths.keys())
    set_config(original, adapter_name, contents, unused)
    return model


def _room(layer: LoRALayer, name: str) -> int:
    """The rank that an adapter's parameters have room for."""
    return next(iter(layer.adapter_tensors(name).values())).shape[0]


def _padded(layer: LoRALayer, name: str, max_rank: int) -> list[tuple[nn.Parameter, torch.Tensor]]:
    shapes = type(layer).adapter_shapes(
        layer.base_layer, max_rank, layer.adapters[name].use_dora, layer.adapters[name].lora_bias
    )
    r, padded = _room(layer, name), []
    for suffix, parameter in layer.adapter_tensors(name).items():
        if tuple(parameter.shape) != shapes[suffix]:
            value = parameter.new_zeros(shapes[suffix])
            _copy_into(suffix, value, smaller(suffix, parameter, r, layer.base_layer), r, layer)
            padded.append((parameter, value))
    return padded


def _copy_into(suffix: str, room: torch.Tensor, value: torch.Tensor, r: int, layer: LoRALayer) -> None:
    used = used_part(suffix, room, r, layer.base_layer)
    used.copy_(value.reshape(used.shape))


def _check_fits(model: nn.Module, name: str, contents: Contents) -> None:
    config, slot = contents.config, config_of(model, name)
    for field in ("use_dora", "lora_bias"):
        if getattr(config, field) != getattr(slot, field):
            raise AdapterFileError(
                f"the file has {field}={getattr(config, field)} and adapter {name!r} {getattr(slot, field)}; expected "
                "the same: load it under another name"
            )
    if config.bias != "none" or slot.bias != "none":
        raise AdapterFileError(
            f'the file has bias={config.bias!r} and adapter {name!r} {slot.bias!r}; expected "none" of both, since the '
            "biases are the base model's"
        )
    copies = {path for path, wrapper in saved_modules(model).items() if name in wrapper.modules_to_save}
    if copies != contents.whole.keys():
        raise AdapterFileError(
            f"the file has modules_to_save {sorted(contents.whole)} and adapter {name!r} {sorted(copies)}; "
            "expected the same"
        )
    for path, tensors in contents.layers.items():
        layer = contents.modules[path]
        if not isinstance(layer, LoRALayer) or name not in layer.adapters:
            raise AdapterFileError(f"the file has {path!r}, where adapter {name!r} is not; load it under another name")
        r, room = contents.ranks[path], _room(layer, name)
        if r > room:
            raise AdapterFileError(
                f"{path} has rank {r} in the file, and adapter {name!r} has room for {room}; "
                f"prepare_for_hotswap(model, {r}) before compiling"
            )
        _check_exact(path, layer.adapter_tensors(name), tensors)
    for path, tensors in contents.whole.items():
        copy = saved_modules(model)[path].modules_to_save[name]
        _check_exact(path, dict(copy.state_dict()), tensors)


def _check_exact(path: str, slot: dict[str, nn.Parameter] | Tensors, tensors: Tensors) -> None:
    for suffix, tensor in tensors.items():
        held = tensor.to(slot[suffix].dtype)
        if not torch.equal(held.to(tensor.dtype), tensor):
            raise AdapterFileError(
                f"{path}.{suffix} is {tensor.dtype}, which the slot's {slot[suffix].dtype} would round; make the slot "
                f"from an adapter in {tensor.dtype}"
            )


def _fill(layer: LoRALayer, name: str, contents: Contents, path: str) -> None:
    r, alpha, tensors = contents.ranks[path], contents.alphas[path], contents.layers[path]
    for suffix, parameter in layer.adapter_tensors(name).items():
        parameter.zero_()
        _copy_into(suffix, parameter, tensors[suffix], r, layer)
    adapter = layer.adapters[name]
    adapter.r, adapter.lora_alpha, adapter.use_rslora = r, alpha, contents.config.use_rslora
    adapter.rescale(adapter.own_scaling)


def _switch_off(layer: LoRALayer, name: str) -> None:
    for parameter in layer.adapter_tensors(name).values():
        parameter.zero_()
    if layer.adapters[name].use_dora:
        magnitude: torch.Tensor = layer.adapter_tensors(name)[MAGNITUDE]
        matrix = layer._matrix(layer.weight)
        norm = layer.lora_magnitude_vector[name].norm(layer.weight, matrix, *layer._factors(name), 1.0)  # type: ignore
        magnitude.copy_(norm.view_as(magnitude))
