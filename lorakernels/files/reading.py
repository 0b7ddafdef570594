"""The two ways in which files are read here: JSON and safetensors. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

# Bigger than any real JSON of an adapter or of a model's index by far; a file past it is not read.
MAX_BYTES = 16 << 20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".npz")
MEND_A_PICKLE = (
    "a pickle can run any code and is not read; convert it with safetensors.torch.save_file where you trust it"
)

Tensors = dict[str, torch.Tensor]


class AdapterFileError(ValueError):
    """An adapter's files cannot be used: says which, what is in them and what is expected."""


def read_json(path: Path) -> dict[str, Any]:
    """The object of fields in a JSON file."""
    _check_is_file(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise AdapterFileError(f"{path} has {path.stat().st_size:,} bytes; expected at most {MAX_BYTES:,}")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except AdapterFileError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8, a number of 5000 digits
        raise AdapterFileError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise AdapterFileError(f"{path} holds a {type(fields).__name__}; expected an object of fields")
    return fields


def write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """A safetensors file; what goes wrong in it, in the body too, is an AdapterFileError."""
    _check_is_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise AdapterFileError(f"{path} is not a whole safetensors file: {error}") from error


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Every tensor of a safetensors file, and its metadata."""
    with open_weights(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _check_is_file(path: Path) -> None:
    """Say what there is instead of a file, a pickle above all; of a pipe or a device, that it is one."""
    if path.is_file():
        return
    folder = path.parent
    if not folder.is_dir():
        raise AdapterFileError(f"{folder} is not a folder; expected one with {path.name}")
    here = sorted(os.listdir(folder))
    if path.name in here:
        raise AdapterFileError(f"{path} is not a regular file, or a link to none; expected a file to read")
    pickles = [name for name in here if name.endswith(PICKLES)]
    if pickles and path.suffix == ".safetensors":
        raise AdapterFileError(f"{folder} has {', '.join(pickles[:3])} and no {path.name}: {MEND_A_PICKLE}")
    raise AdapterFileError(f"{folder} has no {path.name}; it has: {', '.join(here[:10]) or 'nothing'}")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise AdapterFileError where a tensor of floats holds NaN or Inf."""
    # An 8-bit float has no isfinite.
    if not torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all():
        raise AdapterFileError(f"{name} holds NaN or Inf")
