"""AdapterStore: every row has its own adapter's answer, whatever comes and goes; what is refused changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import gc
import io
import itertools
import json
import os
import pickle
import random
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointError, checkpoint

import lorakernels as lk
from lorakernels.config import scaling_of
from lorakernels.files.config_file import fields_of
from lorakernels.serving.books import Books, Version
from lorakernels.serving.errors import CapacityError, StaleBatchError
from lorakernels.serving.pools import Pool, Writer
from lorakernels.serving.served import ServedEmbedding, ServedLinear

VOCABULARY, WIDTH, INNER = 13, 8, 12
ALL = ("q_proj", "up", "down", "embed")
Adapter = tuple[lk.LoRAConfig, dict[str, torch.Tensor]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.down(torch.tanh(self.up(self.q_proj(h))))


class Net(nn.Module):
    """Every row [L] of ids on its own, so that a row alone and in a batch are the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def make_net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).requires_grad_(False).eval()


def make_ids(rows: int, length: int = 3) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length))


def make_adapter(net: nn.Module, seed: int, r: int = 4, targets: tuple[str, ...] = ALL, **fields: Any) -> Adapter:
    """Random factors for every module that `targets` names, by the keys of PEFT's files."""
    config = lk.LoRAConfig(r=r, lora_alpha=fields.pop("lora_alpha", 3), target_modules=list(targets), **fields)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, module in net.named_modules():
        leaf = path.rpartition(".")[2]
        if leaf in targets and isinstance(module, (nn.Linear, nn.Embedding)):
            rank = config.rank_pattern.get(path, r)
            of_embedding = isinstance(module, nn.Embedding)
            A, B = ("lora_embedding_A", "lora_embedding_B") if of_embedding else ("lora_A.weight", "lora_B.weight")
            N, K = module.weight.shape[::-1] if of_embedding else module.weight.shape
            options: Any = {"generator": generator, "dtype": module.weight.dtype}
            tensors[f"base_model.model.{path}.{A}"] = torch.randn(rank, K, **options) / 3
            tensors[f"base_model.model.{path}.{B}"] = torch.randn(N, rank, **options) / 3
    return config, tensors


def write(folder: Path, adapter: Adapter, **fields: Any) -> Path:
    config, tensors = adapter
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields_of(config)))
    save_file(tensors, folder / "adapter_model.safetensors")
    if fields:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def merged(net: nn.Module, adapter: Adapter | None) -> nn.Module:
    """The oracle: W + scaling · B A in the weights, in float64."""
    net = copy.deepcopy(net).double()
    if adapter is None:
        return net
    config, tensors = adapter
    for key, A in tensors.items():
        path, _, name = key.removeprefix("base_model.model.").partition(".lora_")
        if name in ("A.weight", "embedding_A"):
            B = tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            scaling = scaling_of(config.alpha_pattern.get(path, config.lora_alpha), len(A), config.use_rslora)
            update = scaling * B.double() @ A.double()
            net.get_submodule(path).weight.data += update.T if name == "embedding_A" else update
    return net


