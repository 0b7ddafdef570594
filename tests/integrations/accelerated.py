"""A small model of PEFT's, its accelerated copy, and what both compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model

from lorakernels.integrations.peft import accelerate

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


class Scaled(nn.Linear):
    """Stands for a quantised base: its weight alone does not say what it computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


class Disguised(torch.Tensor):
    """Stands for a quantised weight inside a plain nn.Linear, as torchao makes it."""


def double_output(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output
