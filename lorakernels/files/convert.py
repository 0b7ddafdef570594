"""Adapters of kohya-ss/sd-scripts, diffusers and mlx-lm as PEFT's: its folder, or what a model is to load."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from lorakernels.config import LoRAConfig
from lorakernels.files.checkpoint import Checkpoint
from lorakernels.files.config_file import check_start, config_from_fields
from lorakernels.files.formats import AdapterFile, find, read_adapter
from lorakernels.files.naming import Model, of_files, place
from lorakernels.files.one_file import fields_of_part
from lorakernels.files.peft import PeftFile, read_peft, with_ranks, write_peft
from lorakernels.files.reading import AdapterFileError, as_file_error
from lorakernels.files.saving import new_folder
from lorakernels.files.update import BIAS, CONFIG_FILE, MAGNITUDE, Update


def convert(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    prefix: str | None = None,
) -> Path:
    """Write the adapter at `source` (kohya, diffusers, mlx-lm) into the new folder `to` as PEFT's; the numbers stay.

    A warning says what was taken as usual since the file leaves it open.

    Args:
        source: a .safetensors file of kohya's or diffusers' format, or mlx-lm's folder.
        to: a folder that does not exist yet, or is empty.
        model: folder of the model's safetensors. kohya writes underscores for the dots of a module's name, and only
            the model's own names tell which were dots. With it shapes are checked too.
        prefix: which part of a file ("lora_unet", "transformer", ...): a PEFT folder is for one model.

    Raises:
        AdapterFileError: the adapter is broken, PEFT's already, or does not fit `model`. Nothing is written then.
    """
    adapter = read_adapter(source)
    if adapter.format == "peft":
        raise AdapterFileError(f"{source} is in PEFT's format already; expected one of kohya, diffusers or mlx-lm")
    checkpoint = None if model is None else Checkpoint(model)
    part, names = place(adapter, None if checkpoint is None else of_files(checkpoint), prefix)
    updates = {path: adapter.updates[name] for name, path in names.items()}
    if checkpoint is not None:
        updates = {path: checkpoint.fitted(path, update, checkpoint.transposed) for path, update in updates.items()}
    config = _config(adapter, part, updates)
    if part in adapter.assumed:
        warnings.warn(f"{source}: {adapter.assumed[part]}, as files without it mean", stacklevel=2)
    folder = new_folder(to, sources=[Path(source)])
    tensors = {path: update.tensors for path, update in updates.items()}
    write_peft(folder, config, tensors, fan_in_fan_out=checkpoint is not None and checkpoint.transposed)
    return Path(to)


def read_for(source: str | os.PathLike[str], model: Callable[[], Model], prefix: str | None = None) -> PeftFile:
    """The adapter at `source`, of any format, as PEFT's files would have it for a model.

    What a file has no configuration for is inferred, and a warning says what came of it.
    """
    kind, path = find(source)
    if kind == "peft":
        if prefix is not None:
            raise AdapterFileError(f"{source} is PEFT's folder, which is for one model; leave prefix={prefix!r} out")
        return read_peft(path)
    adapter = read_adapter(path)
    part, names = place(adapter, model(), prefix, choose=True)
    updates = {path: adapter.updates[name] for name, path in names.items()}
    config = _config(adapter, part, updates)
    patterns = "".join(
        f", {len(getattr(config, n))} in {n}" for n in ("rank_pattern", "alpha_pattern") if getattr(config, n)
    )
    left = len(adapter.updates) - len(updates)
    said = [
        f"{adapter.format} format{f', of which the part is {part}' if part else ''}",
        f"r={config.r}, lora_alpha={config.lora_alpha:g}{patterns}, use_rslora={config.use_rslora}, "
        f"use_dora={config.use_dora}, {len(updates)} target modules such as {next(iter(updates))}",
        *([adapter.assumed[part]] if part in adapter.assumed else []),
        *([f"{left} modules of other models are left out"] if left else []),
    ]
    warnings.warn(
        f"{adapter.source} has no {CONFIG_FILE} of PEFT's, and this is inferred: {'; '.join(said)}", stacklevel=4
    )
    layers = {path: update.tensors for path, update in updates.items()}
    return PeftFile(str(adapter.source), {}, config, layers, {})


def _config(adapter: AdapterFile, part: str, updates: Mapping[str, Update]) -> LoRAConfig:
    """The configuration that says what these updates are: as the file has it, otherwise what they come to."""
    source = str(adapter.source)
    ranks = {path: update.r for path, update in updates.items()}
    alphas = {path: int(u.alpha) if float(u.alpha).is_integer() else u.alpha for path, u in updates.items()}
    have = {}
    for name in (MAGNITUDE, BIAS):
        those = [path for path, update in updates.items() if name in update.tensors]
        if those and len(those) < len(updates):
            raise AdapterFileError(
                f"{source}: {len(those)} of {len(updates)} modules have {name}; expected all or none"
            )
        have[name] = bool(those)
    fields = fields_of_part(adapter.fields, part) if adapter.format == "diffusers" else {}
    check_start(fields, source)
    # What most modules have, beside patterns for the rest.
    (r, _), *_ = Counter(ranks.values()).most_common(1)
    (alpha, _), *_ = Counter(alphas.values()).most_common(1)
    said = config_from_fields(fields, source) if fields else LoRAConfig()
    dropout = said.lora_dropout if fields else (adapter.fields.get("lora_parameters") or {}).get("dropout") or 0.0
    with as_file_error(source):
        config = LoRAConfig(r, alpha, dropout, sorted(updates), use_rslora=said.use_rslora)
        config = replace(config, use_dora=have[MAGNITUDE], lora_bias=have[BIAS])
    return with_ranks(config, ranks, alphas)
