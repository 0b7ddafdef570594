"""Files that appear whole, whoever else saves to the same place, and whatever ends the process in the middle."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lorakernels.files.reading import AdapterFileError
from lorakernels.files.weights import stamp_of

try:
    import fcntl
except ImportError:  # Windows: savers to one folder must not meet there
    fcntl = None  # type: ignore[assignment]

Write = Callable[[Path], None]
_PARTIAL = re.compile(r"\..*\.partial-\d+-[0-9a-f]{8}")


def save_together(folder: Path, first: tuple[str, Write], second: tuple[str, Write]) -> None:
    """Write two files of `folder`, which keeps its others: `read_together` finds both as they were, or both new.

    A folder that is not there yet appears with both, by one rename. In one that is there, the second lies beside, under
    a name with the digest of the first, until both have been renamed: so it is found whenever the process ends.
    """
    if not os.path.lexists(folder):
        try:
            with appearing(folder) as beside:
                for name, write in (first, second):
                    write(beside / name)
            return
        except OSError as error:  # another has made it meanwhile
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    with locked(folder):
        partial = folder / f".{first[0]}.partial"  # safetensors has files of its own there while it writes
        try:
            _settle(folder, first[0], second[0])
            partial.mkdir()
            for name, write in (first, second):
                write(partial / name)
                _sync(partial / name)
            beside = folder / f".{second[0]}.{_digest(partial / first[0])}"
            os.replace(partial / second[0], beside)
            os.replace(partial / first[0], folder / first[0])
            _sync(folder)
            os.replace(beside, folder / second[0])
            _sync(folder)
        finally:
            _settle(folder, first[0], second[0])


def read_together(folder: Path, first: str, second: str, read: Callable[[Path, Path], object]) -> None:
    """Call `read` with the paths of two files of `folder` that were saved together; again where they change meanwhile.

    Raises AdapterFileError where they go on changing, and what `read` raises.
    """

    def stamps() -> list[tuple[int, ...] | None]:
        found: list[tuple[int, ...] | None] = [None, None]
        for i, name in enumerate((first, second)):
            with suppress(OSError):
                found[i] = stamp_of(folder / name)
        return found

    for attempt in range(3):
        with locked(folder, attempt > 0):
            before = stamps()
            try:
                read(folder / first, _second_of(folder, first, second))
            except (AdapterFileError, OSError):
                if stamps() == before:
                    raise
            else:
                if stamps() == before:
                    return
    raise AdapterFileError(f"the files in {folder} change again and again; read it when nobody writes them")


def _second_of(folder: Path, first: str, second: str) -> Path:
    """The second file as it belongs to the first: where it is, or where a save that was ended has left it."""
    left = [path for path in _left(folder, second) if not path.is_symlink()]
    digest = _digest(folder / first) if left and (folder / first).is_file() else ""
    return next((path for path in left if digest and path.name.endswith(digest)), folder / second)


def _settle(folder: Path, first: str, second: str) -> None:
    """Finish what a save has begun, where its first file is in place; otherwise take it away."""
    meant = _second_of(folder, first, second)
    if meant.name != second:
        os.replace(meant, folder / second)
        _sync(folder)
    for path in _left(folder, second):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / f".{first}.partial", ignore_errors=True)


def _left(folder: Path, second: str) -> list[Path]:
    beginning = f".{second}."
    with suppress(OSError), os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(beginning)]
        return [folder / name for name in names if re.fullmatch("[0-9a-f]{64}", name.removeprefix(beginning))]
    return []


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` at the end, or disappears with an error: `out` is whole or not there.

    What others that were killed have left beside it is taken away. Raises OSError where there is an `out` by then
    that holds something.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in [path for path in out.parent.iterdir() if _PARTIAL.fullmatch(path.name)]:
        with suppress(OSError), locked(abandoned, wait=False):
            shutil.rmtree(abandoned, ignore_errors=True)
    while True:
        partial = out.parent / f".{out.name[:100]}.partial-{os.getpid()}-{secrets.token_hex(4)}"
        partial.mkdir()
        with ExitStack() as held:
            with suppress(FileNotFoundError):
                held.enter_context(locked(partial))
            if not partial.exists():  # another has taken it for abandoned before it was locked, or even opened
                continue
            try:
                yield partial
                for path in (*partial.rglob("*"), partial):
                    _sync(path)
                if os.name == "nt" and out.exists():  # elsewhere an empty folder is replaced
                    out.rmdir()
                os.rename(partial, out)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        _sync(out.parent)
        return


def new_folder(out: str | os.PathLike[str], sources: Sequence[Path] = ()) -> Path:
    """The path of a folder that is to be a new one.

    Raises AdapterFileError where `out` is one of `sources` or the current folder, or exists and is not an empty one.
    """
    out = Path(out).resolve()  # "." and ".." have no name and no parent of their own
    if any(out == source.resolve() for source in sources):
        raise AdapterFileError(f"{out} is what is read; expected another folder to write to")
    if out == Path.cwd():
        raise AdapterFileError(f"{out} is the current folder, which cannot be replaced; expected a new one")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise AdapterFileError(f"{out} exists and is not an empty folder; expected a new one, or remove it first")
    return out


@contextmanager
def locked(folder: Path, needed: bool = True, wait: bool = True) -> Iterator[None]:
    """Alone in `folder` of all threads and processes that lock it; the end of the process, a kill too, lets it go.

    Without `wait` raises OSError where another is there. Where the file system has no locks nobody waits for anybody.
    """
    if fcntl is None or not needed:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not wait:
                raise
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # of a process that was forked meanwhile too
    finally:
        os.close(handle)


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file as PEFT writes it. Raises OSError where it cannot be written, such as to a full disk."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _sync(path: Path) -> None:
    """Onto the disk itself, lest the end of power leave the name without the numbers."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that do not do it for folders
            raise
    finally:
        os.close(handle)