def alone(net: nn.Module, adapters: list[Adapter | None], ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([merged(net, adapter)(row[None]) for adapter, row in zip(adapters, ids, strict=True)])


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


def make_store(net: nn.Module, adapters: Mapping[str, Adapter | Path], **options: Any) -> lk.AdapterStore:
    store = lk.AdapterStore(net, **({"max_adapters": 4, "max_rank": 8} | options))
    for name, adapter in adapters.items():
        store.load(name, adapter)
    return store


def books(store: lk.AdapterStore) -> tuple[Any, ...]:
    """All that a failed call must leave as it was."""
    stats, current = store.stats(), store._books.current
    free = [sorted(pool.free) for pool in store._pools]
    pools = [None if pool.memory is None else pool.memory.clone() for pool in store._pools]
    kept = (
        stats.adapters,
        stats.on_device,
        stats.in_host,
        stats.pinned,
        stats.in_use,
        stats.used_bytes,
        stats.host_bytes,
    )
    return dict(current), kept, free, [None if memory is None else memory.tolist() for memory in pools]


# ------------------------------------------------------------------------------------------- the right answer

ROWS = ["bob", None, "alice", "carol", "alice"]


def test_each_row_is_its_adapter_alone(net: Net, base: Net, three: dict[str, Adapter], store: lk.AdapterStore) -> None:
    ids = make_ids(len(ROWS))
    expected = alone(base, [three.get(row or "") for row in ROWS], ids)
    with store.batch(ROWS):
        y, again = net(ids), net(ids[:, :2])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(again, expected[:, :2], rtol=0, atol=1e-10)
    assert torch.equal(y[1], base(ids)[1])
    assert torch.equal(net(ids), base(ids)), "outside a batch the model is the base"


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("poison", [float("nan"), 1e4])
def test_an_adapter_touches_no_other_row(impl: str, poison: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKERNELS_IMPL", impl)
    net = make_net(torch.float32)
    adapters = {name: make_adapter(net, i, r=i + 2) for i, name in enumerate(("alice", "bob"))}
    store, ids = make_store(net, adapters), make_ids(3)
    rows = ["alice", "bob", None]
    with store.batch(rows):
        clean = net(ids)
    torch.testing.assert_close(
        clean.double(), alone(net, [adapters.get(row or "") for row in rows], ids), atol=1e-4, rtol=0
    )
    for pool, pages in store._books.current["bob"].pages.items():
        pool.memory[list(pages)] = poison
    with store.batch(rows):
        poisoned = net(ids)
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]]) and not torch.equal(poisoned[1], clean[1])
    assert torch.equal(clean[2:], make_net(torch.float32)(ids)[2:])


def test_a_file_of_peft(net: Net, base: Net, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down", "embed"], init_lora_weights=False,
        rank_pattern={"layers.1.q_proj": 2}, alpha_pattern={"layers.0.down": 5}, use_rslora=True,
    )  # fmt: skip
    model = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False).eval()
    model.save_pretrained(tmp_path / "one")
    store, ids = make_store(net, {"one": tmp_path / "one"}), make_ids(2)
    with store.batch(["one", None]):
        torch.testing.assert_close(net(ids)[0], model(ids)[0], rtol=0, atol=1e-10)


def test_ranks_and_scalings_that_differ_within_a_class(net: Net, base: Net) -> None:
    patterns = {"rank_pattern": {"layers.1.up": 6, "layers.0.q_proj": 1}, "alpha_pattern": {"layers.0.up": -9}}
    adapter = make_adapter(net, 5, r=3, **patterns)
    store, ids = make_store(net, {"one": adapter}), make_ids(1)
    with store.batch(["one"]):
        torch.testing.assert_close(net(ids), alone(base, [adapter], ids), rtol=0, atol=1e-10)


@pytest.mark.parametrize("lora_alpha", [0.0, 1e-50, 1e-44, -1e30])
def test_scalings_that_float32_cannot_hold(net: Net, base: Net, lora_alpha: float) -> None:
    config, tensors = make_adapter(net, 5, targets=("embed",), lora_alpha=lora_alpha)
    up = max(1.0, 1 / abs(lora_alpha or 1))  # for the update to be seen
    adapter = config, {key: t * up if "embedding_B" in key else t for key, t in tensors.items()}
    store, ids = make_store(net, {"one": adapter}), make_ids(1)
    with store.batch(["one"]):
        torch.testing.assert_close(net.embed(ids), merged(base, adapter).embed(ids), rtol=1e-10, atol=0)  # type: ignore[operator]


