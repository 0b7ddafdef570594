"""The numbers of a store."""

from __future__ import annotations

from dataclasses import dataclass


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
