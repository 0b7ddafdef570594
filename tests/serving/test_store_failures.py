"""What fails or is interrupted in the middle changes nothing."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from served_net import Adapter, Net, alone, books, make_ids, make_store

import lorakernels as lk
from lorakernels.serving.books import Books, Version
from lorakernels.serving.pools import Pool, Writer
from lorakernels.testing.failing import FailAt

FAILURES: list[tuple[str, type, str]] = [
    ("copy", Pool, "write"),
    ("memory", Pool, "make"),
    ("pinned memory", Pool, "host_rows"),
]


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize(("what", "owner", "method"), FAILURES, ids=[failure[0] for failure in FAILURES])
def test_a_failure_in_the_middle_of_a_load(
    net: Net,
    base: Net,
    three: dict[str, Adapter],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    owner: type,
    method: str,
    call: int,
) -> None:
    store = make_store(net, {"bob": three["bob"]})
    before, calls, real = books(store), [0], getattr(owner, method)

    def failing(self: Any, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] >= call:
            if method == "write":
                real(self, *args)  # bytes are there already
            raise torch.OutOfMemoryError(what)
        return real(self, *args)

    for action in (lambda: store.load("alice", three["alice"]), lambda: store.replace("bob", three["alice"])):
        monkeypatch.setattr(owner, method, failing)
        calls[0] = 0
        with pytest.raises(torch.OutOfMemoryError):
            action()
        monkeypatch.undo()
        assert books(store) == before, "pools that were made for it are gone too"
    ids = make_ids(1)
    with store.batch(["bob"]):
        torch.testing.assert_close(net(ids), alone(base, [three["bob"]], ids), rtol=0, atol=1e-10)
    store.load("alice", three["alice"])


def test_what_left_for_a_load_that_fails_comes_back(
    net: Net, base: Net, three: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ids, writes = make_store(net, {"alice": three["alice"]}, max_adapters=1), make_ids(1), iter([True, False])
    store.pin("alice")
    before, real = books(store), Pool.write

    def failing(self: Pool, *args: Any) -> None:
        real(self, *args)
        if not next(writes, True):
            raise torch.OutOfMemoryError

    monkeypatch.setattr(Pool, "write", failing)
    with pytest.raises(torch.OutOfMemoryError):
        store.replace("alice", three["bob"])
    assert books(store) == before and store.stats().evictions == 0
    with store.batch(["alice"]):
        torch.testing.assert_close(net(ids), alone(base, [three["alice"]], ids), rtol=0, atol=1e-10)


class Interrupt:
    """Raises KeyboardInterrupt once, after a call of its choice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> None:
        self.left, real = 0, getattr(owner, method)

        def interrupted(*args: Any) -> Any:
            result = real(*args)
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(owner, method, interrupted)


