"""Adapter files of PEFT, mlx-lm, kohya-ss/sd-scripts and diffusers in one plain form. Nothing is ever unpickled."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakernels.config import check_alpha
from lorakernels.files import reading
from lorakernels.files.one_file import read_file
from lorakernels.files.peft import (
    DIFFUSERS_FILE,
    WEIGHTS_FILE,
    WEIGHTS_INDEX,
    read_peft,
    replaced_tensors,
    unknown_key,
    updates_of,
)
from lorakernels.files.reading import AdapterFileError, Tensors, as_file_error
from lorakernels.files.update import CONFIG_FILE, LINEAR, MAGNITUDE, Update, check_pair, check_tensors, own_shapes

MLX_FILE = "adapters.safetensors"

_MLX_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_a|lora_b|m)")
_EMBEDDINGS = ("embed_tokens", "embeddings", "embedding", "wte", "wpe", "word_embeddings", "tok_embeddings")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as its files hold it, checked.

    `format` is "peft", "mlx", "kohya" or "diffusers". `updates` is by module path (kohya: by the name with underscores
    for dots; of a file for several models behind the part's name, see `one_file.part_of`); `others` holds whole weights
    and biases that replace the model's, by name. `fields` is the configuration, or kohya's metadata; diffusers' has
    one a part. `assumed` says by part what the files leave open and was taken as usual.
    """

    format: str
    source: Path
    fields: Mapping[str, Any]
    updates: Mapping[str, Update]
    others: Tensors = field(default_factory=dict)
    assumed: Mapping[str, str] = field(default_factory=dict)


def find(source: str | os.PathLike[str]) -> tuple[str, Path]:
    """What is there: an adapter's folder, of "peft" or "mlx", or a "file" that is one by itself.

    Raises AdapterFileError where there is none, or there are several.
    """
    path = Path(source)
    if not path.exists():
        raise AdapterFileError(f"{path} does not exist; expected an adapter's folder or .safetensors file")
    if path.name in (WEIGHTS_FILE, WEIGHTS_INDEX, MLX_FILE) and (path.parent / CONFIG_FILE).is_file():
        path = path.parent
    if not path.is_dir() and path.suffix != ".safetensors":
        raise AdapterFileError(f"{path} is no .safetensors file; {reading.MEND_A_PICKLE}")
    if not path.is_dir():
        return "file", path
    here = sorted(os.listdir(path))
    kinds = {WEIGHTS_FILE: "peft", WEIGHTS_INDEX: "peft", MLX_FILE: "mlx", DIFFUSERS_FILE: "file"}
    known = {name: kind for name, kind in kinds.items() if name in here}
    if len(set(known.values())) > 1:
        raise AdapterFileError(f"{path} has {' and '.join(known)}, which are two formats; expected one of them")
    single = [name for name in here if name.endswith(".safetensors")]
    if CONFIG_FILE in here or "peft" in known.values():
        return ("mlx" if "mlx" in known.values() else "peft"), path
    if len(single) == 1:
        return "file", path / single[0]
    raise AdapterFileError(
        f"{path} holds no adapter; expected {CONFIG_FILE} with {WEIGHTS_FILE} (PEFT) or {MLX_FILE} (mlx-lm), "
        "or one .safetensors file alone (kohya, diffusers), or such a file's own name. "
        f"It has: {', '.join(here[:10]) or 'nothing'}{reading.mend_of_pickles(here)}"
    )


def read_adapter(source: str | os.PathLike[str]) -> AdapterFile:
    """Read the adapter in a folder (PEFT, mlx-lm) or a .safetensors file (kohya, diffusers).

    Raises AdapterFileError, which says what was found, what is expected and the mend: a half of a pair missing, shapes
    or ranks that disagree, integers, NaN or Inf, a broken file, a key or field that is not known, a pickle.
    """
    kind, path = find(source)
    if kind == "mlx":
        return _read_mlx(path)
    if kind == "file":
        format, fields, updates, assumed = read_file(path)
        return AdapterFile(format, path, fields, updates, assumed=assumed)
    file = read_peft(path)
    return AdapterFile("peft", path, file.fields, others=replaced_tensors(file), updates=updates_of(file))


def _read_mlx(folder: Path) -> AdapterFile:
    """mlx-lm's tuner: lora_a [K, r] and lora_b [r, N], and `scale` multiplies as it is."""
    source, file = folder / CONFIG_FILE, folder / MLX_FILE
    fields = reading.read_json(source)
    kind = fields.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterFileError(f"{source}: fine_tune_type is {kind!r}; expected 'lora' or 'dora'")
    parameters = fields.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise AdapterFileError(f"{source}: lora_parameters is {parameters!r}; expected an object with rank and scale")
    if parameters.get("alpha") is not None:
        raise AdapterFileError(
            f"{source}: lora_parameters has alpha={parameters['alpha']!r}, which old mlx-lm multiplied scale with "
            "(by alpha / rank) and new mlx-lm ignores; remove it, and set scale to the number that was trained with"
        )
    scale: Any = parameters.get("scale")
    rank = parameters.get("rank")
    with as_file_error(source):
        check_alpha(scale, "lora_parameters.scale")
    modules: dict[str, Tensors] = {}
    for key, tensor in reading.read_tensors(file)[0].items():
        match = _MLX_KEY.fullmatch(key)
        if match is None:
            raise unknown_key(file, key, "<module>.lora_a or <module>.lora_b")
        modules.setdefault(match["path"], {})[match["part"]] = tensor
    if not modules:
        raise AdapterFileError(f"{file} holds no LoRA tensors")
    updates = {}
    for path, found in modules.items():
        check_pair(path, found, ("lora_a", "lora_b"), transposed=True)
        a, b, m = found["lora_a"], found["lora_b"], found.get("m")
        if a.shape[1] != rank or isinstance(rank, bool):
            raise AdapterFileError(f"{path}.lora_a is {list(a.shape)}, and rank is {rank!r}; expected [K, rank]")
        if path.rpartition(".")[2] in _EMBEDDINGS:
            raise AdapterFileError(f"{path} is an embedding, whose mlx-lm form is not read; expected linear layers")
        if (m is not None) != (kind == "dora"):
            has = "lacks" if m is None else "has"
            raise AdapterFileError(f"{path} {has} DoRA's m, and fine_tune_type is {kind!r}; expected both or neither")
        tensors = {LINEAR[0]: a.T.contiguous(), LINEAR[1]: b.T.contiguous()} | ({} if m is None else {MAGNITUDE: m})
        check_tensors(path, tensors, own_shapes(path, tensors, a.shape[1], m is not None), "its own", a.shape[1])
        updates[path] = Update(tensors, scale * rank, float(scale))
    return AdapterFile("mlx", folder, fields, updates)
