"""The numbers of a store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lorakernels.serving.books import Books
from lorakernels.serving.pools import Pool


@dataclass(frozen=True)
class StoreStats:
    """What a store holds and has done."""

    adapters: int  # with a name
    on_device: int
    in_host: int  # in main memory
    pinned: int  # of those on the device
    in_use: int  # by a batch or a lease
    hits: int  # adapters of batches and leases that were on the device already
    misses: int  # those that had to be brought there
    reads: int  # how often an adapter's files were read
    evictions: int  # how many left the device to make room
    loads: int  # how often adapters were loaded or brought to the device
    load_seconds: float  # the host's time for that
    device_bytes: int  # of the pools, whether pages are taken or not
    used_bytes: int  # of the pages taken
    padded_bytes: int  # what the adapters on the device would take, were each padded to max_rank
    host_bytes: int  # of the adapters in main memory


def collect(books: Books, pools: Iterable[Pool], max_rank: int) -> StoreStats:
    with books.lock:
        on_device, in_host = books.on_device, books.in_host
        made = [pool for pool in pools if pool.memory is not None]
        return StoreStats(
            adapters=len(books.current),
            on_device=len(on_device),
            in_host=len(in_host),
            pinned=sum(version.pinned and not version.retired for version in on_device),
            in_use=len(books.in_use),
            hits=books.hits,
            misses=books.misses,
            reads=books.reads,
            evictions=books.evictions,
            loads=books.loads,
            load_seconds=books.load_seconds,
            device_bytes=sum(pool.num_pages * pool.page_bytes for pool in made),
            used_bytes=sum((pool.num_pages - len(pool.free)) * pool.page_bytes for pool in made),
            padded_bytes=sum(max_rank * pool.page_bytes for version in on_device for pool in version.parts),
            host_bytes=sum(version.nbytes for version in in_host),
        )
