"""Every row of a batch has its own adapter's answer, in nested batches, threads, tasks and backward."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from served_net import WIDTH, Adapter, Net, alone, make_adapter, make_ids, make_net, make_store, merged
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import lorakernels as lk
from lorakernels.serving import served
from lorakernels.serving.errors import StaleBatchError

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


def test_plans_are_kept_of_the_last_shapes_alone(
    net: Net, base: Net, three: dict[str, Adapter], store: lk.AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "_KEPT_PLANS", 2)
    with store.batch(["alice", "bob"]):
        for length in (1, 2, 3, 1, 3):
            ids = make_ids(2, length)
            torch.testing.assert_close(net(ids), alone(base, [three["alice"], three["bob"]], ids), rtol=0, atol=1e-10)
        [batch] = served._batches.get().values()
        assert {tuple(route.plans) for route in batch._routes.values()} == {((2, 3), (2, 1))}


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


def test_a_rows_bits_do_not_depend_on_the_others_adapters(net: Net, three: dict[str, Adapter]) -> None:
    others = ([None] * 3, ["alice"] * 3, ["bob", "carol", None], ["carol", "bob", "bob"])
    for lengths, ids in ((None, make_ids(4)), ([2, 4, 1, 3], make_ids(1, 10))):
        found = {}
        for invariant in (True, False):
            store = make_store(net, three, invariant=invariant)
            found[invariant] = []
            for rows in others:
                with store.batch(["alice", *rows], lengths=lengths), torch.no_grad():
                    found[invariant].append(net(ids)[0, : 2 if lengths else 3])
            store.close()
        assert all(torch.equal(each, found[True][0]) for each in found[True])
        torch.testing.assert_close(found[True][0], found[False][0])
