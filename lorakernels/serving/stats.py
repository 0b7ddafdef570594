"""The numbers of a store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lorakernels.serving.books import Books
from lorakernels.serving.pages import PageClass


@dataclass(frozen=True)
class StoreStats:
    """What a store holds and has done.

    Attributes:
        adapters, on_device, in_host: how many adapters have a name, lie on the device, lie in main memory.
        pinned, in_use: how many of those on the device are pinned; how many a batch or a lease has.
        hits, misses: adapters of batches and leases that were on the device already, or had to be brought there.
        reads: how often an adapter's files were read.
        evictions: how many left the device to make room.
        loads, load_seconds: how often adapters were loaded or brought to the device, and the host's time for it.
        device_bytes: of the pools, whether pages are taken or not.
        used_bytes: of the pages taken.
        padded_bytes: what the adapters on the device would take, were each padded to max_rank.
        host_bytes: of the adapters in main memory.
    """

    adapters: int
    on_device: int
    in_host: int
    pinned: int
    in_use: int
    hits: int
    misses: int
    reads: int
    evictions: int
    loads: int
    load_seconds: float
    device_bytes: int
    used_bytes: int
    padded_bytes: int
    host_bytes: int


def collect(books: Books, classes: Iterable[PageClass], max_rank: int) -> StoreStats:
    with books.lock:
        on_device = list(books.device.versions)
        pools = [pages for pages in classes if pages.pool is not None]
        return StoreStats(
            adapters=len(books.current),
            on_device=len(on_device),
            in_host=len(books.host.versions),
            pinned=sum(version.pinned and not version.retired for version in on_device),
            in_use=len(books.in_use),
            hits=books.hits,
            misses=books.misses,
            reads=books.reads,
            evictions=books.device.evictions,
            loads=books.loads,
            load_seconds=books.load_seconds,
            device_bytes=sum(pages.num_pages * pages.page_bytes for pages in pools),
            used_bytes=sum((pages.num_pages - len(pages.free)) * pages.page_bytes for pages in pools),
            padded_bytes=sum(max_rank * pages.page_bytes for version in on_device for pages in version.parts),
            host_bytes=books.host.nbytes,
        )
