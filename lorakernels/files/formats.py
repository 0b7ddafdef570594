"""Adapter files of PEFT, kohya-ss/sd-scripts and mlx-lm, read into one plain form. Nothing is ever unpickled."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from lorakernels.adapters.bind import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from lorakernels.adapters.targets import by_pattern
from lorakernels.config import scaling_of
from lorakernels.files.config_file import MAX_BYTES, AdapterFileError, config_from_fields

MLX_FILE = "adapters.safetensors"

# These change the maths and are understood here, so that they do not reach the check of unknown fields.
_OWN_FIELDS = ("fan_in_fan_out", "init_lora_weights", "lora_bias", "modules_to_save", "use_dora")
_PEFT_KEY = re.compile(
    r"(?P<path>.+)\.(?:lora_(?P<linear>[AB])\.(?P<what>weight|bias)"
    r"|lora_embedding_(?P<embedding>[AB])|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)
_KOHYA_KEY = re.compile(r"(?P<path>[^.]+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)")
_MLX_KEY = re.compile(r"(?P<path>.+)\.(?P<part>lora_a|lora_b|m)")
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
_EMBEDDINGS = ("embed_tokens", "embeddings", "embedding", "wte", "wpe", "word_embeddings", "tok_embeddings")
_SAVED_WITH_EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT saves these whole where the vocabulary has grown
T = TypeVar("T", int, float)


@dataclass(frozen=True)
class Update:
    """The update of one module's weight: scaling · B A.

    A is [r, K] and B [N, r] (linear), [r, K, *kernel] and [N, r / groups, 1, ...] (convolution), or [r, vocabulary]
    and [width, r] (`embedding`, whose weight [vocabulary, width] gets the transpose). `magnitude` is DoRA's length of
    every row, `lora_bias` PEFT's bias beside lora_B.
    """

    A: torch.Tensor
    B: torch.Tensor
    alpha: float
    scaling: float
    magnitude: torch.Tensor | None = None
    lora_bias: torch.Tensor | None = None
    embedding: bool = False

    @property
    def r(self) -> int:
        return self.A.shape[0]

    @property
    def groups(self) -> int:
        """Of a convolution: A reads all channels, and each group of B's rows a part of A's outputs."""
        return self.A.shape[0] // self.B.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(t for t in (self.A, self.B, self.magnitude, self.lora_bias) if t is not None)


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
    others: Mapping[str, torch.Tensor] = field(default_factory=dict)


def read_adapter(source: str | os.PathLike[str]) -> AdapterFile:
    """Read the adapter in a folder (PEFT, mlx-lm) or a .safetensors file (kohya).

    Raises AdapterFileError, which says what was found, what is expected and the mend: a half of a pair missing, shapes
    or ranks that disagree, integers, NaN or Inf, a broken file, a key or field that is not known, a pickle.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise AdapterFileError(f"{path} does not exist; expected an adapter's folder or .safetensors file")
    if path.suffix != ".safetensors":
        raise AdapterFileError(
            f"{path} is no .safetensors file; a pickle (.bin, .pt, .ckpt) can run any code and is not read: "
            "convert it with safetensors.torch.save_file where you trust it"
        )
    if path.name in (WEIGHTS_FILE, MLX_FILE) and (path.parent / CONFIG_FILE).is_file():
        return _read_folder(path.parent)
    return _read_kohya(path)


def _read_folder(folder: Path) -> AdapterFile:
    here = sorted(os.listdir(folder))
    if WEIGHTS_FILE in here or MLX_FILE in here:
        fields = read_json(folder / CONFIG_FILE)
        if WEIGHTS_FILE in here and MLX_FILE in here:
            raise AdapterFileError(f"{folder} has {WEIGHTS_FILE} (PEFT) and {MLX_FILE} (mlx-lm); expected one of them")
        return _read_peft(folder, fields) if WEIGHTS_FILE in here else _read_mlx(folder, fields)
    single = [name for name in here if name.endswith(".safetensors")]
    if len(single) == 1 and CONFIG_FILE not in here:
        return _read_kohya(folder / single[0])
    pickles = [name for name in here if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".npz"))]
    mend = ""
    if pickles:
        mend = f"; {', '.join(pickles[:3])} is not read, convert it to safetensors where you trust it"
    raise AdapterFileError(
        f"{folder} holds no adapter; expected {CONFIG_FILE} with {WEIGHTS_FILE} (PEFT) or {MLX_FILE} (mlx-lm), "
        f"or one .safetensors file (kohya). It has: {', '.join(here[:10]) or 'nothing'}{mend}"
    )


# ------------------------------------------------------------------------------------------- PEFT


