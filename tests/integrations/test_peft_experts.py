"""PEFT's `target_parameters` on transformers' experts: PEFT's own numbers, without a second copy of a stack."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixtures import BOTH, FIRST, LAST, MIXTURES, Mixture, assert_same, shake, step
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorakernels as lk
from lorakernels.testing.guards import watch_allocations


def adapted(
    name: str,
    which: slice = BOTH,
    adapters: tuple[str, ...] = ("default",),
    dtype: torch.dtype = torch.float64,
    **rest: Any,
) -> Mixture:
    """A mixture with PEFT's adapters, none of them zero, and a router that is trained."""
    kind = {key: rest.pop(key) for key in ("implementation", "experts") if key in rest}
    model = Mixture(name, dtype, **kind)
    targets = model.targets[which]
    for i, adapter in enumerate(adapters):
        config = LoraConfig(r=2 + i, lora_alpha=3, target_modules=[], target_parameters=targets, **rest)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, model, adapter)
    for parameter in model.router.parameters():
        parameter.requires_grad_()
    shake(model)
    activate(model, list(adapters))
    return model


def activate(model: nn.Module, names: list[str]) -> None:
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            module.set_adapter(names)


def fused(model: nn.Module) -> lk.integrations.peft.AccelerationReport:  # type: ignore[name-defined]
    report = lk.accelerate(model)
    assert report.num_accelerated == report.num_layers > 0, report
    return report


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own forward is not run."""
    monkeypatch.setattr(ParamWrapper, "_activate_lora", None)


@pytest.mark.parametrize("which", [BOTH, FIRST, LAST], ids=["both", "first", "last"])
@pytest.mark.parametrize("name", MIXTURES)
def test_as_peft_in_float64(name: str, which: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(name, which)
    expected = step(model)
    assert sum("lora_" in key for key in expected) == 2 * len(model.targets[which])
    assert any(key.startswith(("block.gate", "block.router")) for key in expected)
    fused(model)
    monkeypatch.setattr(ParamWrapper, "_activate_lora", None)
    assert_same(step(model), expected)
    monkeypatch.undo()
    lk.restore(model)
    assert all(torch.equal(found, expected[key]) for key, found in step(model).items())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_every_implementation(name: str, implementation: str) -> None:
    dtype = torch.float64 if implementation == "eager" else torch.float32
    model = adapted(name, dtype=dtype, implementation=implementation)
    expected = step(model)
    fused(model)
    rounds = dtype is torch.float32 or name == "nemotron_h"  # whose eager experts are added up in float32
    assert_same(step(model), expected, 1e-5 if rounds else 1e-14)


PATTERNS = {"rank_pattern": {"gate_up_proj": 5}, "alpha_pattern": {"down_proj": 7}}


@pytest.mark.parametrize(
    ("name", "rest"),
    [
        *((name, {"adapters": ("a", "b")}) for name in ("qwen3_moe", "gpt_oss", "llama4")),
        ("gpt_oss", PATTERNS),
        ("qwen3_moe", {"use_rslora": True}),
    ],
    ids=str,
)
def test_several_adapters_and_patterns(name: str, rest: dict[str, Any]) -> None:
    model = adapted(name, **rest)
    expected = step(model)
    fused(model)
    assert_same(step(model), expected)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("qwen3_moe", torch.float32), ("gpt_oss", torch.bfloat16), ("llama4", torch.bfloat16)],
    ids=str,
)
def test_as_exact_as_peft(name: str, dtype: torch.dtype) -> None:
    """Within twice PEFT's own error, and a rounding, of the float64 numbers; bitwise the same twice."""
    model = adapted(name, dtype=dtype)
    theirs = step(model)
    fused(model)
    ours, again = step(model), step(model)
    exact = step(copy.deepcopy(model).double())
    for key, tensor in exact.items():
        assert torch.equal(ours[key], again[key])
        allowed = 2 * (theirs[key].double() - tensor).norm() + torch.finfo(dtype).eps * tensor.norm()
        assert (ours[key].double() - tensor).norm() <= allowed, key


