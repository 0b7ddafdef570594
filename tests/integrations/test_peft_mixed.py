"""PEFT's mixed batches accelerated: what PEFT's own loop gives, and what stays PEFT's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from accelerated import EXACT, IN, assert_equal, config
from mixed import ADAPTERS, BASE, MIXED, models

import lorakernels as lk
from lorakernels.integrations import peft_mixed

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")


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
def test_parity(adapters: str, batch: str, lead: tuple[int, ...], products: list[tuple[Any, ...]]) -> None:
    check(adapters, batch, lead)
    assert len(products) == (0 if "base alone" in batch else 2 - (batch == "one for all") * 2)


@pytest.mark.parametrize("adapters", ["equal ranks", "rslora", "rank_pattern", "ranks far apart", "dropout"])
def test_parity_of_adapters(adapters: str, products: list[tuple[Any, ...]]) -> None:
    check(adapters, "mixed", (3,))
    assert len(products) == 2


def check(adapters: str, batch: str, lead: tuple[int, ...]) -> None:
    plain, fast = models(*ADAPTERS[adapters])
    names = BATCHES[batch]
    x = torch.randn(len(names), *lead, IN, dtype=torch.float64)
    assert_equal(values_and_gradients(fast, x, names), values_and_gradients(plain, x, names))


def test_parity_without_a_gradient(products: list[tuple[Any, ...]]) -> None:
    """In `no_grad` and in inference mode packs are kept for the time of a call."""
    plain, fast = models(*ADAPTERS["mixed ranks"])
    for context in (torch.no_grad, torch.inference_mode):
        for tokens in (5, 1):
            x = torch.randn(len(MIXED), tokens, IN, dtype=torch.float64)
            with context():
                torch.testing.assert_close(
                    fast(x, adapter_names=MIXED), plain(x, adapter_names=MIXED), rtol=EXACT, atol=EXACT
                )
    assert len(products) == 8
    assert not peft_mixed._packs


def test_reentrant_checkpointing(products: list[tuple[Any, ...]]) -> None:
    """The first run of a region has no gradients, and what is kept of it is not for the second."""
    x, found = torch.randn(len(MIXED), 3, IN, dtype=torch.float64), []
    for model in models(*ADAPTERS["mixed ranks"]):
        model.requires_grad_()
        leaf = x.clone().requires_grad_()
        with model.base_model._enable_peft_forward_hooks(adapter_names=MIXED):
            checkpoint(model.base_model.model, leaf, use_reentrant=True).square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"x": leaf.grad, **gradients})
    assert_equal(found[1], found[0])
    assert len(products) == 4


@pytest.mark.parametrize("names", [tuple(MIXED), MIXED], ids=["tuple", "list"])
def test_float32_adapters_of_a_bfloat16_layer(names: Any, products: list[tuple[Any, ...]]) -> None:
    plain, fast = models(*ADAPTERS["mixed ranks"], dtype=torch.float32)
    for model in (plain, fast):
        for layer in (model.base_model.model.up, model.base_model.model.down):
            layer.base_layer.bfloat16()
    x = torch.randn(len(names), 3, IN).bfloat16()
    exact = copy.deepcopy(plain).double()(x.double(), adapter_names=names)
    ours, theirs = fast(x, adapter_names=names), plain(x, adapter_names=names)
    assert ours.dtype is theirs.dtype is torch.bfloat16
    assert len(products) == 2
    # Our low-rank products are rounded to bfloat16 and PEFT's are not.
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 2**-7 * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain, fast = plain.float(), fast.float()
        ours, theirs = fast(x.float(), adapter_names=names), plain(x.float(), adapter_names=names)
    assert ours.dtype is theirs.dtype is torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2**-5, atol=2**-5)
    assert len(products) == 4


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
def test_pefts_own_forward_where_the_fused_one_cannot_be(change: Any, products: list[tuple[Any, ...]]) -> None:
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
    assert len(products) == 1  # the one before the change


def test_disabled_adapters_and_restore(products: list[tuple[Any, ...]]) -> None:
    plain, fast = models(config(), config(r=7))
    x, names = torch.randn(3, IN, dtype=torch.float64), ["a0", BASE, "a1"]
    with plain.disable_adapter(), fast.disable_adapter():
        assert torch.equal(fast(x, adapter_names=names), plain(x, adapter_names=names))
    lk.restore(fast)
    with torch.no_grad():
        assert torch.equal(fast(x, adapter_names=names), plain(x, adapter_names=names))
    assert not products
    lk.accelerate(fast)
    with torch.no_grad():
        fast(x, adapter_names=names)
    assert len(products) == 2
    assert not any("lorakernels" in str(value) for module in fast.modules() for value in module.__dict__.values())


def test_a_rows_bits_do_not_depend_on_the_others_adapters() -> None:
    _, fast = models(*ADAPTERS["mixed ranks"])
    x = torch.randn(len(MIXED), 3, 24, dtype=torch.float64)
    others = (["a0"] * 11, [BASE] * 11, MIXED[1:], ["a4", "a0"] * 5 + ["a1"])
    found: dict[bool, list[torch.Tensor]] = {}
    for invariant in (True, False):
        lk.accelerate(fast, invariant=invariant)
        with torch.no_grad():
            found[invariant] = [fast(x, adapter_names=["a0", *rest])[0] for rest in others]
    assert all(torch.equal(each, found[True][0]) for each in found[True])
    names = ["a0", *others[-1]]
    lk.accelerate(fast, invariant=True)
    values = fast(x.requires_grad_(), adapter_names=names)
    values.sum().backward()
    gradients = [p.grad.clone() for p in fast.parameters() if p.grad is not None]
    fast.zero_grad()
    lk.accelerate(fast)
    fast(x, adapter_names=names).sum().backward()
    for one, other in zip(gradients, [p.grad for p in fast.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(one, other)
