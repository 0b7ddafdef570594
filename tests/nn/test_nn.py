"""LoRALinear: construction, adapters, scaling, merging."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lorakernels as lk
from lorakernels.testing.budget import error


def trained(layer: lk.LoRALinear, name: str = "default") -> lk.LoRALinear:
    """The layer with a B that is not zero."""
    nn.init.normal_(layer.lora_B[name].weight)
    return layer


def test_starts_as_its_base_and_trains_only_the_adapter() -> None:
    layer = lk.LoRALinear(24, 16, r=4)
    x = torch.randn(3, 24)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }
    assert list(layer.state_dict()) == [
        "base_layer.weight",
        "base_layer.bias",
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]


def test_from_linear_shares_and_copies_nothing() -> None:
    linear = nn.Linear(24, 16, bias=False)
    weight = linear.weight
    layer = lk.LoRALinear.from_linear(linear, r=2)
    assert layer.base_layer is linear and layer.weight is weight and layer.bias is None
    assert not weight.requires_grad


@pytest.mark.parametrize("linear", [nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4), nn.Bilinear(2, 2, 2)])
def test_from_linear_takes_exactly_linear(linear: nn.Module) -> None:
    with pytest.raises(TypeError, match=rf"exactly torch\.nn\.Linear; got .*{type(linear).__name__}"):
        lk.LoRALinear.from_linear(linear)  # type: ignore[arg-type]


@pytest.mark.parametrize(("init", "deviation"), [(True, 1 / math.sqrt(3 * 1000)), ("gaussian", 1 / 64)])
def test_initialisation(init: bool | str, deviation: float) -> None:
    layer = lk.LoRALinear(1000, 16, r=64, init_lora_weights=init)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert not B.any()
    # 64,000 draws: the deviation is known to about 1 / √128,000, and five of those are allowed.
    assert abs(A.detach().std().item() / deviation - 1) < 5 / math.sqrt(128_000)
    assert (A.detach().abs().max().item() <= 1 / math.sqrt(1000)) == (init is True)
    before = A.clone()
    layer.reset_lora_parameters(init_lora_weights=False)
    assert not torch.equal(A, before) and B.any()


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 16 / 4), (True, 16 / 2)])
def test_scaling_is_alpha_over_r_or_its_root(use_rslora: bool, scaling: float) -> None:
    assert lk.LoRALinear(8, 8, r=4, lora_alpha=16, use_rslora=use_rslora).scaling == scaling


def test_scaling_is_settable_and_zero_is_the_base_to_the_bit() -> None:
    layer = trained(lk.LoRALinear(24, 16, r=4))
    x = torch.randn(3, 24)
    base, full = layer.base_layer(x), layer(x)
    layer.scaling = 2.0
    half = layer(x)
    assert error((half - base) * 2, full - base) < 1e-6
    layer.scaling = 0
    assert torch.equal(layer(x), base)
    layer(x).sum().backward()
    assert not layer.lora_A["default"].weight.grad.any() and not layer.lora_B["default"].weight.grad.any()
    with pytest.raises(ValueError, match="scaling is nan"):
        layer.scaling = float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_and_unmerge(dtype: torch.dtype) -> None:
    layer = trained(lk.LoRALinear(64, 48, r=4, dtype=dtype)).eval()
    base = layer.weight.clone()
    adapted = base.double() + layer.delta_weight().double()
    layer.merge()
    assert layer.merged and layer.weight.dtype == dtype
    # One rounding of the sum, and the float32 of B A.
    eps = torch.finfo(dtype).eps
    assert ((layer.weight.double() - adapted).abs() <= eps / 2 * adapted.abs() + 1e-6).all()
    x = torch.randn(5, 64, dtype=dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.unmerge()
    assert not layer.merged
    # The base within a rounding: of the merged weight, which the difference inherits, and its own.
    assert ((layer.weight - base).abs().double() <= eps / 2 * (adapted.abs() + base.abs().double()) + 2e-6).all()


def test_merge_keep_base_brings_the_base_back_to_the_bit() -> None:
    layer = trained(lk.LoRALinear(64, 48, r=4, dtype=torch.bfloat16)).eval()
    base = layer.weight.clone()
    layer.merge(keep_base=True)
    assert not torch.equal(layer.weight, base)
    nn.init.normal_(layer.lora_A["default"].weight)  # does not matter: the base was kept
    layer.unmerge()
    assert torch.equal(layer.weight, base)
    nn.init.constant_(layer.weight, 0.5)  # and is not kept for the next merge
    layer.merge()
    layer.unmerge()
    assert (layer.weight - 0.5).abs().mean() < 0.1


def test_merging_takes_care() -> None:
    layer = trained(lk.LoRALinear(8, 8, r=2))
    base = layer.weight.clone()
    with pytest.warns(UserWarning, match="no adapter is merged"):
        layer.unmerge()
    layer.merge()
    merged = layer.weight.clone()
    with pytest.warns(UserWarning, match="merged already"):
        layer.merge()
    assert torch.equal(layer.weight, merged)
    with pytest.raises(RuntimeError, match="training would not reach them"):
        layer(torch.randn(2, 8))
    layer.eval()
    for forbidden in (lambda: layer.add_adapter("other"), lambda: layer.set_adapter([])):
        with pytest.raises(RuntimeError, match="unmerge"):
            forbidden()
    broken = trained(lk.LoRALinear(8, 8, r=2))
    nn.init.constant_(broken.lora_A["default"].weight, float("nan"))
    base = broken.weight.clone()
    with pytest.raises(ValueError, match="not finite; nothing changed"):
        broken.merge()
    assert torch.equal(broken.weight, base) and not broken.merged


def test_changes_while_merged_do_not_confuse_unmerge() -> None:
    layer = trained(lk.LoRALinear(8, 8, r=2, dtype=torch.float64)).eval()
    base = layer.weight.clone()
    layer.merge()
    with pytest.raises(RuntimeError, match="call unmerge"):
        layer.scaling = 100.0
    layer.adapters["default"].scaling = 100.0
    nn.init.normal_(layer.lora_A["default"].weight)
    copied = copy.deepcopy(layer)
    for merged in (layer, copied):
        merged.unmerge()
        assert torch.allclose(merged.weight, base, atol=1e-12) and merged.scaling == 100.0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_several_adapters_add_up(training: bool, dropout: float) -> None:
    layer = trained(lk.LoRALinear(24, 16, r=4, dtype=torch.float64, lora_dropout=dropout)).train(training)
    layer.add_adapter("second", r=3, lora_alpha=5)
    trained(layer, "second")
    assert layer.active_adapters == ["default"]
    assert not layer.lora_A["second"].weight.requires_grad
    x = torch.randn(3, 24, dtype=torch.float64)
    layer.set_adapter(["default", "second", "default"])
    torch.manual_seed(1)
    both = layer(x)
    torch.manual_seed(1)
    layer.set_adapter("default")
    first = layer(x)
    expected = first + x @ layer.delta_weight("second").double().T
    assert torch.allclose(both, expected)
    layer.set_adapter(["default", "second"])
    layer.adapters["second"].scaling = 0.0
    nn.init.constant_(layer.lora_A["second"].weight, float("inf"))
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    layer.set_adapter([])
    assert torch.equal(layer(x), layer.base_layer(x))
    with pytest.raises(KeyError, match="no adapter 'third'; its adapters"):
        layer.set_adapter("third")
    with pytest.raises(RuntimeError, match="0 are active"):
        _ = layer.scaling


@pytest.mark.parametrize("training", [False, True])
def test_each_of_several_adapters_has_its_own_dropout(training: bool) -> None:
    layer = trained(lk.LoRALinear(24, 16, r=4, lora_dropout=0.5)).train(training)
    layer.add_adapter("second", r=3, lora_dropout=0.5)
    trained(layer, "second")
    layer.set_adapter(["default", "second"])
    x = torch.randn(3, 24)
    runs = torch.stack([layer(x) for _ in range(400)]).double()
    layer.eval()
    # The mean of 400 runs within five of its standard errors; in eval mode there is nothing random.
    assert ((runs.mean(0) - layer(x)).abs() <= 5 * runs.std(0) / 20 + 1e-5).all()
    assert bool(runs.std(0).any()) == training


def test_a_forward_of_the_base_layers_own_runs() -> None:
    layer = trained(lk.LoRALinear(24, 16, r=4))
    x = torch.randn(3, 24)
    plain = layer(x)
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: forward(x) + 1  # type: ignore[method-assign]
    assert torch.allclose(layer(x), plain + 1, atol=1e-5)


def test_hooks_of_the_base_layer_run() -> None:
    linear = nn.Linear(24, 16)
    layer = trained(lk.LoRALinear.from_linear(linear, r=4))
    x = torch.randn(3, 24)
    expected = layer(x)
    seen = []
    linear.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert seen == [(3, 16)]


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "..", "a\\b", " a", "a\0", "train", "keys"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match="adapter name"):
        lk.LoRALinear(4, 4, adapter_name=name)


def test_a_configuration_or_its_fields() -> None:
    layer = lk.LoRALinear(6, 4, r=2, lora_alpha=3, lora_dropout=0.1, use_rslora=True)
    config = lk.LoRAConfig(r=2, lora_alpha=3, lora_dropout=0.1, use_rslora=True, target_modules=["q"])
    layer.add_adapter("second", config)
    assert layer.adapters["second"] == layer.adapters["default"]
    assert lk.LoRALinear.from_base(nn.Linear(6, 4), config=config).adapters == {"default": layer.adapters["second"]}
    for wrong, match in (
        (lambda: layer.add_adapter("third", target_modules=["q"]), "'target_modules'] mean nothing for one layer"),
        (lambda: layer.add_adapter("third", rank=3), "'rank'] mean nothing for one layer"),
        (lambda: layer.add_adapter("third", config, r=3), "expected a LoRAConfig alone"),
        (lambda: layer.add_adapter("third", {"r": 3}), "expected a LoRAConfig alone"),
    ):
        with pytest.raises(TypeError, match=match):
            wrong()
    assert layer.adapter_names == ["default", "second"]


def test_adapters_are_float32_on_a_16_bit_base() -> None:
    layer = trained(lk.LoRALinear(24, 16, r=4, dtype=torch.bfloat16))
    assert layer.lora_A["default"].weight.dtype == torch.float32
    y = layer(torch.randn(3, 24, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_A["default"].weight.grad.dtype == torch.float32


def test_repr_tells_the_adapters() -> None:
    text = repr(lk.LoRALinear(24, 16, r=4, lora_dropout=0.1))
    assert "in_features=24" in text and "default: r=4, lora_alpha=16, scaling=4, dropout=0.1" in text


@pytest.mark.parametrize("name", ["training", "_modules", "_parameters"])
def test_names_of_a_containers_own_attributes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is an attribute of"):
        lk.LoRALinear(4, 4, adapter_name=name)


def test_a_merged_weight_or_bias_that_float16_cannot_hold_is_refused() -> None:
    for what in ("weight", "bias"):
        layer = lk.LoRALinear(4, 4, r=1, lora_alpha=1, lora_bias=True, dtype=torch.float16)
        with torch.no_grad():
            getattr(layer, what).fill_(60000)
            if what == "weight":
                layer.lora_A["default"].weight.fill_(100)
                layer.lora_B["default"].weight.fill_(100)
            else:
                layer.lora_B["default"].bias.fill_(10000)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        with pytest.raises(ValueError, match=r"float16 weight that is not finite; nothing changed"):
            layer.merge()
        assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())
        assert not layer.merged


def test_a_tensor_scaling_stays_one_and_zero_is_the_base() -> None:
    layer = trained(lk.LoRALinear(6, 5, r=2, use_dora=True))
    nn.init.uniform_(layer.lora_magnitude_vector["default"].weight, 2, 3)
    x = torch.randn(3, 6)
    scaling = torch.tensor(2.0)
    layer.adapters["default"].scaling = scaling
    assert not torch.allclose(layer(x), layer.base_layer(x))
    layer.scaling = 0.0
    assert layer.adapters["default"].scaling is scaling and scaling == 0
    assert torch.allclose(layer(x), layer.base_layer(x), atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
@torch.no_grad()
def test_torchs_fast_path_does_not_leave_a_layer_put_by_hand_out(
    copied: Callable[[nn.Module], nn.Module], padded: bool
) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    for layer in model.layers:
        layer.linear1 = trained(lk.LoRALinear.from_linear(layer.linear1, r=4))
    model, x = copied(model), torch.randn(2, 5, 16)
    real = torch.arange(5) < torch.tensor([[5], [3 if padded else 5]])
    found = model(x, src_key_padding_mask=~real if padded else None)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = model(x, src_key_padding_mask=~real if padded else None)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert error(found[real], expected[real]) < 1e-5
