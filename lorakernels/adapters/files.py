"""Adapter files in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lorakernels.adapters.adapter_config import AdapterFileError, write_config
from lorakernels.adapters.hub import local_folder
from lorakernels.adapters.inject import (
    adapted_layers,
    adapter_configs,
    adapter_parameters,
    adapters_in,
    config_of,
    freeze_all_but_adapters,
    give_adapter,
    layers_of,
    nothing_on_error,
    refuse_changed_base,
    refuse_shared_biases,
    replace_modules,
    uncompiled,
)
from lorakernels.adapters.rank_slices import smaller
from lorakernels.adapters.saved_modules import give_copies, saved_modules, state_of
from lorakernels.adapters.targets import pattern_value
from lorakernels.adapters.tensors import CONFIG_FILE, PREFIX, WEIGHTS_FILE, Contents, Tensors, read_contents
from lorakernels.config import LoRAConfig, of_one_layer
from lorakernels.nn.base import DEFAULT, check_adapter_name
from lorakernels.nn.layer import LoRALayer


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = DEFAULT) -> Path:
    """Write an adapter of `model` into `folder`, which PEFT's `from_pretrained` reads.

    One that PiSSA or OLoRA has started is written as a plain adapter of twice the rank for the original base weights.
    Of sharded parameters every process calls this and the first one writes.
    Raises KeyError, naming the adapters there are, when the model has none of that name or was not given it as a whole,
    and RuntimeError when another adapter has changed the base weights, or ranks past those of a hot swap have trained.
    """
    model = uncompiled(model)
    config = config_of(model, adapter_name)
    refuse_changed_base(model, but_by=adapter_name)
    tensors: Tensors = {f"{PREFIX}{name}": bias for name, bias in _saved_biases(model, config, adapter_name).items()}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, layer in layers_of(model, adapter_name).items():
        own, ranks[path], alphas[path] = _plain(layer, adapter_name)
        tensors |= {f"{PREFIX}{path}.{suffix}": tensor for suffix, tensor in own.items()}
    for path, wrapper in saved_modules(model).items():
        if adapter_name in wrapper.modules_to_save:
            state = state_of(wrapper.modules_to_save[adapter_name])
            tensors |= {f"{PREFIX}{path}.{name}": tensor for name, tensor in state.items()}
    folder = Path(folder)
    whole = {key: _whole(tensor) for key, tensor in tensors.items()}
    sharded = any(hasattr(tensor, "full_tensor") for tensor in tensors.values())
    if not sharded or torch.distributed.get_rank() == 0:
        _write(folder, whole, describing(config, ranks, alphas))
    if sharded:
        torch.distributed.barrier()  # every process may read the files when the call returns
    return folder


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in main memory: parameters may share theirs. Shards are gathered, on every process."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):  # a DTensor, whose module is not imported for this
        tensor = tensor.full_tensor()
    return tensor.cpu().clone(memory_format=torch.contiguous_format)


def _write(folder: Path, tensors: Tensors, config: LoRAConfig) -> None:
    """Whole or not at all: a reader never meets half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, fields = folder / f".{WEIGHTS_FILE}.partial", folder / f".{CONFIG_FILE}.partial"
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
        write_config(fields, config)
        os.replace(weights, folder / WEIGHTS_FILE)
        os.replace(fields, folder / CONFIG_FILE)
    except BaseException:  # a full disk, an interrupt
        weights.unlink(missing_ok=True)
        fields.unlink(missing_ok=True)
        raise


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = DEFAULT,
    *,
    trainable: bool = False,
    hub: bool = False,
    revision: str | None = None,
) -> nn.Module:
    """Put the adapter in `folder` into `model`, in place, and make it the active one.

    The file's tensors say which layers are adapted, and keep their dtype; whole modules (modules_to_save) keep the
    model's. An adapter of that name which has the same layers and ranks gets the new weights; otherwise it is added.
    Everything is checked before anything changes: when an error is raised the model is as it was. Pickles are never
    read.

    Args:
        model: plain, or with adapters from `inject` or `load_adapter`; compiled or not.
        folder: holds adapter_config.json and adapter_model.safetensors. With `hub`, when there is no such folder, the
            name of a repository on the Hugging Face hub, "organisation/name".
        adapter_name: the name it gets in the model.
        trainable: whether its parameters need gradients.
        hub: whether the hub may be asked.
        revision: a branch, tag or commit on the hub; implies `hub`.

    Returns:
        `model` itself.

    Raises:
        AdapterFileError: the files are missing, broken, or do not fit the model.
        ImportError: the hub is asked, and huggingface_hub is not installed.
    """
    check_adapter_name(adapter_name)
    compiled, model = model, uncompiled(model)
    contents = read_contents(model, local_folder(folder, hub, revision))
    config = contents.config
    _check_name_is_free(model, adapter_name, contents)
    refuse_meta(contents)
    _refuse_8_bits(contents)
    earlier = adapters_in(model)

    # A model that trains adapters already keeps what trains beside them.
    beside = [p for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    made: dict[nn.Module, nn.Module] = {}
    with nothing_on_error(model, adapter_name, made):
        for path in contents.layers:
            module = made.get(contents.modules[path], contents.modules[path])
            if not isinstance(module, LoRALayer) or adapter_name not in module.adapters:
                own = of_one_layer(config, contents.ranks[path], contents.alphas[path], init_lora_weights=True)
                module = give_adapter(module, adapter_name, own, made)
            module.adapters[adapter_name].r = contents.ranks[path]  # a hot swap may have left a smaller one
            module.configure(adapter_name, contents.alphas[path], config.lora_dropout, config.use_rslora)
            _set_weights(module, adapter_name, contents.layers[path])
        new = [contents.modules[path] for path in contents.whole if path not in _with_copy(model, adapter_name)]
        made |= give_copies(new, adapter_name)
        replace_modules(model, made)
        if not earlier:
            freeze_all_but_adapters(model, config.bias if trainable else "none")
        else:
            for parameter in beside:
                parameter.requires_grad_(True)
        _activate_only(model, adapter_name, trainable)
    copy_whole(model, adapter_name, contents)
    with torch.no_grad():
        for bias, value in contents.biases:
            bias.copy_(value)
    set_config(model, adapter_name, contents, [])
    return compiled


def set_config(model: nn.Module, adapter_name: str, contents: Contents, unused: list[str]) -> None:
    """Remember what an adapter's files say, and which of its layers in the model they do not have."""
    config = dataclasses.replace(contents.config, target_modules=sorted(contents.layers))
    model._lora_configs = {**adapter_configs(model), adapter_name: config}  # type: ignore[assignment]
    model._lora_unused = {**getattr(model, "_lora_unused", {}), adapter_name: unused}  # type: ignore[assignment]


def describing(config: LoRAConfig, ranks: dict[str, int], alphas: dict[str, float]) -> LoRAConfig:
    """`config` with the ranks and alphas that the layers really have, after a change to plain LoRA or a hot swap."""
    # A start is history by now, and PEFT would go through it again: PiSSA's changes the base, and for an embedding it
    # knows no orthogonal one.
    again = config.init_lora_weights in (True, False, "kaiming", "gaussian")
    fields: dict[str, Any] = {"init_lora_weights": config.init_lora_weights if again else True}
    for one, many, actual in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
        said, pattern = getattr(config, one), getattr(config, many)
        wrong = {path: value for path, value in actual.items() if pattern_value(path, pattern, said) != value}
        if len(set(actual.values())) == 1 and wrong:
            fields[one], fields[many] = next(iter(actual.values())), {}
        else:
            fields[many] = {f"^{re.escape(path)}": value for path, value in wrong.items()} | dict(pattern)
    return dataclasses.replace(config, **fields)


def _plain(layer: LoRALayer, name: str) -> tuple[dict[str, torch.Tensor], int, float]:
    """An adapter's tensors as its file has them, its rank and its alpha."""
    adapter = layer.adapters[name]
    r, alpha = adapter.r, adapter.lora_alpha
    tensors: dict[str, torch.Tensor] = dict(layer.adapter_tensors(name))
    if name in layer.base_changed_by:
        tensors |= dict(zip(tensors, layer.as_plain_lora(name), strict=False))
        # Of twice the rank, and with the same scaling.
        return tensors, 2 * r, alpha * (math.sqrt(2) if adapter.use_rslora else 2)
    return {suffix: smaller(suffix, tensor, r, layer.base_layer) for suffix, tensor in tensors.items()}, r, alpha


def _saved_biases(model: nn.Module, config: LoRAConfig, adapter_name: str) -> Tensors:
    """The biases that trained with an adapter, by PEFT's names: `<module>.base_layer.bias` in an adapted layer."""
    if config.bias == "none":
        return {}
    of_adapters = set(map(id, adapter_parameters(model)))
    adapted = tuple(
        f"{path}.base_layer." for path, layer in adapted_layers(model).items() if adapter_name in layer.adapters
    )
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)  # PEFT has each of a tied one's names
        if name.rpartition(".")[2] == "bias"
        and id(parameter) not in of_adapters
        and (config.bias == "all" or name.startswith(adapted))
    }


