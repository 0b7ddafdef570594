"""What an adapter's files mean in a model: which tensor belongs to which of its layers, checked against it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lorakernels.adapters import held
from lorakernels.adapters.inject import base_and_kind
from lorakernels.adapters.saved_modules import SavedModule, state_of
from lorakernels.adapters.targets import Target, find_modules_to_save, known_stacks, plain_modules, why_without_effect
from lorakernels.config import LoRAConfig, of_one_layer
from lorakernels.files.config_file import check_start, not_supported
from lorakernels.files.naming import Model, own_names, renamings_of
from lorakernels.files.peft import PREFIX, PeftFile, plain_name, unknown_key, updates_of
from lorakernels.files.reading import AdapterFileError, Tensors, as_file_error, check_finite
from lorakernels.files.stacks import of_today
from lorakernels.files.update import Shapes, Update
from lorakernels.nn.expert_layer import Stack
from lorakernels.nn.experts import stack_names, why_not_run
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.modules import named_parameters
from lorakernels.quant.layers import is_transposed

_RESIZE = "; give the model the size that it was trained with first (model.resize_token_embeddings, num_labels)"
Values = list[tuple[torch.Tensor, torch.Tensor]]  # of the model, and beside it what is to be in it


@dataclasses.dataclass(frozen=True)
class Contents:
    """An adapter's files, all checked: nothing in here can fail to fit the model.

    `layers` has the updates by path, their tensors by the names of `LoRALayer.adapter_shapes`, and `targets` what is at
    these paths in the model; `whole` has those of whole modules by path and their own names; `biases` each of the
    model's beside its new value, and `base` the same of base weights.
    """

    config: LoRAConfig
    modules: dict[str, nn.Module]
    targets: dict[str, Target]
    layers: dict[str, Update]
    whole: dict[str, Tensors]
    biases: Values
    base: Values


def bind(
    model: nn.Module, file: PeftFile, bases: Mapping[type, type] = MappingProxyType({}), base_weights: str = "model"
) -> Contents:
    """Check an adapter's files against `model`; raises AdapterFileError, and changes nothing.

    `bases` says of a module's class which plain one stands for it, where a store has switched the model's. Base weights
    in the file must be the model's, or with `base_weights="file"` are to come into it.
    """
    config = file.config
    check_start(file.fields, file.source)
    with as_file_error(file.source):
        to_save = find_modules_to_save(model, config.modules_to_save)
    modules = dict(plain_modules(model))
    known: dict[str, Target] = {**modules, **(known_stacks(model) if file.stacks else {})}
    others = _with_own_names(file.others, model)
    whole = _take_whole(others, to_save, modules)
    biases = _take_biases(others, model) if config.bias != "none" else []
    # Before ranks and shapes: how many modules there can be is the model's.
    weights = own_names(
        [f"{path}.weight" for path in file.layers],
        {f"{path}.weight": None for path in known},
        partial(renamings_of, model),
    )
    own = {path: weights[f"{path}.weight"].removesuffix(".weight") for path in file.layers}
    found = {path: _layer(known, modules, own[path], bases) for path in file.layers}
    of_stacks = {
        path: of_today(path, file.layers[path], stack.num_experts, stack.sizes, stack.by_columns, file.fields)
        for path, (stack, _) in found.items()
        if isinstance(stack, Stack)
    }
    file = dataclasses.replace(file, layers=file.layers | of_stacks)

    if file.fields.get("fan_in_fan_out") and not any(is_transposed(base) for base, _ in found.values()):
        raise not_supported("fan_in_fan_out", file.fields["fan_in_fan_out"], file.source)
    if file.fields.get("ensure_weight_tying"):  # where nothing is tied it says nothing
        trained = [base for base, _ in found.values()] + list(to_save.values())
        with as_file_error(file.source):
            tied = (p for module in trained if isinstance(module, nn.Module) for p in module.parameters())
            held.refuse_tied(model, tied, "ensure_weight_tying=True")
    base = _take_base(others, model, file.source, base_weights)

    def shapes_of(path: str, r: int, alpha: float) -> tuple[str, Shapes]:
        (base, kind), variant = found[path], (config.use_dora, config.lora_bias, config.pooled)
        with as_file_error(f"module {path!r}"):
            kind.check_adapter(base, of_one_layer(config, r, alpha, init_lora_weights=True))
            what = "a stack of experts" if isinstance(base, Stack) else f"a {kind.BASE.__name__}"
            return what, kind.adapter_shapes(base, r, *variant)

    layers = {own[path]: update for path, update in updates_of(file, shapes_of).items()}
    targets = {path: known[path] for path in layers}
    for path, target in {**{path: modules[path] for path in whole}, **targets}.items():
        for name, tensor in (target.experts if isinstance(target, Stack) else target).named_parameters():
            if tensor.is_meta:  # nothing can be put into it, and what is loaded later would start anew
                raise AdapterFileError(f"{path}.{name} is on the meta device and has no values; put them there first")
    stacks = {own[path] for path in file.stacks}
    config = dataclasses.replace(
        config, target_modules=sorted(layers.keys() - stacks), target_parameters=sorted(stacks) or None
    )
    return Contents(config, modules, targets, layers, whole, biases, base)


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
            if not values:
                raise AdapterFileError(f"module {path!r} has no tensor {name!r} in the file; modules_to_save means all")
            value = values[0]
            if value.shape != own.shape or value.is_floating_point() != own.is_floating_point():
                found = f"{list(value.shape)}, {value.dtype}"
                raise AdapterFileError(f"{path}.{name} is {found}; expected {list(own.shape)}, {own.dtype}{_RESIZE}")
            if not all(torch.equal(value, other) for other in values[1:]):
                raise AdapterFileError(f"{' and '.join(names)} are one module, of which the file has two {name!r}")
            check_finite(f"{path}.{name}", value)
            whole[path][name] = value
    return whole


def _take_biases(tensors: Tensors, model: nn.Module) -> Values:
    """Take the biases out of a file's tensors, each beside the model's own that it replaces."""
    own = {name: parameter for name, parameter in _parameters(model).items() if name.endswith("bias")}
    taken: dict[torch.Tensor, tuple[str, torch.Tensor]] = {}
    for key in [key for key in tensors if key.startswith(PREFIX) and key.endswith(".bias")]:
        name, value = plain_name(key.removeprefix(PREFIX)), tensors.pop(key)
        check_finite(key, value)
        if name not in own or own[name].shape != value.shape:
            expected = list(own[name].shape) if name in own else "a bias that the model has"
            raise AdapterFileError(f"{key} is {list(value.shape)}, {value.dtype}; expected {expected}")
        first, other = taken.setdefault(own[name], (key, value))
        if not torch.equal(value.to(own[name].dtype), other.to(own[name].dtype)):
            raise AdapterFileError(f"{first} and {key} are one bias of the model, of which the file has two values")
    return [(bias, value) for bias, (_, value) in taken.items()]


def _take_base(tensors: Tensors, model: nn.Module, source: str, base_weights: str) -> Values:
    """What is left may only be the base's own weights, which PEFT saves beside adapted or resized embeddings."""
    own = _parameters(model) if tensors else {}
    taken: dict[torch.Tensor, torch.Tensor] = {}
    for key, value in tensors.items():
        weight = own.get(plain_name(key.removeprefix(PREFIX)))
        if weight is None or not key.startswith(PREFIX):
            raise unknown_key(source, key, f"{PREFIX}<module>.lora_A.weight and the like, or what was trained whole")
        check_finite(key, value)
        if weight.is_meta:
            raise AdapterFileError(f"{key} is a base weight, and the model's is on the meta device; load it first")
        if weight.shape != value.shape:
            raise AdapterFileError(
                f"{key} is a base weight {list(value.shape)}, the model's {list(weight.shape)}{_RESIZE}"
            )
        if base_weights == "file":
            if not torch.equal(taken.setdefault(weight, value), value):
                raise AdapterFileError(f"{key} is one base weight under two names, of which the file has two values")
        elif not _is_same(weight.detach().cpu(), value):
            raise AdapterFileError(
                f"{key} is another base weight than the model's, such as embeddings with new tokens; "
                'load_adapter(..., base_weights="file") puts it into the model, for all its adapters'
            )
    return list(taken.items())


