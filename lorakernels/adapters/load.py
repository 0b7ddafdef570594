"""PEFT's files of an adapter into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from lorakernels.adapters import held
from lorakernels.adapters.bind import Contents, as_named, bind
from lorakernels.adapters.inject import add, freeze_all_but_adapters
from lorakernels.adapters.saved_modules import SavedModule, copies_of, state_of
from lorakernels.adapters.switch import set_adapter
from lorakernels.adapters.transformers_methods import give_methods
from lorakernels.adapters.uncalled import watch
from lorakernels.config import of_one_layer
from lorakernels.files.convert import read_for
from lorakernels.files.peft import local_path
from lorakernels.files.reading import AdapterFileError, as_file_error, check_fits
from lorakernels.nn.base import DEFAULT, check_adapter_name
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.modules import unwrapped
from lorakernels.nn.whole import whole, write
from lorakernels.quant.layers import weight_of


@whole
def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = DEFAULT,
    *,
    trainable: bool = False,
    hub: bool = False,
    revision: str | None = None,
    prefix: str | None = None,
    base_weights: str = "model",
) -> nn.Module:
    """Put the adapter in `folder` into `model`, in place, and make it the active one.

    `folder` is PEFT's or mlx-lm's, or a file of kohya's or diffusers' format (docs/coming-from.md). The last three have
    no configuration of PEFT's: it is inferred from names, shapes and what they say, and a warning says what came of it.

    The file's tensors say which layers are adapted, and keep their dtype; whole modules (modules_to_save) keep the
    model's. An adapter of that name which has the same layers and ranks gets the new weights; otherwise it is added.
    Everything is checked before anything changes: when an error is raised the model is as it was. Pickles are never
    read.

    Args:
        model: plain, or with adapters from `inject` or `load_adapter`; compiled or not.
        folder: holds adapter_config.json and adapter_model.safetensors, or is a .safetensors file. With `hub`, when it
            is not there, the name of a repository on the Hugging Face hub, "organisation/name".
        adapter_name: the name it gets in the model.
        trainable: whether its parameters need gradients.
        hub: whether the hub may be asked.
        revision: a branch, tag or commit on the hub; implies `hub`.
        prefix: which part of a file for several models, such as "lora_unet" or "text_encoder"; left out, the one part
            that fits `model`.
        base_weights: of base weights in the file, which PEFT saves where the vocabulary was resized or embeddings are
            targets: "model", they must be the model's; "file", they replace the model's, which then stay changed.

    Returns:
        `model` itself.

    Raises:
        AdapterFileError: the files are missing, broken, or do not fit the model.
        ImportError: the hub is asked, and huggingface_hub is not installed.
        ValueError: `base_weights` is none of the two.
    """
    check_adapter_name(adapter_name)
    compiled, model = model, unwrapped(model)
    if base_weights not in ("model", "file"):
        raise ValueError(f"base_weights is {base_weights!r}; expected 'model' or 'file'")
    contents = bind(
        model, read_for(local_path(folder, hub, revision), partial(as_named, model), prefix), base_weights=base_weights
    )
    check_numbers(contents)
    config = contents.config
    _check_name_is_free(model, adapter_name, contents)
    earlier = held.names(model)
    configs, tensors = {}, {}
    for path, update in contents.layers.items():
        configs[contents.targets[path]] = of_one_layer(config, update.r, update.alpha, init_lora_weights=True)
        tensors[contents.targets[path]] = update.tensors.values()
    add(model, adapter_name, configs, [contents.modules[path] for path in contents.whole], tensors)
    if not earlier:
        freeze_all_but_adapters(model, config.bias if trainable else "none")
    set_adapter(model, adapter_name)
    if not trainable:
        for parameter in held.parameters(model, adapter_name):
            parameter.requires_grad_(False)
    copy_whole(model, adapter_name, contents)
    for own, value in contents.biases + contents.base:
        write(own, value)
    held.remember(model, adapter_name, config)
    give_methods(model)
    if trainable:
        watch(model)
    return compiled


def check_numbers(contents: Contents) -> None:
    """Raise AdapterFileError for what torch cannot add or promote, and for what overflows in the model's dtype."""
    for path, update in contents.layers.items():
        module = contents.targets[path]
        dtype = weight_of(module.target if isinstance(module, LoRALayer) else module).dtype
        for suffix, tensor in update.tensors.items():
            if tensor.element_size() == 1:  # adapters keep the file's dtype
                raise AdapterFileError(
                    f"{path}.{suffix} is {tensor.dtype}; expected float64, float32, bfloat16 or float16: convert the "
                    "file's tensors first"
                )
            check_fits(f"{path}.{suffix}", tensor, dtype, update.scaling if "_B" in suffix else 1.0)
    for path, tensors in contents.whole.items():
        module = contents.modules[path]
        for name, own in state_of(module.original_module if isinstance(module, SavedModule) else module).items():
            check_fits(f"{path}.{name}", tensors[name], own.dtype)
    for own, value in contents.biases + contents.base:
        check_fits("a bias or base weight", value, own.dtype)


def _check_name_is_free(model: nn.Module, adapter_name: str, contents: Contents) -> None:
    """A name that is taken must mean the same layers, ranks and modules, whose weights are then replaced."""
    with as_file_error("the file cannot be loaded now", RuntimeError):
        held.refuse_changed_base(model)
        held.refuse_shared_biases(model, contents.config, adapter_name)
        held.refuse_merged(model)
    owners = held.owners(model, adapter_name).values()
    taken = {layer: _shapes(layer.adapter_tensors(adapter_name)) for layer in owners}
    copies = copies_of(model, adapter_name)
    new = {contents.targets[path]: _shapes(update.tensors) for path, update in contents.layers.items()}
    if (taken or copies) and (taken != new or copies.keys() != contents.whole.keys()):
        raise AdapterFileError(
            f"the model has an adapter {adapter_name!r} with other layers or ranks ({len(taken)} layers; the file has "
            f"{len(new)}) or modules_to_save; load it under another name, or use hotswap_adapter"
        )
    if any(isinstance(layer.adapters[adapter_name].scaling, torch.Tensor) for layer in taken):
        raise AdapterFileError(f"adapter {adapter_name!r} is prepared for hot swaps; use hotswap_adapter")


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}


def copy_whole(model: nn.Module, adapter_name: str, contents: Contents) -> None:
    """Put a file's whole modules into an adapter's copies, in place and in their dtype."""
    copies = copies_of(model, adapter_name)
    for path, tensors in contents.whole.items():
        for name, own in copies[path].state_dict(keep_vars=True).items():
            if name in tensors:
                write(own, tensors[name])