def test_disable_merge_and_switch() -> None:
    """Each state as PEFT has it, and back."""
    model = adapted("qwen3_moe", adapters=("a", "b"))
    twin = copy.deepcopy(model)
    fused(model)
    states: list[Callable[[ParamWrapper], object]] = [
        lambda layer: layer.set_adapter(["b"]),
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.enable_adapters(True),
        lambda layer: layer.merge(adapter_names=["a"]),
        lambda layer: layer.unmerge(),
    ]
    for change in states:
        for each in (model, twin):
            for layer in each.modules():
                if isinstance(layer, ParamWrapper):
                    change(layer)
        for each in (model, twin):
            for parameter in each.router.parameters():
                parameter.requires_grad_()
        assert_same(step(model), step(twin), 1e-13)


def test_names_state_and_copies_are_peft_s() -> None:
    model = adapted("gpt_oss")
    before, text = {k: v.clone() for k, v in model.state_dict().items()}, repr(model)
    fused(model)
    assert repr(model) == text and model.state_dict().keys() == before.keys()
    assert_same(step(copy.deepcopy(model)), step(model), 0)


def test_checkpointed_and_compiled() -> None:
    model = adapted("qwen3_moe")
    fused(model)
    expected = step(model)
    assert_same(step(model, lambda x: checkpoint(model, x, use_reentrant=False)), expected, 0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(step(model, compiled), expected)


def test_no_second_copy_of_a_stack() -> None:
    model = adapted("qwen3_moe", dtype=torch.float32, experts=64)
    fused(model)
    with watch_allocations() as made:
        step(model)
    assert 0 < max(made) < model.get_parameter("block.experts.base_layer.base_layer.down_proj").nbytes / 2


def hooked(model: Mixture) -> None:
    model.block.experts.get_base_layer().register_forward_hook(lambda *_: None)


def spread(model: Mixture) -> None:
    model.block.experts.get_base_layer()._is_expert_parallel = True


def of_a_kernel(model: Mixture) -> None:
    model.config._experts_implementation = "sonicmoe"


def of_another_kind(model: Mixture) -> None:
    base = model.block.experts.get_base_layer()
    base.__class__ = type("Other", (type(base),), {"forward": lambda self, x, *_: x})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "the experts have hooks"),
        (spread, "the experts are spread over processes"),
        (of_a_kernel, "the experts' implementation is 'sonicmoe'"),
        (of_another_kind, "is not a mixture whose experts transformers dispatches"),
    ],
)
def test_left_to_peft_with_the_reason(change: Callable[[Mixture], None], reason: str) -> None:
    model = adapted("qwen3_moe")
    change(model)
    report = lk.accelerate(model)
    assert report.num_accelerated == 0
    assert all(reason in row.reason for row in report.rows), report
    if change is not of_a_kernel:
        assert_same(step(model), step(adapted_and_changed(change)), 0)


def adapted_and_changed(change: Callable[[Mixture], None]) -> Mixture:
    model = adapted("qwen3_moe")
    change(model)
    return model


def test_mixed_batches_are_refused_as_by_peft() -> None:
    model = adapted("qwen3_moe")
    fused(model)
    with pytest.raises(ValueError, match="does not support mixed"):
        model.block.experts(torch.ones(1, 16), adapter_names=["default"])


@pytest.mark.parametrize(
    ("implementation", "dtype"), [("grouped_mm", torch.float32), ("eager", torch.float32), ("eager", torch.bfloat16)]
)
def test_under_autocast(implementation: str, dtype: torch.dtype) -> None:
    model = adapted("qwen3_moe", dtype=dtype, implementation=implementation)

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    expected = step(model, run)
    fused(model)
    found = step(model, run)
    assert found["y"].dtype is expected["y"].dtype
    assert_same(found, expected, 0.05)
