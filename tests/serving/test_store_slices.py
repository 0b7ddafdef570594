"""Projections of one x as slices of one launch: fewer launches, the same numbers, and never another x's or batch's."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from served_net import Adapter, make_adapter, make_store, merged
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton")

import lorakernels as lk
from lorakernels.kernels.launch import record_launches
from lorakernels.nn import mixed, siblings

WIDTH = 16
QKV = ("q_proj", "k_proj", "v_proj")
EVERY = (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS = ["alice", None, "bob", "alice"]


class Layer(nn.Module):
    """`between` runs after q and gives k, or None for k of h."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, 8), nn.Linear(width, 8, bias=False)
        self.v_proj = nn.Linear(width, 4)
        self.o_proj = nn.Linear(4, width)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(width, 24), nn.Linear(width, 24), nn.Linear(24, width)
        self.between: Callable[[Any, torch.Tensor], Any] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.layer_norm(x, x.shape[-1:])
        q = self.q_proj(h)
        k = self.between(self, h) if self.between else None
        k = self.k_proj(h) if k is None else k
        x = x + self.o_proj(torch.tanh(q * k).mean(-1, keepdim=True) + self.v_proj(h))
        return x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many slices each product of many adapters had, by the kernels."""
    monkeypatch.setenv("LORAKERNELS_IMPL", "triton")
    sizes: list[int] = []
    real = mixed.multi_lora_linear

    def spy(x: torch.Tensor, weights: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(weights) if type(weights) is tuple else 1)
        return real(x, weights, *args, **kwargs)

    monkeypatch.setattr(mixed, "multi_lora_linear", spy)
    return sizes


def make_model(dtype: torch.dtype = torch.float32, width: int = WIDTH, layers: int = 1) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(width) for _ in range(layers))).to(dtype).requires_grad_(False)


def adapters_of(model: nn.Module, **targets: tuple[str, ...]) -> dict[str, Adapter]:
    given = targets or {"alice": QKV, "bob": QKV}
    return {name: make_adapter(model, i, r=i + 4, targets=names) for i, (name, names) in enumerate(given.items())}


def alone(model: nn.Module, adapters: list[Adapter | None], x: torch.Tensor) -> torch.Tensor:
    return torch.cat([merged(model, each)(row[None].double()) for each, row in zip(adapters, x, strict=True)])


def run(model: nn.Module, store: lk.AdapterStore, rows: list[Any], x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), store.batch(rows):
        return model(x)


@pytest.mark.parametrize("length", [1, 20], ids=["a program a token", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_is_one_launch_and_the_same_to_the_bit(dtype: torch.dtype, length: int, launches: list[int]) -> None:
    found, x = {}, torch.randn(4, length, WIDTH).to(dtype)
    for group in (True, False):
        model = make_model(dtype)
        store = make_store(model, adapters_of(model, alice=EVERY, bob=EVERY), group=group)
        found[group] = run(model, store, ROWS, x)
        with record_launches() as recorded:
            run(model, store, ROWS, x)
        assert len(recorded) == 2 * (4 if group else 7)
        store.close()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert launches == [3, 1, 2, 1] * 2 + [1] * 7 * 2
    assert torch.equal(found[True], found[False])
    assert siblings._thread.scope is None


def test_it_is_what_explain_tells(launches: list[int]) -> None:
    model, x = make_model(), torch.randn(4, 2, WIDTH)
    store = make_store(model, adapters_of(model))
    with record_launches() as recorded:
        run(model, store, ROWS, x)
    factors = recorded[0].args["factors"]
    weights, plan = [model[0].get_submodule(name).weight for name in QKV], lk.BatchPlan(2, 8, max_rank=16, num_pages=64)
    told = lk.explain(x, weights, [factor.ptr for factor in factors], plan=plan, impl="triton").kernels[1:3]
    names = [launch.kernel.__name__.removesuffix("_kernel") for launch in recorded[:2]]
    assert launches[0] == len(factors) == 3 and [line.partition(" ")[0] for line in told] == names


def test_sums_that_are_split_otherwise() -> None:
    model, x = make_model(width=520), torch.randn(4, 1, 520)
    adapters, base = adapters_of(model), copy.deepcopy(model)
    store = make_store(model, adapters)
    expected = alone(base, [adapters.get(row or "") for row in ROWS], x)
    assert (run(model, store, ROWS, x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("rows", [["alice", "bob"], ["bob", "carol", None], ["alice", "dora"], ["carol"], [None]])
def test_who_reaches_what(rows: list[Any], launches: list[int]) -> None:
    """Slices are what the same adapters reach; a member that one of them does not reach runs by itself."""
    model = make_model()
    adapters = adapters_of(model, alice=EVERY, bob=("q_proj", "v_proj"), carol=("k_proj",), dora=QKV)
    base, x = copy.deepcopy(model), torch.randn(len(rows), 3, WIDTH)
    store = make_store(model, adapters)
    expected = alone(base, [adapters.get(row or "") for row in rows], x)
    assert (run(model, store, rows, x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (
        launches
        == {
            ("alice", "bob"): [2, 1, 1, 2, 1],
            ("bob", "carol", None): [2, 1],
            ("alice", "dora"): [3, 1, 2, 1],
            ("carol",): [1],
            (None,): [],
        }[tuple(rows)]
    )


def test_an_adapter_has_the_same_pages_everywhere_if_it_can(launches: list[int]) -> None:
    model = make_model()
    base, x = copy.deepcopy(model), torch.randn(3, 3, WIDTH)
    q, k = QKV[:1], QKV[1:2]
    sizes = {"first": (8, q), "second": (4, QKV), "third": (4, QKV), "wide": (8, k), "narrow": (2, k)}
    adapters = {name: make_adapter(model, r, r=r, targets=targets) for name, (r, targets) in sizes.items()}
    store = make_store(model, {}, num_pages=16, max_adapters=8)
    rows = ["third", "second", "third"]
    answers = alone(base, [adapters[row] for row in rows], x)

    def check(pages_of_third: int, slices: list[int]) -> None:
        assert len(set(store._books.current["third"].pages.values())) == pages_of_third
        assert (run(model, store, rows, x) - answers).abs().max() <= 1e-5 * answers.abs().max()
        assert launches[-len(slices) :] == slices

    for name in ("first", "second", "third"):
        store.load(name, adapters[name])
    check(1, [3])  # though others were free for k and v
    store.evict("third")
    for name in ("wide", "narrow"):
        store.load(name, adapters[name])
    store.evict("wide")
    store.load("third", adapters["third"])  # of what is free for q, k has two that are free
    check(2, [1, 2])  # k, the first of these pages, leads v


def edit_x(layer: Any, h: torch.Tensor) -> None:
    h.mul_(2)


def of_a_view(layer: Any, h: torch.Tensor) -> torch.Tensor:
    return layer.k_proj(h.view(h.shape))


def of_another(layer: Any, h: torch.Tensor) -> torch.Tensor:
    return layer.k_proj(h + 1)


def twice(layer: Any, h: torch.Tensor) -> torch.Tensor:
    return layer.k_proj(h) + layer.k_proj(h)


def edit_base(layer: Any, h: torch.Tensor) -> None:
    layer.k_proj.weight.mul_(0.5)


def with_gradients(layer: Any, h: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        return layer.k_proj(h)


def fail(layer: Any, h: torch.Tensor) -> None:
    raise KeyboardInterrupt  # for which torch runs no hook


@pytest.mark.parametrize("event", [edit_x, of_a_view, of_another, twice, edit_base, with_gradients])
def test_what_happens_between(event: Callable[..., Any], launches: list[int]) -> None:
    found, x = [], torch.randn(4, 1, WIDTH)
    for group in (True, False):
        model = make_model()
        store = make_store(model, adapters_of(model), group=group)
        model[0].between = event
        found.append(run(model, store, ROWS, x))
    assert launches[0] == 3 and torch.equal(*found)


def test_a_batch_that_ends_or_begins_between(launches: list[int]) -> None:
    found, x = [], torch.randn(4, 1, WIDTH)
    for group in (True, False):
        model = make_model()
        store = make_store(model, adapters_of(model), group=group)

        def within(layer: Any, h: torch.Tensor, store: lk.AdapterStore = store) -> torch.Tensor:
            with store.batch(["bob", "bob", None, "alice"]):
                return layer.k_proj(h)

        model[0].between = within
        found.append(run(model, store, ROWS, x))
        outer = store.batch(ROWS)
        model[0].between = lambda layer, h, outer=outer: outer.__exit__(None, None, None)
        outer.__enter__()
        with torch.no_grad():
            found.append(model(x))
    assert launches[0] == 3 and torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_an_interrupt_leaves_nothing_wrong() -> None:
    model, x = make_model(layers=2), torch.randn(4, 1, WIDTH)
    store = make_store(model, adapters_of(model))
    expected = run(model, store, ROWS, x)
    model[1].between = fail
    with pytest.raises(KeyboardInterrupt):
        run(model, store, ROWS, x)
    model[1].between = None
    assert torch.equal(run(model, store, ROWS, x), expected)
    assert siblings._thread.scope is None


def hook(model: Any) -> None:
    model[0].k_proj.register_forward_hook(lambda module, args, y: 2 * y)


def own_forward(model: Any) -> None:
    kept = model[0].k_proj.forward
    model[0].k_proj.forward = lambda h: kept(h) + 1


def on_top(model: Any) -> None:
    kind = type(model[0].k_proj)
    model[0].k_proj.__class__ = type("OnTop", (kind,), {"forward": lambda self, h: kind.forward(self, h) + 1})


@pytest.mark.parametrize("change", [hook, own_forward, on_top])
def test_members_that_do_more_run_by_themselves(change: Callable[..., Any], launches: list[int]) -> None:
    found, x = [], torch.randn(4, 1, WIDTH)
    for group in (True, False):
        model = make_model()
        store = make_store(model, adapters_of(model), group=group)
        change(model)
        found.append(run(model, store, ROWS, x))
    assert launches[0] == 2 and torch.equal(*found)


def test_a_member_that_is_never_called_is_missed(launches: list[int]) -> None:
    """Though its group has computed it."""
    model, x = make_model(), torch.randn(2, 1, WIDTH)
    store = make_store(model, adapters_of(model))
    model[0].between = lambda layer, h: F.linear(h, layer.k_proj.weight)
    with pytest.raises(RuntimeError, match=r"1 adapted layers .* 0\.k_proj\. "):
        run(model, store, ["alice", "bob"], x)
    assert launches[0] == 3


@pytest.mark.parametrize("mode", ["gradients", "inference mode", "invariant", "plain torch"])
def test_where_there_are_no_groups(mode: str, launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make_model(), torch.randn(4, 1, WIDTH)
    adapters, base = adapters_of(model), copy.deepcopy(model)
    if mode == "plain torch":
        monkeypatch.setenv("LORAKERNELS_IMPL", "torch")
    store = make_store(model, adapters, invariant=mode == "invariant")
    x.requires_grad_(mode == "gradients")
    with torch.inference_mode(mode == "inference mode"), torch.set_grad_enabled(mode == "gradients"), store.batch(ROWS):
        y = model(x)
        if mode == "gradients":  # of two of them one after the other
            h = model[0].q_proj(x), model[0].k_proj(x)
            assert all(torch.autograd.grad(each.sum(), x)[0].abs().sum() > 0 for each in h)
    expected = alone(base, [adapters.get(row or "") for row in ROWS], x.detach())
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert set(launches) == {1}


def test_packed_weights_and_groups_of_ones_own(launches: list[int]) -> None:
    found, x = [], torch.randn(4, 1, 64)
    for groups in ([["q_proj", "k_proj"]], None):
        model = make_model(width=64)
        lk.quantize(model, "nf4")
        adapters = adapters_of(make_model(width=64))
        store = make_store(model, adapters, group=groups is not None, groups=groups or ())
        found.append(run(model, store, ROWS, x))
    assert torch.equal(*found) and launches == [2, 1] + [1] * 3
    with pytest.raises(ValueError, match="groups has"):
        lk.AdapterStore(make_model(), groups=[["a", "b"]])


def test_the_hooks_go_with_the_store() -> None:
    model = make_model()
    siblings.declare({model[0]: (("q_proj", "k_proj"),)})
    own = make_store(model, adapters_of(model))
    assert siblings.has_groups(model[0]) and not own._hooks, "somebody else's stay"
    own.close()
    assert siblings.has_groups(model[0])
    siblings.forget(model[0])
    model[0].store = make_store(model, adapters_of(model))
    assert siblings.has_groups(model[0])
    twin = copy.deepcopy(model)
    del twin, model[0].store
    gc.collect()
    assert not siblings.has_groups(model[0])