def _is_same(weight: torch.Tensor, value: torch.Tensor) -> bool:
    """To the bit, in the narrower of the two dtypes: a file may be of a model that was loaded in bfloat16."""
    return any(torch.equal(weight.to(dtype), value.to(dtype)) for dtype in {weight.dtype, value.dtype})


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters by plain names, a tied one under each of its own, as PEFT writes it."""
    return {plain_name(name): parameter for name, parameter in named_parameters(model)}


def as_named(model: nn.Module) -> Model:
    """What the names in files are looked up in: the layers of a model, each by all of its names."""
    layers = [path for path, module in plain_modules(model) if isinstance(module, LoRALayer) or not module._modules]
    return Model(
        {f"{path}.weight": None for path in layers}, f"the {type(model).__name__}", partial(renamings_of, model)
    )


def _with_own_names(tensors: Tensors, model: nn.Module) -> Tensors:
    plain = {key: plain_name(key.removeprefix(PREFIX)) for key in tensors if key.startswith(PREFIX)}
    own = own_names(plain.values(), _parameters(model) if plain else (), partial(renamings_of, model))
    renamed = {key: f"{PREFIX}{own[name]}" for key, name in plain.items() if own[name] != name}
    return {renamed.get(key, key): tensor for key, tensor in tensors.items()}


def _layer(
    known: Mapping[str, Target], modules: Mapping[str, nn.Module], path: str, bases: Mapping[type, type]
) -> tuple[Any, type[LoRALayer]]:
    """The layer or stack that a path means, without its adapters, and what adapts it."""
    layer, experts = known.get(path), modules.get(path.rpartition(".")[0])
    if layer is None and experts is not None and path.rpartition(".")[2] in experts._parameters:
        why = why_not_run(experts) or f"their stacks are {' and '.join(stack_names(experts))}"
        raise AdapterFileError(f"{path} is no stack of experts that can be adapted: {why}")
    if layer is None:
        near = difflib.get_close_matches(path, modules, n=3, cutoff=0.4)
        raise AdapterFileError(f"the model has no module {path!r}; near names: {', '.join(near) or 'none'}")
    if why := why_without_effect(modules, path):
        raise AdapterFileError(f"module {path!r}: {why}; take its tensors out of the file")
    with as_file_error("the file does not fit"):
        return base_and_kind(f"module {path!r}", layer, bases)
