"""The model stays itself, with a store, after it, and copied; experts and positions are refused."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from served_net import VOCABULARY, WIDTH, Adapter, Net, alone, make_adapter, make_ids, make_net, make_store, merged
from torch import nn
from torch.nn.utils import parametrize

import lorakernels as lk
from lorakernels.serving.served import ServedEmbedding, ServedLinear


def test_the_model_stays_itself(net: Net, base: Net, three: dict[str, Adapter]) -> None:
    state, parameters = dict(net.state_dict()), dict(net.named_parameters())
    calls: list[Any] = []
    net.layers[0].up.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr,operator]
    store, ids = make_store(net, three), make_ids(1)
    assert type(net.layers[0].up) is ServedLinear and type(net.embed) is ServedEmbedding  # type: ignore[union-attr]
    assert type(net.head) is nn.Linear, "no adapter has reached it"
    assert net.state_dict().keys() == state.keys() and all(net.get_parameter(n) is p for n, p in parameters.items())
    with store.batch(["alice"]):
        net(ids)
        twin = copy.deepcopy(net)
        assert torch.equal(twin(ids), base(ids)), "a copy is nobody's to serve"
        for protocol in (2, pickle.HIGHEST_PROTOCOL):
            file = io.BytesIO()
            torch.save(net.embed, file, pickle_protocol=protocol)
            assert b"lorakernels" not in file.getvalue()
            file.seek(0)
            read = torch.load(file, weights_only=False)
            assert torch.equal(read(ids), base.embed(ids)) and read.__dict__.keys() == base.embed.__dict__.keys()
        assert [type(module) for module in twin.modules()] == [type(module) for module in base.modules()]
        assert type(copy.copy(net.embed)) is nn.Embedding and type(net.embed) is ServedEmbedding
        with pytest.raises(RuntimeError, match="in use: alice"):
            store.close()
    assert len(calls) == 2
    store.close()
    assert type(net.layers[0].up) is nn.Linear and net.layers[0].up.__dict__.keys() == base.layers[0].up.__dict__.keys()  # type: ignore[union-attr]
    assert torch.equal(net(ids), base(ids)) and store.stats().device_bytes == store.stats().host_bytes == 0
    for use in (
        lambda: store.load("alice", three["alice"]),
        lambda: store.acquire("alice"),
        lambda: store.prefetch("a"),
        lambda: store.evict("alice"),
        lambda: store.unpin("alice"),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    make_store(net, three).close()  # the next one has a free model


@pytest.mark.parametrize("end", ["close", "gone"])
def test_a_forward_that_somebody_kept_is_the_base_when_the_store_is_not_there(
    net: Net, base: Net, three: dict[str, Adapter], end: str
) -> None:
    store, ids = make_store(net, three), make_ids(1)
    for module in (net.embed, net.layers[0].up):  # type: ignore[union-attr]
        module.forward = (lambda forward: lambda x: forward(x))(module.forward)  # as accelerate's hooks do
    with store.batch(["alice"]):
        torch.testing.assert_close(net(ids), alone(base, [three["alice"]], ids), rtol=0, atol=1e-10)
    if end == "close":
        store.close()
    del store
    assert torch.equal(net(ids), base(ids)) and type(net.embed) is nn.Embedding


def test_copies_and_models_of_a_store_that_is_gone_can_be_served(
    net: Net, base: Net, three: dict[str, Adapter], store: lk.AdapterStore
) -> None:
    ids = make_ids(1)
    expected = alone(base, [three["bob"]], ids)
    twin = copy.deepcopy(net)
    for _ in range(2):  # the first is gone when the second is made
        other = None
        other = make_store(twin, three)
        twin.store = other  # a model may hold its store
        with other.batch(["bob"]):
            torch.testing.assert_close(twin(ids), expected, rtol=0, atol=1e-10)
            assert torch.equal(net(ids), base(ids))
        del twin.store
    other = None
    assert type(twin.embed) is nn.Embedding and type(twin.layers[0].up) is nn.Linear  # type: ignore[union-attr]
    gone = weakref.ref(twin)
    twin.store = make_store(twin, three)
    del twin
    gc.collect()
    assert gone() is None


class Same(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


def test_a_class_on_top_of_a_served_one_stays(net: Net, base: Net, three: dict[str, Adapter]) -> None:
    store, ids, up = make_store(net, three), make_ids(1), net.layers[0].up
    parametrize.register_parametrization(up, "weight", Same())  # type: ignore[arg-type]
    kind = type(up)
    with store.batch(["bob"]):
        torch.testing.assert_close(net(ids), alone(base, [three["bob"]], ids), rtol=0, atol=1e-10)
    store.close()
    assert type(net.layers[0].up) is kind and torch.equal(net(ids), base(ids))  # type: ignore[union-attr]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_store_has_no_copies(net: Net, store: lk.AdapterStore, duplicate: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="cannot be copied or pickled; make one for the copied model"):
        duplicate(store)
    gc.collect()
    assert type(net.embed) is ServedEmbedding


def test_a_model_that_holds_its_store_can_be_copied(
    net: Net, base: Net, three: dict[str, Adapter], store: lk.AdapterStore
) -> None:
    net.store = store
    twin, ids = copy.deepcopy(net), make_ids(1)
    assert twin.store is None and torch.equal(twin(ids), base(ids))
    with store.batch(["bob"]):
        torch.testing.assert_close(net(ids), alone(base, [three["bob"]], ids), rtol=0, atol=1e-10)
    del net.store


def test_pools_go_with_their_store(net: Net, three: dict[str, Adapter]) -> None:
    store = make_store(net, three)
    with store.batch(["alice", None]):
        net(make_ids(2))
    pools = [weakref.ref(pool.memory) for pool in store._pools if pool.memory is not None]
    views = [weakref.ref(site.lora_A) for site in store._sites.values() if site.lora_A is not None]
    gc.collect()
    gc.disable()
    try:
        del store
        assert pools and views and not any(one() is not None for one in pools + views)
    finally:
        gc.enable()


def test_two_models_have_a_batch_each(net: Net, base: Net, three: dict[str, Adapter], store: lk.AdapterStore) -> None:
    draft = make_net()
    other, ids = make_store(draft, three), make_ids(2)
    with store.batch(["alice", "bob"]), other.batch(["bob", None]):
        torch.testing.assert_close(net(ids), alone(base, [three["alice"], three["bob"]], ids), rtol=0, atol=1e-10)
        torch.testing.assert_close(draft(ids), alone(base, [three["bob"], None], ids), rtol=0, atol=1e-10)


class Expert(nn.Module):
    """A projection of all tokens, and one of those that a router has picked."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.add_module(name, nn.ModuleList([nn.Linear(WIDTH, WIDTH)]))
        self.picked = getattr(self, name)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.picked(self.q_proj(x)[:, 1:].flatten(0, 1))


