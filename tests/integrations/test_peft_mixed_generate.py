"""Mixed batches in a model that generates: never an adapter of an earlier call."""

from __future__ import annotations

import copy
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from accelerated import EXACT, IN, config, randomised
from mixed import ADAPTERS, BASE, MIXED, RANKS, models
from peft import LoraConfig, get_peft_model

import lorakernels as lk
from lorakernels.integrations import peft_mixed

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")


def llama(dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, pad_token_id=0, **sizes))
    plain = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"), adapter_name="a0")
    for i, r in enumerate(RANKS[1:], 1):
        target = ["q_proj", "down_proj"] if i % 2 else "all-linear"
        plain.add_adapter(f"a{i}", LoraConfig(r=r, target_modules=target))
    plain = randomised(plain.to(dtype), std=0.4).eval()
    fast = copy.deepcopy(plain)
    lk.accelerate(fast)
    return plain, fast


def generated(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6, **options}
    return model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)


def test_generate(products: list[tuple[Any, ...]]) -> None:
    plain, fast = llama()
    tokens = torch.randint(1, 64, (len(MIXED), 5))
    ours = generated(fast, tokens, adapter_names=MIXED)
    assert len(products) == 2 * 7 * 6  # each of the layers' projections, at every step
    assert len({id(args[4]) for args in products}) == 4  # a plan for the prompt, one for the steps, by who is there
    assert torch.equal(ours, generated(plain, tokens, adapter_names=MIXED))
    assert not peft_mixed._packs
    for row, name in enumerate(MIXED):
        if name == BASE:
            with fast.disable_adapter():
                alone = generated(fast, tokens[row : row + 1])
        else:
            fast.set_adapter(name)
            alone = generated(fast, tokens[row : row + 1])
        assert torch.equal(alone[0], ours[row]), name


def test_plans_do_not_add_up_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = llama()
    plans: weakref.WeakSet[Any] = weakref.WeakSet()
    alive: list[int] = []

    def made(*args: Any, **kwargs: Any) -> Any:
        plans.add(plan := lk.BatchPlan(*args, **kwargs))
        alive.append(len(plans))
        return plan

    monkeypatch.setattr(peft_mixed, "BatchPlan", made)
    tokens = torch.randint(1, 64, (3, 5))
    generated(fast, tokens, adapter_names=["a1", BASE, "a2"], use_cache=False, min_new_tokens=24, max_new_tokens=24)
    # What lru_cache holds, and the last of each layer's.
    assert len(alive) >= 24 and max(alive) <= 12


