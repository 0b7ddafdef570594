"""A small net, its copy that nobody serves, and a store with three adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
from served_net import Adapter, Net, make_adapter, make_net, make_store

import lorakernels as lk


@pytest.fixture
def net() -> Net:
    return make_net()


@pytest.fixture
def base(net: Net) -> Net:
    return copy.deepcopy(net)


@pytest.fixture
def three(net: Net) -> dict[str, Adapter]:
    """Adapters of several ranks and targets."""
    return {
        "alice": make_adapter(net, 1, r=2),
        "bob": make_adapter(net, 2, r=7, targets=("q_proj", "up")),
        "carol": make_adapter(net, 3, r=4, targets=("down", "embed"), use_rslora=True),
    }


@pytest.fixture
def store(net: Net, three: dict[str, Adapter]) -> Iterator[lk.AdapterStore]:
    store = make_store(net, three)
    yield store
    if not store._books.in_use:
        store.close()