@pytest.mark.parametrize("name", ["experts", "expert_0", "expert1", "local_experts", "mixture", "shared_experts"])
def test_experts_are_refused(name: str) -> None:
    net = Expert(name).double()
    store, adapter = lk.AdapterStore(net), make_adapter(net, 1, targets=("q_proj", "0"))
    if name not in ("mixture", "shared_experts"):
        with pytest.raises(lk.AdapterFileError, match="is an expert"):
            store.load("one", adapter)
        return
    store.load("one", adapter)
    with store.batch(["one", None]), pytest.raises(ValueError, match="sent some of the tokens"):
        net(torch.randn(2, 5, WIDTH, dtype=torch.float64))


class Positions(nn.Module):
    """A table of positions [1, T], and a layer of all tokens in one dimension."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Embedding(VOCABULARY, WIDTH))
        self.table = getattr(self, name)
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[None]
        return self.up((x + self.table(positions)).flatten(0, 1)).view_as(x)


def test_an_adapter_of_positions_breaks_no_other_batch() -> None:
    net = Positions("positions").double()
    base, adapter = copy.deepcopy(net), make_adapter(net, 1, targets=("up",))
    store, x = make_store(net, {"one": adapter}), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    store.load("another", make_adapter(net, 2, targets=("positions",)))
    store.evict("another")  # the table stays a served module
    with store.batch(["one", None]):
        torch.testing.assert_close(net(x), alone(base, [adapter, None], x), rtol=0, atol=1e-10)


class FlatPositions(nn.Module):
    """nanoGPT's table of positions [T], and a branch that a row may be sent to before there is any row."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.branch, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: torch.Tensor, sent: slice) -> torch.Tensor:
        h = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        flat = h.flatten(0, 1)
        flat[sent] = self.branch(flat[sent])
        return self.up(flat.view_as(h))


FLAT: list[tuple[tuple[str, ...], slice, str | None]] = [
    (("wpe", "up"), slice(0), "'wpe' got 8 ids in one dimension for a batch of 2"),
    (("wpe",), slice(0), "'wpe' got 8 ids"),
    (("wpe", "wte"), slice(0), r"'wpe' got 8 tokens where others got \[2, 8\].* or positions"),
    (("branch", "up"), slice(4, 8), r"'branch' got 4 tokens where others got \[2, 8\]"),
    (("branch", "up"), slice(16), None),
]


@pytest.mark.parametrize(("targets", "sent", "message"), FLAT, ids=str)
def test_flat_tokens_that_are_not_all_are_refused_in_any_order(
    targets: tuple[str, ...], sent: slice, message: str | None
) -> None:
    torch.manual_seed(0)
    net, ids = FlatPositions().double(), make_ids(2, 8)
    base = copy.deepcopy(net)
    store = make_store(net, {name: make_adapter(net, i, targets=targets) for i, name in enumerate("ab")})
    for name in "ab":  # with one adapter there is nothing to know
        adapter = make_adapter(net, "ab".index(name), targets=targets)
        with torch.no_grad(), store.batch([name]):
            expected = merged(base, adapter)(ids[:1], slice(0))
            torch.testing.assert_close(net(ids[:1], slice(0)), expected, rtol=0, atol=1e-10)
    with torch.no_grad(), store.batch(["a", "b"]):
        if message is None:
            net(ids, sent)
            return
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                net(ids, sent)


def test_positions_of_t5_are_refused() -> None:
    net = Positions("relative_attention_bias")
    with pytest.raises(lk.AdapterFileError, match="table of positions"):
        lk.AdapterStore(net).load("one", make_adapter(net, 1, targets=("relative_attention_bias",)))
