"""PEFT's two files of an adapter: parsed by name alone, and written whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorakernels.config import LoRAConfig, scaling_of
from lorakernels.files import reading
from lorakernels.files.config_file import config_from_fields, fields_of
from lorakernels.files.reading import AdapterFileError, Tensors, as_file_error, check_finite
from lorakernels.files.saving import read_together, save_together, write_weights
from lorakernels.files.update import CONFIG_FILE, LINEAR, MAGNITUDE, SUFFIXES, Shapes, Update, check_tensors, own_shapes
from lorakernels.files.weights import read_tensors
from lorakernels.formula import spread_over_groups
from lorakernels.patterns import by_pattern

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_KEY = re.compile(rf"(?P<path>.+)\.(?P<suffix>{'|'.join(map(re.escape, SUFFIXES))})(?:(?<={MAGNITUDE})\.weight)?")
# What an adapted or a saved module has inside, where the plain model has nothing.
_INSIDE = re.compile(r"\.(base_layer|original_module)(?=\.)")
_SAVED_WITH_EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT saves these whole where the vocabulary has grown
# Parts of a key that belong to other methods, by the name a user knows.
_OTHER_KINDS = {
    "hada_w": "LoHa (LyCORIS)",
    "lokr_w": "LoKr (LyCORIS)",
    "dora_scale": "DoRA of LyCORIS, which has two layouts",
    "lora_mid": "LoCon with a Tucker core (LyCORIS)",
    "oft_": "OFT",
    "diff": "a full difference (LyCORIS)",
    "lora_a_scales": "a quantised adapter (mlx-lm)",
    "lora_b_scales": "a quantised adapter (mlx-lm)",
}


@dataclass(frozen=True)
class PeftFile:
    """What PEFT's files hold, by name: nothing of it is measured yet.

    `layers` has the tensors of adapted modules by module path and PEFT's suffix, `others` the rest by key: trained
    biases, whole modules, base weights. `fields` is the configuration as it is written.
    """

    source: str
    fields: Mapping[str, Any]
    config: LoRAConfig
    layers: dict[str, Tensors]
    others: Tensors


def read_peft(folder: Path) -> PeftFile:
    """The adapter in a folder; raises AdapterFileError, with what is there, where a file is missing or broken."""
    held: dict[str, Any] = {}

    def read(weights: Path, config: Path) -> None:
        held.update(fields=reading.read_json(config), tensors=read_tensors(weights)[0])

    read_together(folder, WEIGHTS_FILE, CONFIG_FILE, read)
    return parse(held["fields"], held["tensors"], str(folder))


def local_folder(folder: str | os.PathLike[str], hub: bool, revision: str | None) -> Path:
    """`folder` itself where it is one, otherwise the hub's copy of its two files, if the hub may be asked.

    Raises ImportError without huggingface_hub, ValueError for a revision of a local folder, and AdapterFileError
    when there is no such folder and the hub may not be asked, or cannot give the files.
    """
    path = Path(folder)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{folder} is a local folder, which has no revision {revision!r}; leave revision out")
        return path
    if not hub and revision is None:
        raise AdapterFileError(
            f"{folder} is not a folder; expected one with {CONFIG_FILE} and {WEIGHTS_FILE}, or hub=True for a name on "
            "the Hugging Face hub"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError("loading from the hub needs huggingface_hub: pip install huggingface_hub") from error
    # Its errors and those of its HTTP client have no common base.
    with as_file_error(f"{folder} cannot be had from the hub", Exception):
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))


def parse(fields: Mapping[str, Any], tensors: Tensors, source: str) -> PeftFile:
    """A configuration's fields, and tensors by PEFT's keys."""
    config = config_from_fields(fields, source)
    layers: dict[str, Tensors] = {}
    others: Tensors = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key.removeprefix(PREFIX)) if key.startswith(PREFIX) else None
        if match is not None and not _is_saved(f"{match['path']}.", config):
            layers.setdefault(match["path"], {})[match["suffix"]] = tensor
        elif not _is_repeated(key, tensors):
            others[key] = tensor
    return PeftFile(source, fields, config, layers, others)


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
        if shapes_of is None:
            kind, shapes = "its own", own_shapes(path, tensors, r, config.use_dora, config.lora_bias)
        else:
            kind, shapes = shapes_of(path, r, alpha)
        means = f"{kind}, use_dora={config.use_dora}, lora_bias={config.lora_bias}"
        means += f", use_qalora=True with groups of {config.pooled}" if config.pooled else ""
        check_tensors(path, tensors, shapes, means, r)
        updates[path] = Update({name: tensors[name] for name in shapes}, alpha, scaling_of(alpha, r, config.use_rslora))
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
) -> None:
    """Write both files, whole, together or not at all: see `save_together`.

    `updates` is by module path and PEFT's suffix, `others` by the model's names; `base` says where the model came from.
    """
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in (others or {}).items()}
    tensors |= {f"{PREFIX}{path}.{suffix}": t for path, own in updates.items() for suffix, t in own.items()}
    fields = fields_of(config) | {"base_model_name_or_path": base}
    save_together(
        folder,
        (WEIGHTS_FILE, lambda path: write_weights(path, tensors)),
        (CONFIG_FILE, lambda path: reading.write_json(path, fields)),
    )
