"""What an adapter's files hold: which tensor belongs to which layer of a model, checked against it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lorakernels.adapters.adapter_config import AdapterFileError, read_config
from lorakernels.adapters.inject import adaptable, served
from lorakernels.adapters.saved_modules import SavedModule, state_of
from lorakernels.adapters.targets import by_pattern, find_modules_to_save, owner_of, plain_modules
from lorakernels.config import LoRAConfig, of_one_layer
from lorakernels.nn.adapt import LAYERS
from lorakernels.nn.base import MAGNITUDE
from lorakernels.nn.layer import LoRALayer

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_SUFFIXES = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", MAGNITUDE)
_KEY = re.compile(rf"(?P<path>.+)\.(?P<suffix>{'|'.join(map(re.escape, _SUFFIXES))})")
# What an adapted or a saved module has inside, where the plain model has nothing.
_INSIDE = re.compile(r"\.(base_layer|original_module)(?=\.)")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Contents:
    """An adapter's files, all checked: nothing in here can fail to fit the model.

    Tensors of `layers` by module path and by the names of `LoRALayer.adapter_shapes`, those of `whole` by module path
    and the module's own names; `biases` has each of the model's beside its new value.
    """

    config: LoRAConfig
    modules: dict[str, nn.Module]
    layers: dict[str, Tensors]
    ranks: dict[str, int]
    alphas: dict[str, float]
    whole: dict[str, Tensors]
    biases: list[tuple[torch.Tensor, torch.Tensor]]


def read_contents(model: nn.Module, folder: Path) -> Contents:
    """Read an adapter's files and check them against `model`; raises AdapterFileError, and changes nothing."""
    config = read_config(_existing(folder, CONFIG_FILE))
    path = _existing(folder, WEIGHTS_FILE)
    return check_contents(model, config, _read_tensors(path), str(path))


def check_contents(model: nn.Module, config: LoRAConfig, tensors: Tensors, source: str) -> Contents:
    """Tensors by the keys of PEFT's files, checked against `model`; takes them out of `tensors`. Raises as above."""
    if not tensors:
        raise AdapterFileError(f"{source} holds no tensors")
    try:
        whole_modules = find_modules_to_save(model, config.modules_to_save)
    except TypeError as error:
        raise AdapterFileError(str(error)) from error
    modules = dict(plain_modules(model))
    whole = _take_whole(tensors, whole_modules, modules)
    layers = _take_layers(tensors, whole_modules)
    biases = _take_biases(tensors, model, config)
    _refuse_the_rest(tensors, model)
    if not layers:
        raise AdapterFileError(f"{source} holds no tensors of an adapted layer")
    bases = {path: _layer(modules, path) for path in layers}  # first of all: how many there can be is the model's
    ranks = by_pattern(layers, config.rank_pattern, config.r, CONFIG_FILE)
    alphas = by_pattern(layers, config.alpha_pattern, config.lora_alpha, CONFIG_FILE)
    for path, own in layers.items():
        _check_layer(path, bases[path], own, ranks[path], alphas[path], config)
    return Contents(config, modules, layers, ranks, alphas, whole, biases)


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_file():
        return path
    if not folder.is_dir():
        raise AdapterFileError(
            f"{folder} is not a folder; expected one with {CONFIG_FILE} and {WEIGHTS_FILE}, or hub=True for a name "
            "on the Hugging Face hub"
        )
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
    if name == WEIGHTS_FILE and pickles:
        raise AdapterFileError(
            f"{folder} has {', '.join(pickles)} and no {WEIGHTS_FILE}: a pickle can run any code and is not read; "
            "convert it with safetensors.torch.save_file where you trust it"
        )
    raise AdapterFileError(f"{folder} has no {name}; it has: {', '.join(sorted(os.listdir(folder))) or 'nothing'}")


def _read_tensors(path: Path) -> Tensors:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise AdapterFileError(f"{path} is not a whole safetensors file: {error}") from error


def _take_whole(
    tensors: Tensors, to_save: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]
) -> dict[str, Tensors]:
    """The tensors of the modules `to_save`, out of `tensors`: all that a module's state dict has, of the same shapes.

    One that the model has under several names may be in the file under any of them, and comes back under its first.
    """
    whole: dict[str, Tensors] = {}
    for module in dict.fromkeys(to_save.values()):
        names = [name for name, other in modules.items() if other is module]
        path = names[0]
        whole[path] = {}
        for name, own in state_of(module.original_module if isinstance(module, SavedModule) else module).items():
            values = [tensors.pop(key) for key in (f"{PREFIX}{one}.{name}" for one in names) if key in tensors]
            value = values[0] if values else None
            if value is None:
                raise AdapterFileError(f"module {path!r} has no tensor {name!r} in the file; modules_to_save means all")
            if value.shape != own.shape or value.is_floating_point() != own.is_floating_point():
                found = f"{list(value.shape)}, {value.dtype}"
                raise AdapterFileError(f"{path}.{name} is {found}; expected {list(own.shape)}, {own.dtype}")
            if not all(torch.equal(value, other) for other in values[1:]):
                raise AdapterFileError(f"{' and '.join(names)} are one module, of which the file has two {name!r}")
            _check_finite(f"{path}.{name}", value)
            whole[path][name] = value
        # PEFT repeats the biases under the names that they have inside its wrapper where bias="all"; those of a module
        # without others in it come without the adapter's name.
        for inside in [f"{PREFIX}{name}.modules_to_save." for name in names]:
            for key in [key for key in tensors if key.startswith(inside) and key.endswith("bias")]:
                ending = key.removeprefix(inside)
                copied = whole[path].get(ending, whole[path].get(ending.partition(".")[2]))
                if copied is not None and torch.equal(tensors[key], copied):
                    del tensors[key]
    return whole


