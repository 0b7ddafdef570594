"""Adapter files in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lorakernels.adapters.adapter_config import AdapterFileError, read_config, write_config
from lorakernels.adapters.inject import adapted_layers, adapter_configs, freeze_all_but_adapters, replace_modules
from lorakernels.adapters.targets import pattern_value, plain_modules
from lorakernels.config import LoRAConfig
from lorakernels.nn.layer import DEFAULT, LoRALayer, check_adapter_name
from lorakernels.nn.linear import LoRALinear

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")

Pair = tuple[torch.Tensor, torch.Tensor]


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = DEFAULT) -> Path:
    """Write an adapter of `model` into `folder`, which PEFT's `from_pretrained` reads.

    Raises KeyError, naming the adapters there are, when the model has none of that name.
    """
    configs = adapter_configs(model)
    if adapter_name not in configs:
        raise KeyError(f"the model has no adapter {adapter_name!r}; its adapters: {list(configs)}")
    tensors = {f"{PREFIX}{name}": bias.detach().cpu() for name, bias in _saved_biases(model, adapter_name).items()}
    for path, layer in adapted_layers(model).items():
        if adapter_name in layer.r:
            for factor, adapters in (("A", layer.lora_A), ("B", layer.lora_B)):
                weight = adapters[adapter_name].weight
                assert isinstance(weight, torch.Tensor)
                tensors[f"{PREFIX}{path}.lora_{factor}.weight"] = weight.detach().cpu().contiguous()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: a reader never meets half a file.
    partial = folder / f".{WEIGHTS_FILE}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS_FILE)
    write_config(folder / f".{CONFIG_FILE}.partial", configs[adapter_name])
    os.replace(folder / f".{CONFIG_FILE}.partial", folder / CONFIG_FILE)
    return folder


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = DEFAULT, *, trainable: bool = False
) -> nn.Module:
    """Put the adapter in `folder` into `model`, in place, and make it the active one.

    The file's tensors say which layers are adapted, and keep their dtype. An adapter of that name which has the
    same layers and ranks gets the new weights; otherwise it is added. Everything is checked before anything
    changes: when an error is raised the model is as it was. Pickles are never read.

    Args:
        model: plain, or with adapters from `inject` or `load_adapter`.
        folder: holds adapter_config.json and adapter_model.safetensors.
        adapter_name: the name it gets in the model.
        trainable: whether its parameters need gradients.

    Returns:
        `model` itself.

    Raises:
        AdapterFileError: the files are missing, broken, or do not fit the model.
    """
    check_adapter_name(adapter_name)
    folder = Path(folder)
    config = read_config(_existing(folder, CONFIG_FILE))
    tensors = _read_tensors(_existing(folder, WEIGHTS_FILE))
    biases = _take_biases(tensors, model, config)
    pairs = _pairs(tensors)
    modules = dict(plain_modules(model))
    layers = {path: _layer(modules, path) for path in pairs}
    ranks, alphas = _by_pattern(pairs, config)
    for path, (A, B) in pairs.items():
        _check_pair(path, layers[path], A, B, ranks[path])
    _check_name_is_free(model, adapter_name, pairs)

    # A model that trains adapters already keeps what trains beside them.
    beside = [p for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    made: dict[nn.Module, nn.Module] = {}
    for path, (A, B) in pairs.items():
        layer = layers[path]
        if not isinstance(layer, LoRALayer):
            assert isinstance(layer, nn.Linear)
            plain = layer
            layer = LoRALinear.from_linear(
                plain, ranks[path], alphas[path], config.lora_dropout, config.use_rslora, adapter_name=adapter_name
            )
            made[plain] = layer
        elif adapter_name not in layer.r:
            layer.add_adapter(adapter_name, ranks[path], alphas[path], config.lora_dropout, config.use_rslora)
        layer.configure(adapter_name, alphas[path], config.lora_dropout, config.use_rslora)
        _set_weights(layer, adapter_name, A, B, trainable)
    replace_modules(model, made)
    with torch.no_grad():
        for bias, value in biases:
            bias.copy_(value)
    if not adapter_configs(model):
        freeze_all_but_adapters(model, config.bias if trainable else "none")
    else:
        for parameter in beside:
            parameter.requires_grad_(True)
    for layer in adapted_layers(model).values():
        layer.set_adapter([adapter_name] if adapter_name in layer.r else [])
        if not trainable and adapter_name in layer.r:
            layer.lora_A[adapter_name].requires_grad_(False)
            layer.lora_B[adapter_name].requires_grad_(False)
    config = dataclasses.replace(config, target_modules=sorted(pairs))
    model._lora_configs = {**adapter_configs(model), adapter_name: config}  # type: ignore[assignment]
    return model


def _saved_biases(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The biases that trained with an adapter, by PEFT's names: `<module>.base_layer.bias` in an adapted layer."""
    kind = adapter_configs(model)[adapter_name].bias
    adapted = tuple(f"{path}.base_layer." for path, layer in adapted_layers(model).items() if adapter_name in layer.r)
    biases = {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    if kind == "none":
        return {}
    return {name: bias for name, bias in biases.items() if kind == "all" or name.startswith(adapted)}


def _take_biases(
    tensors: dict[str, torch.Tensor], model: nn.Module, config: LoRAConfig
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Take the biases out of a file's tensors, each beside the model's own that it replaces."""
    if config.bias == "none":
        return []
    own = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if name.endswith("bias")}
    taken: list[tuple[torch.Tensor, torch.Tensor]] = []
    for key in [key for key in tensors if key.startswith(PREFIX) and key.endswith(".bias")]:
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        value = tensors.pop(key)
        if name not in own or own[name].shape != value.shape or not torch.isfinite(value.float()).all():
            expected = list(own[name].shape) if name in own else "a bias that the model has"
            raise AdapterFileError(f"{key} is {list(value.shape)}, {value.dtype}; expected finite numbers, {expected}")
        taken.append((own[name], value))
    return taken


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_file():
        return path
    if not folder.is_dir():
        raise AdapterFileError(f"{folder} is not a folder; expected one with {CONFIG_FILE} and {WEIGHTS_FILE}")
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
    if name == WEIGHTS_FILE and pickles:
        raise AdapterFileError(
            f"{folder} has {', '.join(pickles)} and no {WEIGHTS_FILE}: a pickle can run any code and is not read; "
            "convert it with safetensors.torch.save_file where you trust it"
        )
    raise AdapterFileError(f"{folder} has no {name}; it has: {', '.join(sorted(os.listdir(folder))) or 'nothing'}")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise AdapterFileError(f"{path} is not a whole safetensors file: {error}") from error


def _pairs(tensors: dict[str, torch.Tensor]) -> dict[str, Pair]:
    """A and B by module path; every key must belong to such a pair."""
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        if match is None or not key.startswith(PREFIX):
            raise AdapterFileError(f"unknown key {key!r}; expected {PREFIX}<module>.lora_A.weight or .lora_B.weight")
        factors.setdefault(match["path"], {})[match["factor"]] = tensor
    if not factors:
        raise AdapterFileError("the file holds no tensors")
    for path, found in factors.items():
        if len(found) != 2:
            missing = "B" if "A" in found else "A"
            raise AdapterFileError(f"module {path!r} has no lora_{missing}.weight; expected both lora_A and lora_B")
    return {path: (found["A"], found["B"]) for path, found in factors.items()}


def _layer(modules: dict[str, nn.Module], path: str) -> nn.Module:
    layer = modules.get(path)
    if layer is None:
        near = difflib.get_close_matches(path, modules, n=3, cutoff=0.4)
        raise AdapterFileError(f"the model has no module {path!r}; near names: {', '.join(near) or 'none'}")
    if type(layer) is not nn.Linear and not isinstance(layer, LoRALinear):
        raise AdapterFileError(f"module {path!r} is a {type(layer).__qualname__}; expected torch.nn.Linear")
    return layer


def _check_pair(path: str, layer: nn.Module, A: torch.Tensor, B: torch.Tensor, r: int) -> None:
    K, N = layer.in_features, layer.out_features
    for name, tensor in (("lora_A", A), ("lora_B", B)):
        if not tensor.is_floating_point():
            raise AdapterFileError(f"{path}.{name} is {tensor.dtype}; expected a float dtype")
        if tensor.dim() != 2:
            raise AdapterFileError(f"{path}.{name} is {list(tensor.shape)}; expected two dimensions")
        if not torch.isfinite(tensor.float()).all():
            raise AdapterFileError(f"{path}.{name} holds NaN or Inf")
    if A.shape[1] != K or B.shape[0] != N:
        hint = " (transposed?)" if A.shape[0] == K or B.shape[1] == N else ""
        raise AdapterFileError(
            f"{path}: lora_A is {list(A.shape)} and lora_B {list(B.shape)}; expected [r, {K}] and [{N}, r]{hint}"
        )
    if A.shape[0] != B.shape[1] or A.shape[0] != r:
        raise AdapterFileError(
            f"{path}: lora_A has rank {A.shape[0]}, lora_B {B.shape[1]}, and {CONFIG_FILE} says {r}; expected one rank"
        )


def _check_name_is_free(model: nn.Module, adapter_name: str, pairs: dict[str, Pair]) -> None:
    """A name that is taken must mean the same layers and ranks, whose weights are then replaced."""
    taken = {path: layer.r[adapter_name] for path, layer in adapted_layers(model).items() if adapter_name in layer.r}
    ranks = {path: A.shape[0] for path, (A, _) in pairs.items()}
    if taken and taken != ranks:
        raise AdapterFileError(
            f"the model has an adapter {adapter_name!r} with other layers or ranks "
            f"({len(taken)} layers; the file has {len(ranks)}); load it under another name"
        )
    merged = [path for path, layer in adapted_layers(model).items() if layer.merged]
    if merged:
        raise AdapterFileError(f"adapters are merged into {merged[0]!r} and {len(merged) - 1} more; call unmerge first")


def _by_pattern(pairs: dict[str, Pair], config: LoRAConfig) -> tuple[dict[str, int], dict[str, float]]:
    """Rank and alpha by module path."""
    try:
        ranks = {path: pattern_value(path, config.rank_pattern, config.r) for path in pairs}
        return ranks, {path: pattern_value(path, config.alpha_pattern, config.lora_alpha) for path in pairs}
    except ValueError as error:
        raise AdapterFileError(f"{CONFIG_FILE}: rank_pattern or alpha_pattern: {error}") from error


@torch.no_grad()
def _set_weights(layer: LoRALayer, adapter_name: str, A: torch.Tensor, B: torch.Tensor, trainable: bool) -> None:
    for adapters, tensor in ((layer.lora_A, A), (layer.lora_B, B)):
        module = adapters[adapter_name]
        if module.weight.dtype == tensor.dtype:
            module.weight.copy_(tensor)  # type: ignore[operator]
        else:
            module.weight = nn.Parameter(tensor.to(module.weight.device), requires_grad=trainable)  # type: ignore[arg-type]
