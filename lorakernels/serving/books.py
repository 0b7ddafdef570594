"""The books of a store: which version each name means, who refers to it, and where it is. All under one lock."""

from __future__ import annotations

import difflib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from lorakernels.serving.errors import CapacityError, StaleBatchError
from lorakernels.serving.sources import Rows, Source
from lorakernels.serving.tiers import DeviceTier, HostTier, Version


class Lease:
    """One version of an adapter, held for a request of many batches: `store.batch` takes it in a name's place.

    It stays on the device until `release`, or the end of `with`, whatever is loaded under its name meanwhile.
    """

    def __init__(self, books: Books, held: Version) -> None:
        self.books, self.held, self.released = books, held, False

    @property
    def name(self) -> str:
        return self.held.name

    @property
    def version(self) -> int:
        """Another number for each loading."""
        return self.held.number

    def release(self) -> None:
        """Let it go; a second time does nothing."""
        with self.books.lock:
            released, self.released = self.released, True
            if not released:
                self.books.release([self.held])

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Lease({self.name!r}, version {self.version}{', released' if self.released else ''})"


class Books:
    """Versions by name, the tiers, and counts. `read` reads a version's files again, without the lock."""

    def __init__(self, device: DeviceTier, host: HostTier, read: Callable[[Source], Rows]) -> None:
        self.device, self.host, self._read = device, host, read
        self.lock = threading.RLock()
        self.current: dict[str, Version] = {}
        self.in_use: set[Version] = set()
        self.closed = False
        self.hits = self.misses = self.reads = self.loads = 0
        self.load_seconds = 0.0

    def check_open(self) -> None:
        if self.closed:
            raise RuntimeError("the store is closed; make a new one")

    def find(self, name: str) -> Version:
        self.check_open()
        if not isinstance(name, str):
            raise TypeError(f"name is {name!r}; expected the name of an adapter, as text")
        if name not in self.current:
            near = difflib.get_close_matches(name, self.current, n=3) or list(self.current)[:3]
            raise KeyError(
                f"the store has no adapter {name!r} among {len(self.current)}; near names: {', '.join(near) or 'none'}"
            )
        return self.current[name]

    def add(self, version: Version, rows: Rows) -> None:
        """Let a name mean a new version, on the device where there is room. When it raises nothing has changed.

        Raises CapacityError where it must be on the device, or in main memory, and cannot.
        """
        old = self.current.get(version.name)
        version.pinned = old is not None and old.pinned
        freed = old if old is not None and not old.refs else None  # what leaves main memory for the new one
        self.host.check(version, freed)
        try:
            if old is not None:
                old.retired = True  # pinned or not, it may leave for the new one
            try:
                self.device.place({version: rows})
            except CapacityError:
                if version.pinned:
                    raise
            self.host.keep(version, rows, freed)
            self.current[version.name] = version
        except BaseException:
            if self.current.get(version.name) is not version:
                self._drop(version)
            raise
        finally:
            if old is not None:
                old.retired = False
        if old is not None:
            self._retire(old)

    def forget(self, name: str) -> None:
        self._retire(self.find(name))
        del self.current[name]

    def fetch(self, name: str) -> None:
        """Bring an adapter to the device and hold nothing: a hint takes no room that a batch wants meanwhile."""
        start = time.perf_counter()
        with self.lock:
            version = self.find(name)
            rows, source = version.rows, version.source
            if version.pages:
                self.device.touch(version)
                return
        reads = rows is None
        if rows is None:
            assert source is not None, "what has no source stays in main memory"
            rows = self._read(source)
        with self.lock:
            if self.current.get(name) is version and not version.pages:
                self.device.place({version: rows})
                self.host.keep(version, rows)
                self.count_load(start, reads)

    def hold(self, wanted: Sequence[str | Lease | None]) -> list[Version | None]:
        """The versions that names and leases mean, each referred to once more, and all on the device."""
        counted: list[Version] = []
        try:
            with self.lock:
                self.check_open()
                held = [self._meant(one) for one in wanted]
                versions = [version for version in dict.fromkeys(held) if version is not None]
                for version in versions:
                    version.refs += 1
                    counted.append(version)
                self.in_use.update(versions)
                on_device = sum(bool(version.pages) for version in versions)
                self.hits += on_device
                self.misses += len(versions) - on_device
            self._bring(versions)
        except BaseException:
            self.release(counted)
            raise
        return held

    def release(self, versions: Iterable[Version]) -> None:
        with self.lock:
            for version in versions:
                version.refs -= 1
                if not version.refs:
                    self.in_use.discard(version)
                    if version.retired:
                        self._drop(version)

    def count_load(self, start: float, reads: int) -> None:
        self.loads += 1
        self.reads += reads
        self.load_seconds += time.perf_counter() - start

    def _meant(self, wanted: str | Lease | None) -> Version | None:
        if wanted is None:
            return None
        if isinstance(wanted, str):
            return self.find(wanted)
        if wanted.books is not self:
            raise ValueError(f"{wanted} is of another store")
        if wanted.released:
            raise StaleBatchError(f"{wanted} cannot be used any more: acquire the name again")
        return wanted.held

    def _bring(self, versions: Sequence[Version]) -> None:
        start = time.perf_counter()
        rows: dict[Version, Rows] = {}
        with self.lock:
            for version in versions:
                if version.pages:
                    self.device.touch(version)
                elif version.rows is not None:
                    rows[version] = version.rows
            unread = [version for version in versions if not version.pages and version not in rows]
        for version in unread:
            assert version.source is not None, "what has no source stays in main memory"
            rows[version] = self._read(version.source)
        if not rows:
            return
        with self.lock:
            # Another thread may have brought one meanwhile.
            missing = {version: own for version, own in rows.items() if not version.pages}
            self.device.place(missing)
            for version, own in missing.items():
                self.host.keep(version, own)
            self.count_load(start, len(unread))

    def _retire(self, version: Version) -> None:
        version.retired = True
        if not version.refs:
            self._drop(version)

    def _drop(self, version: Version) -> None:
        self.device.drop(version)
        self.host.drop(version)
