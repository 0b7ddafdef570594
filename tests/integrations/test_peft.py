"""PEFT's layers accelerated: the same values, gradients and files, and PEFT's own forward where that cannot be."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

peft = pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from lorakernels.integrations import peft_terms
from lorakernels.integrations.peft import accelerate, restore
from lorakernels.nn import adapted
from lorakernels.testing.budget import assert_within_budget

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")

IN, MIDDLE, OUT = 24, 20, 16
EXACT = 1e-10
NAMES = ("first", "second", "third")


class Two(nn.Module):
    """Two linear layers, so that a gradient passes through one adapted layer into another."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(IN, MIDDLE, bias=bias)
        self.down = nn.Linear(MIDDLE, OUT, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"], **fields})


def peft_model(*configs: LoraConfig, bias: bool = True, dtype: torch.dtype = torch.float64) -> Any:
    """A PeftModel whose adapters "first", "second", ... all do something; "first" is active."""
    model = get_peft_model(Two(bias).to(dtype), configs[0], adapter_name=NAMES[0])
    for name, other in zip(NAMES[1:], configs[1:], strict=False):
        model.add_adapter(name, other)
    return randomised(model.to(dtype))


def randomised(model: Any, std: float = 0.3) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std)
    return model


def accelerated_copy(model: Any) -> Any:
    copied = copy.deepcopy(model)
    accelerate(copied)
    return copied


def values_and_gradients(model: Any, x: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x, **kwargs)
    weight = torch.arange(1, y.numel() + 1, dtype=y.dtype).view_as(y) / y.numel()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((y * weight).sum(), [x, *parameters.values()], allow_unused=True)
    found = {"y": y.detach(), "dx": gradients[0]}
    return found | {name: g for name, g in zip(parameters, gradients[1:], strict=True) if g is not None}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = EXACT) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        error = float((ours[name] - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
        assert error <= tolerance, f"{name}: {error}"


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every call that took the fused path."""
    calls: list[dict[str, Any]] = []

    def spy_on(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(kwargs)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)

    spy_on(adapted, "lora_linear")
    spy_on(adapted.ops, "small_lora_linear")
    return calls


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 7, IN, dtype=torch.float64)


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


# ---- states that change between two calls


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


# ---- DoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_new_dora_adapter_changes_nothing_to_the_bit(dtype: torch.dtype, fused: list[dict[str, Any]]) -> None:
    base = Two().to(dtype)
    x = torch.randn(9, IN, dtype=dtype)
    expected = base(x)
    model = get_peft_model(base, config(use_dora=True))
    accelerate(model)
    assert torch.equal(model(x), expected)
    assert len(fused) == 2


def test_dora_with_dropout_draws_what_peft_draws(x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    plain = peft_model(config(use_dora=True, lora_dropout=0.3))
    model = accelerated_copy(plain)

    def drawn(m: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        return values_and_gradients(m, x)

    assert_equal(drawn(model), drawn(plain))
    assert len(fused) == 2
    for m in (plain, model):  # the layer evaluates and its dropout does not know: PEFT asks the layer
        m.eval()
        m.base_model.model.up.lora_dropout["first"].train()
    assert_equal(drawn(model), drawn(plain))


def test_dora_sees_an_edit_of_the_base_weight(x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    plain = peft_model(config(use_dora=True))
    model = accelerated_copy(plain)
    assert_equal(values_and_gradients(model, x), values_and_gradients(plain, x))
    edits = (lambda w: w.mul_(1.5), lambda w: setattr(w, "data", w.data * 2))
    for edit in edits:
        for m in (plain, model):
            with torch.no_grad():
                edit(m.base_model.model.up.base_layer.weight)
        assert_equal(values_and_gradients(model, x), values_and_gradients(plain, x))
    for m in (plain, model):
        m.merge_adapter()
        m.unmerge_adapter()
    assert_equal(values_and_gradients(model, x), values_and_gradients(plain, x))
    assert len(fused) == 8


def test_dora_sees_what_a_new_adapters_start_did_to_the_base_weight(x: torch.Tensor) -> None:
    """OLoRA's edits it through `.data`, which leaves neither a version nor an address behind."""
    plain = peft_model(config(use_dora=True), dtype=torch.float32)
    fast = accelerated_copy(plain)
    x = x.float()
    before = fast(x)
    for model in (plain, fast):
        torch.manual_seed(0)
        model.add_adapter("other", config(init_lora_weights="olora"))
        model.set_adapter("first")
    torch.testing.assert_close(fast(x), plain(x))
    assert not torch.allclose(fast(x), before)
    restore(fast)
    assert not peft_terms._norms


def test_dora_keeps_nothing_of_the_outputs_size() -> None:
    model = peft_model(config(use_dora=True), dtype=torch.float32).base_model.model.up
    x = torch.randn(512, IN)

    def kept(layer: Any) -> int:
        sizes: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), x)}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x).sum()
        return sum(sizes.values())

    # S and a few vectors; PEFT keeps the base result and the adapter's.
    assert kept(accelerated_copy(model)) < 512 * MIDDLE * 4 < kept(model)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda dora: dora.register_forward_hook(double_output), "or has hooks"),
        (
            lambda dora: setattr(dora, "weight", nn.Parameter(dora.weight.detach().as_subclass(Disguised))),
            "plain tensor",
        ),
    ],
)
def test_dora_that_somebody_changed_runs_pefts_forward(
    spoil: Any, reason: str, x: torch.Tensor, fused: list[dict[str, Any]]
) -> None:
    plain = peft_model(config(use_dora=True)).base_model.model.up
    model = accelerated_copy(plain)
    for layer in (plain, model):
        spoil(layer.lora_magnitude_vector["first"])
    report = accelerate(model)
    assert report.num_accelerated == 0 and reason in report.rows[0].reason
    assert_equal(values_and_gradients(model, x), values_and_gradients(plain, x), tolerance=0)
    assert not fused


