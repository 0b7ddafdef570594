"""The books of a store: which version each name means, who refers to it, and where it is. All under one lock."""

from __future__ import annotations

import difflib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

from torch import nn

from lorakernels.adapters.folder import Source
from lorakernels.nn.whole import Lock
from lorakernels.plan import BASE
from lorakernels.serving.errors import CapacityError, StaleBatchError
from lorakernels.serving.pools import Pool, Site
from lorakernels.serving.served import Routing
from lorakernels.serving.sources import Parts, Rows


class Version:
    """One loading of an adapter. It never changes, and its pages are its own until nobody refers to it."""

    def __init__(self, name: str, number: int, source: Source | None, parts: Parts, sites: Sequence[Site]) -> None:
        self.name, self.number, self.source, self.parts = name, number, source, parts
        self.sites = sites
        self.nbytes = sum(part.rank * pool.page_bytes for pool, part in parts.items())
        self.rows: Rows | None = None  # in main memory, while they are kept there
        self.pages: dict[Pool, tuple[int, ...]] = {}  # on the device; empty while it is not there
        self.written: dict[Any, Any] = {}  # by writer, what a reader waits for
        self.refs = 0
        self.pinned = False
        self.retired = False  # another version has its name, or none has: gone with the last reference

    @property
    def stays(self) -> bool:
        """Whether it may not leave the device."""
        return self.refs > 0 or (self.pinned and not self.retired)

    def routing(self) -> Routing:
        return {pool: (pages, self.parts[pool].scaling) for pool, pages in self.pages.items()}

    def enter(self, rows: Rows) -> None:
        """Take pages on the device, which must be free, and write them."""
        try:
            common = sorted(set.intersection(*(set(pool.free) for pool in self.parts))) if self.parts else ()
            for pool, part in self.parts.items():
                self.pages[pool] = pool.take(part.rank, common)
                pool.write(self.pages[pool], rows[pool])
            self.written = {pool.writer: pool.writer.written() for pool in self.parts}
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Give the pages back, zeroed; one that is not on the device is let be."""
        with ExitStack() as stack:  # all of them, where an interrupt comes between
            taken, self.pages = self.pages, {}
            for pool, pages in taken.items():
                stack.callback(pool.give_back, pages)


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
    """The versions, and where they are, the least recently used to leave first; and counts.

    On the device lie `max_adapters` at most, and as many rank rows of each class as its pool has. Main memory keeps
    packed rows of at most `host_bytes`: what leaves it is read again, without the lock, and what came without a folder
    never leaves it.
    """

    def __init__(self, max_adapters: int, host_bytes: int, read: Callable[..., tuple[Any, Parts, Rows]]) -> None:
        self.max_adapters, self.host_bytes, self.read = max_adapters, host_bytes, read
        self.lock = Lock()
        self.current: dict[str, Version] = {}
        # What has a name or is in use, the least recently used first.
        self.versions: OrderedDict[Version, None] = OrderedDict()
        # Of the sites that a version has reached those that no batch has called, by their parents as they were then. In
        # a model of which a part never runs, such as a tower for pictures, there are always some.
        self.uncalled: dict[nn.Module, set[Site]] = {}
        self.closed = False
        self.hits = self.misses = self.reads = self.loads = self.evictions = 0
        self.load_seconds = 0.0

    @property
    def on_device(self) -> list[Version]:
        return [version for version in self.versions if version.pages]

    @property
    def in_host(self) -> list[Version]:
        return [version for version in self.versions if version.rows is not None]

    @property
    def in_use(self) -> list[Version]:
        return [version for version in self.versions if version.refs]

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
        self._check_can_stay(version, freed)
        try:
            if old is not None:
                old.retired = True  # pinned or not, it may leave for the new one
            self.versions[version] = None
            try:
                self._place({version: rows})
            except CapacityError:
                if version.pinned:
                    raise
            self._keep(version, rows, freed)
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

    def reach(self, reached: Mapping[Site, nn.Module]) -> None:
        """Look for the sites of an adapter, which have these parents."""
        for site, parent in reached.items():
            if not site.is_seen:
                self.uncalled.setdefault(parent, set()).add(site)

    def forget_called(self, called: set[Site]) -> None:
        for site in called:
            site.is_seen = True
        if called:
            left = {parent: sites - called for parent, sites in self.uncalled.items()}
            self.uncalled = {parent: sites for parent, sites in left.items() if sites}

    def forget(self, name: str) -> None:
        version = self.find(name)
        del self.current[name]
        self._retire(version)

    def fetch(self, name: str) -> None:
        """Bring an adapter to the device and hold nothing: a hint takes no room that a batch wants meanwhile."""
        with self.lock:
            version = self.find(name)
        self._bring([version])

    def hold(self, wanted: Sequence[str | Lease | None], held: list[Version]) -> list[int]:
        """Bring the versions that names and leases mean to the device, each referred to once more: which of them each
        of `wanted` is. They come into `held` as they are counted, for the caller to release whatever is raised."""
        with self.lock:
            self.check_open()
            meant = [self._meant(one) for one in wanted]
            versions = [version for version in dict.fromkeys(meant) if version is not None]
            slot_of: dict[Version | None, int] = {version: slot for slot, version in enumerate(versions)}
            slots = [slot_of.get(version, BASE) for version in meant]
            for version in versions:
                version.refs += 1
                held.append(version)
            on_device = sum(bool(version.pages) for version in versions)
            self.hits += on_device
            self.misses += len(versions) - on_device
        self._bring(versions)
        return slots

    def release(self, versions: Iterable[Version]) -> None:
        with self.lock, ExitStack() as stack:  # all of them, where one cannot be dropped
            for version in versions:
                stack.callback(self._release, version)

    def _release(self, version: Version) -> None:
        version.refs -= 1
        if not version.refs and version.retired:
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
                    self.versions.move_to_end(version)
                elif version.rows is not None:
                    rows[version] = version.rows
            unread = [version for version in versions if not version.pages and version not in rows]
        for version in unread:
            assert version.source is not None, "what has no source stays in main memory"
            *_, rows[version] = self.read(version.source)
        if not rows:
            return
        with self.lock:
            # Another thread may have brought one meanwhile, or taken the name from one that nobody holds.
            missing = {v: own for v, own in rows.items() if not v.pages and v in self.versions}
            self._place(missing)
            for version, own in missing.items():
                self.versions.move_to_end(version)
                self._keep(version, own)
            self.count_load(start, len(unread))

    def _place(self, rows: Mapping[Version, Rows]) -> None:
        """Bring adapters to the device, all or none; others that may leave do so for them.

        Where it fails the pools it made go, and those that left for it come back if they are in main memory.

        Raises CapacityError where those that stay hold the room, before anything changes.
        """
        leaving = self._leaving(list(rows))
        made = {pool for version in rows for pool in version.parts if pool.memory is None}
        try:
            for pool in made:
                pool.make()  # where memory may run out: before anyone leaves
            for version in leaving:
                version.leave()
            for version, own in rows.items():
                version.enter(own)
        except BaseException:
            for version in rows:
                version.leave()
            for pool in made:
                pool.drop()
            for version in leaving:
                if version.rows is not None and not version.pages:
                    with suppress(Exception):
                        version.enter(version.rows)
            raise
        self.evictions += len(leaving)

    def _leaving(self, new: Sequence[Version]) -> list[Version]:
        here = self.on_device
        slots = len(here) + len(new) - self.max_adapters
        short: dict[Pool, int] = {}
        for version in new:
            for pool, part in version.parts.items():
                short[pool] = short.get(pool, -len(pool.free)) + part.rank
        leaving: list[Version] = []
        for version in sorted(here, key=lambda version: not version.retired):  # those replaced before others
            lacking = {pool for pool, number in short.items() if number > 0}
            if slots <= 0 and not lacking:
                break
            # One more slot, or pages of a class that lacks them: who has neither to give stays.
            if not version.stays and (slots > 0 or lacking & version.pages.keys()):
                leaving.append(version)
                slots -= 1
                for pool, pages in version.pages.items():
                    short[pool] = short.get(pool, 0) - len(pages)
        what = [f"{slots} of {self.max_adapters} slots"] if slots > 0 else []
        what += [
            f"{number} of {pool.num_pages} pages for {pool.name!r}" for pool, number in short.items() if number > 0
        ]
        if what:
            pinned = sorted({version.name for version in here if version.pinned and not version.retired})
            in_use = sorted({version.name for version in here if version.refs})
            raise CapacityError(
                f"no room on the device for {', '.join(repr(version.name) for version in new)}, which would need "
                f"{' and '.join(what)} more; pinned: {', '.join(pinned) or 'none'}; in use: "
                f"{', '.join(in_use) or 'none'}. unpin one, wait for a batch to end, or make the store with a larger "
                "max_adapters or num_pages",
                pinned,
                in_use,
            )
        return leaving

    def _check_can_stay(self, version: Version, freed: Version | None) -> None:
        """Raise CapacityError where an adapter that main memory must keep does not fit it, once `freed` has left."""
        fixed = sum(other.nbytes for other in self.versions if other.source is None and other is not freed)
        if version.source is None and fixed + version.nbytes > self.host_bytes:
            raise CapacityError(
                f"adapter {version.name!r} of {version.nbytes:,} bytes came as tensors, which have no folder to be "
                f"read from again, so it must stay in main memory, where {fixed:,} of host_bytes={self.host_bytes:,} "
                "are taken by others like it; raise host_bytes, or save it and load the folder"
            )

    def _keep(self, version: Version, rows: Rows, freed: Version | None = None) -> None:
        """Keep rows in main memory, if they fit once `freed` has left; the least recently used leave for them."""
        if version.rows is not None:
            return
        others = [other for other in self.in_host if other is not freed]
        room = self.host_bytes - version.nbytes - sum(other.nbytes for other in others)
        leaving = []
        for other in others:
            if room < 0 and other.source is not None:
                leaving.append(other)
                room += other.nbytes
        if room >= 0:
            version.rows = rows  # before any leave: an interrupt may come between
            for other in leaving:
                other.rows = None

    def _retire(self, version: Version) -> None:
        version.retired = True
        if not version.refs:
            self._drop(version)

    def _drop(self, version: Version) -> None:
        try:
            version.leave()
        finally:
            version.rows = None
            self.versions.pop(version, None)