def test_an_interrupted_batch_holds_nothing(
    store: lk.AdapterStore, three: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    names, interrupt = list(three), Interrupt(monkeypatch, Version, "__hash__")  # on nearly every line
    for call in itertools.count(1):
        before, batch, interrupt.left = books(store), store.batch(names), call
        try:
            batch.__enter__()
        except KeyboardInterrupt:
            interrupt.left = 0
            assert books(store) == before and not any(version.refs for version in before[0].values())
            continue
        interrupt.left = 0
        batch.__exit__(None, None, None)
        break
    assert call > 2 * len(names)


def test_an_interrupted_load_changes_nothing(
    net: Net, base: Net, three: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ids = make_store(net, {"one": three["alice"]}), make_ids(1)
    before, interrupt = books(store), Interrupt(monkeypatch, Books, "_keep")
    for name in ("new", "one"):
        interrupt.left = 1
        with pytest.raises(KeyboardInterrupt):
            store.load(name, three["alice"])
        with store.batch(["one"]):
            torch.testing.assert_close(net(ids), alone(base, [three["alice"]], ids), rtol=0, atol=1e-10)
        assert books(store) == before


def test_pages_that_cannot_be_zeroed_are_free(
    net: Net, three: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(net, {"alice": three["alice"]})
    for _ in range(2):
        interrupt = Interrupt(monkeypatch, Writer, "wait_for_reads")
        interrupt.left = 1
        with pytest.raises(KeyboardInterrupt):
            store.evict("alice")
        monkeypatch.undo()
        stats = store.stats()
        assert (stats.used_bytes, stats.on_device) == (0, 0)
        assert all(sorted(pool.free) == list(range(pool.num_pages)) for pool in store._pools)
        store.load("alice", three["alice"])


def loaded(net: Net, three: dict[str, Adapter], *names: str, **options: Any) -> lk.AdapterStore:
    store = make_store(net, {name: three[name] for name in names}, **options)
    store.pin(names[0])
    return store


def run(store: lk.AdapterStore, *names: str) -> None:
    with store.batch(names):
        store.model(make_ids(len(names)))


Do = Callable[[lk.AdapterStore, dict[str, Adapter]], object]
ACTS: dict[str, tuple[tuple[str, ...], dict[str, Any], Do]] = {
    "load": (("alice",), {}, lambda s, t: s.load("bob", t["bob"])),
    "load, another leaves": (("alice", "bob"), {"max_adapters": 2}, lambda s, t: s.load("carol", t["carol"])),
    "replace": (("alice", "bob"), {}, lambda s, t: s.replace("bob", t["carol"])),
    "replace what is pinned": (("alice",), {"max_adapters": 1}, lambda s, t: s.replace("alice", t["bob"])),
    "evict": (("alice", "bob"), {}, lambda s, t: s.evict("alice")),
    "batch": (("alice", "bob"), {}, lambda s, t: run(s, "alice", "bob")),
    "batch, one comes": (("alice", "bob", "carol"), {"max_adapters": 2}, lambda s, t: run(s, "alice", "bob", "alice")),
    "lease": (("alice", "bob"), {}, lambda s, t: s.acquire("bob").release()),
    "evict in use": (("alice", "bob"), {}, lambda s, t: evicted_in_use(s)),
}


def evicted_in_use(store: lk.AdapterStore) -> None:
    with store.batch(["bob", "alice"]):
        store.evict("bob")


def tried(act: str, net: Net, base: Net, three: dict[str, Adapter], error: Any, numbers: Iterable[int]) -> int:
    """Fail at each of these operators: the names mean what they did or are to mean, and nothing is held or lost."""
    names, options, do = ACTS[act]
    count = 0
    for number in numbers:
        store = loaded(net, three, *names, **options)
        meant = {name: three[name] for name in names}
        fails = FailAt(number, error("injected"))
        try:
            with fails:
                do(store, three)
        except error as raised:
            assert raised is fails.error
        left = store._books.versions
        assert not any(version.refs for version in left) and not any(v.retired for v in left), number
        assert set(left) == set(store._books.current.values())
        for pool in store._pools:
            taken = [page for version in left for page in version.pages.get(pool, ())]
            assert sorted([*pool.free, *taken]) == list(range(pool.num_pages)), number
            assert pool.memory is None or not pool.memory[pool.free].any(), number
        done = {"load": "bob", "load, another leaves": "carol"}
        meant |= {done[act]: three[done[act]]} if act in done and done[act] in store.names else {}
        changed = {"replace": ("bob", "carol"), "replace what is pinned": ("alice", "bob")}
        assert set(store.names) == set(meant) or act.startswith("evict"), number
        ids = make_ids(1)
        for name in store.names:
            with store.batch([name]):
                answer = net(ids)
            either = [meant[name]] + [three[new] for own, new in (changed.get(act, ("", "")),) if own == name]
            assert any(torch.allclose(answer, alone(base, [one], ids), rtol=0, atol=1e-10) for one in either), number
        store.close()
        if fails.left >= 0:
            break
        count += 1
    return count


@pytest.mark.parametrize("act", ACTS)
def test_a_failure_at_an_operator(act: str, net: Net, base: Net, three: dict[str, Adapter]) -> None:
    tried(act, net, base, three, KeyboardInterrupt if len(act) % 2 else MemoryError, [0, 3 + len(act) % 4, 40])


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
def test_a_failure_at_every_operator(act: str, net: Net, base: Net, three: dict[str, Adapter]) -> None:
    errors = (MemoryError, torch.OutOfMemoryError, KeyboardInterrupt)
    count = sum(tried(act, net, base, three, error, itertools.count()) for error in errors)
    print(f"{act}: {count} points, states wrong: 0")


def test_interrupts_of_the_terminal(net: Net, base: Net, three: dict[str, Adapter]) -> None:
    store, ids, stop = loaded(net, three, "alice", "bob", max_adapters=2), make_ids(1), threading.Event()
    armed, raised = False, 0

    def interrupt(*_: Any) -> None:
        nonlocal armed, raised
        if armed:
            armed, raised = False, raised + 1
            raise KeyboardInterrupt

    def fire() -> None:
        while not stop.wait(0.002):
            os.kill(os.getpid(), signal.SIGINT)

    handler, thread = signal.signal(signal.SIGINT, interrupt), threading.Thread(target=fire)
    thread.start()
    for _ in range(12):
        try:
            armed = True
            store.load("carol", three["carol"])
            run(store, "alice", "carol")
            store.evict("carol")
            armed = False
        except KeyboardInterrupt:
            pass
    stop.set()
    thread.join()
    signal.signal(signal.SIGINT, handler)
    assert raised and not any(version.refs for version in store._books.versions)
    assert set(store._books.versions) == set(store._books.current.values())
    for pool in store._pools:
        taken = [page for version in store._books.versions for page in version.pages.get(pool, ())]
        assert sorted([*pool.free, *taken]) == list(range(pool.num_pages))
    with store.batch(["bob"]):
        torch.testing.assert_close(net(ids), alone(base, [three["bob"]], ids), rtol=0, atol=1e-10)