def _with_copy(model: nn.Module, adapter_name: str) -> set[str]:
    return {path for path, wrapper in saved_modules(model).items() if adapter_name in wrapper.modules_to_save}


def _check_name_is_free(model: nn.Module, adapter_name: str, contents: Contents) -> None:
    """A name that is taken must mean the same layers, ranks and modules, whose weights are then replaced."""
    try:
        refuse_changed_base(model)
        refuse_shared_biases(model, contents.config, adapter_name)
    except (RuntimeError, ValueError) as error:
        raise AdapterFileError(str(error)) from error
    layers = adapted_layers(model)
    merged = [path for path, layer in layers.items() if layer.merged]
    if merged:
        raise AdapterFileError(f"adapters are merged into {merged[0]!r} and {len(merged) - 1} more; call unmerge first")
    taken = {
        layer: _shapes(layer.adapter_tensors(adapter_name))
        for layer in layers.values()
        if adapter_name in layer.adapters
    }
    copies = _with_copy(model, adapter_name)
    new = {contents.modules[path]: _shapes(tensors) for path, tensors in contents.layers.items()}
    if (taken or copies) and (taken != new or copies != contents.whole.keys()):
        raise AdapterFileError(
            f"the model has an adapter {adapter_name!r} with other layers or ranks ({len(taken)} layers; the file has "
            f"{len(new)}) or modules_to_save; load it under another name, or use hotswap_adapter"
        )
    if any(isinstance(layer.adapters[adapter_name].scaling, torch.Tensor) for layer in taken):
        raise AdapterFileError(f"adapter {adapter_name!r} is prepared for hot swaps; use hotswap_adapter")


