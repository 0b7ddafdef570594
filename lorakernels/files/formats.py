"""Adapter files of PEFT, kohya-ss/sd-scripts and mlx-lm, read into one plain form. Nothing is ever unpickled."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorakernels.config import FLOAT32_MAX, check_alpha, scaling_of
from lorakernels.files import reading
from lorakernels.files.peft import WEIGHTS_FILE, read_peft, replaced_tensors, unknown_key, updates_of
from lorakernels.files.reading import AdapterFileError, Tensors, as_file_error
from lorakernels.files.update import CONFIG_FILE, LINEAR, MAGNITUDE, Update, check_pair, check_tensors, own_shapes
from lorakernels.files.weights import read_tensors

MLX_FILE = "adapters.safetensors"

_KOHYA_KEY = re.compile(r"(?P<path>[^.]+)\.(?P<part>lora_(?:down|up)(?=\.weight)|alpha$)(?:\.weight)?")
_MLX_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_a|lora_b|m)")
_EMBEDDINGS = ("embed_tokens", "embeddings", "embedding", "wte", "wpe", "word_embeddings", "tok_embeddings")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as its files hold it, checked.

    `format` is "peft", "kohya" or "mlx". `updates` is by module path (kohya: by the name with underscores for dots);
    `others` holds whole weights and biases that replace the model's, by name. `fields` is the configuration, or
    kohya's metadata.
    """

    format: str
    source: Path
    fields: Mapping[str, Any]
    updates: Mapping[str, Update]
    others: Tensors = field(default_factory=dict)


def read_adapter(source: str | os.PathLike[str]) -> AdapterFile:
    """Read the adapter in a folder (PEFT, mlx-lm) or a .safetensors file (kohya).

    Raises AdapterFileError, which says what was found, what is expected and the mend: a half of a pair missing, shapes
    or ranks that disagree, integers, NaN or Inf, a broken file, a key or field that is not known, a pickle.
    """
    path = Path(source)
    if not path.exists():
        raise AdapterFileError(f"{path} does not exist; expected an adapter's folder or .safetensors file")
    if not path.is_dir() and path.suffix != ".safetensors":
        raise AdapterFileError(f"{path} is no .safetensors file; {reading.MEND_A_PICKLE}")
    if path.name in (WEIGHTS_FILE, MLX_FILE) and (path.parent / CONFIG_FILE).is_file():
        path = path.parent
    return _read_folder(path) if path.is_dir() else _read_kohya(path)


def _read_folder(folder: Path) -> AdapterFile:
    here = sorted(os.listdir(folder))
    if WEIGHTS_FILE in here and MLX_FILE in here:
        raise AdapterFileError(f"{folder} has {WEIGHTS_FILE} (PEFT) and {MLX_FILE} (mlx-lm); expected one of them")
    if WEIGHTS_FILE in here:
        file = read_peft(folder)
        return AdapterFile("peft", folder, file.fields, others=replaced_tensors(file), updates=updates_of(file))
    if MLX_FILE in here:
        return _read_mlx(folder)
    single = [name for name in here if name.endswith(".safetensors")]
    if len(single) == 1 and CONFIG_FILE not in here:
        return _read_kohya(folder / single[0])
    raise AdapterFileError(
        f"{folder} holds no adapter; expected {CONFIG_FILE} with {WEIGHTS_FILE} (PEFT) or {MLX_FILE} (mlx-lm), "
        f"or one .safetensors file (kohya). It has: {', '.join(here[:10]) or 'nothing'}{reading.mend_of_pickles(here)}"
    )


def _by_module(file: Path, tensors: Tensors, key_of: re.Pattern[str], expected: str) -> dict[str, Tensors]:
    """The tensors by module path, and there by the `part` of their keys."""
    parts: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        match = key_of.fullmatch(key)
        if match is None:
            raise unknown_key(file, key, expected)
        parts.setdefault(match["path"], {})[match["part"]] = tensor
    if not parts:
        raise AdapterFileError(f"{file} holds no LoRA tensors")
    return parts


def _update(path: str, tensors: Tensors, alpha: float, scaling: float) -> Update:
    r = tensors[LINEAR[0]].shape[0]
    check_tensors(path, tensors, own_shapes(path, tensors, r, use_dora=MAGNITUDE in tensors), "its own", r)
    return Update(tensors, alpha, scaling)


def _read_kohya(path: Path) -> AdapterFile:
    """sd-scripts' networks/lora.py: lora_down is A, lora_up is B, and the scaling is alpha / r."""
    tensors, metadata = read_tensors(path)
    if any(".lora_A." in key or ".lora_B." in key for key in tensors):
        raise AdapterFileError(f"{path} holds PEFT's keys and no {CONFIG_FILE}; expected both in one folder")
    updates = {}
    expected = "<module>.lora_down.weight, .lora_up.weight or .alpha"
    for name, found in _by_module(path, tensors, _KOHYA_KEY, expected).items():
        check_pair(name, found, ("lora_down", "lora_up"))
        A, B = found["lora_down"], found["lora_up"]
        # Files older than alpha mean alpha = r.
        alpha = _alpha(name, found["alpha"]) if "alpha" in found else float(A.shape[0])
        scaling = scaling_of(alpha, A.shape[0], use_rslora=False)
        updates[name] = _update(name, {LINEAR[0]: A, LINEAR[1]: B}, alpha, scaling)
    return AdapterFile("kohya", path, metadata, updates)


def _alpha(name: str, tensor: torch.Tensor) -> float:
    alpha = float(tensor) if tensor.numel() == 1 and not tensor.is_complex() else math.nan
    if not 0 < abs(alpha) <= FLOAT32_MAX:
        found = alpha if tensor.numel() == 1 else list(tensor.shape)
        raise AdapterFileError(f"{name}.alpha is {found}; expected one finite number that is not 0")
    return alpha


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
    updates = {}
    expected = "<module>.lora_a or <module>.lora_b"
    for path, found in _by_module(file, read_tensors(file)[0], _MLX_KEY, expected).items():
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
        updates[path] = _update(path, tensors, scale * rank, float(scale))
    return AdapterFile("mlx", folder, fields, updates)