def _read_peft(folder: Path, fields: dict[str, Any]) -> AdapterFile:
    source = folder / CONFIG_FILE
    plain = {name: value for name, value in fields.items() if name not in _OWN_FIELDS}
    config = config_from_fields(plain, str(source))
    saved = _saved_names(fields, source)
    tensors = read_tensors(folder / WEIGHTS_FILE)[0]
    parts: dict[str, dict[str, torch.Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _PEFT_KEY.fullmatch(name)
        if not key.startswith(PREFIX) or (match is None and not _is_declared(name, fields, saved)):
            raise _unknown(folder / WEIGHTS_FILE, key, f"{PREFIX}<module>.lora_A.weight or .lora_B.weight")
        if match is None:
            if not _is_repeated(key, tensors):
                others[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
            continue
        factor = match["linear"] or match["embedding"] or "magnitude"
        part = f"lora_{'embedding_' if match['embedding'] else ''}{factor}" if factor != "magnitude" else factor
        parts.setdefault(match["path"], {})["bias" if match["what"] == "bias" else part] = tensor
    ranks = by_pattern(parts, config.rank_pattern, config.r, source)
    alphas = by_pattern(parts, config.alpha_pattern, config.lora_alpha, source)
    updates = {}
    for path, found in parts.items():
        embedding = any(part.startswith("lora_embedding_") for part in found)
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        A, B = _pair(path, found, names, grouped=True)
        if A.shape[0] != ranks[path]:
            raise AdapterFileError(
                f"{path}: the tensors have rank {A.shape[0]} and {CONFIG_FILE} says {ranks[path]}; expected one rank"
            )
        for name, on in (("magnitude", bool(fields.get("use_dora"))), ("bias", bool(fields.get("lora_bias")))):
            if (name in found) != on:
                field_name, part = ("use_dora", "magnitude vector") if name == "magnitude" else ("lora_bias", "bias")
                raise AdapterFileError(
                    f"{path} has {'a' if name in found else 'no'} {part}, and {CONFIG_FILE} says "
                    f"{field_name}={on}; expected both or neither"
                )
        scaling = scaling_of(alphas[path], A.shape[0], config.use_rslora)
        updates[path] = Update(A, B, alphas[path], scaling, found.get("magnitude"), found.get("bias"), embedding)
    return _checked(AdapterFile("peft", folder, fields, updates, others))


def _saved_names(fields: Mapping[str, Any], source: Path) -> list[str]:
    saved = fields.get("modules_to_save") or []
    names = [saved] if isinstance(saved, str) else saved
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterFileError(f"{source}: modules_to_save is {saved!r}; expected a list of module names, or null")
    return names


def _is_repeated(key: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a key is one of those that bias="all" adds for the biases inside modules_to_save.

    They are the untrained original's, and the trained ones again, under the wrapper's names for them.
    """
    if ".original_module." in key:
        return True
    module, inside, name = key.partition(".modules_to_save.")
    plain = (f"{module}.{name}", f"{module}.{name.partition('.')[2]}")  # the second: after the adapter's name
    return bool(inside) and any(other in tensors and torch.equal(tensors[other], tensors[key]) for other in plain)


def _is_declared(name: str, fields: Mapping[str, Any], saved: Iterable[str]) -> bool:
    """Whether a tensor that is no adapter's was trained beside it, as the configuration says."""
    if fields.get("bias", "none") != "none" and name.endswith(".bias"):
        return True
    if any(part and f"{part}." in name for part in saved):  # PEFT means every module whose name ends so
        return True
    return name.endswith(".weight") and name.split(".")[-2] in _SAVED_WITH_EMBEDDINGS


# ------------------------------------------------------------------------------------------- kohya


def _read_kohya(path: Path) -> AdapterFile:
    """sd-scripts' networks/lora.py: lora_down is A, lora_up is B, and the scaling is alpha / r."""
    tensors, metadata = read_tensors(path)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KOHYA_KEY.fullmatch(key)
        if match is None:
            if ".lora_A." in key or ".lora_B." in key:
                raise AdapterFileError(f"{path} holds PEFT's keys and no {CONFIG_FILE}; expected both in one folder")
            raise _unknown(path, key, "<module>.lora_down.weight, .lora_up.weight or .alpha")
        parts.setdefault(match["path"], {})[match["part"].removesuffix(".weight")] = tensor
    updates = {}
    for name, found in parts.items():
        A, B = _pair(name, found, ("lora_down", "lora_up"))
        # Files older than alpha mean alpha = r.
        alpha = _alpha(name, found["alpha"]) if "alpha" in found else float(A.shape[0])
        updates[name] = Update(A, B, alpha, scaling_of(alpha, A.shape[0], False))
    return _checked(AdapterFile("kohya", path, metadata, updates))


def _alpha(name: str, tensor: torch.Tensor) -> float:
    alpha = float(tensor) if tensor.numel() == 1 and not tensor.is_complex() else math.nan
    if not math.isfinite(alpha) or alpha == 0:
        found = alpha if tensor.numel() == 1 else list(tensor.shape)
        raise AdapterFileError(f"{name}.alpha is {found}; expected one finite number that is not 0")
    return alpha


# ------------------------------------------------------------------------------------------- mlx-lm


def _read_mlx(folder: Path, fields: dict[str, Any]) -> AdapterFile:
    """mlx-lm's tuner: lora_a [K, r] and lora_b [r, N], and `scale` multiplies as it is."""
    source = folder / CONFIG_FILE
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
    scale, rank = parameters.get("scale"), parameters.get("rank")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise AdapterFileError(f"{source}: lora_parameters.scale is {scale!r}; expected a finite number")
    tensors = read_tensors(folder / MLX_FILE)[0]
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _MLX_KEY.fullmatch(key)
        if match is None:
            raise _unknown(folder / MLX_FILE, key, "<module>.lora_a or <module>.lora_b")
        parts.setdefault(match["path"], {})[match["part"]] = tensor
    updates = {}
    for path, found in parts.items():
        a, b = _pair(path, found, ("lora_a", "lora_b"), transposed=True)
        if a.shape[-1] != rank or isinstance(rank, bool):
            raise AdapterFileError(
                f"{path}.lora_a is {list(a.shape)}, and lora_parameters.rank is {rank!r}; expected [K, rank]"
            )
        if path.rpartition(".")[2] in _EMBEDDINGS:
            raise AdapterFileError(
                f"{path} is an embedding, whose mlx-lm form is not supported; expected linear layers"
            )
        if ("m" in found) != (kind == "dora"):
            has = "has" if "m" in found else "lacks"
            raise AdapterFileError(f"{path} {has} DoRA's m, and fine_tune_type is {kind!r}; expected both or neither")
        updates[path] = Update(a.T.contiguous(), b.T.contiguous(), scale * rank, float(scale), found.get("m"))
    return _checked(AdapterFile("mlx", folder, fields, updates))


# ------------------------------------------------------------------------------------------- shared


def read_json(path: Path) -> dict[str, Any]:
    """An object of fields."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise AdapterFileError(f"{path} has {path.stat().st_size:,} bytes; expected at most {MAX_BYTES:,}")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterFileError(f"{path.parent} has no {path.name}; expected it beside the weights") from error
    except AdapterFileError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise AdapterFileError(f"{path} holds a {type(fields).__name__}; expected an object of fields")
    return fields


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor of a safetensors file, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise AdapterFileError(f"{path} is not a whole safetensors file: {error}") from error


def _unknown(file: Path, key: str, expected: str) -> AdapterFileError:
    kinds = [kind for part, kind in _OTHER_KINDS.items() if any(word.startswith(part) for word in key.split("."))]
    if kinds:
        return AdapterFileError(f"{file}: {key!r} belongs to {kinds[-1]}, which is not supported; expected LoRA")
    return AdapterFileError(f"{file}: unknown key {key!r}; expected {expected}")


def _pair(
    path: str,
    found: Mapping[str, torch.Tensor],
    names: tuple[str, str],
    transposed: bool = False,
    grouped: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors of a module. `transposed`: [K, r] and [r, N]. `grouped`: a convolution may have groups."""
    missing = [name for name in names if name not in found]
    if missing:
        raise AdapterFileError(f"module {path!r} has no {missing[0]}; expected both {names[0]} and {names[1]}")
    A, B = found[names[0]], found[names[1]]
    plain = A.dim() == B.dim() == 2
    conv = A.dim() == B.dim() > 2 and not transposed and set(B.shape[2:]) == {1}
    if not plain and not conv:
        forms = "two dimensions" if transposed else "two dimensions, or [r, K, *kernel] and [N, r, 1, ...]"
        raise AdapterFileError(
            f"{path}: {names[0]} is {list(A.shape)} and {names[1]} {list(B.shape)}; expected {forms}"
        )
    ranks = (A.shape[1], B.shape[0]) if transposed else (A.shape[0], B.shape[1])
    empty = 0 in (*A.shape, *B.shape)
    if conv and grouped and not empty and ranks[0] % ranks[1] == 0 and B.shape[0] % (ranks[0] // ranks[1]) == 0:
        return A, B
    if ranks[0] != ranks[1] or empty:
        raise AdapterFileError(
            f"{path}: {names[0]} is {list(A.shape)} and {names[1]} {list(B.shape)}; expected "
            f"{'[K, r] and [r, N]' if transposed else '[r, K] and [N, r]'} with one r of at least 1 (transposed?)"
        )
    return A, B


def _checked(adapter: AdapterFile) -> AdapterFile:
    if not adapter.updates:
        raise AdapterFileError(f"{adapter.source} holds no LoRA tensors")
    for path, update in adapter.updates.items():
        for tensor in update.tensors:
            _check_numbers(path, tensor)
        length = update.B.shape[0]
        for name, vector in (("magnitude", update.magnitude), ("bias of lora_B", update.lora_bias)):
            if vector is not None and vector.numel() != length:
                raise AdapterFileError(f"{path}: the {name} is {list(vector.shape)}; expected {length} numbers")
    for name, tensor in adapter.others.items():
        if tensor.is_floating_point():  # BatchNorm counts its batches in int64
            _check_numbers(name, tensor)
    return adapter


def _check_numbers(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise AdapterFileError(f"{name} holds a tensor of {tensor.dtype}; expected a float dtype")
    if not torch.isfinite(tensor.float() if tensor.dtype != torch.float64 else tensor).all():
        raise AdapterFileError(f"{name} holds NaN or Inf")


def most_common(values: Iterable[T]) -> T:
    """The value that most modules have: what a file's one number should be, beside patterns for the rest."""
    return Counter(values).most_common(1)[0][0]
