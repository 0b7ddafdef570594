"""One safetensors file that is an adapter by itself: of sd-scripts, LyCORIS, diffusers, ai-toolkit and their kin."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from lorakernels.config import FLOAT32_MAX, scaling_of
from lorakernels.files.config_file import config_from_fields, not_supported
from lorakernels.files.peft import PREFIX, PeftFile, plain_keys, unknown_key, updates_of
from lorakernels.files.reading import AdapterFileError, Tensors, as_file_error
from lorakernels.files.update import BIAS, CONFIG_FILE, LINEAR, MAGNITUDE, Update, check_pair, check_tensors, own_shapes
from lorakernels.files.weights import read_tensors

# What sd-scripts, musubi-tuner and LyCORIS put before a module's name, the longer ones first.
KOHYA_PREFIXES = ("lora_transformer", "lora_unet", "lora_te1", "lora_te2", "lora_te3", "lora_te", "lycoris")
# What diffusers puts before it, the model's name in the pipeline; and ComfyUI.
_PART = re.compile(
    r"((unet|transformer|text_encoder|image_encoder|prior|controlnet)(_\d)?|(model\.)?diffusion_model)\."
)
_METADATA = "lora_adapter_metadata"  # in the header: each part's configuration, `transformer.r` and so on
_KEY = re.compile(
    r"(?P<path>.+?)(?:[._]lora(?:_linear_layer)?[._](?P<half>A|B|down|up)\.(?P<what>weight|bias)"
    r"|\.(?P<other>alpha|dora_scale|lora_magnitude_vector)(?:(?<=vector)\.weight)?)"
)
# CLIP's layers, by the names that diffusers gave them once.
_OF_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def part_of(format: str, name: str, prefix: str | None = None) -> tuple[str, str]:
    """Which model of several a file's name of a module is of, and its name in that; nothing where it does not say.

    `prefix` is what kohya's names may begin with beside what is known.
    """
    if format == "diffusers":
        match = _PART.match(name)
        return (match[0][:-1], name[match.end() :]) if match is not None else ("", name)
    known = () if format != "kohya" else KOHYA_PREFIXES if prefix is None else (prefix, *KOHYA_PREFIXES)
    part = next((one for one in known if name.startswith(f"{one}_")), "")
    return part, name[len(part) + 1 :] if part else name


def fields_of_part(fields: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The configuration of one part, of those in a header."""
    start = f"{part}." if part else ""
    return {
        name[len(start) :]: value
        for name, value in fields.items()
        if name.startswith(start) and (part or "." not in name)
    }


def read_file(path: Path) -> tuple[str, Mapping[str, Any], dict[str, Update], dict[str, str]]:
    """Format, header, updates by the file's names of modules, and by part what it leaves open and is taken as usual.

    down is A, up is B, and the scaling is alpha / r. Files without alpha mean r, and so do diffusers and sd-scripts.
    """
    tensors, metadata = read_tensors(path)
    if any(key.startswith(PREFIX) for key in tensors):
        both = f"{CONFIG_FILE}, which says the scaling"
        raise AdapterFileError(f"{path} holds PEFT's keys and no {both}; expected both in one folder")
    modules: dict[str, Tensors] = {}
    for key, tensor in plain_keys(tensors, str(path)).items():
        match = _KEY.fullmatch(key)
        if match is None:
            expected = "<module>.lora_down.weight, .lora_up.weight or .alpha, or <module>.lora_A.weight and the like"
            raise unknown_key(path, key, expected)
        part = match["other"] or f"lora_{match['half']}{'.bias' if match['what'] == 'bias' else ''}"
        own = modules.setdefault(_of_today(match["path"]), {})
        if part in own:
            raise AdapterFileError(f"{path} has two keys for one tensor, such as {key}; expected one of them")
        own[part] = tensor
    if not modules:
        raise AdapterFileError(f"{path} holds no LoRA tensors")
    format = _format_of(path, modules)
    fields = metadata if format == "kohya" else _configurations(path, metadata)
    updates: dict[str, Update] = {}
    assumed: dict[str, str] = {}
    for part in dict.fromkeys(part_of(format, name)[0] for name in modules):
        names = [name for name in modules if part_of(format, name)[0] == part]
        adapters = {name: _tensors(name, modules[name]) for name in names}
        alphas = {name: modules[name]["alpha"] for name in names if "alpha" in modules[name]}
        configured = {} if format == "kohya" else fields_of_part(fields, part)
        if configured and alphas:
            raise AdapterFileError(f"{path} has {next(iter(alphas))}.alpha, and lora_alpha in its header; expected one")
        if configured:
            config = config_from_fields(configured, str(path))
            if config.target_parameters:
                raise not_supported("target_parameters", config.target_parameters, str(path))
            inner = {part_of(format, name)[1]: name for name in names}
            layers = {rest: adapters[name] for rest, name in inner.items()}
            found = updates_of(PeftFile(str(path), configured, config, layers, {}))
            updates |= {inner[rest]: update for rest, update in found.items()}
            continue
        for name, own in adapters.items():
            r = own[LINEAR[0]].shape[0]
            alpha = _alpha(name, alphas[name]) if name in alphas else float(r)
            check_tensors(name, own, own_shapes(name, own, r, MAGNITUDE in own, BIAS in own), "its own", r)
            updates[name] = Update(own, alpha, scaling_of(alpha, r, use_rslora=False))
        if without := [name for name in names if name not in alphas]:
            assumed[part] = f"alpha is the rank for {len(without)} of {len(names)} modules"
    return format, fields, updates, assumed


