"""What is on the device, what is in main memory, and who leaves for whom."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from served_net import ALL, Adapter, Net, alone, books, make_adapter, make_ids, make_net, make_store, write

import lorakernels as lk
from lorakernels.serving.errors import CapacityError


def test_a_thousand_adapters_through_a_store_of_sixty_four(net: Net, base: Net, tmp_path: Path) -> None:
    draw = random.Random(0)
    choices = [ALL, ("q_proj", "up"), ("down",)]
    adapters = {
        f"user-{i}": make_adapter(net, i, r=draw.choice([1, 2, 4, 16, 64]), targets=draw.choice(choices))
        for i in range(1000)
    }
    store = lk.AdapterStore(net, max_adapters=64, max_rank=64, host_bytes=1 << 20, root=tmp_path)
    for name, adapter in adapters.items():
        write(tmp_path / name, adapter)
        store.load(name)
    names = list(adapters)
    draw.shuffle(names)
    for i in range(0, 1000, 10):
        rows: list[str | None] = [*names[i : i + 10], None]
        ids = make_ids(len(rows), 2)
        with store.batch(rows):
            y = net(ids)
        torch.testing.assert_close(y, alone(base, [adapters.get(row or "") for row in rows], ids), rtol=0, atol=1e-9)
    stats = store.stats()
    assert stats.adapters == 1000 and stats.on_device <= 64 and stats.in_use == stats.pinned == 0
    assert stats.hits + stats.misses == 1000 and stats.evictions > 900
    assert 0 < stats.host_bytes <= 1 << 20 and stats.reads > 1500, "main memory is too small for all"
    assert stats.used_bytes == sum(version.nbytes for version in store._books.on_device)
    assert stats.padded_bytes > 2 * stats.used_bytes
    assert stats.load_seconds > 0 and 1000 < stats.loads <= 1000 + stats.misses


def test_pages_neither_leak_nor_fragment(net: Net) -> None:
    draw = random.Random(1)
    adapters = {
        f"user-{i}": make_adapter(net, i, r=draw.choice([1, 3, 8]), targets=draw.choice([ALL, ("up",)]))
        for i in range(24)
    }
    store = make_store(net, adapters, max_adapters=6, num_pages=20)
    device_bytes, leases = store.stats().device_bytes, []
    assert device_bytes == sum(20 * pool.page_bytes for pool in store._pools if pool.memory is not None)
    for i in range(10_000):
        try:
            leases.append(store.acquire(draw.choice(store.names)))
        except CapacityError:
            assert leases
        while len(leases) > draw.randrange(4):
            leases.pop(draw.randrange(len(leases))).release()
        if i % 20 == 0:
            name = draw.choice(store.names)
            if draw.random() < 0.5:
                store.evict(name)
            store.load(name, adapters[name])
        if i % 50 == 0:
            stats, versions = store.stats(), store._books.on_device
            assert stats.used_bytes == sum(version.nbytes for version in versions)
            assert stats.device_bytes == device_bytes and stats.on_device <= 6
            assert stats.in_use == len({(lease.name, lease.version) for lease in leases})
            assert all(
                sorted([*pool.free, *(page for version in versions for page in version.pages.get(pool, ()))])
                == list(range(20))
                for pool in store._pools
            )
    for lease in leases:
        lease.release()
    assert store.stats().evictions > 3000
    for name in store.names:
        store.evict(name)
    stats = store.stats()
    assert (stats.used_bytes, stats.host_bytes, stats.on_device, stats.in_host) == (0, 0, 0, 0)
    assert all(not pool.memory.any() for pool in store._pools if pool.memory is not None), "pages are zeroed"


def test_pages_that_do_not_lie_together(net: Net, base: Net) -> None:
    adapters = {name: make_adapter(net, seed, r=seed) for seed, name in ((2, "first"), (3, "second"), (5, "third"))}
    store, ids = make_store(net, {name: adapters[name] for name in ("first", "second")}), make_ids(2)
    store.evict("first")
    store.load("third", adapters["third"])
    assert (0, 1, 5, 6, 7) in store._books.current["third"].pages.values()
    with store.batch(["second", "third"]):
        expected = alone(base, [adapters["second"], adapters["third"]], ids)
        torch.testing.assert_close(net(ids), expected, rtol=0, atol=1e-10)


def test_what_is_in_use_is_not_replaced(net: Net, base: Net, three: dict[str, Adapter], store: lk.AdapterStore) -> None:
    ids, new = make_ids(1), make_adapter(net, 9, r=5)
    before, after = alone(base, [three["alice"]], ids), alone(base, [new], ids)
    lease = store.acquire("alice")
    with store.batch(["alice"]):
        store.replace("alice", new)
        torch.testing.assert_close(net(ids), before, rtol=0, atol=1e-10)
        with store.batch(["alice"]):
            torch.testing.assert_close(net(ids), after, rtol=0, atol=1e-10)
        store.load("alice", three["bob"])  # a third version
        store.evict("alice")
        assert "alice" not in store.names
        for i in range(6):  # as many as would take every page, were it free
            store.load(f"other-{i}", make_adapter(net, 20 + i, r=8))
        torch.testing.assert_close(net(ids), before, rtol=0, atol=1e-10)
    with store.batch([lease]):
        torch.testing.assert_close(net(ids), before, rtol=0, atol=1e-10)
    held = store.stats().used_bytes
    lease.release()
    lease.release()
    assert store.stats().used_bytes < held and store.stats().in_use == 0
    with pytest.raises(KeyError, match="no adapter 'alice'"), store.batch(["alice"]):
        pass


def test_a_pool_that_is_full(net: Net, three: dict[str, Adapter]) -> None:
    store = make_store(net, three, max_adapters=2)
    store.pin("alice")
    lease = store.acquire("bob")
    before = books(store)
    for use in (lambda: store.acquire("carol"), lambda: store.pin("carol"), lambda: store.batch(["carol"]).__enter__()):
        with pytest.raises(CapacityError, match=r"1 of 2 slots.*pinned: alice; in use: bob") as caught:
            use()
        assert (caught.value.pinned, caught.value.in_use) == (["alice"], ["bob"])
        assert books(store) == before
    with pytest.raises(CapacityError, match="1 of 2 slots"), store.batch(["alice", "bob", "carol", "carol"]):
        pass
    store.load("dave", make_adapter(net, 4))  # waits in main memory
    assert store.stats().on_device == 2
    lease.release()
    store.acquire("dave").release()
    store.unpin("alice")
    with store.batch(["dave", "carol"]):
        assert store.stats().on_device == 2
    with pytest.raises(CapacityError, match="1 of 2 slots"), store.batch(["alice", "bob", "carol"]):
        pass


def test_a_pin_holds_for_the_next_version(net: Net, three: dict[str, Adapter]) -> None:
    store = make_store(net, three, max_adapters=1, num_pages=8)
    store.pin("alice")
    store.load("alice", make_adapter(net, 8, r=8))
    assert store.stats().on_device == store.stats().pinned == 1
    with pytest.raises(CapacityError, match="pinned: alice"):
        store.acquire("bob")
    with store.acquire("alice"):
        before = books(store)
        with pytest.raises(CapacityError, match="in use: alice"):
            store.replace("alice", three["alice"])  # must be on the device, where the old one is in use
        assert books(store) == before


def test_a_pin_is_of_what_is_on_the_device_whatever_comes_between(
    net: Net, three: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real, times = make_store(net, three, max_adapters=1), lk.AdapterStore.acquire, [0, 1]

    def replaced(self: lk.AdapterStore, name: str) -> Any:
        lease = real(self, name)
        if times.pop():
            self.replace(name, three["bob"])  # waits in main memory: the old version has the only slot
        return lease

    monkeypatch.setattr(lk.AdapterStore, "acquire", replaced)
    store.pin("alice")
    assert not times and [(v.name, v.pinned) for v in store._books.on_device] == [("alice", True)]
    assert store._books.current["alice"].pinned and store.stats().pinned == 1 and not store.stats().in_use


def test_a_new_version_takes_the_place_of_the_old_one(net: Net, three: dict[str, Adapter]) -> None:
    store = make_store(net, three, max_adapters=3)
    store.replace("carol", three["bob"])  # the most recently used
    assert [version.name for version in store._books.on_device] == ["alice", "bob", "carol"]


def test_pages_run_out_before_slots(net: Net) -> None:
    adapters = {"small": make_adapter(net, 9, r=1, targets=("down",))}
    adapters |= {f"user-{i}": make_adapter(net, i, r=8, targets=("up",)) for i in range(3)}
    store = make_store(net, adapters, max_adapters=8, num_pages=17)
    on_device = [version.name for version in store._books.on_device]
    assert on_device == ["small", "user-1", "user-2"], "what has no page of that class need not go"
    store.pin("user-1"), store.pin("user-2")
    with pytest.raises(CapacityError, match=r"7 of 17 pages for 'up'.*pinned: user-1, user-2"):
        store.acquire("user-0")


def test_the_least_recently_used_leaves(net: Net, three: dict[str, Adapter]) -> None:
    store = make_store(net, three, max_adapters=3)
    with store.batch(["bob"]), store.batch(["alice"]):
        pass
    for i, left in enumerate([["bob", "alice", "new-0"], ["alice", "new-0", "new-1"]]):
        store.load(f"new-{i}", three["bob"])
        assert [version.name for version in store._books.on_device] == left
    assert store.stats().evictions == 2


def test_mixed_ranks_take_what_they_need(net: Net) -> None:
    store = make_store(net, {f"user-{r}": make_adapter(net, r, r=r) for r in (4, 64)}, max_rank=64, num_pages=68)
    stats = store.stats()
    assert stats.used_bytes * 128 == stats.padded_bytes * 68


def test_main_memory_has_a_budget(net: Net, base: Net, tmp_path: Path) -> None:
    adapters = {f"user-{i}": make_adapter(net, i, r=4) for i in range(4)}
    folders = {name: write(tmp_path / name, adapter) for name, adapter in adapters.items()}
    one = make_store(make_net(), {"one": adapters["user-0"]}).stats().host_bytes
    store = make_store(net, folders, max_adapters=1, host_bytes=2 * one + 1)
    assert store.stats().host_bytes == 2 * one and store.stats().reads == 4
    ids = make_ids(1)
    for name in ("user-3", "user-2", "user-0"):
        with store.batch([name]):
            torch.testing.assert_close(net(ids), alone(base, [adapters[name]], ids), rtol=0, atol=1e-10)
    stats = store.stats()
    assert (stats.hits, stats.misses, stats.reads, stats.host_bytes) == (1, 2, 5, 2 * one)

    exact = make_store(make_net(), {"one": adapters["user-0"]}, host_bytes=one)
    with exact.acquire("one"), pytest.raises(CapacityError):
        exact.replace("one", adapters["user-1"])  # the old one is in use, and has to stay
    exact.replace("one", adapters["user-1"])
    assert exact.stats().host_bytes == one
    exact.acquire("one").release()

    none = make_store(make_net(), folders, host_bytes=0)
    assert none.stats().host_bytes == 0 and none.stats().on_device == 4
    before = books(store)
    store.load("tensors", adapters["user-1"]), store.load("more", adapters["user-2"])
    with pytest.raises(CapacityError, match="no folder to be read"):
        store.load("most", adapters["user-3"])
    store.acquire("user-1").release()
    store.acquire("tensors").release()
    store.evict("tensors"), store.evict("more")
    assert store.stats().host_bytes == 0 and before[0] == store._books.current


@pytest.mark.parametrize("change", ["rewrite", "same time", "remove"])
def test_files_that_change_are_not_another_adapter(net: Net, tmp_path: Path, change: str) -> None:
    folders = {name: write(tmp_path / name, make_adapter(net, i)) for i, name in enumerate(("one", "two"))}
    store = make_store(net, folders, max_adapters=1, host_bytes=0)
    if change != "remove":
        time.sleep(0.01)
        before_it = [(path, path.stat()) for path in folders["one"].iterdir()]
        write(folders["one"], make_adapter(net, 7))
        for path, found in before_it if change == "same time" else ():
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    else:
        (folders["one"] / "adapter_model.safetensors").unlink()
    before = books(store)
    store.prefetch("one")
    for _ in range(2):
        with pytest.raises(lk.AdapterFileError, match="has no adapter_model" if change == "remove" else "have changed"):
            store.acquire("one")
        assert books(store) == before
    write(folders["one"], make_adapter(net, 7))
    store.replace("one", folders["one"])
    store.acquire("one").release()


def test_prefetch_brings_what_the_next_batch_needs(net: Net, three: dict[str, Adapter], tmp_path: Path) -> None:
    store = make_store(net, {n: write(tmp_path / n, a) for n, a in three.items()}, max_adapters=1, host_bytes=0)
    reads = store.stats().reads
    store.prefetch("alice")
    store.prefetch("alice")
    store._prefetches["alice"].exception()  # what has not begun by then, a batch does itself
    with store.batch(["alice"]):
        pass
    stats = store.stats()
    assert (stats.hits, stats.misses, stats.reads) == (1, 0, reads + 1)
    with pytest.raises(KeyError):
        store.prefetch("nobody")
    with store.batch(["alice"]):
        store.prefetch("bob")  # no room now: a hint that comes to nothing
        store._prefetches["bob"].exception()
    with store.batch(["bob"]):
        pass
    store.prefetch("carol")
    store.close()
    with pytest.raises(RuntimeError, match="closed"):
        store.prefetch("alice")


def test_a_prefetch_takes_no_room_from_a_batch(net: Net, three: dict[str, Adapter]) -> None:
    store = make_store(net, three, max_adapters=1)
    for _ in range(20):
        for name in 20 * list(three):
            store.prefetch(name)
        with store.batch(["alice"]):  # whose slot a prefetch may be using
            pass
    store.close()


@contextmanager
def slow_reads(store: lk.AdapterStore) -> Iterator[threading.Event]:
    """Within the block reads of other threads do not end; the event tells that one has begun."""
    real, begun, go_on = store._books.read, threading.Event(), threading.Event()

    def slow(source: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(10)
        return real(source)

    store._books.read = slow
    try:
        yield begun
    finally:
        go_on.set()


def test_a_version_that_is_replaced_while_a_prefetch_reads_it_takes_no_room(
    net: Net, base: Net, three: dict[str, Adapter], tmp_path: Path
) -> None:
    folders = {name: write(tmp_path / name, adapter) for name, adapter in three.items()}
    store, ids = make_store(net, folders, max_adapters=1, host_bytes=0), make_ids(1)
    with slow_reads(store) as begun:
        store.prefetch("alice")  # carol is on the device
        assert begun.wait(10)
        pending = store._prefetches["alice"]
        store.replace("alice", folders["bob"])
    assert pending.exception() is None
    [version] = store._books.on_device
    assert version is store._books.current["alice"] and store.stats().used_bytes == version.nbytes
    with store.batch(["alice"]):
        torch.testing.assert_close(net(ids), alone(base, [three["bob"]], ids), rtol=0, atol=1e-10)


def test_a_batch_waits_for_no_prefetch_that_has_not_begun(
    net: Net, base: Net, three: dict[str, Adapter], tmp_path: Path
) -> None:
    adapters = {"first": three["alice"], **three}
    folders = {name: write(tmp_path / name, adapter) for name, adapter in adapters.items()}
    store, ids = make_store(net, folders, max_adapters=2, host_bytes=0), make_ids(1)
    before = store.stats()
    with slow_reads(store) as begun:
        for name in adapters:  # of which bob and carol are on the device
            store.prefetch(name)
        assert begun.wait(10)
        first = store._prefetches["first"]
        for name in ("bob", "carol", "alice"):
            with store.batch([name]):
                torch.testing.assert_close(net(ids), alone(base, [three[name]], ids), rtol=0, atol=1e-10)
        assert not first.done() and list(store._prefetches) == ["first"]
    assert first.exception() is None
    stats = store.stats()
    assert (stats.hits - before.hits, stats.misses - before.misses, stats.reads - before.reads) == (2, 1, 2)
    assert (stats.on_device, stats.in_use) == (2, 0)
    assert stats.used_bytes == sum(version.nbytes for version in store._books.on_device)