def test_rows_that_are_repeated_or_packed(
    net: Net, base: Net, three: dict[str, Adapter], store: lk.AdapterStore
) -> None:
    ids = make_ids(6)
    expected = alone(base, [three["bob"]] * 3 + [three["alice"]] * 3, ids)
    with store.batch(["bob", "alice"]):
        torch.testing.assert_close(net(ids), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(net(ids.flatten()), expected.flatten(0, 1), rtol=0, atol=1e-10)
    packed = ids.flatten()[None]
    with store.batch(["bob", None, "alice"], lengths=list(np.array([4, 0, 14]))):
        y = net(packed)[0]
    expected = torch.cat([merged(base, three["bob"])(packed[0, :4]), merged(base, three["alice"])(packed[0, 4:])])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)


def test_no_adapter_is_the_base_to_the_bit(net: Net, base: Net, store: lk.AdapterStore) -> None:
    ids = make_ids(2)
    for rows in ([None, None], []):
        with store.batch(rows):
            assert torch.equal(net(ids), base(ids))
    with store.batch(["alice", None]):
        assert net(ids[:0]).shape == (0, 3, 5) and net(ids[:, :0]).shape == (2, 0, 5)
    lonely = lk.AdapterStore(make_net())
    with lonely.batch([None]):
        assert torch.equal(lonely.model(ids), base(ids))


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rows second": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features second": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "a slice": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "four dimensions": lambda x: x[:, None].transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_adapter_is_the_base_to_the_bit_for_any_strides(
    layout: str, cast: torch.dtype | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32)).to(dtype)
    adapter, x = make_adapter(net, 1, targets=("0",)), LAYOUTS[layout](torch.randn(4, 17, 16, dtype=dtype))
    store = make_store(net, {"one": adapter})
    with torch.autocast("cpu", cast, enabled=cast is not None):
        expected = net(x)
        with store.batch([None, "one", None, None]):
            y = net(x)
    assert y.dtype == expected.dtype and torch.equal(y[[0, 2, 3]], expected[[0, 2, 3]])
    if dtype is torch.float64 and cast is None:
        torch.testing.assert_close(y[1], merged(net, adapter)(x)[1], rtol=0, atol=1e-12)


