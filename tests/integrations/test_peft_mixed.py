"""PEFT's mixed batches accelerated: what PEFT's own loop gives, and never an adapter of an earlier call."""

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
from accelerated import EXACT, IN, Two, assert_equal, config, randomised
from peft import LoraConfig, get_peft_model

import lorakernels as lk
from lorakernels.integrations import peft_mixed

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

RANKS = (4, 7, 1, 4, 16, 4, 2, 5)
BASE = "__base__"
MIXED = ["a0", "a1", BASE, "a2", "a3", "a4", "a0", "a5", "a6", "a7", "a3", "a3"]


def models(*configs: LoraConfig, dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Any, Any]:
    """PEFT's model with adapters a0, a1, … and its accelerated copy, both to infer with."""
    torch.manual_seed(0)
    plain = get_peft_model(Two(bias).to(dtype), configs[0], adapter_name="a0")
    for i, other in enumerate(configs[1:], 1):
        plain.add_adapter(f"a{i}", other)
    plain = randomised(plain.to(dtype)).eval()
    fast = copy.deepcopy(plain)
    lk.accelerate(fast)
    return plain, fast


def values_and_gradients(model: Any, x: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    for parameter in model.parameters():
        parameter.requires_grad_()
    x = x.clone().requires_grad_()
    y = model(x, adapter_names=names)
    weight = torch.arange(1, y.numel() + 1, dtype=y.dtype).view_as(y) / y.numel()
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad((y * weight).sum(), [x, *parameters.values()], allow_unused=True)
    found = {"y": y.detach(), "dx": gradients[0]}
    # A gradient that PEFT leaves out, of an adapter without a row, may also be zero.
    return found | {
        name: torch.zeros_like(parameters[name]) if g is None else g
        for name, g in zip(parameters, gradients[1:], strict=True)
    }


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every multi-adapter product, and its plan."""
    calls: list[tuple[Any, ...]] = []
    real: Callable[..., Any] = peft_mixed._product

    def spy(pack: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> Any:
        calls.append((pack, x, weight, bias, pack.plan(x[0, ..., 0].numel())))
        return real(pack, x, weight, bias)

    monkeypatch.setattr(peft_mixed, "_product", spy)
    return calls


ADAPTERS = {
    "mixed ranks": [config(r=r, lora_alpha=3 + r) for r in RANKS],
    "equal ranks": [config() for _ in RANKS],
    "rslora": [config(r=r, use_rslora=True) for r in RANKS],
    "rank_pattern": [config(r=r, rank_pattern={"up": 9 - r % 4}, alpha_pattern={"down": 1.7}) for r in RANKS],
    "missing on some layers": [
        config(r=r, target_modules=["down"] if i in (1, 7) else ["up"] if i == 3 else ["up", "down"])
        for i, r in enumerate(RANKS)
    ],
    "lora_bias": [config(r=r, lora_bias=i % 2 == 0) for i, r in enumerate(RANKS)],
    "ranks far apart": [config(r=1 if i else 3000) for i in range(8)],
    "dropout": [config(r=r, lora_dropout=0.5) for r in RANKS],
}
BATCHES = {
    "mixed": MIXED,
    "in order, equal lengths": [f"a{i // 2}" for i in range(16)],
    "interleaved": [f"a{i % 8}" for i in range(16)],
    "one for all": ["a4"] * 5,
    "one and the base": ["a4", BASE, "a4"],
    "the base alone": [BASE] * 3,
    "skewed": ["a0"] * 30 + ["a1"],
}


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("adapters", ["mixed ranks", "missing on some layers", "lora_bias"])
def test_parity(adapters: str, batch: str, lead: tuple[int, ...], fused: list[tuple[Any, ...]]) -> None:
    check(adapters, batch, lead)
    assert len(fused) == (0 if "base alone" in batch else 2 - (batch == "one for all") * 2)


@pytest.mark.parametrize("adapters", ["equal ranks", "rslora", "rank_pattern", "ranks far apart", "dropout"])
def test_parity_of_adapters(adapters: str, fused: list[tuple[Any, ...]]) -> None:
    check(adapters, "mixed", (3,))
    assert len(fused) == 2


def check(adapters: str, batch: str, lead: tuple[int, ...]) -> None:
    plain, fast = models(*ADAPTERS[adapters])
    names = BATCHES[batch]
    x = torch.randn(len(names), *lead, IN, dtype=torch.float64)
    assert_equal(values_and_gradients(fast, x, names), values_and_gradients(plain, x, names))


def test_parity_without_a_gradient(fused: list[tuple[Any, ...]]) -> None:
    """In `no_grad` and in inference mode packs are kept for the time of a call."""
    plain, fast = models(*ADAPTERS["mixed ranks"])
    for context in (torch.no_grad, torch.inference_mode):
        for tokens in (5, 1):
            x = torch.randn(len(MIXED), tokens, IN, dtype=torch.float64)
            with context():
                torch.testing.assert_close(
                    fast(x, adapter_names=MIXED), plain(x, adapter_names=MIXED), rtol=EXACT, atol=EXACT
                )
    assert len(fused) == 8
    assert not peft_mixed._packs


@pytest.mark.parametrize("names", [tuple(MIXED), MIXED], ids=["tuple", "list"])
def test_float32_adapters_of_a_bfloat16_layer(names: Any, fused: list[tuple[Any, ...]]) -> None:
    plain, fast = models(*ADAPTERS["mixed ranks"], dtype=torch.float32)
    for model in (plain, fast):
        for layer in (model.base_model.model.up, model.base_model.model.down):
            layer.base_layer.bfloat16()
    x = torch.randn(len(names), 3, IN).bfloat16()
    exact = copy.deepcopy(plain).double()(x.double(), adapter_names=names)
    ours, theirs = fast(x, adapter_names=names), plain(x, adapter_names=names)
    assert ours.dtype is theirs.dtype is torch.bfloat16
    assert len(fused) == 2
    # Our low-rank products are rounded to bfloat16 and PEFT's are not.
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 2**-7 * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain, fast = plain.float(), fast.float()
        ours, theirs = fast(x.float(), adapter_names=names), plain(x.float(), adapter_names=names)
    assert ours.dtype is theirs.dtype is torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2**-5, atol=2**-5)
    assert len(fused) == 4


def test_scaling_as_a_tensor_and_not_finite() -> None:
    plain, fast = models(config(), config(r=7), config())
    names = ["a0", "a1", BASE, "a2"]
    x = torch.randn(4, IN, dtype=torch.float64)
    for model in (plain, fast):
        for layer in (model.base_model.model.up, model.base_model.model.down):
            layer.scaling["a0"] = torch.tensor(0.3, dtype=torch.float64)
            layer.scaling["a2"] = float("inf")
    ours, theirs = fast(x, adapter_names=names), plain(x, adapter_names=names)
    torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT, equal_nan=True)
    assert not theirs[3].isfinite().all()


def test_a_scaling_past_float32() -> None:
    plain, fast = models(config(), config(), dtype=torch.float32)
    for model in (plain, fast):
        model.base_model.model.up.scaling["a1"] = 1e39
    x, names = torch.randn(3, IN), ["a0", "a1", BASE]
    ours, theirs = fast(x, adapter_names=names), plain(x, adapter_names=names)
    torch.testing.assert_close(ours, theirs)
    assert theirs.isfinite().all()


def test_base_rows_of_a_transposed_x_are_the_base_to_the_bit() -> None:
    _, fast = models(config(), config(), dtype=torch.bfloat16)
    layer, base = fast.base_model.model.up, fast.base_model.model.up.base_layer
    x = torch.randn(3, IN, 5, dtype=torch.bfloat16).transpose(1, 2)
    for layout in (x, x.detach().requires_grad_()):
        y = layer(layout, adapter_names=["a0", BASE, "a1"])
        assert torch.equal(y[1], base(layout)[1]) and not torch.equal(y[0], base(layout)[0])


@pytest.mark.parametrize("poison", [float("nan"), 1e4])
@pytest.mark.parametrize("batch", ["mixed", "in order, equal lengths", "interleaved", "skewed"])
@pytest.mark.parametrize("adapters", ["mixed ranks", "ranks far apart"])
def test_an_adapter_touches_no_other_row(adapters: str, batch: str, poison: float) -> None:
    _, fast = models(*ADAPTERS[adapters], dtype=torch.float32)
    layer, names = fast.base_model.model.up, BATCHES[batch]
    x = torch.randn(len(names), 3, IN)
    with torch.no_grad():
        clean = layer(x, adapter_names=names)
        layer.lora_A["a1"].weight.fill_(poison)
        layer.lora_B["a1"].weight.fill_(poison)
        dirty = layer(x, adapter_names=names)
        base = torch.nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    others = torch.tensor([name != "a1" for name in names])
    assert torch.equal(clean[others], dirty[others])
    assert not torch.equal(clean[~others], dirty[~others])
    of_base = torch.tensor([name == BASE for name in names])
    assert torch.equal(clean[of_base], base[of_base])


# ---- in a model that generates


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


def test_generate(fused: list[tuple[Any, ...]]) -> None:
    plain, fast = llama()
    tokens = torch.randint(1, 64, (len(MIXED), 5))
    ours = generated(fast, tokens, adapter_names=MIXED)
    assert len(fused) == 2 * 7 * 6  # each of the layers' projections, at every step
    assert len({id(args[4]) for args in fused}) == 4  # one plan for the prompt and one for the steps, by who is there
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


# ---- what stays PEFT's


def test_errors_are_pefts() -> None:
    x = torch.randn(2, IN, dtype=torch.float64)

    def unknown(model: Any) -> None:
        model(x, adapter_names=["a0", "nobody"])

    def training(model: Any) -> None:
        model.train()(x, adapter_names=["a0", "a1"])

    def too_few(model: Any) -> None:
        model(x, adapter_names=["a0"])

    def merged(model: Any) -> None:
        model.merge_adapter(["a0"])
        model(x, adapter_names=["a0", "a1"])

    def dora(model: Any) -> None:
        model(x, adapter_names=["a0", "a2"])

    for call in (unknown, training, too_few, merged, dora):
        raised = []
        for model in models(config(), config(), config(use_dora=True)):
            with pytest.raises(ValueError) as error:
                call(model)
            raised.append(str(error.value))
        assert raised[0] == raised[1] and raised[0]


def dropout_in_training(model: Any) -> None:
    model.base_model.model.up.train()


def hook_on_an_adapter(model: Any) -> None:
    model.base_model.model.up.lora_A["a1"].register_forward_hook(lambda module, args, y: 2 * y)


def hook_on_the_base(model: Any) -> None:
    model.base_model.model.up.base_layer.register_forward_hook(lambda module, args, y: 2 * y)


def another_base(model: Any) -> None:
    class Other(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    model.base_model.model.up.base_layer.__class__ = Other


@pytest.mark.parametrize("change", [dropout_in_training, hook_on_an_adapter, hook_on_the_base, another_base])
def test_pefts_own_forward_where_the_fused_one_cannot_be(change: Any, fused: list[tuple[Any, ...]]) -> None:
    outputs = []
    x = torch.randn(3, IN, dtype=torch.float64)
    for model in models(config(lora_dropout=0.4), config(lora_dropout=0.4)):
        with torch.no_grad():
            usual = model.base_model.model.up(x, adapter_names=["a0", BASE, "a1"])
            change(model)
            torch.manual_seed(1)
            outputs.append(model.base_model.model.up(x, adapter_names=["a0", BASE, "a1"]))
        assert not torch.equal(usual, outputs[-1])
    assert torch.equal(*outputs)
    assert len(fused) == 1  # the one before the change


def test_disabled_adapters_and_restore(fused: list[tuple[Any, ...]]) -> None:
    plain, fast = models(config(), config(r=7))
    x, names = torch.randn(3, IN, dtype=torch.float64), ["a0", BASE, "a1"]
    with plain.disable_adapter(), fast.disable_adapter():
        assert torch.equal(fast(x, adapter_names=names), plain(x, adapter_names=names))
    lk.restore(fast)
    with torch.no_grad():
        assert torch.equal(fast(x, adapter_names=names), plain(x, adapter_names=names))
    assert not fused
    lk.accelerate(fast)
    with torch.no_grad():
        fast(x, adapter_names=names)
    assert len(fused) == 2
    assert not any("lorakernels" in str(value) for module in fast.modules() for value in module.__dict__.values())
