"""PEFT's two files of an adapter: parsed by name alone, and written whole or not at all."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorakernels.config import LoRAConfig, scaling_of
from lorakernels.files import reading
from lorakernels.files.checkpoint import weight_map_of
from lorakernels.files.config_file import config_from_fields, fields_of
from lorakernels.files.reading import AdapterFileError, Tensors, as_file_error, check_finite
from lorakernels.files.saving import read_together, save_together, write_weights
from lorakernels.files.stacks import WRITTEN_AS, by_parameter, num_experts, wrapped_names
from lorakernels.files.update import (
    BIAS,
    CONFIG_FILE,
    LINEAR,
    MAGNITUDE,
    SUFFIXES,
    Shapes,
    Update,
    check_tensors,
    merged_bias,
    merged_weight,
    of_kernel,
    own_shapes,
)
from lorakernels.files.weights import read_tensors
from lorakernels.formula import spread_over_groups
from lorakernels.patterns import by_pattern

WEIGHTS_FILE = "adapter_model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS_FILE}.index.json"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
ON_HUB = [CONFIG_FILE, "adapter_model*.safetensors", WEIGHTS_INDEX, DIFFUSERS_FILE]
PREFIX = "base_model.model."
_KEY = re.compile(rf"(?P<path>.+)\.(?P<suffix>{'|'.join(map(re.escape, SUFFIXES))})(?:(?<={MAGNITUDE})\.weight)?")
# As a model's own state dict has them: the adapter's name behind that of the part.
_INFIX = re.compile(
    r"(?P<path>.+\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))"
    r"\.(?P<adapter>(?!(?:weight|bias)$)[^.]+)(?P<rest>\.weight|\.bias|)"
)
# What torch's wrappers put into the names of a state dict; DistributedDataParallel's is told from a module's own name
# before all others alone.
_WRAPPED = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_WRAPPERS = re.compile(rf"^((module|{_WRAPPED})\.)+(?=base_model\.)|(?<![^.])({_WRAPPED})\.")
# What PEFT trains whole where the task says so and the configuration, of its first versions, does not.
_HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# What an adapted or a saved module has inside, where the plain model has nothing.
_INSIDE = re.compile(r"\.(base_layer|original_module)(?=\.)")
_SAVED_WITH_EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT saves these whole where the vocabulary has grown
# Parts of a key that belong to other methods, by the name a user knows.
_OTHER_KINDS = {
    "hada_w": "LoHa (LyCORIS)",
    "lokr_w": "LoKr (LyCORIS)",
    "lora_mid": "LoCon with a Tucker core (LyCORIS)",
    "oft_": "OFT",
    "diff": "a full difference (LyCORIS)",
    "lora_a_scales": "a quantised adapter (mlx-lm)",
    "lora_b_scales": "a quantised adapter (mlx-lm)",
}


@dataclass(frozen=True)
class PeftFile:
    """What PEFT's files hold, by name: nothing of it is measured yet.

    `layers` has the tensors of adapted modules by module path and PEFT's suffix, and of `stacks` of experts by their
    parameters' names; `others` the rest by key: trained biases, whole modules, base weights. `fields` is the
    configuration as it is written.
    """

    source: str
    fields: Mapping[str, Any]
    config: LoRAConfig
    layers: dict[str, Tensors]
    others: Tensors
    stacks: frozenset[str] = frozenset()


def files_of(folder: Path) -> list[Path]:
    """The configuration's file and those of the weights: one, or an index and its shards."""
    index = folder / WEIGHTS_INDEX
    if not os.path.exists(index):  # Path.exists raises for a name that is too long
        return [folder / CONFIG_FILE, folder / WEIGHTS_FILE]
    if (folder / WEIGHTS_FILE).exists():
        raise AdapterFileError(f"{folder} has {WEIGHTS_FILE} and {WEIGHTS_INDEX}; expected one of them")
    return [folder / CONFIG_FILE, index, *(folder / shard for shard in sorted(set(weight_map_of(index).values())))]


