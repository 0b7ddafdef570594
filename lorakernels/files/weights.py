"""Safetensors files, read a tensor at a time. They are never mapped: of a file that is cut short meanwhile a mapping
ends the process, and of one that is overwritten it gives a half of each."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from lorakernels.files.reading import AdapterFileError, Tensors, as_file_error, open_file

MAX_HEADER = 100_000_000  # safetensors' own
# The format's names of the dtypes that torch has (https://github.com/huggingface/safetensors#format).
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


class Entry(NamedTuple):
    """A tensor in a file: its dtype in safetensors' words, its shape, and where its bytes are behind the header."""

    dtype: str
    shape: torch.Size
    begin: int
    end: int


class Weights:
    """An open safetensors file, its header checked: `entries` in the order of their names, and `metadata`.

    Raises AdapterFileError where the file is none, and where it has changed since it was opened, or was `opened_as`.
    """

    def __init__(self, path: Path, file: BinaryIO, opened_as: tuple[int, ...] | None = None) -> None:
        self.path, self.file, self.stamp = path, file, stamp_of(file.fileno())
        if opened_as is not None:
            self._check_is(opened_as)
        with as_file_error(f"{path} is not a whole safetensors file", RecursionError):
            header = self._header()
            self.metadata = _texts(header.pop("__metadata__", {}))
            self.entries = {name: _entry(name, fields) for name, fields in sorted(header.items())}
            begin = 0
            for name, entry in sorted(self.entries.items(), key=lambda item: item[1][2:]):
                if entry.begin != begin:
                    raise ValueError(f"{name} begins at {entry.begin:,}; expected {begin:,}, where the one before ends")
                begin = entry.end
            if self.begin + begin != self.size:
                raise ValueError(f"it has {self.size:,} bytes; expected {self.begin + begin:,}, as its header says")

    @property
    def size(self) -> int:
        return self.stamp[0]

    def read(self, name: str) -> torch.Tensor:
        """A tensor, in memory of its own."""
        dtype, shape, begin, end = self.entries[name]
        if dtype not in TYPES:
            raise AdapterFileError(f"{self.path}: {name} is {dtype}, which is not read; expected {', '.join(TYPES)}")
        data = torch.empty(end - begin, dtype=torch.uint8)
        self.file.seek(self.begin + begin)
        with as_file_error(f"{self.path} cannot be read", OSError):
            number = self.file.readinto(data.numpy()) if end > begin else 0  # type: ignore[attr-defined]
        self._check_is(self.stamp)
        if number != end - begin:
            raise AdapterFileError(f"{self.path} ends in the middle of {name}")
        return data.view(TYPES[dtype]).view(shape)

    def _header(self) -> dict[str, Any]:
        start = self.file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else self.size
        self.begin = 8 + length
        if self.begin > self.size or length > MAX_HEADER:
            raise ValueError(f"it has {self.size:,} bytes, and its header would have {length:,}")
        header = json.loads(self.file.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"its header is a {type(header).__name__}; expected an object of tensors")
        return header

    def _check_is(self, stamp: tuple[int, ...]) -> None:
        if stamp_of(self.file.fileno()) != stamp:
            raise AdapterFileError(f"{self.path} has changed while it was read; try again when nobody writes it")


def stamp_of(file: int | Path) -> tuple[int, ...]:
    """What changes with a file: its size, times and inode. Copies that keep the time have another inode or ctime."""
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


@contextmanager
def open_weights(path: Path, opened_as: tuple[int, ...] | None = None) -> Iterator[Weights]:
    """A safetensors file, closed at the end of the block."""
    with open_file(path) as file:
        yield Weights(path, file, opened_as)


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Every tensor of a safetensors file, and its metadata."""
    with open_weights(path) as file:
        if file.size > _memory():
            raise AdapterFileError(f"{path} has {file.size:,} bytes, and this machine a memory of {_memory():,}")
        return {name: file.read(name) for name in file.entries}, file.metadata


def _memory() -> int:
    """The machine's, or no bound where it does not say."""
    names = getattr(os, "sysconf_names", {})
    known = "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 1 << 62


def _texts(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, Mapping) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is no object of texts")
    return dict(metadata)


def _entry(name: str, fields: Any) -> Entry:
    if not isinstance(fields, Mapping) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has no dtype, shape and data_offsets alone")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    whole = all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
    if not isinstance(dtype, str) or not whole or len(offsets) != 2:
        raise ValueError(f"{name} has dtype={dtype!r}, shape={shape!r}, data_offsets={offsets!r}")
    begin, end = offsets
    if begin > end or (dtype in TYPES and end - begin != math.prod(shape) * TYPES[dtype].itemsize):
        raise ValueError(f"{name} is {dtype} {shape}, and has {end - begin:,} bytes")
    return Entry(dtype, torch.Size(shape), begin, end)