# ---- dropout


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


# ---- what PEFT's own forward keeps


class Scaled(nn.Linear):
    """Stands for a quantised base: its weight alone does not say what it computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


class Disguised(torch.Tensor):
    """Stands for a quantised weight inside a plain nn.Linear, as torchao makes it."""


def double_output(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def double_input(module: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
    return 2 * args[0]


def quantise(layer: Any) -> None:
    layer.base_layer.__class__ = Scaled


def disguise_weight(layer: Any) -> None:
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().as_subclass(Disguised))


def disguise_A(layer: Any) -> None:
    layer.lora_A["first"].weight = nn.Parameter(layer.lora_A["first"].weight.detach().as_subclass(Disguised))


def replace_base_forward(layer: Any) -> None:
    layer.base_layer.forward = lambda x: nn.functional.linear(x, layer.base_layer.weight)


def replace_dropout(layer: Any) -> None:
    layer.lora_dropout["first"] = nn.Hardtanh(-0.5, 0.5)


def drop_everything(layer: Any) -> None:
    layer.lora_dropout["first"].p = 1.0


def replace_A(layer: Any) -> None:
    A = layer.lora_A["first"]
    layer.lora_A["first"] = nn.Sequential()
    layer.lora_A["first"].weight = A.weight
    layer.lora_A["first"].append(A).append(nn.Tanh())


def bias_A(layer: Any) -> None:
    layer.lora_A["first"].bias = nn.Parameter(torch.ones(layer.r["first"], dtype=torch.float64))


def spread_scaling(layer: Any) -> None:
    layer.scaling["first"] = torch.linspace(0, 1, MIDDLE, dtype=torch.float64)


SPOILERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "quantised base": (quantise, "Scaled, not exactly torch.nn.Linear"),
    "quantised weight": (disguise_weight, "Disguised"),
    "adapter of another tensor type": (disguise_A, "not a plain tensor"),
    "base hook": (lambda layer: layer.base_layer.register_forward_hook(double_output), "base layer has hooks"),
    "base pre-hook": (lambda layer: layer.base_layer.register_forward_pre_hook(double_input), "base layer has hooks"),
    "base forward": (replace_base_forward, "replaced forward"),
    "A hook": (lambda layer: layer.lora_A["first"].register_forward_hook(double_output), "adapter 'first' has hooks"),
    "B pre-hook": (
        lambda layer: layer.lora_B["first"].register_forward_pre_hook(double_input),
        "adapter 'first' has hooks",
    ),
    "dropout hook": (
        lambda layer: layer.lora_dropout["first"].register_forward_hook(double_output),
        "'first' has hooks",
    ),
    "dropout of another kind": (replace_dropout, "Hardtanh"),
    "all dropped": (drop_everything, "p < 1"),
    "A of another kind": (replace_A, "not the torch.nn.Linear that PEFT makes"),
    "A with a bias": (bias_A, "not the torch.nn.Linear that PEFT makes"),
    "scaling of several elements": (spread_scaling, "not a number"),
    "fan_in_fan_out": (lambda layer: setattr(layer, "fan_in_fan_out", True), "fan_in_fan_out"),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_what_is_not_plain_runs_pefts_forward(name: str, x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    spoil, reason = SPOILERS[name]
    rate = 0.1 if name == "all dropped" else 0.0
    plain = peft_model(config(lora_dropout=rate)).base_model.model.up
    untouched = plain(x)
    model = accelerated_copy(plain)
    for layer in (plain, model):  # after acceleration: it is found out at the call
        spoil(layer)
    report = accelerate(model)
    assert report.num_accelerated == 0
    assert reason in report.rows[0].reason
    ours = values_and_gradients(model, x)
    theirs = values_and_gradients(plain, x)
    assert not fused
    assert_equal(ours, theirs, tolerance=0)
    assert name in ("adapter of another tensor type", "quantised weight", "fan_in_fan_out") or not torch.equal(
        ours["y"], untouched
    ), "the case changes nothing, so it shows nothing"


@pytest.mark.parametrize(
    ("fields", "names", "reason"),
    [
        ({"alora_invocation_tokens": [1]}, ["first"], "LoRA variant"),
        ({"use_dora": True}, ["first", "second"], "DoRA is active beside another"),
    ],
)
def test_variants_run_pefts_forward(
    fields: dict[str, Any], names: list[str], reason: str, x: torch.Tensor, fused: list[dict[str, Any]]
) -> None:
    plain = peft_model(config(**fields), config())
    plain.base_model.set_adapter(names)
    model = copy.deepcopy(plain)
    report = accelerate(model)
    assert report.num_accelerated == 0
    assert reason in report.rows[0].reason
    assert_equal(values_and_gradients(model, x), values_and_gradients(plain, x), tolerance=0)
    assert not fused
    for m in (plain, model):
        m.set_adapter("second")
    assert accelerate(model).num_accelerated == 2
    assert_equal(values_and_gradients(model, x), values_and_gradients(plain, x))
    assert len(fused) == 2


def test_dtypes_that_do_not_fit_are_left_to_peft(fused: list[dict[str, Any]]) -> None:
    model = accelerated_copy(peft_model(config(), dtype=torch.float32))
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(3, IN, dtype=torch.float64))
    layer = model.base_model.model.up
    layer.base_layer.weight = nn.Parameter(torch.ones(MIDDLE, IN, dtype=torch.int8), requires_grad=False)
    layer.base_layer.bias = None
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
        layer(torch.randn(3, IN))
    assert not fused


def test_input_casting_switched_off(fused: list[dict[str, Any]]) -> None:
    model = accelerated_copy(peft_model(config(), dtype=torch.float32))
    layer = model.base_model.model.up
    layer.base_layer.to(torch.bfloat16)
    x = torch.randn(3, IN).bfloat16()
    layer(x)
    assert len(fused) == 1
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        layer(x)
    layer.to(torch.bfloat16)
    with disable_input_dtype_casting(model):
        layer(x)
    assert len(fused) == 2


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [["first"], ["first", "second"]])
def test_autocast(names: list[str], base: torch.dtype, fused: list[dict[str, Any]]) -> None:
    model = peft_model(config(lora_bias=True), config(r=7), dtype=torch.float32)
    model.base_model.set_adapter(names)
    plain = model.base_model.model.up
    plain.base_layer.to(base)
    ours_layer = accelerated_copy(plain)
    x = torch.randn(64, IN)
    exact = values_and_gradients(copy.deepcopy(plain).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager, ours = values_and_gradients(plain, x), values_and_gradients(ours_layer, x)
    assert len(fused) == 1
    for key, expected in exact.items():
        assert ours[key].dtype == eager[key].dtype, key
        assert_within_budget(ours[key], eager[key], expected, torch.bfloat16, key)


# ---- what stays, and what comes back


def description(model: Any) -> Any:
    types = [(name, type(module)) for name, module in model.named_modules()]
    return types, repr(model), [(key, value.data_ptr()) for key, value in model.state_dict().items()]


def test_accelerate_and_restore_leave_everything_else(x: torch.Tensor) -> None:
    model = peft_model(config(), config(use_dora=True))
    model.base_model.model.up.register_forward_hook(double_output)
    before, expected = description(model), model(x)
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    first = accelerate(model)
    assert accelerate(model) == first
    assert isinstance(model.base_model.model.up, PeftLinear)
    assert description(model)[2] == before[2]
    torch.testing.assert_close(model(x), expected)
    restore(model)
    restore(model)
    assert description(model) == before
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == state
    assert torch.equal(model(x), expected)


def test_saved_files_are_the_same(tmp_path: Path) -> None:
    plain = peft_model(config(lora_dropout=0.1), config(use_dora=True), dtype=torch.float32)
    # A copy too: PEFT writes its set of target modules in the order it has, which copying may change.
    copy.deepcopy(plain).save_pretrained(tmp_path / "plain")
    accelerated_copy(plain).save_pretrained(tmp_path / "accelerated")

    def files(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    saved = files(tmp_path / "accelerated")
    assert saved == files(tmp_path / "plain")
    assert sum(name.endswith(".safetensors") for name in saved) == 2


def test_on_meta_tensors(x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    for dora in (False, True):
        model = accelerated_copy(peft_model(config(use_dora=dora))).to("meta")
        assert model(x.to("meta")).shape == model.base_model.model(x.to("meta")).shape
    assert fused


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_runs_pefts_forward(x: torch.Tensor, tmp_path: Path) -> None:
    fast = accelerated_copy(peft_model(config()))
    traced = torch.jit.trace(fast, x)
    traced.save(str(tmp_path / "traced.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "traced.pt"))(x), fast(x))


def test_copies_and_pickles_stay_accelerated(x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    model = accelerated_copy(peft_model(config()).base_model.model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        restore(other)
        assert type(other.up) is PeftLinear
    assert len(fused) == 6


def test_injected_adapters_in_any_tree(x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    plain = randomised(inject_adapter_in_model(config(), nn.ModuleDict({"inner": Two().double()})))
    model = copy.deepcopy(plain)
    report = accelerate(model)
    assert [row.name for row in report.rows] == ["inner.up", "inner.down"]
    assert_equal(values_and_gradients(model["inner"], x), values_and_gradients(plain["inner"], x))
    assert len(fused) == 2


def test_report() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, IN)
            self.blocks = nn.ModuleList(Two() for _ in range(3))
            self.conv = nn.Conv2d(3, 4, 1)
            self.slow = Scaled(IN, OUT)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    targets = ["embed", "up", "down", "conv", "slow"]
    model = get_peft_model(Mixed(), LoraConfig(target_modules=targets, modules_to_save=["blocks.2"]))
    report = accelerate(model)
    assert (report.num_layers, report.num_accelerated) == (7, 4)
    reasons = {row.name.rpartition("model.")[2]: row.reason for row in report.not_accelerated}
    assert reasons.keys() == {"embed", "conv", "slow"}
    assert "lora.layer.Embedding over torch.nn.modules.sparse.Embedding" in reasons["embed"]
    assert "Conv2d" in reasons["conv"]
    assert "Scaled" in reasons["slow"]
    text = str(report)
    assert "4 of 7 LoRA layers accelerated" in text
    assert "blocks.*.up" in text
    assert text == "\n".join(line.rstrip() for line in text.splitlines())
    assert "4 of 7" in repr(report)


def test_wrong_arguments() -> None:
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            function("model")
    with pytest.warns(UserWarning, match="no PEFT LoRA layer"):
        assert accelerate(Two()).rows == ()


def test_import_without_peft() -> None:
    code = """