def read_peft(folder: Path) -> PeftFile:
    """The adapter in a folder; raises AdapterFileError, with what is there, where a file is missing or broken."""
    config, first, *shards = files_of(folder)
    if not shards:
        held: dict[str, Any] = {}

        def read(weights: Path, config: Path) -> None:
            held.update(fields=reading.read_json(config), tensors=read_tensors(weights)[0])

        read_together(folder, WEIGHTS_FILE, CONFIG_FILE, read)
        return parse(held["fields"], held["tensors"], str(folder))
    fields = reading.read_json(config)
    found = {file.name: read_tensors(file)[0] for file in shards}
    if weight_map_of(first) != {name: shard for shard, tensors in found.items() for name in tensors}:
        raise AdapterFileError(f"{first} and its shards disagree on where tensors are; download all of them again")
    return parse(fields, {name: tensor for own in found.values() for name, tensor in own.items()}, str(folder))


def local_path(folder: str | os.PathLike[str], hub: bool, revision: str | None) -> Path:
    """`folder` itself where it is there, otherwise the hub's copy of an adapter's files, if the hub may be asked.

    Raises ImportError without huggingface_hub, ValueError for a revision of a local folder, and AdapterFileError
    when there is no such folder and the hub may not be asked, or cannot give the files.
    """
    path = Path(folder)
    if path.exists():
        if revision is not None:
            raise ValueError(f"{folder} is a local folder, which has no revision {revision!r}; leave revision out")
        return path
    if not hub and revision is None:
        raise AdapterFileError(
            f"{folder} is not a folder; expected one with {CONFIG_FILE} and {WEIGHTS_FILE}, a .safetensors file that "
            "is there, or hub=True for a name on the Hugging Face hub"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError("loading from the hub needs huggingface_hub: pip install huggingface_hub") from error
    # Its errors and those of its HTTP client have no common base.
    with as_file_error(f"{folder} cannot be had from the hub", Exception):
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=ON_HUB))


def parse(fields: Mapping[str, Any], tensors: Tensors, source: str) -> PeftFile:
    """A configuration's fields, and tensors by PEFT's keys."""
    tensors = plain_keys(tensors, source)
    config = _with_heads(config_from_fields(fields, source), fields, tensors, source)
    layers: dict[str, Tensors] = {}
    others: Tensors = {}
    inside: dict[str, Tensors] = {}  # what is adapted in a module that was trained whole
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else None
        path = match["path"] if match is not None else ""
        saved = bool(path) and _is_saved(f"{path}.", config)
        within = saved and f"{PREFIX}{path}.base_layer.weight" in tensors and ".original_module." not in key
        if match is not None and (within or not saved):
            (inside if within else layers).setdefault(path, {})[match["suffix"]] = tensor
        elif not _is_repeated(key, tensors):
            others[key] = tensor
    if inside:
        others = _merged_inside(PeftFile(source, fields, config, inside, {}), others)
    layers, stacks = by_parameter(layers, config, source)
    return PeftFile(source, fields, config, layers, others, frozenset(stacks))


def plain_keys(tensors: Tensors, source: str) -> Tensors:
    """By the keys that PEFT's files have, where they are those of a model's state dict, `lora_A.default.weight`.

    Or of a wrapped model's: `_orig_mod.base_model.model.….lora_A.weight`.
    """
    unwrapped = {key: _WRAPPERS.sub("", key) for key in tensors}
    matches = {key: _INFIX.fullmatch(name) for key, name in unwrapped.items()}
    names = sorted({match["adapter"] for match in matches.values() if match is not None})
    if len(names) > 1:
        raise AdapterFileError(f"{source} holds the adapters {', '.join(names)}; expected one in a file")
    plain: Tensors = {}
    for key, match in matches.items():
        own = unwrapped[key] if match is None else match["path"] + match["rest"]
        own = own.replace(f".modules_to_save.{names[0]}.", ".") if names else own
        if own in plain:
            raise AdapterFileError(f"{source}: {key} and another key are both {own}; expected one of them")
        plain[own] = tensors[key]
    return plain


