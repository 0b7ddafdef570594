"""How files are opened, and JSON is read; what is said of a file that cannot be used. Nothing is ever unpickled."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lorakernels.printable import printable

# Bigger than any real JSON of an adapter or of a model's index by far; a file past it is not read.
MAX_BYTES = 16 << 20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".npz")
_OF_THE_MACHINE = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC)
MEND_A_PICKLE = (
    "a pickle can run any code and is not read; convert it with safetensors.torch.save_file where you trust it"
)

Tensors = dict[str, torch.Tensor]


class AdapterFileError(ValueError):
    """An adapter's files cannot be used: says which, what is in them and what is expected.

    What is quoted of a file cannot do anything to a terminal.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A regular file, to read; of a pipe, a device or a folder it is said at once that it is none."""
    _check_is_file(path)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # it may be a pipe by now
    with as_file_error(path, OSError):
        handle = os.open(path, flags)
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise AdapterFileError(_not_regular(path))
        yield file


def _not_regular(path: Path) -> str:
    return f"{path} is not a regular file, or a link to none; expected a file to read"


def read_json(path: Path) -> dict[str, Any]:
    """The object of fields in a JSON file."""
    # ValueError: JSON, UTF-8, a number of 5000 digits.
    with open_file(path) as file, as_file_error(f"{path} cannot be read as JSON", OSError, RecursionError):
        text = file.read(MAX_BYTES + 1) or b""
        if len(text) > MAX_BYTES:
            raise AdapterFileError(f"{path} has more than {MAX_BYTES:,} bytes; expected at most that")
        fields = json.loads(text.decode())
    if not isinstance(fields, dict):
        raise AdapterFileError(f"{path} holds a {type(fields).__name__}; expected an object of fields")
    return fields


def write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


@contextmanager
def as_file_error(source: object, *others: type[Exception]) -> Iterator[None]:
    """What the body finds wrong is wrong with a file: an AdapterFileError that begins with `source`.

    What is wrong with the machine, no memory or no handles left, stays what it is.
    """
    kinds: tuple[type[Exception], ...] = (TypeError, ValueError, OverflowError, *others)
    try:
        yield
    except (AdapterFileError, MemoryError, torch.OutOfMemoryError):
        raise
    except kinds as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            raise
        raise AdapterFileError(f"{source}: {error}") from error


def _check_is_file(path: Path) -> None:
    """Say what there is instead of a file, a pickle above all; of a pipe or a device, that it is one."""
    if path.is_file():
        return
    folder = path.parent
    if not folder.is_dir():
        raise AdapterFileError(f"{folder} is not a folder; expected one with {path.name}")
    here = sorted(os.listdir(folder))
    if path.name in here:
        raise AdapterFileError(_not_regular(path))
    mend = mend_of_pickles(here) if path.suffix == ".safetensors" else ""
    raise AdapterFileError(f"{folder} has no {path.name}; it has: {', '.join(here[:10]) or 'nothing'}{mend}")


def mend_of_pickles(names: Iterable[str]) -> str:
    """What to say of the pickles among these files; nothing where there are none."""
    pickles = [name for name in names if name.endswith(PICKLES)]
    return f"; of {', '.join(pickles[:3])}: {MEND_A_PICKLE}" if pickles else ""


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise AdapterFileError where a tensor of floats holds NaN or Inf."""
    ends = _ends(tensor)
    if ends is not None and not torch.isfinite(ends).all():
        raise AdapterFileError(f"{name} holds NaN or Inf")


def check_fits(name: str, tensor: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Raise AdapterFileError where a number, times `factor`, would be infinite in the model's dtype."""
    ends = _ends(tensor)
    if ends is not None and not torch.isfinite((ends := ends * factor).to(dtype)).all():
        times = "" if factor == 1 else f", times the scaling {factor:g},"
        found = f"{name} has numbers of up to {float(ends.abs().max()):g}{times} which the model's {dtype} cannot hold"
        raise AdapterFileError(f"{found}; expected at most {torch.finfo(dtype).max:g}: use a model in a wider dtype")


def _ends(tensor: torch.Tensor) -> torch.Tensor | None:
    """The least and the greatest of floats, in float64, both NaN if one is: half the time of `isfinite().all()`."""
    if not tensor.numel() or not tensor.is_floating_point():
        return None
    return torch.stack((tensor if tensor.element_size() > 1 else tensor.float()).aminmax()).double()
