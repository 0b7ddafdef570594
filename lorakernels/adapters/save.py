"""A model's adapters into PEFT's files, adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lorakernels.adapters import held
from lorakernels.adapters.rank_slices import smaller
from lorakernels.adapters.saved_modules import copies_of, state_of
from lorakernels.config import LoRAConfig
from lorakernels.files.peft import with_ranks, write_peft
from lorakernels.files.reading import Tensors
from lorakernels.nn.base import DEFAULT
from lorakernels.nn.expert_layer import LoRAExperts
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.modules import named_parameters, unwrapped
from lorakernels.patterns import matches
from lorakernels.quant.layers import is_transposed


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = DEFAULT,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write an adapter of `model` into `folder`, which PEFT's `from_pretrained` reads.

    One that PiSSA or OLoRA has started is written as a plain adapter of twice the rank for the original base weights.
    Of sharded parameters every process calls this and the first one writes; or one process gives their whole values as
    `state_dict`, by the model's names, and writes alone.
    Raises KeyError, naming the adapters there are, when the model has none of that name or was not given it as a whole,
    RuntimeError when another adapter has changed the base weights, or ranks past those of a hot swap have trained, and
    ValueError when `state_dict` lacks a parameter that is sharded.
    """
    model = unwrapped(model)
    config = held.config_of(model, adapter_name)
    held.refuse_changed_base(model, but_by=adapter_name)
    others = _saved_biases(model, config, adapter_name)
    for path, copy in copies_of(model, adapter_name).items():
        others |= {f"{path}.{name}": tensor for name, tensor in state_of(copy).items()}
    named = {} if state_dict is None else dict(named_parameters(model))
    values = {id(named[name]): value for name, value in (state_dict or {}).items() if name in named}
    others = {name: values.get(id(tensor), tensor) for name, tensor in others.items()}
    updates: dict[str, Tensors] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    layers = held.layers_of(model, adapter_name)
    for path, layer in layers.items():
        updates[path], ranks[path], alphas[path] = _plain(layer, adapter_name, values)
    sharded = any(hasattr(tensor, "full_tensor") for own in (others, *updates.values()) for tensor in own.values())
    if sharded and state_dict is not None:
        raise ValueError("state_dict lacks parameters that are sharded; expected all of the adapter's, whole")
    others, updates = _whole(others), {path: _whole(own) for path, own in updates.items()}
    if not sharded or torch.distributed.get_rank() == 0:
        base = getattr(model, "name_or_path", None) or None  # of a transformers model
        transposed = any(is_transposed(layer.base_layer) for layer in layers.values())
        stacks = {path for path, layer in layers.items() if isinstance(layer, LoRAExperts)}
        config = with_ranks(_of_stacks(config, stacks), ranks, alphas)
        write_peft(Path(folder), config, updates, others, base, transposed, stacks)
    if sharded:
        torch.distributed.barrier()  # every process may read the files when the call returns
    return Path(folder)


def _of_stacks(config: LoRAConfig, stacks: Collection[str]) -> LoRAConfig:
    """`config` as PEFT takes it for these stacks of experts: without entries that mean none, and without dropout."""
    if not stacks:
        return config
    if config.lora_dropout:
        dropped = f"lora_dropout={config.lora_dropout} is written as 0, for PEFT refuses dropout beside"
        warnings.warn(f"{dropped} target_parameters; whoever trains the adapter further sets it again", stacklevel=3)
    entries = [name for name in config.target_parameters or () if any(matches(path, [name]) for path in stacks)]
    return replace(config, lora_dropout=0.0, target_parameters=sorted(entries))


def _whole(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Contiguous copies in main memory: parameters may share theirs. Shards are gathered, on every process."""
    whole = {}
    for name, tensor in tensors.items():
        own = tensor.detach()
        if hasattr(own, "full_tensor"):  # a DTensor, whose module is not imported for this
            own = own.full_tensor()
        whole[name] = own.cpu().clone(memory_format=torch.contiguous_format)
    return whole


def _plain(
    layer: LoRALayer, name: str, values: Mapping[int, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], int, float]:
    """An adapter's tensors as its file has them, its rank and its alpha; `values` are those of parameters, by id."""
    adapter = layer.adapters[name]
    r, alpha = adapter.r, adapter.lora_alpha
    tensors = {suffix: values.get(id(tensor), tensor) for suffix, tensor in layer.adapter_tensors(name).items()}
    if name in layer.base_changed_by:
        tensors |= dict(zip(tensors, layer.as_plain_lora(name), strict=False))
        # Of twice the rank, and with the same scaling.
        return tensors, 2 * r, alpha * (math.sqrt(2) if adapter.use_rslora else 2)
    return {suffix: smaller(suffix, tensor, r, layer.target) for suffix, tensor in tensors.items()}, r, alpha


def _saved_biases(model: nn.Module, config: LoRAConfig, adapter_name: str) -> Tensors:
    """The biases that trained with an adapter, by PEFT's names: `<module>.base_layer.bias` in an adapted layer."""
    if config.bias == "none":
        return {}
    of_adapters = set(map(id, held.parameters(model)))
    adapted = tuple(f"{path}.base_layer." for path in held.owners(model, adapter_name))
    return {
        name: parameter
        for name, parameter in named_parameters(model)  # PEFT has each of a tied one's names
        if name.rpartition(".")[2] == "bias"
        and id(parameter) not in of_adapters
        and (config.bias == "all" or name.startswith(adapted))
    }
