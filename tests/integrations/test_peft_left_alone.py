"""What the fused path does not cover runs PEFT's own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from accelerated import (
    IN,
    MIDDLE,
    Disguised,
    Scaled,
    accelerated_copy,
    assert_equal,
    config,
    double_output,
    peft_model,
    values_and_gradients,
)
from peft.helpers import disable_input_dtype_casting

from lorakernels.integrations.peft import accelerate
from lorakernels.testing.budget import assert_within_budget

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")


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
