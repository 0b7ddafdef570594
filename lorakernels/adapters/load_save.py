"""A model's adapters to and from PEFT's files: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lorakernels.adapters import held
from lorakernels.adapters.bind import Contents, bind
from lorakernels.adapters.inject import adding, freeze_all_but_adapters
from lorakernels.adapters.rank_slices import smaller
from lorakernels.adapters.saved_modules import copies_of, state_of
from lorakernels.adapters.switch import set_adapter
from lorakernels.config import LoRAConfig, of_one_layer
from lorakernels.files.peft import local_folder, read_peft, with_ranks, write_peft
from lorakernels.files.reading import AdapterFileError, Tensors, as_file_error
from lorakernels.nn.base import DEFAULT, check_adapter_name
from lorakernels.nn.layer import LoRALayer


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = DEFAULT) -> Path:
    """Write an adapter of `model` into `folder`, which PEFT's `from_pretrained` reads.

    One that PiSSA or OLoRA has started is written as a plain adapter of twice the rank for the original base weights.
    Of sharded parameters every process calls this and the first one writes.
    Raises KeyError, naming the adapters there are, when the model has none of that name or was not given it as a whole,
    and RuntimeError when another adapter has changed the base weights, or ranks past those of a hot swap have trained.
    """
    model = held.uncompiled(model)
    config = held.config_of(model, adapter_name)
    held.refuse_changed_base(model, but_by=adapter_name)
    others = _saved_biases(model, config, adapter_name)
    for path, copy in copies_of(model, adapter_name).items():
        others |= {f"{path}.{name}": tensor for name, tensor in state_of(copy).items()}
    updates: dict[str, Tensors] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, layer in held.layers_of(model, adapter_name).items():
        updates[path], ranks[path], alphas[path] = _plain(layer, adapter_name)
    sharded = any(hasattr(tensor, "full_tensor") for own in (others, *updates.values()) for tensor in own.values())
    others, updates = _whole(others), {path: _whole(own) for path, own in updates.items()}
    if not sharded or torch.distributed.get_rank() == 0:
        write_peft(Path(folder), with_ranks(config, ranks, alphas), updates, others)
    if sharded:
        torch.distributed.barrier()  # every process may read the files when the call returns
    return Path(folder)


def _whole(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Contiguous copies in main memory: parameters may share theirs. Shards are gathered, on every process."""
    whole = {}
    for name, tensor in tensors.items():
        own = tensor.detach()
        if hasattr(own, "full_tensor"):  # a DTensor, whose module is not imported for this
            own = own.full_tensor()
        whole[name] = own.cpu().clone(memory_format=torch.contiguous_format)
    return whole


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
    compiled, model = model, held.uncompiled(model)
    contents = bind(model, read_peft(local_folder(folder, hub, revision)))
    config = contents.config
    _check_name_is_free(model, adapter_name, contents)
    earlier = held.names(model)
    configs, tensors = {}, {}
    for path, update in contents.layers.items():
        for suffix, tensor in update.tensors.items():
            if tensor.element_size() == 1:  # adapters keep the file's dtype, and torch neither adds nor promotes these
                raise AdapterFileError(
                    f"{path}.{suffix} is {tensor.dtype}; expected float64, float32, bfloat16 or float16: convert the "
                    "file's tensors first"
                )
        configs[contents.modules[path]] = of_one_layer(config, update.r, update.alpha, init_lora_weights=True)
        tensors[contents.modules[path]] = update.tensors.values()
    with adding(model, adapter_name, configs, [contents.modules[path] for path in contents.whole], tensors):
        if not earlier:
            freeze_all_but_adapters(model, config.bias if trainable else "none")
        set_adapter(model, adapter_name)
        if not trainable:
            for parameter in held.parameters(model, adapter_name):
                parameter.requires_grad_(False)
        copy_whole(model, adapter_name, contents)
        with torch.no_grad():
            for bias, value in contents.biases:
                bias.copy_(value)
        held.remember(model, adapter_name, config)
    return compiled


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
    of_adapters = set(map(id, held.parameters(model)))
    adapted = tuple(f"{path}.base_layer." for path in held.owners(model, adapter_name))
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)  # PEFT has each of a tied one's names
        if name.rpartition(".")[2] == "bias"
        and id(parameter) not in of_adapters
        and (config.bias == "all" or name.startswith(adapted))
    }


def _check_name_is_free(model: nn.Module, adapter_name: str, contents: Contents) -> None:
    """A name that is taken must mean the same layers, ranks and modules, whose weights are then replaced."""
    with as_file_error("the file cannot be loaded now", RuntimeError):
        held.refuse_changed_base(model)
        held.refuse_shared_biases(model, contents.config, adapter_name)
        held.refuse_merged(model)
    owners = held.owners(model, adapter_name).values()
    taken = {layer: _shapes(layer.adapter_tensors(adapter_name)) for layer in owners}
    copies = copies_of(model, adapter_name)
    new = {contents.modules[path]: _shapes(update.tensors) for path, update in contents.layers.items()}
    if (taken or copies) and (taken != new or copies.keys() != contents.whole.keys()):
        raise AdapterFileError(
            f"the model has an adapter {adapter_name!r} with other layers or ranks ({len(taken)} layers; the file has "
            f"{len(new)}) or modules_to_save; load it under another name, or use hotswap_adapter"
        )
    if any(isinstance(layer.adapters[adapter_name].scaling, torch.Tensor) for layer in taken):
        raise AdapterFileError(f"adapter {adapter_name!r} is prepared for hot swaps; use hotswap_adapter")


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}


@torch.no_grad()
def copy_whole(model: nn.Module, adapter_name: str, contents: Contents) -> None:
    """Put a file's whole modules into an adapter's copies, in place and in their dtype."""
    copies = copies_of(model, adapter_name)
    for path, tensors in contents.whole.items():
        for name, own in state_of(copies[path]).items():
            own.copy_(tensors[name])