def _with_heads(config: LoRAConfig, fields: Mapping[str, Any], tensors: Tensors, source: str) -> LoRAConfig:
    """With the head that the task trains whole, where there is one in the file and no modules_to_save."""
    heads = _HEADS_OF_TASKS.get(str(fields.get("task_type")), ()) if not config.modules_to_save else ()
    found = [head for head in heads if any(f".{head}." in key and ".lora_" not in key for key in tensors)]
    if not found:
        return config
    said = f"modules_to_save={found!r} of task_type={fields['task_type']!r}, which the configuration leaves out"
    warnings.warn(f"{source}: taken for {said}", stacklevel=2)
    return replace(config, modules_to_save=found)


def _merged_inside(inside: PeftFile, others: Tensors) -> Tensors:
    """Whole modules as plain ones, where PEFT has adapted a layer in their copies: what trained is the sum."""
    plain = dict(others)
    for path, update in updates_of(inside).items():
        weight, bias = (plain.pop(f"{PREFIX}{path}.base_layer.{name}", None) for name in ("weight", "bias"))
        if weight is None or weight.shape != update.shape or (bias is None and BIAS in update.tensors):
            raise AdapterFileError(
                f"{inside.source}: the adapter of {path} does not fit the whole module that it is in"
            )
        plain[f"{PREFIX}{path}.weight"] = merged_weight(weight, update).to(weight.dtype)
        if bias is not None:
            own = merged_bias(bias, update).to(bias.dtype) if BIAS in update.tensors else bias
            plain[f"{PREFIX}{path}.bias"] = own
    what = ", ".join(inside.layers)
    warnings.warn(f"{inside.source}: adapters inside modules_to_save are merged into these: {what}", stacklevel=2)
    return plain


