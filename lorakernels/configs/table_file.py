"""Tuning tables as files: where they lie, how they are read and written, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import Device
from lorakernels.configs.heuristic import MULTI_OPERATIONS, OPERATIONS, next_power_of_two

FORMAT = 1
CACHE = "LORAKERNELS_CACHE"
SHIPPED = Path(__file__).resolve().parent / "tables"
# A thousand shapes take about one.
_MAX_MEGABYTES = 16
_SIZES = ("M", "N", "K", "r", "itemsize", "slots")
_OPERATIONS = (*OPERATIONS, *MULTI_OPERATIONS)


class Key(NamedTuple):
    """What must be the same for an entry to count: all but M and the slots, of which the nearest will do."""

    operation: str
    N: int
    K: int
    rank_class: int
    itemsize: int


def key_of(operation: str, N: int, K: int, r: int, itemsize: int) -> Key:
    """Ranks that are padded to the same BLOCK_R share a class."""
    return Key(operation, N, K, max(next_power_of_two(r), 16), itemsize)


@dataclass(frozen=True)
class Entry:
    """One tuned launch. `measured` is for people: nothing reads it back but `lorakernels tune --resume`.

    `slots` is 1 but where a batch has many adapters.
    """

    operation: str
    M: int
    N: int
    K: int
    r: int
    itemsize: int
    config: KernelConfig
    measured: Mapping[str, Any] = field(default_factory=dict, compare=False)
    slots: int = 1

    @property
    def key(self) -> Key:
        return key_of(self.operation, self.N, self.K, self.r, self.itemsize)

    def __str__(self) -> str:
        slots = "" if self.slots == 1 else f" slots={self.slots}"
        return f"entry M={self.M} N={self.N} K={self.K} r={self.r}{slots}"

    def to_fields(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_fields(cls, fields: Any) -> Entry:
        """Raises ValueError naming what is wrong."""
        if not isinstance(fields, dict):
            raise ValueError(f"an entry is {type(fields).__name__}; expected an object")
        if unknown := sorted(fields.keys() - {field.name for field in dataclasses.fields(cls)}):
            raise ValueError(f"an entry has a field {unknown[0]!r}, which this version does not know")
        fields = {"operation": None, "config": None, "measured": {}, "slots": 1} | fields
        if fields["operation"] not in _OPERATIONS:
            raise ValueError(f"operation is {fields['operation']!r}; expected one of {', '.join(_OPERATIONS)}")
        for name in _SIZES:
            value = fields.get(name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a number of at least 1")
        if not isinstance(fields["measured"], dict):
            raise ValueError(f"measured is {type(fields['measured']).__name__}; expected an object")
        return cls(**fields | {"config": KernelConfig.from_fields(fields["config"])})


@dataclass
class Table:
    """The tuned launches of one device. `name` is what `explain` calls it."""

    name: str
    device: str
    arch: str
    entries: list[Entry] = field(default_factory=list)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_key: dict[Key, list[Entry]] = {}
        for entry in self.entries:
            self._by_key.setdefault(entry.key, []).append(entry)

    def nearest(self, key: Key, M: int, slots: int = 1) -> list[Entry]:
        """The entries of this key, the one with the nearest M and slots first: nearest by ratio."""

        def distance(entry: Entry) -> float:
            return abs(math.log(entry.M / max(M, 1))) + abs(math.log(entry.slots / slots))

        return sorted(self._by_key.get(key, ()), key=distance)

    def put(self, entry: Entry) -> None:
        """Add the entry, in place of one for the same launch."""
        same = [e for e in self._by_key.get(entry.key, ()) if (e.M, e.slots) == (entry.M, entry.slots)]
        self.entries = [e for e in self.entries if e not in same] + [entry]
        self.__post_init__()


def cache_folder() -> Path:
    """The user's cache: LORAKERNELS_CACHE, or where the platform keeps caches."""
    if named := os.environ.get(CACHE):
        return Path(named).expanduser()
    folders = {"win32": ("LOCALAPPDATA", "~/AppData/Local"), "darwin": ("", "~/Library/Caches")}
    variable, default = folders.get(sys.platform, ("XDG_CACHE_HOME", "~/.cache"))
    return Path(os.environ.get(variable) or default).expanduser() / "lorakernels"


def user_path(device: Device) -> Path:
    return cache_folder() / "tuning" / f"{device.slug}.json"


def shipped_path(device: Device) -> Path:
    return SHIPPED / f"{device.slug}.json"


def read_table(path: Path, name: str | None = None) -> tuple[Table, list[str]]:
    """The table in a file, and what is wrong with those of its entries that were left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a table of this format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no tuning table at {path}")
    size = path.stat().st_size
    if size > _MAX_MEGABYTES << 20:
        raise ValueError(f"{path} has {size} bytes; expected a tuning table, of at most {_MAX_MEGABYTES} MiB")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected a tuning table, an object")
    if content.get("format") != FORMAT or type(content["format"]) is not int:
        raise ValueError(f"{path} has format {content.get('format')!r}; this version reads format {FORMAT}")
    for text in ("device", "arch"):
        if not isinstance(content.get(text), str):
            raise ValueError(f"{path} has {text} {content.get(text)!r}; expected a name")
    if not isinstance(content.get("entries"), list):
        raise ValueError(f"{path} has entries of {type(content.get('entries')).__name__}; expected a list")
    entries, problems = [], []
    for index, fields in enumerate(content["entries"]):
        try:
            entries.append(Entry.from_fields(fields))
        except ValueError as error:
            problems.append(f"entry {index}: {error}")
    versions = {name: str(content[name]) for name in ("triton", "torch") if name in content}
    return Table(name or f"table {path}", content["device"], content["arch"], entries, versions), problems


def write_table(path: Path, table: Table) -> None:
    """Write the table whole or not at all: another process sees the old file or the new one."""
    content = {
        "format": FORMAT,
        "device": table.device,
        "arch": table.arch,
        **table.versions,
        "entries": [entry.to_fields() for entry in table.entries],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