import sys
from lorakernels.integrations.peft import accelerate
import torch
assert "peft" not in sys.modules and "transformers" not in sys.modules
sys.modules["peft"] = None
try:
    accelerate(torch.nn.Linear(1, 1))
except ImportError as error:
    assert "pip install peft" in str(error), error
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---- memory and torch.compile


def kept_bytes(layer: Any, x: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward, those of parameters left out."""
    ours = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = layer(x)
    assert kept.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_bytes_kept_for_the_backward(base: torch.dtype, rate: float) -> None:
    plain = peft_model(config(lora_dropout=rate), dtype=torch.float32).base_model.model.up
    plain.base_layer.to(base)
    x = torch.randn(256, IN, dtype=base, requires_grad=True)
    ours, theirs = kept_bytes(accelerated_copy(plain), x), kept_bytes(plain, x)
    if base is torch.float32 and rate == 0.0:
        assert ours == theirs == 4 * 256 * (IN + 4)  # x and x Aᵀ: there is nothing more to save
    else:
        assert ours < 0.75 * theirs


@contextmanager
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", ["plain", "several", "dropout", "autocast"])
def test_compile_has_no_graph_break(case: str) -> None:
    rate = 0.3 if case == "dropout" else 0.0
    model = accelerated_copy(peft_model(config(lora_dropout=rate, lora_bias=True), config(r=3), dtype=torch.float32))
    model.base_model.set_adapter(["first", "second"] if case == "several" else ["first"])
    model = model.base_model.model
    x = torch.randn(6, IN)
    with fresh_dynamo(), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.manual_seed(0)
        ours = values_and_gradients(compiled, x)
        torch.manual_seed(0)
        eager = values_and_gradients(model, x)
    assert_equal({key.removeprefix("_orig_mod."): value for key, value in ours.items()}, eager, tolerance=1e-6)


def test_hot_swap_does_not_recompile(tmp_path: Path) -> None:
    peft_model(config(r=2, lora_alpha=9), dtype=torch.float32).save_pretrained(tmp_path)
    plain = peft_model(config(), dtype=torch.float32)
    prepare_model_for_compiled_hotswap(plain, target_rank=6)
    model = accelerated_copy(plain)
    x = torch.randn(6, IN)
    with fresh_dynamo(), torch.no_grad():
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model.base_model.model, fullgraph=True, backend=counter)
        before = compiled(x)
        torch.testing.assert_close(before, plain(x))
        for m in (plain, model):
            hotswap_adapter(m, str(tmp_path / "first"), adapter_name="first")
        torch.testing.assert_close(compiled(x), plain(x))
        assert not torch.allclose(compiled(x), before)
        assert counter.frame_count == 1
        assert counter.graphs[0].code.count("torch.ops.lorakernels.lora_linear(") == 2


# ---- a transformers model


def tiny_llama(**fields: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", **fields)
    return randomised(get_peft_model(transformers.LlamaForCausalLM(llama), lora), std=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_llama(checkpointing: bool, fused: list[dict[str, Any]]) -> None:
    plain = tiny_llama(modules_to_save=["lm_head"], use_rslora=True)
    model = copy.deepcopy(plain)
    report = accelerate(model)
    assert (report.num_layers, report.num_accelerated) == (14, 14)
    tokens = torch.randint(1, 96, (2, 12))
    found = []
    for m in (model, plain):
        if checkpointing:
            m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            m.train()
        out = m(input_ids=tokens, labels=tokens)
        out.loss.backward()
        gradients = {name: p.grad for name, p in m.named_parameters() if p.grad is not None}
        found.append({"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients})
    assert len(found[0]) == 2 + 28 + 1
    assert_equal(found[0], found[1], tolerance=2e-5)
    assert len(fused) == (28 if checkpointing else 14)


def test_llama_generates_the_same(fused: list[dict[str, Any]]) -> None:
    plain = tiny_llama().eval()
    model = accelerated_copy(plain)
    tokens = torch.randint(1, 96, (2, 5))
    ours = model.generate(input_ids=tokens, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, plain.generate(input_ids=tokens, max_new_tokens=8, do_sample=False))
    assert ours.shape == (2, 13)
    assert len(fused) == 8 * 14
    with plain.disable_adapter():
        base = plain.generate(input_ids=tokens, max_new_tokens=8, do_sample=False)
    assert not torch.equal(ours, base), "the adapter changes no token, so the test shows nothing"
