"""The two places where adapters are held, the least recently used to leave first: pages on the device, main memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from lorakernels.serving.errors import CapacityError
from lorakernels.serving.pages import PageClass
from lorakernels.serving.served import Routing
from lorakernels.serving.sources import Parts, Rows, Source


class Version:
    """One loading of an adapter. It never changes, and its pages are its own until nobody refers to it."""

    def __init__(self, name: str, number: int, source: Source | None, parts: Parts) -> None:
        self.name, self.number, self.source, self.parts = name, number, source, parts
        self.rows: Rows | None = None  # in main memory, while the host tier keeps them
        self.pages: dict[PageClass, tuple[int, ...]] = {}  # on the device; empty while it is not there
        self.written: dict[Any, Any] = {}  # by writer, what a reader waits for
        self.refs = 0
        self.pinned = False
        self.retired = False  # another version has its name, or none has: gone with the last reference

    @property
    def nbytes(self) -> int:
        return sum(part.rank * pages.page_bytes for pages, part in self.parts.items())

    @property
    def stays(self) -> bool:
        """Whether it may not leave the device."""
        return self.refs > 0 or (self.pinned and not self.retired)

    def routing(self) -> Routing:
        return {pages: (own, self.parts[pages].scaling) for pages, own in self.pages.items()}


class DeviceTier:
    """Adapters in pages: `max_adapters` of them at most, and as many rank rows of each class as its pool has."""

    def __init__(self, max_adapters: int) -> None:
        self.max_adapters = max_adapters
        self.versions: OrderedDict[Version, None] = OrderedDict()  # the least recently used first
        self.evictions = 0

    def touch(self, version: Version) -> None:
        self.versions.move_to_end(version)

    def place(self, rows: Mapping[Version, Rows]) -> None:
        """Bring adapters here, all or none; others that may leave do so for them.

        Where it fails the pools it made go, and those that left for it come back if they are in main memory.

        Raises CapacityError where those that stay hold the room, before anything changes.
        """
        leaving = self._leaving(list(rows))
        made = {pages for version in rows for pages in version.parts if pages.pool is None}
        try:
            for pages in made:
                pages.make_pool()  # where memory may run out: before anyone leaves
            for version in leaving:
                self.drop(version)
            for version, own in rows.items():
                self._enter(version, own)
        except BaseException:
            for version in rows:
                self.drop(version)
            for pages in made:
                pages.drop_pool()
            for version in leaving:
                if version.rows is not None and not version.pages:
                    with suppress(Exception):
                        self._enter(version, version.rows)
            raise
        self.evictions += len(leaving)

    def _enter(self, version: Version, rows: Rows) -> None:
        try:
            self.versions[version] = None
            for pages, part in version.parts.items():
                version.pages[pages] = pages.take(part.rank)
                pages.write(version.pages[pages], rows[pages])
            version.written = {pages.writer: pages.writer.written() for pages in version.parts}
        except BaseException:
            self.drop(version)
            raise

    def drop(self, version: Version) -> None:
        """Give an adapter's pages back, zeroed; one that is not here is let be."""
        with ExitStack() as stack:  # all of it, where an interrupt comes between
            taken, version.pages = version.pages, {}
            stack.callback(self.versions.pop, version, None)
            for pages, own in taken.items():
                stack.callback(pages.give_back, own)

    def _leaving(self, new: Sequence[Version]) -> list[Version]:
        slots = len(self.versions) + len(new) - self.max_adapters
        short: dict[PageClass, int] = {}
        for version in new:
            for pages, part in version.parts.items():
                short[pages] = short.get(pages, -len(pages.free)) + part.rank
        leaving: list[Version] = []
        for version in sorted(self.versions, key=lambda version: not version.retired):  # those replaced before others
            lacking = {pages for pages, number in short.items() if number > 0}
            if slots <= 0 and not lacking:
                break
            # One more slot, or pages of a class that lacks them: who has neither to give stays.
            if not version.stays and (slots > 0 or lacking & version.pages.keys()):
                leaving.append(version)
                slots -= 1
                for pages, own in version.pages.items():
                    short[pages] = short.get(pages, 0) - len(own)
        lacking = {pages for pages, number in short.items() if number > 0}
        if slots > 0 or lacking:
            self._refuse(new, slots, {pages: short[pages] for pages in lacking})
        return leaving

    def _refuse(self, new: Sequence[Version], slots: int, lacking: Mapping[PageClass, int]) -> None:
        pinned = sorted({version.name for version in self.versions if version.pinned and not version.retired})
        in_use = sorted({version.name for version in self.versions if version.refs})
        what = [f"{slots} of {self.max_adapters} slots"] if slots > 0 else []
        what += [f"{number} of {pages.num_pages} pages for {pages.name!r}" for pages, number in lacking.items()]
        raise CapacityError(
            f"no room on the device for {', '.join(repr(version.name) for version in new)}, which would need "
            f"{' and '.join(what)} more; pinned: {', '.join(pinned) or 'none'}; in use: {', '.join(in_use) or 'none'}. "
            "unpin one, wait for a batch to end, or make the store with a larger max_adapters or num_pages",
            pinned,
            in_use,
        )


class HostTier:
    """Packed adapters in main memory, at most `budget` bytes of them.

    What leaves is read from its folder again. What came without a folder never leaves.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self.versions: OrderedDict[Version, None] = OrderedDict()

    def check(self, version: Version, freed: Version | None) -> None:
        """Raise CapacityError where an adapter that must be kept cannot be, once `freed` has left."""
        fixed = sum(other.nbytes for other in self.versions if other.source is None and other is not freed)
        if version.source is None and fixed + version.nbytes > self.budget:
            raise CapacityError(
                f"adapter {version.name!r} of {version.nbytes:,} bytes came as tensors, which have no folder to be "
                f"read from again, so it must stay in main memory, where {fixed:,} of host_bytes={self.budget:,} are "
                "taken by others like it; raise host_bytes, or save it and load the folder"
            )

    def keep(self, version: Version, rows: Rows, freed: Version | None = None) -> None:
        """Keep an adapter, if it fits once `freed` has been dropped; the least recently used leave for it."""
        if version in self.versions:
            self.versions.move_to_end(version)
            return
        leaving, room = [], self.budget - self.nbytes - version.nbytes
        if freed is not None and freed in self.versions:
            room += freed.nbytes
        for other in self.versions:
            if room >= 0:
                break
            if other.source is not None and other is not freed:
                leaving.append(other)
                room += other.nbytes
        if room < 0:
            return
        version.rows = rows  # before any leave: an interrupt may come between
        self.nbytes += version.nbytes
        self.versions[version] = None
        for other in leaving:
            self.drop(other)

    def drop(self, version: Version) -> None:
        if version in self.versions:
            del self.versions[version]
            self.nbytes -= version.nbytes
            version.rows = None