def _take_layers(tensors: Tensors, whole: Mapping[str, nn.Module]) -> dict[str, Tensors]:
    """The tensors of adapted layers, out of `tensors`."""
    layers: dict[str, Tensors] = {}
    for key in list(tensors):
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        if match is not None and key.startswith(PREFIX) and owner_of(match["path"], whole) is None:
            layers.setdefault(match["path"], {})[match["suffix"]] = tensors.pop(key)
    return layers


def _take_biases(tensors: Tensors, model: nn.Module, config: LoRAConfig) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Take the biases out of a file's tensors, each beside the model's own that it replaces."""
    if config.bias == "none":
        return []
    own = {name: parameter for name, parameter in _parameters(model).items() if name.endswith("bias")}
    taken: dict[torch.Tensor, tuple[str, torch.Tensor]] = {}
    for key in [key for key in tensors if key.startswith(PREFIX) and key.endswith(".bias")]:
        name = _INSIDE.sub("", key.removeprefix(PREFIX))
        value = tensors.pop(key)
        if name not in own or own[name].shape != value.shape or not _is_finite(value):
            expected = list(own[name].shape) if name in own else "a bias that the model has"
            raise AdapterFileError(f"{key} is {list(value.shape)}, {value.dtype}; expected finite numbers, {expected}")
        first, other = taken.setdefault(own[name], (key, value))
        if not torch.equal(value.to(own[name].dtype), other.to(own[name].dtype)):
            raise AdapterFileError(f"{first} and {key} are one bias of the model, of which the file has two values")
    return [(bias, value) for bias, (_, value) in taken.items()]


def _refuse_the_rest(tensors: Tensors, model: nn.Module) -> None:
    """What is left may only be the base's own weights, which PEFT saves beside adapted embeddings."""
    own = _parameters(model) if tensors else {}
    for key, value in tensors.items():
        weight = own.get(_INSIDE.sub("", key.removeprefix(PREFIX)))
        if weight is None or not key.startswith(PREFIX):
            raise AdapterFileError(
                f"unknown key {key!r}; expected {PREFIX}<module>. and one of {', '.join(_SUFFIXES)}, or a tensor of "
                "a module in modules_to_save"
            )
        if weight.shape != value.shape or not torch.equal(weight.detach().cpu(), value.to(weight.dtype)):
            raise AdapterFileError(
                f"{key} is another base weight ({list(value.shape)}) than the model's ({list(weight.shape)}); put it "
                "into the model first, since other adapters would get it too"
            )


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters by plain names, a tied one under each of its own, as PEFT writes it."""
    return {_INSIDE.sub("", name): p for name, p in model.named_parameters(remove_duplicate=False)}


def _layer(modules: dict[str, nn.Module], path: str) -> nn.Module:
    """The layer that a path means, without its adapters."""
    layer = modules.get(path)
    if layer is None:
        near = difflib.get_close_matches(path, modules, n=3, cutoff=0.4)
        raise AdapterFileError(f"the model has no module {path!r}; near names: {', '.join(near) or 'none'}")
    base = layer.base_layer if isinstance(layer, LoRALayer) else layer
    if type(base) not in LAYERS and served(base):
        raise AdapterFileError(f"module {path!r} {served(base)}")
    if type(base) not in LAYERS:
        raise AdapterFileError(f"module {path!r} is a {type(layer).__qualname__}; expected one of {adaptable()}")
    return base


def _check_layer(path: str, base: nn.Module, tensors: Tensors, r: int, alpha: float, config: LoRAConfig) -> None:
    """Each tensor of a layer is there, is finite and has the shape that the configuration says."""
    kind = LAYERS[type(base)]
    try:
        kind.check_adapter(base, of_one_layer(config, r, alpha, init_lora_weights=True))
        shapes = kind.adapter_shapes(base, r, config.use_dora, config.lora_bias)
    except (TypeError, ValueError, OverflowError) as error:
        raise AdapterFileError(f"module {path!r}: {error}") from error
    means = f"use_dora={config.use_dora}, lora_bias={config.lora_bias}"
    if tensors.keys() != shapes.keys():
        missing = [suffix for suffix in shapes if suffix not in tensors]
        extra = [suffix for suffix in tensors if suffix not in shapes]
        what = f"has no {' and no '.join(missing)}" if missing else f"has {' and '.join(extra)} too"
        expected = ", ".join(shapes)
        raise AdapterFileError(f"module {path!r} {what}; expected {expected} (a {type(base).__name__}, {means})")
    for suffix, shape in shapes.items():
        tensor = tensors[suffix]
        if not tensor.is_floating_point():
            raise AdapterFileError(f"{path}.{suffix} is {tensor.dtype}; expected a float dtype")
        if tuple(tensor.shape) != shape:
            hint = " (transposed?)" if tuple(tensor.shape) == shape[::-1] else ""
            raise AdapterFileError(
                f"{path}.{suffix} is {list(tensor.shape)}; expected {list(shape)}, as {CONFIG_FILE} says r={r}{hint}"
            )
        _check_finite(f"{path}.{suffix}", tensor)


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if not _is_finite(tensor):
        raise AdapterFileError(f"{name} holds NaN or Inf")


def _is_finite(tensor: torch.Tensor) -> bool:
    # An 8-bit float has no isfinite.
    return bool(torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all())
