"""The two ways in which files are read here: JSON and safetensors. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
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
    # ValueError: JSON, UTF-8, a number of 5000 digits.
    with as_file_error(f"{path} cannot be read as JSON", OSError, RecursionError):
        if path.stat().st_size > MAX_BYTES:
            raise AdapterFileError(f"{path} has {path.stat().st_size:,} bytes; expected at most {MAX_BYTES:,}")
        fields = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise AdapterFileError(f"{path} holds a {type(fields).__name__}; expected an object of fields")
    return fields


def write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


@contextmanager
def as_file_error(source: object, *others: type[Exception]) -> Iterator[None]:
    """What the body finds wrong is wrong with a file: an AdapterFileError that begins with `source`."""
    kinds: tuple[type[Exception], ...] = (TypeError, ValueError, OverflowError, *others)
    try:
        yield
    except AdapterFileError:
        raise
    except kinds as error:
        raise AdapterFileError(f"{source}: {error}") from error


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """A safetensors file; what goes wrong in it, in the body too, is an AdapterFileError."""
    _check_is_file(path)
    with (
        as_file_error(f"{path} is not a whole safetensors file", SafetensorError, OSError),
        safe_open(path, framework="pt") as file,
    ):
        yield file


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
    mend = mend_of_pickles(here) if path.suffix == ".safetensors" else ""
    raise AdapterFileError(f"{folder} has no {path.name}; it has: {', '.join(here[:10]) or 'nothing'}{mend}")


def mend_of_pickles(names: Iterable[str]) -> str:
    """What to say of the pickles among these files; nothing where there are none."""
    pickles = [name for name in names if name.endswith(PICKLES)]
    return f"; of {', '.join(pickles[:3])}: {MEND_A_PICKLE}" if pickles else ""


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise AdapterFileError where a tensor of floats holds NaN or Inf."""
    # An 8-bit float has no isfinite.
    if not torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all():
        raise AdapterFileError(f"{name} holds NaN or Inf")