def refuse_meta(contents: Contents) -> None:
    """Nothing can be put into tensors without values, and what is loaded later would start anew."""
    for path in [*contents.layers, *contents.whole]:
        for name, tensor in contents.modules[path].named_parameters():
            if tensor.device.type == "meta":
                raise AdapterFileError(
                    f"{path}.{name} is on the meta device and has no values; put them into the model first"
                )


def _refuse_8_bits(contents: Contents) -> None:
    """Adapters keep the file's dtype, and torch neither adds nor promotes 8-bit floats."""
    for path, tensors in contents.layers.items():
        for suffix, tensor in tensors.items():
            if tensor.element_size() == 1:
                raise AdapterFileError(
                    f"{path}.{suffix} is {tensor.dtype}; expected float64, float32, bfloat16 or float16: convert the "
                    "file's tensors first"
                )


def _shapes(tensors: Any) -> dict[str, tuple[int, ...]]:
    return {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}


@torch.no_grad()
def _set_weights(layer: LoRALayer, adapter_name: str, tensors: Tensors) -> None:
    for suffix, parameter in layer.adapter_tensors(adapter_name).items():
        if parameter.dtype == tensors[suffix].dtype:
            parameter.copy_(tensors[suffix])
        else:
            # The parameter itself stays: an optimizer may have it. A copy, since the tensor may be a view of the file.
            parameter.data = tensors[suffix].to(parameter.device, copy=True)


@torch.no_grad()
def copy_whole(model: nn.Module, adapter_name: str, contents: Contents) -> None:
    """Put a file's whole modules into an adapter's copies, in place and in their dtype."""
    wrappers = saved_modules(model)
    for path, tensors in contents.whole.items():
        for name, own in state_of(wrappers[path].modules_to_save[adapter_name]).items():
            own.copy_(tensors[name])


def _activate_only(model: nn.Module, adapter_name: str, trainable: bool) -> None:
    for layer in adapted_layers(model).values():
        layer.set_adapter([adapter_name] if adapter_name in layer.adapters else [])
    for wrapper in saved_modules(model).values():
        wrapper.set_adapter([adapter_name])
    if not trainable:
        for parameter in adapter_parameters(model, adapter_name):
            parameter.requires_grad_(False)
