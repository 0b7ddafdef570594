"""What fails or is interrupted in the middle changes nothing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from served_net import Adapter, Net, alone, books, make_ids, make_store

import lorakernels as lk
from lorakernels.serving.books import Books, Version
from lorakernels.serving.pools import Pool, Writer

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