def test_batches_in_each_other_and_in_threads(
    net: Net, base: Net, three: dict[str, Adapter], store: lk.AdapterStore
) -> None:
    ids = make_ids(1)
    with store.batch(["alice"]):
        first = net(ids)
        with store.batch(["bob"]):
            inner = net(ids)
        assert torch.equal(net(ids), first)
    torch.testing.assert_close(inner, alone(base, [three["bob"]], ids), rtol=0, atol=1e-10)

    wrong: list[str] = []
    start = threading.Barrier(4)

    def serve(name: str | None) -> None:
        expected = alone(base, [three.get(name or "")], ids)
        start.wait()
        for _ in range(20):
            with store.batch([name]):
                if not torch.allclose(net(ids), expected, rtol=0, atol=1e-10):
                    wrong.append(str(name))

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("alice", "bob", "carol", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_batches_that_end_in_another_order(net: Net, base: Net, store: lk.AdapterStore) -> None:
    ids = make_ids(1)
    first, second = store.batch(["alice"]), store.batch(["bob"])
    with store.batch(["bob"]):
        bob = net(ids)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(net(ids), bob)
    contextvars.copy_context().run(second.__exit__, None, None, None)
    with pytest.raises(StaleBatchError):  # closed elsewhere; nobody else's answer
        net(ids)
    with store.batch(["bob"]):
        assert torch.equal(net(ids), bob)
    assert torch.equal(net(ids), base(ids)) and not store.stats().in_use


def test_a_generator_and_a_batch(net: Net, base: Net, store: lk.AdapterStore) -> None:
    """One that yields within a batch has its thread in it, as documented; its end, in any order, leaves nothing."""
    ids = make_ids(1)

    @contextlib.contextmanager
    def serving(name: str) -> Iterator[None]:
        with store.batch([name]):
            yield

    def wrong() -> Iterator[torch.Tensor]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(serving("alice"))
            yield net(ids)

    async def asynchronous() -> AsyncIterator[torch.Tensor]:
        with store.batch(["alice"]):
            yield net(ids)

    def step() -> torch.Tensor:
        with serving("alice"):
            return net(ids)

    def steps() -> Iterator[torch.Tensor]:
        yield step()

    alice = next(steps())
    assert not torch.equal(alice, base(ids)) and torch.equal(net(ids), base(ids))
    held = wrong()
    assert torch.equal(next(held), alice) and torch.equal(net(ids), alice)
    with store.batch(["bob"]):
        bob = net(ids)
        held.close()
        assert torch.equal(net(ids), bob)
    assert torch.equal(asyncio.run(asynchronous().__anext__()), alice)  # type: ignore[arg-type]
    assert torch.equal(net(ids), base(ids))
    gc.collect()
    assert not store.stats().in_use


def test_torchs_default_device_does_not_matter(net: Net, three: dict[str, Adapter]) -> None:
    ids, store = make_ids(2), make_store(net, {"bob": three["bob"]})
    with torch.device("meta"):
        store.load("alice", three["alice"])
        with store.batch(["alice", "bob"]):
            there = net(ids)
        with store.batch(["alice", "bob"], lengths=[2, 4]):
            net(ids.view(-1))
    with store.batch(["alice", "bob"]):
        assert torch.equal(net(ids), there)


def test_gradient_of_x(net: Net, base: Net, three: dict[str, Adapter]) -> None:
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():  # which makes the pools
        store = make_store(net, three)
    with store.batch(["bob", None]):
        with torch.inference_mode():
            net.layers[0](x.detach())  # makes the plan that the next line uses
        [dx] = torch.autograd.grad(net.layers[0](x).square().sum(), x)
    oracle = [merged(base, adapter).layers[0] for adapter in (three["bob"], None)]  # type: ignore[index]
    [expected] = torch.autograd.grad(sum(one(x[i]).square().sum() for i, one in enumerate(oracle)), x)
    torch.testing.assert_close(dx, expected, rtol=0, atol=1e-10)


def test_a_backward_within_a_batch_bears_what_is_written_meanwhile_and_none_comes_later(
    net: Net, base: Net, three: dict[str, Adapter]
) -> None:
    store = make_store(net, {"alice": three["alice"]})
    x = torch.randn(1, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    [expected] = torch.autograd.grad(merged(base, three["alice"]).layers[0](x).sum(), x)  # type: ignore[index]
    with store.batch(["alice"]):
        y, late = net.layers[0](x), net.layers[0](x)
        embedded = net.embed.requires_grad_()(make_ids(1))
        store.load("bob", three["bob"]), store.evict("bob"), store.load("carol", three["carol"])
        with store.batch(["carol"]):
            [dx] = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, expected, rtol=0, atol=1e-10)
    for of_ended in (late, embedded):
        with pytest.raises(StaleBatchError, match="backward within `with`"):
            of_ended.sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_within_a_batch(
    net: Net, base: Net, three: dict[str, Adapter], store: lk.AdapterStore, use_reentrant: bool
) -> None:
    x = torch.randn(1, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    [expected] = torch.autograd.grad(merged(base, three["bob"]).layers[0](x).square().sum(), x)  # type: ignore[index]
    with store.batch(["bob"]):
        late = checkpoint(net.layers[0], x, use_reentrant=use_reentrant)
        checkpoint(net.layers[0], x, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-10)
    if not use_reentrant:
        with pytest.raises((StaleBatchError, CheckpointError)):
            late.sum().backward()


def test_a_compiled_model_is_compiled_once(
    net: Net, base: Net, three: dict[str, Adapter], store: lk.AdapterStore
) -> None:
    torch._dynamo.reset()
    compiled, ids = torch.compile(net, backend="eager"), make_ids(2)
    for i, rows in enumerate((["alice", None], ["bob", "alice"], [None, None], ["carol", "carol"])):
        with store.batch(rows), torch.compiler.set_stance("fail_on_recompile" if i else "default"), torch.no_grad():
            expected = alone(base, [three.get(row or "") for row in rows], ids)
            torch.testing.assert_close(compiled(ids), expected, rtol=0, atol=1e-10)


def test_generate_mixed_rows(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    base = copy.deepcopy(model)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head")
    adapters = {name: make_adapter(model, i, r=r, targets=targets) for i, (name, r) in enumerate([("a", 3), ("b", 8)])}
    store = make_store(model, adapters)
    ids = torch.randint(1, 40, (4, 5))
    rows = ["b", None, "a", "b"]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

    def tokens(net: Any, ids: torch.Tensor, **more: Any) -> list[list[int]]:
        return net.generate(ids, attention_mask=torch.ones_like(ids), **options, **more).tolist()

    each = [tokens(merged(base, adapters.get(row or "")), ids[i : i + 1]) for i, row in enumerate(rows)]
    with store.batch(rows):
        assert tokens(model, ids) == [row for [row] in each]
    assert len({tuple(row[0]) for row in each}) == 4 and tokens(model, ids) == tokens(base, ids)
    beams: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
    with store.batch(rows[:3]):
        found = tokens(model, ids[:3], **beams)
    expected = [
        tokens(merged(base, adapters.get(row or "")), ids[i : i + 1], **beams) for i, row in enumerate(rows[:3])
    ]
    assert found == [row for pair in expected for row in pair]
    with store.batch(rows[:1]):
        assert tokens(model, ids[:1], use_cache=False) == each[0]


# ------------------------------------------------------------------------------------------- many come and go


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


# ------------------------------------------------------------------------------------------- main memory and files


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


def test_a_batch_waits_for_no_prefetch_that_has_not_begun(
    net: Net, base: Net, three: dict[str, Adapter], tmp_path: Path
) -> None:
    adapters = {"first": three["alice"], **three}
    folders = {name: write(tmp_path / name, adapter) for name, adapter in adapters.items()}
    store, ids = make_store(net, folders, max_adapters=2, host_bytes=0), make_ids(1)
    before, real = store.stats(), store._books._read
    begun, go_on = threading.Event(), threading.Event()

    def slow(source: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(10)
        return real(source)

    store._books._read = slow
    for name in adapters:  # of which bob and carol are on the device
        store.prefetch(name)
    assert begun.wait(10)
    first = store._prefetches["first"]
    try:
        for name in ("bob", "carol", "alice"):
            with store.batch([name]):
                torch.testing.assert_close(net(ids), alone(base, [three[name]], ids), rtol=0, atol=1e-10)
        assert not first.done() and list(store._prefetches) == ["first"]
    finally:
        go_on.set()
    assert first.exception() is None
    stats = store.stats()
    assert (stats.hits - before.hits, stats.misses - before.misses, stats.reads - before.reads) == (2, 1, 2)
    assert (stats.on_device, stats.in_use) == (2, 0)
    assert stats.used_bytes == sum(version.nbytes for version in store._books.on_device)


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


# ------------------------------------------------------------------------------------------- what is refused


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
    root, outside = tmp_path / "root", write(tmp_path / "outside", three["alice"])
    inside = write(root / "inside", three["alice"])
    (root / "link").symlink_to(outside)
    (root / "good").symlink_to(inside)
    (root / "halves").mkdir()
    for file in outside.iterdir():
        (root / "halves" / file.name).symlink_to(file)
    store = lk.AdapterStore(net, root=root)
    for folder in ("../outside", str(outside), "link", "halves", "inside/../../outside", "a\0b", "nothing", "."):
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
    ("alpha", lambda a: a, {"lora_alpha": 1e300}, lk.AdapterFileError, "scaling"),
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


# ------------------------------------------------------------------------------------------- the model


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
