"""PEFT's layers accelerated: the same values and gradients, whatever changes between two calls."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from accelerated import (
    EXACT,
    IN,
    NAMES,
    accelerated_copy,
    assert_equal,
    config,
    peft_model,
    randomised,
    values_and_gradients,
)
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

from lorakernels.integrations.peft import accelerate
from lorakernels.testing.budget import assert_within_budget

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")
PARITY = {
    "plain": ([config()], True),
    "no base bias": ([config()], False),
    "rslora": ([config(use_rslora=True, r=9)], True),
    "rank and alpha patterns": ([config(rank_pattern={"up": 7}, alpha_pattern={"down": 1.5})], True),
    "bias of the base trained": ([config(bias="lora_only")], True),
    "lora_bias": ([config(lora_bias=True)], True),
    "lora_bias without base bias": ([config(lora_bias=True)], False),
    "several adapters": ([config(), config(r=7, use_rslora=True), config(r=1)], True),
    "several with lora_bias": ([config(lora_bias=True), config(r=7, lora_alpha=3, lora_bias=True)], False),
    "several on other layers": ([config(), config(target_modules=["down"])], True),
    "dora": ([config(use_dora=True)], True),
    "dora without base bias, rslora": ([config(use_dora=True, use_rslora=True, r=9)], False),
    "dora with dropout off": ([config(use_dora=True, lora_dropout=0.5)], True),
    "dropout off": ([config(lora_dropout=0.5), config(lora_dropout=0.2, lora_bias=True)], True),
}


@pytest.mark.parametrize("name", PARITY)
def test_parity(name: str, x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    configs, bias = PARITY[name]
    plain = peft_model(*configs, bias=bias)
    plain.base_model.set_adapter(list(NAMES[: len(configs)]))
    if "dropout off" in name:
        plain.eval()
    model = accelerated_copy(plain)
    ours = values_and_gradients(model, x)
    assert_equal(ours, values_and_gradients(plain, x))
    assert sum("lora_A" in key for key in ours) >= 2
    assert len(fused) == 2


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "lora_bias", "several adapters", "dora"])
def test_parity_bfloat16(name: str, adapter: torch.dtype, fused: list[dict[str, Any]]) -> None:
    configs, bias = PARITY[name]
    layers = peft_model(*configs, bias=bias, dtype=torch.bfloat16)
    layers.base_model.set_adapter(list(NAMES[: len(configs)]))
    plain = layers.base_model.model.up
    for adapters in (plain.lora_A, plain.lora_B, plain.lora_magnitude_vector):
        adapters.to(adapter)
    x = torch.randn(64, IN).bfloat16()
    exact = values_and_gradients(copy.deepcopy(plain).double(), x.double())
    eager = values_and_gradients(plain, x)
    ours = values_and_gradients(accelerated_copy(plain), x)
    assert len(fused) == 1
    for key, expected in exact.items():
        assert ours[key].dtype == eager[key].dtype
        assert_within_budget(ours[key], eager[key], expected, torch.bfloat16, key)


def test_x_is_not_copied_for_float32_adapters() -> None:
    model = accelerated_copy(peft_model(config(), dtype=torch.float32)).base_model.model.up
    model.base_layer.to(torch.bfloat16)
    x = torch.randn(64, IN).bfloat16()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        assert model(x).dtype is torch.bfloat16
    assert [t.dtype for t in saved if t.shape == x.shape] == [torch.bfloat16]
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


def test_switch_disable_and_back(x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    plain = peft_model(config(), config(r=7))
    model = accelerated_copy(plain)
    outputs = []
    for names in ("first", "second", ["first", "second"], "first"):
        for m in (plain, model):
            m.base_model.set_adapter(names)
        ours = values_and_gradients(model, x)
        assert_equal(ours, values_and_gradients(plain, x))
        outputs.append(ours["y"])
    assert not torch.allclose(outputs[0], outputs[1])
    assert len(fused) == 8
    with plain.disable_adapter(), model.disable_adapter():
        assert torch.equal(model(x), plain(x))
    assert len(fused) == 8
    assert torch.equal(model(x), outputs[0])


@pytest.mark.parametrize("names", [["first"], ["first", "second"]])
def test_merge_and_unmerge(names: list[str], x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    plain = peft_model(config(lora_bias=True), config(r=7))
    plain.base_model.set_adapter(names)
    model = accelerated_copy(plain)
    before = model(x)
    for m in (plain, model):
        m.merge_adapter()
    fused.clear()
    assert torch.equal(model(x), plain(x))
    assert not fused
    torch.testing.assert_close(model(x), before, rtol=0, atol=EXACT)
    with model.disable_adapter():  # takes the adapters out of the base again, as PEFT does
        model(x)
    plain.unmerge_adapter()
    assert_equal(values_and_gradients(model, x), values_and_gradients(plain, x))
    assert len(fused) == 2
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged.up) is nn.Linear
    torch.testing.assert_close(merged(x), before, rtol=0, atol=EXACT)


def test_adapters_added_loaded_and_deleted_after_acceleration(
    x: torch.Tensor, tmp_path: Path, fused: list[dict[str, Any]]
) -> None:
    randomised(other := peft_model(config(r=5))).save_pretrained(tmp_path)
    plain = peft_model(config(target_modules=["up"]))
    model = copy.deepcopy(plain)
    assert accelerate(model).num_layers == 1
    for m in (plain, model):
        m.add_adapter("added", config(target_modules=["up"], r=3))
        m.load_adapter(tmp_path / "first", adapter_name="loaded")
        m.double()
    assert type(model.base_model.model.down) is PeftLinear
    assert accelerate(model).num_layers == accelerate(model).num_accelerated == 2
    torch.manual_seed(1)
    randomised(plain)
    torch.manual_seed(1)
    randomised(model)
    for name in ("added", "loaded", "first"):
        for m in (plain, model):
            m.set_adapter(name)
        assert_equal(values_and_gradients(model, x), values_and_gradients(plain, x))
    # "added" and "first" do not reach `down`, which then is its base layer alone
    assert len(fused) == 1 + 2 + 1
    for m in (plain, model):
        m.delete_adapter("first")
        m.set_adapter("loaded")
    assert_equal(values_and_gradients(model, x), values_and_gradients(plain, x))
    assert other.peft_config["first"].r == 5


def test_weighted_and_scaled_adapters(x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    plain = peft_model(config(), config())
    model = accelerated_copy(plain)
    for m in (plain, model):
        m.add_weighted_adapter(["first", "second"], [0.3, 0.7], "mean", combination_type="cat")
        m.set_adapter("mean")
        m.base_model.model.up.scale_layer(0.25)
    assert_equal(values_and_gradients(model, x), values_and_gradients(plain, x))
    assert len(fused) == 2


@pytest.mark.parametrize("names", [["first"], ["first", "second"]])
def test_scaling_as_a_tensor(names: list[str], x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    plain = peft_model(config(r=4, lora_alpha=3, lora_bias=True), config(r=3))
    prepare_model_for_compiled_hotswap(plain, target_rank=8)
    plain.double()
    plain.base_model.set_adapter(names)
    model = accelerated_copy(plain)
    assert isinstance(model.base_model.model.up.scaling["first"], torch.Tensor)
    for scaling in (None, 2.5):
        for m in (plain, model):
            if scaling is not None:
                m.base_model.model.up.scaling["first"].fill_(scaling)
        assert_equal(values_and_gradients(model, x), values_and_gradients(plain, x))
    assert len(fused) == 4


def test_tensors_in_the_place_of_parameters(x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    """What FSDP and DataParallel do to a module for the time of a forward."""
    model = accelerated_copy(peft_model(config(lora_bias=True))).base_model.model.up
    expected = model(x)
    for module in (model.base_layer, model.lora_A["first"], model.lora_B["first"]):
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            setattr(module, name, None if parameter is None else parameter.detach().clone())
    assert torch.equal(model(x), expected)
    assert len(fused) == 2


def dropout_layers(*rates: float) -> Any:
    model = peft_model(*(config(lora_dropout=p) for p in rates))
    model.base_model.set_adapter(list(NAMES[: len(rates)]))
    return accelerated_copy(model).base_model.model.up


@pytest.mark.parametrize("rates", [(0.3,), (0.3, 0.5), (0.0, 0.5)])
def test_dropout_is_unbiased(rates: tuple[float, ...], fused: list[dict[str, Any]]) -> None:
    layer = dropout_layers(*rates)
    x = torch.randn(2, IN, dtype=torch.float64)
    outputs = []
    with torch.no_grad():
        for seed in range(12):
            torch.manual_seed(seed)
            outputs.append(layer(x.expand(500, 2, IN)))
        samples = torch.cat(outputs)
        expected = layer.eval()(x)
    assert len(fused) == 13
    deviation = samples.std(0)
    assert (deviation > 0).all()
    assert ((samples.mean(0) - expected).abs() < 5 * deviation / len(samples) ** 0.5).all()


@pytest.mark.parametrize("rates", [(0.3,), (0.3, 0.5)])
def test_dropout_follows_the_seed_and_the_mode(rates: tuple[float, ...], fused: list[dict[str, Any]]) -> None:
    layer = dropout_layers(*rates)
    x = torch.randn(5, IN, dtype=torch.float64)

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    layer.eval()
    assert torch.equal(drawn(1), drawn(2))
    assert len(fused) == 6


def test_each_adapter_has_a_mask_of_its_own() -> None:
    layer = dropout_layers(0.5, 0.5)
    with torch.no_grad():
        layer.lora_A["second"].weight.copy_(layer.lora_A["first"].weight)
        layer.lora_B["second"].weight.copy_(-layer.lora_B["first"].weight)
    x = torch.randn(5, IN, dtype=torch.float64)
    base = layer.base_layer(x)
    assert not torch.allclose(layer(x), base)
    torch.testing.assert_close(layer.eval()(x), base)


@pytest.mark.parametrize("rates", [(0.4,), (0.4, 0.2)])
def test_dropout_backward_is_the_forwards(rates: tuple[float, ...], fused: list[dict[str, Any]]) -> None:
    layer = dropout_layers(*rates)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    leaves = [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def under_one_seed(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), x)

    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(under_one_seed, (x, *leaves), fast_mode=True)
    assert fused