def _is_repeated(key: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a key is one of those that bias="all" adds for the biases inside modules_to_save.

    They are the untrained original's, and the trained ones again, under the wrapper's names for them.
    """
    if ".original_module." in key:
        return True
    module, inside, name = key.partition(".modules_to_save.")
    plain = (f"{module}.{name}", f"{module}.{name.partition('.')[2]}")  # the second: after the adapter's name
    return bool(inside) and any(other in tensors and torch.equal(tensors[other], tensors[key]) for other in plain)


def _is_saved(name: str, config: LoRAConfig) -> bool:
    """Whether a name lies in a module that was trained whole: PEFT means every module whose name ends so."""
    return any(f"{ending}." in name for ending in config.modules_to_save or ())


def plain_name(name: str) -> str:
    """A tensor's name in the model without adapters."""
    return _INSIDE.sub("", name)


def updates_of(
    file: PeftFile, shapes_of: Callable[[str, int, float], tuple[str, Shapes]] | None = None
) -> dict[str, Update]:
    """The update of each module, checked.

    Args:
        shapes_of: of a path, its rank and its alpha: what kind of module it is, and the shapes that it should have.
            Without it the factors' own outer sizes count.
    """
    config = file.config
    if not file.layers:
        raise AdapterFileError(f"{file.source} holds no tensors of an adapted layer")
    with as_file_error(f"{CONFIG_FILE}: rank_pattern or alpha_pattern"):
        ranks = by_pattern(file.layers, config.rank_pattern, config.r)
        alphas = by_pattern(file.layers, config.alpha_pattern, config.lora_alpha)
    updates = {}
    for path, tensors in file.layers.items():
        r, alpha = ranks[path], alphas[path]
        if shapes_of is None and config.pooled and LINEAR[0] in tensors:  # as a plain adapter that does the same
            tensors = {**tensors, LINEAR[0]: spread_over_groups(tensors[LINEAR[0]], config.pooled)}
        experts = num_experts(path, tensors, r) if path in file.stacks else 0
        if shapes_of is None:
            kind, shapes = "its own", own_shapes(path, tensors, r * (experts or 1), config.use_dora, config.lora_bias)
        else:
            kind, shapes = shapes_of(path, r, alpha)
            tensors = of_kernel(tensors, shapes[LINEAR[0]][2:]) if LINEAR[0] in shapes else tensors
        means = f"{kind}, use_dora={config.use_dora}, lora_bias={config.lora_bias}"
        means += f", use_qalora=True with groups of {config.pooled}" if config.pooled else ""
        check_tensors(path, tensors, shapes, means, r)
        own = {name: tensors[name] for name in shapes}
        updates[path] = Update(own, alpha, scaling_of(alpha, r, config.use_rslora), experts)
    return updates


def replaced_tensors(file: PeftFile) -> Tensors:
    """The whole weights and biases that replace the model's, by the model's names, as far as a file alone tells."""
    replaced = {}
    for key, tensor in file.others.items():
        name = key.removeprefix(PREFIX)
        biases = file.config.bias != "none" and name.endswith(".bias")
        with_embeddings = name.endswith(".weight") and name.split(".")[-2] in _SAVED_WITH_EMBEDDINGS
        if not key.startswith(PREFIX) or not (biases or with_embeddings or _is_saved(name, file.config)):
            raise unknown_key(file.source, key, f"{PREFIX}<module>.lora_A.weight or .lora_B.weight")
        name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        replaced[name] = tensor
        if tensor.is_floating_point():  # BatchNorm counts its batches in int64
            check_finite(name, tensor)
    return replaced


def unknown_key(source: Path | str, key: str, expected: str) -> AdapterFileError:
    """What to raise of a key that nobody knows, with the method that it belongs to where that is known."""
    kinds = [kind for part, kind in _OTHER_KINDS.items() if any(word.startswith(part) for word in key.split("."))]
    if kinds:
        return AdapterFileError(f"{source}: {key!r} belongs to {kinds[-1]}, which is not supported; expected LoRA")
    return AdapterFileError(f"{source}: unknown key {key!r}; expected {expected}")


def with_ranks(config: LoRAConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> LoRAConfig:
    """`config` with the ranks and alphas that the modules really have, after a change to plain LoRA or a hot swap."""
    # A start is history by now, and PEFT would go through it again: PiSSA's changes the base, and for an embedding it
    # knows no orthogonal one.
    again = config.init_lora_weights in (True, False, "kaiming", "gaussian")
    fields: dict[str, Any] = {"init_lora_weights": config.init_lora_weights if again else True}
    for one, many, actual in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
        said, pattern = getattr(config, one), getattr(config, many)
        found = by_pattern(actual, pattern, said)
        wrong = {path: value for path, value in actual.items() if found[path] != value}
        if len(set(actual.values())) == 1 and wrong:
            fields[one], fields[many] = next(iter(actual.values())), {}
        else:
            # From the start of the name: a bare name would mean every module that ends in it.
            fields[many] = {f"^{re.escape(path)}": value for path, value in wrong.items()} | dict(pattern)
    return replace(config, **fields)


def write_peft(
    folder: Path,
    config: LoRAConfig,
    updates: Mapping[str, Tensors],
    others: Tensors | None = None,
    base: str | None = None,
    fan_in_fan_out: bool = False,
    stacks: Iterable[str] = (),
) -> None:
    """Write both files, whole, together or not at all: see `save_together`.

    `updates` is by module path and PEFT's suffix, `others` by the model's names; `base` says where the model came from,
    `fan_in_fan_out` that its linear layers are GPT-2's, and `stacks` which of `updates` are a mixture's parameters.
    """
    names = wrapped_names(stacks)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in (others or {}).items()}
    of_layers = [(names.get(path, path), own) for path, own in updates.items()]
    tensors |= {f"{PREFIX}{path}.{suffix}": t for path, own in of_layers for suffix, t in own.items()}
    version = {"peft_version": WRITTEN_AS} if names else {}
    fields = fields_of(config) | {"base_model_name_or_path": base, "fan_in_fan_out": fan_in_fan_out} | version
    save_together(
        folder,
        (WEIGHTS_FILE, lambda path: write_weights(path, tensors)),
        (CONFIG_FILE, lambda path: reading.write_json(path, fields)),
    )
