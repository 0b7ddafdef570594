"""An adapter's folder on the disk: confined to a root, and known again by its files as they were."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lorakernels.files.peft import WEIGHTS_FILE, WEIGHTS_INDEX, files_of
from lorakernels.files.reading import AdapterFileError
from lorakernels.files.update import CONFIG_FILE

FILES = (CONFIG_FILE, WEIGHTS_FILE)
Stamps = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class Source:
    """A folder, and its files as they were when they were first read: size, times and inode of each."""

    folder: Path
    root: Path | None
    stamps: Stamps


def find_source(name: str, folder: str | os.PathLike[str] | None, root: Path | None) -> Source:
    """The source that a name and a folder mean; `root`, where there is one, is already resolved.

    Raises AdapterFileError for a folder outside the root, however it gets there.
    """
    if folder is None:
        if root is None:
            raise ValueError(f"adapter {name!r} has no folder; expected load(name, folder), or a store with root=")
        folder = name
    if "\0" in os.fspath(folder):
        raise AdapterFileError(f"folder {os.fspath(folder)!r} has a NUL in it")
    path = (Path(folder) if root is None else root / folder).resolve()
    check_inside(path, root)
    return Source(path, root, stamps_of(path))


def check_inside(folder: Path, root: Path | None) -> None:
    def check(path: Path) -> None:
        if root is not None and not path.resolve().is_relative_to(root):
            raise AdapterFileError(f"{path} leads out of the root {root}; expected a folder and files in it")

    for path in (folder, *(folder / name for name in (*FILES, WEIGHTS_INDEX))):
        check(path)
    for path in files_of(folder):  # the index is read now that it lies inside
        check(path)


def stamps_of(folder: Path) -> Stamps:
    stamps: list[tuple[int, ...] | None] = []
    for file in files_of(folder):
        try:
            found = file.stat()
            # Copies that keep the time (cp -p, rsync -t) have another inode, or change ctime.
            stamps.append((found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino))
        except OSError:  # the reader says it better
            stamps.append(None)
    return tuple(stamps)
