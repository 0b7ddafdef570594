"""Any sequence of a store's calls: each row answers as its adapter alone, and the books add up.

`pytest tests/serving/test_store_sequences.py --hypothesis-profile long` tries many more.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from served_net import ALL, Adapter, alone, make_adapter, make_ids, make_net

import lorakernels as lk
from lorakernels.serving.books import Lease
from lorakernels.serving.errors import CapacityError, StaleBatchError

NAMES = ("a", "b", "c", "d", "e")
names = st.sampled_from(NAMES)
modules = st.lists(st.sampled_from(ALL), min_size=1, max_size=4, unique=True).map(tuple)


class Store(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        self.base = copy.deepcopy(self.net)
        self.store = lk.AdapterStore(self.net, max_adapters=3, max_rank=6, num_pages=12, host_bytes=4000)
        self.meant: dict[str, Adapter] = {}
        self.leases: list[tuple[Lease, Adapter]] = []
        self.seed = 0

    @rule(name=names, r=st.integers(1, 8), reached=modules, rslora=st.booleans(), must_exist=st.booleans())
    def load(self, name: str, r: int, reached: tuple[str, ...], rslora: bool, must_exist: bool) -> None:
        self.seed += 1
        adapter = make_adapter(self.base, self.seed, r=r, targets=reached, use_rslora=rslora)
        put = self.store.replace if must_exist else self.store.load
        try:
            put(name, adapter)
        except CapacityError:
            return  # nothing has changed, as the invariants find
        except KeyError:
            assert must_exist and name not in self.meant
            return
        assert r <= 6 and not (must_exist and name not in self.meant)
        self.meant[name] = adapter

    @rule(name=names, method=st.sampled_from(["evict", "pin", "unpin", "prefetch"]))
    def call(self, name: str, method: str) -> None:
        try:
            getattr(self.store, method)(name)
        except KeyError:
            assert name not in self.meant
        except CapacityError:
            assert method == "pin"
        else:
            assert name in self.meant
            if method == "evict":
                del self.meant[name]

    @rule(name=names)
    def acquire(self, name: str) -> None:
        try:
            self.leases.append((self.store.acquire(name), self.meant[name]))
        except KeyError:
            assert name not in self.meant
        except CapacityError:
            pass

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.leases:
            lease, _ = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
            lease.release()
            with pytest.raises(StaleBatchError), self.store.batch([lease]):
                raise AssertionError("a released lease has begun a batch")

    @rule(data=st.data(), lead=st.integers(1, 2))
    def answer(self, data: st.DataObject, lead: int) -> None:
        """A batch of names, leases and the base; each row as that adapter merged into the base."""
        known: list[Any] = [None, *self.meant, *range(len(self.leases))]
        rows = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=4))
        given = [self.leases[row][0] if isinstance(row, int) else row for row in rows]
        adapters = [self.leases[row][1] if isinstance(row, int) else self.meant.get(row or "") for row in rows]
        ids = make_ids(len(rows) * lead)
        try:
            with self.store.batch(given), torch.no_grad():
                found = self.net(ids)
        except CapacityError:
            return
        expected = alone(self.base, [adapter for adapter in adapters for _ in range(lead)], ids)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)

    @invariant()
    def books_add_up(self) -> None:
        stats = self.store.stats()
        assert sorted(self.store.names) == sorted(self.meant) and stats.adapters == len(self.meant)
        assert stats.on_device <= 3 and stats.in_use == len({lease.held for lease, _ in self.leases})
        books = self.store._books
        for pool in self.store._pools:
            taken = [page for version in books.on_device for page in version.pages.get(pool, ())]
            assert sorted([*taken, *pool.free]) == list(range(pool.num_pages))
            if pool.memory is not None:
                assert not pool.memory[list(pool.free)].any()

    @invariant()
    def outside_a_batch_it_is_the_base(self) -> None:
        ids = make_ids(1)
        with torch.no_grad():
            assert torch.equal(self.net(ids), self.base(ids))

    def teardown(self) -> None:
        for lease, _ in self.leases:
            lease.release()
        self.store.close()
        assert type(self.net.head) is torch.nn.Linear


TestStore = Store.TestCase