def test_beams_and_several_sequences() -> None:
    plain, fast = llama()
    tokens, names = torch.randint(1, 64, (3, 5)), ["a1", BASE, "a2"]
    for options in ({"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}):
        ours = generated(fast, tokens, adapter_names=names, **options)
        assert torch.equal(ours, generated(plain, tokens, adapter_names=names, **options))


def test_edits_between_two_calls_are_seen() -> None:
    """Also those that leave no version and no address behind, and those while a hook of ours stays."""
    plain, fast = llama()
    tokens = torch.randint(1, 64, (len(MIXED), 5))
    seen = [generated(fast, tokens, adapter_names=MIXED)]

    def edit(change: Callable[[nn.Module], None]) -> None:
        for model in (plain, fast):
            for module in model.modules():
                if isinstance(module, nn.ModuleDict) and "a3" in module:
                    change(module)

    def in_place(adapters: Any) -> None:
        if hasattr(adapters["a3"], "weight"):
            adapters["a3"].weight.data.mul_(-3)

    def swapped(adapters: Any) -> None:
        if hasattr(adapters["a3"], "weight"):
            adapters["a3"].weight.data = adapters["a3"].weight.data.flip(0)

    def replaced(adapters: Any) -> None:
        if hasattr(adapters["a3"], "weight"):
            adapters["a3"].weight = nn.Parameter(adapters["a3"].weight.detach() * 2, requires_grad=False)

    for change in (in_place, swapped, replaced):
        edit(change)
        seen.append(generated(fast, tokens, adapter_names=MIXED))
        assert torch.equal(seen[-1], generated(plain, tokens, adapter_names=MIXED))
    rows = torch.tensor([name == "a3" for name in MIXED])
    for before, after in itertools.pairwise(seen):
        assert not torch.equal(before[rows], after[rows])
        assert torch.equal(before[~rows], after[~rows])


def test_nothing_is_kept_of_a_call_that_raised() -> None:
    """PEFT leaves its hooks then, with the same list of names."""
    plain, fast = models(*ADAPTERS["equal ranks"])
    names, x = list(MIXED), torch.randn(len(MIXED), IN, dtype=torch.float64)

    def interrupted(*_: Any) -> None:
        raise InterruptedError

    for model in (plain, fast):
        last = list(model.base_model.model.children())[-1]
        hook = last.register_forward_pre_hook(interrupted)
        for _ in range(3):
            with torch.no_grad(), pytest.raises(InterruptedError):
                model(x, adapter_names=names)
        hook.remove()
        for module in model.modules():
            if isinstance(module, nn.ModuleDict) and "a3" in module and hasattr(module["a3"], "weight"):
                module["a3"].weight.data.mul_(-3)
    assert len(peft_mixed._packs) == 1, "of the last call alone"
    with torch.no_grad():
        torch.testing.assert_close(fast(x, adapter_names=names), plain(x, adapter_names=names), rtol=EXACT, atol=EXACT)
    assert not peft_mixed._packs


def test_packs_of_an_interrupted_call_go_with_the_next_accelerate_or_restore() -> None:
    for end in (lk.accelerate, lk.restore):
        _, fast = models(*ADAPTERS["equal ranks"])

        def interrupted(*_: Any) -> None:
            raise InterruptedError

        list(fast.base_model.model.children())[-1].register_forward_pre_hook(interrupted)
        with torch.no_grad(), pytest.raises(InterruptedError):
            fast(torch.randn(len(MIXED), IN, dtype=torch.float64), adapter_names=MIXED)
        assert peft_mixed._packs
        end(fast)
        assert not peft_mixed._packs


def test_two_threads_at_once() -> None:
    """Each registers its hooks on the layers while the other looks through them."""
    deep = nn.Sequential(*[nn.Linear(IN, IN) for _ in range(14)])
    model = get_peft_model(deep, LoraConfig(r=4, target_modules=[str(i) for i in range(14)]), adapter_name="a0").eval()
    lk.accelerate(model)
    x = torch.randn(2, IN)
    faults = []

    def serve() -> None:
        try:
            with torch.no_grad():
                for _ in range(400):
                    model(x, adapter_names=["a0", BASE])
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_what_changes_within_a_call_makes_a_new_pack() -> None:
    plain, fast = models(*ADAPTERS["equal ranks"])
    names = list(MIXED)
    x = torch.randn(len(names), IN, dtype=torch.float64)

    def counted(layer: Any) -> None:
        with torch.no_grad():
            layer.lora_B["a3"].weight.mul_(2)

    def another_module(layer: Any) -> None:
        layer.lora_A["a2"] = copy.deepcopy(layer.lora_A["a2"])
        layer.lora_A["a2"].weight.data.neg_()

    def rescaled(layer: Any) -> None:
        layer.set_scale("a4", 3.0)

    def renamed(layer: Any) -> None:
        names[0] = "a7"

    def base_swapped(layer: Any) -> None:
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach() * 2)

    with (
        torch.no_grad(),
        plain.base_model._enable_peft_forward_hooks(adapter_names=names),
        fast.base_model._enable_peft_forward_hooks(adapter_names=names),
    ):
        before = fast.base_model.model(x)
        kept = list(peft_mixed._packs.values())
        fast.base_model.model(x)
        assert len(kept) == 2 and all(a is b for a, b in zip(kept, peft_mixed._packs.values(), strict=True))
        for change in (counted, another_module, rescaled, renamed, base_swapped):
            for model in (plain, fast):
                change(model.base_model.model.up)
            after = fast.base_model.model(x)
            torch.testing.assert_close(after, plain.base_model.model(x), rtol=EXACT, atol=EXACT)
            assert not torch.equal(before, after), change.__name__
            before = after
    assert not peft_mixed._packs


def test_a_layer_called_directly_keeps_nothing() -> None:
    _, fast = models(config(), config())
    layer, x = fast.base_model.model.up, torch.randn(2, IN, dtype=torch.float64)
    with torch.no_grad():
        before = layer(x, adapter_names=["a0", "a1"])
        assert not peft_mixed._packs
        layer.lora_A["a0"].weight.data.neg_()
        after = layer(x, adapter_names=["a0", "a1"])
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
