"""What a store does not take is refused, and changes nothing."""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from served_net import INNER, WIDTH, Adapter, Net, alone, books, make_adapter, make_ids, make_net, make_store, write
from torch import nn

import lorakernels as lk
from lorakernels.nn import modules
from lorakernels.serving.errors import CapacityError, StaleBatchError
from lorakernels.serving.pools import Pool
from lorakernels.serving.served import ServedLinear


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "../a", "/etc", "a\\b", "a\0b", "a\nb", None, 3])
def test_bad_names(store: lk.AdapterStore, three: dict[str, Adapter], name: Any) -> None:
    before = books(store)
    with pytest.raises(ValueError, match="adapter name"):
        store.load(name, three["alice"])
    assert books(store) == before


NUMBERS = {"base_model.model.layers.0.up.lora_A.weight": torch.ones(8, WIDTH)}
BAD_SOURCES: list[tuple[Any, type[Exception], str]] = [
    (5, TypeError, r"is \(int\); expected a folder, or"),
    (b"x", TypeError, r"is \(bytes\); expected a folder, or"),
    (("a", "b"), TypeError, r"is \(str, str\)"),
    ((lk.LoRAConfig(),), TypeError, r"is \(LoRAConfig\)"),
    ((lk.LoRAConfig(), [1]), TypeError, r"is \(LoRAConfig, list\)"),
    ((lk.LoRAConfig(), {key: t.numpy() for key, t in NUMBERS.items()}), TypeError, "up.lora_A.weight' is a ndarray"),
    ((lk.LoRAConfig(), {key: t.to("meta") for key, t in NUMBERS.items()}), TypeError, "on the meta device"),
    ("/no/such/folder", lk.AdapterFileError, "is not a folder; expected one with adapter_config.json$"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD_SOURCES, ids=lambda value: str(value)[:30])
def test_what_is_no_adapter(store: lk.AdapterStore, given: Any, error: type[Exception], message: str) -> None:
    before = books(store)
    for put in (store.load, store.replace):
        with pytest.raises(error, match=message):
            put("bob", given)
    assert books(store) == before


@pytest.mark.parametrize("method", ["acquire", "pin", "unpin", "evict", "prefetch"])
@pytest.mark.parametrize("name", [None, 5])
def test_what_is_no_name(store: lk.AdapterStore, method: str, name: Any) -> None:
    with pytest.raises(TypeError, match=f"name is {name}; expected the name of an adapter"):
        getattr(store, method)(name)


def test_folders_stay_under_the_root(net: Net, three: dict[str, Adapter], tmp_path: Path) -> None:
    root, outside = tmp_path / "root", write(tmp_path / "root-beside", three["alice"])
    inside = write(root / "inside", three["alice"])
    (root / "link").symlink_to(outside)
    (root / "good").symlink_to(inside)
    (root / "halves").mkdir()
    for file in outside.iterdir():
        (root / "halves" / file.name).symlink_to(file)
    store = lk.AdapterStore(net, root=root)
    for folder in (
        "../root-beside",
        str(outside),
        "link",
        "halves",
        "inside/../../root-beside",
        "a\0b",
        "nothing",
        ".",
    ):
        with pytest.raises(lk.AdapterFileError):
            store.load("one", folder)
    assert not store.names and all(type(module) is not ServedLinear for module in net.modules())
    for i, folder in enumerate(("inside", str(inside), "good", "./inside/.", None)):
        store.load(f"name-{i}" if folder else "inside", folder)
    assert len(store.names) == 5
    with pytest.raises(ValueError, match="has no folder"):
        lk.AdapterStore(make_net()).load("one")
    # A link that is turned after loading is looked at again.
    small = lk.AdapterStore(make_net(), root=root, max_adapters=1, host_bytes=0)
    small.load("one", write(root / "turned", three["alice"]))
    small.load("two", "inside")
    (root / "turned").rename(root / "moved")
    (root / "turned").symlink_to(outside)
    with pytest.raises(lk.AdapterFileError, match="leads out of"):
        small.acquire("one")


def _without(adapter: Adapter, ending: str) -> Adapter:
    return adapter[0], {key: tensor for key, tensor in adapter[1].items() if not key.endswith(ending)}


def _changed(adapter: Adapter, change: Callable[[torch.Tensor], torch.Tensor]) -> Adapter:
    return adapter[0], {key: change(tensor) for key, tensor in adapter[1].items()}


def _renamed(adapter: Adapter, old: str, new: str) -> Adapter:
    return adapter[0], {key.replace(old, new): tensor for key, tensor in adapter[1].items()}


CONV = {
    "base_model.model.conv.lora_A.weight": torch.ones(4, WIDTH, 1),
    "base_model.model.conv.lora_B.weight": torch.ones(WIDTH, 4, 1),
}
BAD_FILES: list[tuple[str, Callable[[Adapter], Adapter], dict[str, Any], type[Exception], str]] = [
    ("dora", lambda a: a, {"use_dora": True}, lk.AdapterFileError, "lora_magnitude_vector"),
    ("lora_bias", lambda a: a, {"lora_bias": True}, lk.AdapterFileError, "lora_bias=True"),
    ("bias", lambda a: a, {"bias": "all"}, lk.AdapterFileError, "bias='all' is not served"),
    ("trainable_token_indices", lambda a: a, {"trainable_token_indices": [1]}, lk.AdapterFileError, "trainable_token"),
    ("modules_to_save", lambda a: a, {"modules_to_save": ["head"]}, lk.AdapterFileError, "modules_to_save|no tensor"),
    ("conv", lambda a: (a[0], a[1] | CONV), {}, lk.AdapterFileError, "'conv' is a Conv1d"),
    ("rank", lambda a: a, {"r": 9}, lk.AdapterFileError, "expected"),
    ("r = 0", lambda a: a, {"r": 0}, lk.AdapterFileError, "r is 0"),
    ("alpha", lambda a: a, {"lora_alpha": 1e300}, lk.AdapterFileError, "alpha"),
    ("no B", lambda a: _without(a, "q_proj.lora_B.weight"), {}, lk.AdapterFileError, "no lora_B.weight"),
    ("nan", lambda a: _changed(a, lambda t: t * float("nan")), {}, lk.AdapterFileError, "NaN"),
    ("integers", lambda a: _changed(a, torch.Tensor.long), {}, lk.AdapterFileError, "float dtype"),
    ("no module", lambda a: _renamed(a, "layers.1", "layers.2"), {}, lk.AdapterFileError, "no module"),
    ("strange keys", lambda a: _renamed(a, "lora_", "LORA_"), {}, lk.AdapterFileError, "unknown key"),
]


@pytest.mark.parametrize(
    ("change", "fields", "error", "message"), [case[1:] for case in BAD_FILES], ids=[case[0] for case in BAD_FILES]
)
def test_bad_files(
    net: Net, store: lk.AdapterStore, tmp_path: Path, change: Any, fields: dict[str, Any], error: Any, message: str
) -> None:
    before = books(store)
    folder = write(tmp_path / "bad", change(make_adapter(net, 1)), **fields)
    for action in (lambda: store.load("new", folder), lambda: store.load("bob", folder)):
        with pytest.raises(error, match=message):
            action()
        assert books(store) == before


def test_whole_files_that_a_mixed_batch_cannot_compute(net: Net, store: lk.AdapterStore, tmp_path: Path) -> None:
    before = books(store)
    settings: list[dict[str, Any]] = [
        {"use_dora": True},
        {"lora_bias": True},
        {"use_qalora": True, "qalora_group_size": 4},
        {"modules_to_save": ["head"]},
        {"bias": "all"},
    ]
    for i, fields in enumerate(settings):
        config = lk.LoRAConfig(r=2, target_modules=["up"], **fields)
        lk.save_adapter(lk.inject(make_net(), config), tmp_path / str(i))
        with pytest.raises(lk.AdapterFileError, match=f"{next(iter(fields))}=.* is not served.* on another copy"):
            store.load("new", tmp_path / str(i))
        with pytest.raises(lk.AdapterFileError, match=r"'layers.0.up' is served by an AdapterStore; close\(\) that"):
            lk.load_adapter(net, tmp_path / str(i))
        with pytest.raises(TypeError, match=r"'layers.0.up' is served by an AdapterStore; close\(\) that"):
            lk.inject(net, config)
        lk.load_adapter(copy.deepcopy(net), tmp_path / str(i))
    assert books(store) == before


def test_ranks_and_dtypes_that_do_not_fit(net: Net, store: lk.AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    before = books(store)
    monkeypatch.setattr(Pool, "host_rows", lambda *_: pytest.fail("something was allocated"))
    with pytest.raises(CapacityError, match=r"rank 9.*max_rank=8"):
        store.load("new", make_adapter(net, 1, r=9))
    monkeypatch.undo()
    assert books(store) == before
    half = lk.AdapterStore(make_net(torch.float16))
    with pytest.raises(lk.AdapterFileError, match=r"float16.*cannot hold"):
        half.load("new", _changed(make_adapter(net, 1), lambda t: t * 1e6))
    assert not half.names and half.stats().device_bytes == 0


def test_packing_reads_every_number_once(net: Net, store: lk.AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, sizes, real = make_adapter(net, 1), [], torch.Tensor.amax
    monkeypatch.setattr(torch.Tensor, "amax", lambda tensor: sizes.append(tensor.numel()) or real(tensor))
    store.load("new", adapter)
    assert sum(sizes) == sum(tensor.numel() for tensor in adapter[1].values())


def test_modules_that_cannot_be_switched(three: dict[str, Adapter]) -> None:
    class Special(nn.Linear):
        pass

    stores: list[lk.AdapterStore] = []
    for change, message in (
        (lambda net: net.layers[0].up.__setattr__("__class__", Special), "Special; expected"),
        (lambda net: net.layers[0].up.__dict__.update(forward=lambda x: x), "forward of its own"),
        (lambda net: lk.inject(net, lk.LoRAConfig(target_modules=["up"])), "LoRALinear; a store serves"),
        (lambda net: stores.append(make_store(net, {"one": three["bob"]})), "served by another AdapterStore"),
    ):
        net = make_net()
        change(net)  # type: ignore[no-untyped-call]
        store = lk.AdapterStore(net)
        with pytest.raises(lk.AdapterFileError, match=message):
            store.load("bob", three["bob"])
        assert not store.names and store.stats().device_bytes == 0


def test_a_fast_path_that_would_leave_adapters_out() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, INNER, batch_first=True).double().eval()
    base, adapter = copy.deepcopy(layer), make_adapter(layer, 1, targets=("linear1", "linear2"))
    store, x = lk.AdapterStore(layer), torch.randn(2, 3, WIDTH, dtype=torch.float64)
    with pytest.raises(lk.AdapterFileError, match="set_fastpath_enabled"):
        store.load("one", adapter)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        store.load("one", adapter)
        with torch.no_grad(), store.batch([None, "one"]):
            torch.testing.assert_close(layer(x), alone(base, [None, adapter], x), rtol=0, atol=1e-10)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


BAD_BATCHES: list[tuple[Any, Any, type[Exception], str]] = [
    (["nobody"], None, KeyError, "no adapter 'nobody'"),
    (["alic"], None, KeyError, "alice"),
    ("alice", None, TypeError, "expected a list"),
    ([3], None, TypeError, "a row is 3"),
    (["alice", "bob"], None, ValueError, r"leading shape \[3, 3\] for a batch of 2"),
    (["alice"] * 9, None, ValueError, "batch of 9"),
    (["alice"], [8], ValueError, "9 tokens.*expected 8"),
    (["alice"], [4, 5], ValueError, "expected 1 numbers"),
    (["alice"], [-9], ValueError, "expected 1 numbers"),
    (["alice"], [9.0], ValueError, "expected 1 numbers"),
    (["alice"], [True], ValueError, "expected 1 numbers"),
    (["alice"], 9, TypeError, "lengths is 9"),
]


@pytest.mark.parametrize(("rows", "lengths", "error", "message"), BAD_BATCHES, ids=lambda value: str(value)[:30])
def test_bad_batches(net: Net, store: lk.AdapterStore, rows: Any, lengths: Any, error: Any, message: str) -> None:
    before = books(store)
    with pytest.raises(error, match=message), store.batch(rows, lengths=lengths):
        net(make_ids(3))
    assert books(store) == before
    with store.batch(["alice"]):
        net(make_ids(3))


def test_no_graph_is_captured_of_a_batch(net: Net, store: lk.AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, writer = make_ids(1), store._pools[0].writer
    with store.batch(["alice"]):
        monkeypatch.setattr(writer, "stream", "as on a GPU")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="CUDA graph is being captured"):
            net(ids)
        with pytest.raises(RuntimeError, match="CUDA graph is being captured"), store.batch(["alice"]):
            pass
        monkeypatch.undo()
        net(ids)
    assert not store.stats().in_use


def test_nothing_is_computed_for_what_has_ended(net: Net, store: lk.AdapterStore, three: dict[str, Adapter]) -> None:
    with store.batch(["alice"]):
        kept = contextvars.copy_context()
    with pytest.raises(StaleBatchError, match="has ended"):
        kept.run(net, make_ids(1))
    lease = store.acquire("alice")
    lease.release()
    with pytest.raises(StaleBatchError, match="released"), store.batch([lease]):
        pass
    other = make_store(make_net(), three)
    with pytest.raises(ValueError, match="another store"), store.batch([other.acquire("alice")]):
        pass


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_adapters": 0}, ValueError),
        ({"max_rank": 2.0}, TypeError),
        ({"num_pages": 7, "max_rank": 8}, ValueError),
        ({"host_bytes": -1}, ValueError),
        ({"root": "/no/such/folder"}, OSError),
    ],
    ids=str,
)
def test_bad_settings(net: Net, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        lk.AdapterStore(net, **options)
    with pytest.raises((TypeError, ValueError)):
        lk.AdapterStore(nn.ReLU())
    with pytest.raises(TypeError):
        lk.AdapterStore("model")  # type: ignore[arg-type]


class Fused(nn.Module):
    """Reads a projection's weight where it is told to, as a fused kernel does."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out, self.fused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.linear(x, self.proj.weight, self.proj.bias) if self.fused else self.proj(x)
        return self.out(h)


def test_a_module_that_is_not_called_is_an_error_at_the_end() -> None:
    """Its rows would answer as the base model's."""
    model = nn.Sequential(nn.Identity(), Fused())
    store = lk.AdapterStore(model, max_adapters=2, max_rank=2)
    store.load("one", make_adapter(model, 1, r=2, targets=("proj", "out")))
    x = torch.ones(1, WIDTH)
    for _ in range(2):
        with (
            pytest.raises(RuntimeError, match=r"1 adapted layers .* ran: 1\.proj\. "),
            store.batch(["one"]),
        ):
            model(x)
    with store.batch([None]):
        model(x)
    with store.batch(["one"]):  # neither ran: nothing is known
        model[0](x)
    model[1].fused = False
    with store.batch(["one"]):
        model(x)
    model[1].fused = True
    with store.batch(["one"]):  # it has been called once, as a cross-attention's keys are
        model(x)
    with pytest.raises(KeyError, match="own"), store.batch(["one"]):
        raise KeyError("own")
    assert not any(module._forward_pre_hooks for module in model.modules())
    store.close()


def test_a_part_that_never_runs_costs_a_batch_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"text": Fused(), "tower": Fused()})
    model.text.fused = False  # type: ignore[assignment,union-attr]
    store = lk.AdapterStore(model, max_adapters=2, max_rank=2)
    store.load("one", make_adapter(model, 1, r=2, targets=("proj", "out")))
    for owner in (nn.Module, modules):
        monkeypatch.setattr(owner, "named_modules", None)
    x = torch.ones(1, WIDTH)
    for _ in range(2):
        with store.batch(["one"]):
            model["text"](x)
        assert list(store._books.uncalled) == [model["tower"]]
    with pytest.raises(RuntimeError, match=r"1 adapted layers .* ran: tower\.proj\. "), store.batch(["one"]):
        model["tower"](x)
    model["tower"].compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"1 adapted layers "), store.batch(["one"]):
        model["tower"](x)
    with store.batch([None]):
        model["tower"](x)
