"""Adapters of kohya-ss/sd-scripts and mlx-lm as PEFT's folder."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from lorakernels.config import LoRAConfig
from lorakernels.files.checkpoint import Checkpoint
from lorakernels.files.formats import AdapterFile, read_adapter
from lorakernels.files.peft import with_ranks, write_peft
from lorakernels.files.reading import AdapterFileError, as_file_error
from lorakernels.files.saving import new_folder
from lorakernels.files.update import MAGNITUDE, Update

# What sd-scripts puts before a module's name, the longer ones first.
KOHYA_PREFIXES = ("lora_transformer", "lora_unet", "lora_te1", "lora_te2", "lora_te3", "lora_te", "lycoris")


def convert(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    prefix: str | None = None,
) -> Path:
    """Write the adapter at `source` (kohya or mlx-lm) into the new folder `to` as PEFT's files; the numbers stay.

    Args:
        source: a kohya .safetensors file, or mlx-lm's folder.
        to: a folder that does not exist yet, or is empty.
        model: folder of the model's safetensors. kohya writes underscores for the dots of a module's name, and only
            the model's own names tell which were dots. With it shapes are checked too.
        prefix: which part of a kohya file ("lora_unet", "lora_te", ...): a PEFT folder is for one model.

    Raises:
        AdapterFileError: the adapter is broken, PEFT's already, or does not fit `model`. Nothing is written then.
    """
    adapter = read_adapter(source)
    if adapter.format == "peft":
        raise AdapterFileError(f"{source} is in PEFT's format already; expected a kohya or an mlx-lm adapter")
    checkpoint = None if model is None else Checkpoint(model)
    if adapter.format == "kohya":
        updates = _with_paths(adapter, checkpoint, prefix)
    else:
        if prefix is not None:
            raise AdapterFileError(f"{source} is mlx-lm's, whose modules have no prefix {prefix!r}")
        updates = dict(adapter.updates)
    if checkpoint is not None:
        for path, update in updates.items():
            checkpoint.check_holds(f"{path}.weight", update.shape, "updates")
    config = _config(adapter, updates)
    folder = new_folder(to, sources=[Path(source)])
    write_peft(folder, config, {path: update.tensors for path, update in updates.items()})
    return Path(to)


def _config(adapter: AdapterFile, updates: Mapping[str, Update]) -> LoRAConfig:
    ranks = {path: update.r for path, update in updates.items()}
    alphas = {path: int(u.alpha) if float(u.alpha).is_integer() else u.alpha for path, u in updates.items()}
    # What most modules have, beside patterns for the rest.
    (r, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    dropout = (adapter.fields.get("lora_parameters") or {}).get("dropout") or 0.0
    use_dora = any(MAGNITUDE in update.tensors for update in updates.values())
    with as_file_error(adapter.source):
        config = LoRAConfig(r, alpha, dropout, sorted(updates), use_dora=use_dora)
    return with_ranks(config, ranks, alphas)


def _with_paths(adapter: AdapterFile, checkpoint: Checkpoint | None, prefix: str | None) -> dict[str, Update]:
    """A kohya file's updates by the model's own module paths."""
    known = KOHYA_PREFIXES if prefix is None else (prefix, *KOHYA_PREFIXES)
    by_prefix = {name: next((one for one in known if name.startswith(f"{one}_")), "") for name in adapter.updates}
    counts = Counter(by_prefix.values())
    listing = ", ".join(f"{found or 'none'} ({number} modules)" for found, number in sorted(counts.items()))
    if prefix is None and len(counts) > 1:
        raise AdapterFileError(
            f"{adapter.source} holds adapters of several models: {listing}; a PEFT folder is for one: "
            "choose with --prefix, and give that model's folder as --model"
        )
    chosen = prefix if prefix is not None else next(iter(counts))
    if chosen not in counts:
        raise AdapterFileError(f"{adapter.source} has no modules of the prefix {prefix!r}; it has: {listing}")
    if checkpoint is None:
        raise AdapterFileError(
            f"{adapter.source} is a kohya file, whose module names have underscores for dots; "
            "give the model's folder as --model, whose tensor names tell which were dots"
        )
    paths = defaultdict(list)
    for path in (name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight")):
        paths[path.replace(".", "_")].append(path)
    names = [name for name, found in by_prefix.items() if found == chosen]
    meant = {name: paths.get(name.removeprefix(f"{chosen}_") if chosen else name, []) for name in names}
    for name, found in meant.items():
        if len(found) > 1:
            raise AdapterFileError(f"{name} can mean {' or '.join(found)} of {checkpoint.folder}; expected one module")
    unknown = [name for name in names if not meant[name]]
    if unknown:
        raise AdapterFileError(
            f"{checkpoint.folder} has no module for {len(unknown)} of {counts[chosen]} names, such as {unknown[0]}; "
            "expected the folder of the model that the adapter was trained on (a single part: unet, text_encoder, ...)"
        )
    return {meant[name][0]: adapter.updates[name] for name in names}