def _format_of(path: Path, names: Iterable[str]) -> str:
    kohya = {name: name.startswith(KOHYA_PREFIXES) or "." not in name for name in names}
    prefixed = any(name.startswith(KOHYA_PREFIXES) for name in names)
    if prefixed and not all(kohya.values()):
        other = next(name for name, found in kohya.items() if not found)
        raise AdapterFileError(f"{path} has names of kohya's format and of diffusers', such as {other}; expected one")
    return "kohya" if all(kohya.values()) else "diffusers"


def _of_today(name: str) -> str:
    """A module's name where a file has an older one, or has half converted it.

    Diffusers had processors of attention, whose `attn1.processor.to_out` was of `attn1.to_out.0`.
    """
    if name.startswith(KOHYA_PREFIXES):
        return name.replace(".", "_")
    if ".processor.to_" in name:
        return name.replace(".processor.", ".") + (".0" if name.endswith("to_out") else "")
    parent, _, leaf = name.rpartition(".")
    return f"{parent}.{_OF_CLIP[leaf]}" if leaf in _OF_CLIP and parent.endswith("self_attn") else name


def _tensors(name: str, found: Tensors) -> Tensors:
    """One module's, by PEFT's names."""
    halves = ("lora_A", "lora_B") if {"lora_A", "lora_B"} & found.keys() else ("lora_down", "lora_up")
    check_pair(name, found, halves)
    A, B = (found[half] for half in halves)
    tensors = {LINEAR[0]: A, LINEAR[1]: B}
    if f"{halves[1]}.bias" in found:
        tensors[BIAS] = found[f"{halves[1]}.bias"]
    if "dora_scale" in found:
        lengths, N = found["dora_scale"], B.shape[0]
        if tuple(lengths.shape) != (N, *(1,) * (A.dim() - 1)):
            each = "a length for each column of the weight" if lengths.shape[:1] == (1,) else "no length for each row"
            expected = f"{[N, *(1,) * (A.dim() - 1)]}, as LyCORIS has with wd_on_output"
            raise AdapterFileError(f"{name}.dora_scale is {list(lengths.shape)}, {each}; expected {expected}")
        tensors[MAGNITUDE] = lengths.reshape((1, N, *B.shape[2:]) if B.dim() > 2 else (N,))
    if "lora_magnitude_vector" in found:
        tensors[MAGNITUDE] = found["lora_magnitude_vector"]
    return tensors


def _configurations(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    with as_file_error(f"{path}: {_METADATA} in its header", RecursionError):
        fields = json.loads(metadata.get(_METADATA, "{}"))
    if not isinstance(fields, dict):
        raise AdapterFileError(f"{path}: {_METADATA} in its header is a {type(fields).__name__}; expected an object")
    return fields


def _alpha(name: str, tensor: torch.Tensor) -> float:
    alpha = float(tensor) if tensor.numel() == 1 and not tensor.is_complex() else math.nan
    if not 0 < abs(alpha) <= FLOAT32_MAX:
        found = alpha if tensor.numel() == 1 else list(tensor.shape)
        raise AdapterFileError(f"{name}.alpha is {found}; expected one finite number that is not 0")
    return alpha
