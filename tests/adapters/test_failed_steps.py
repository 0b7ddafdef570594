"""A training step, or a save, in which memory runs out leaves nothing behind: at every torch operator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorakernels as lk
from lorakernels.testing.failing import FailAt

ERRORS = (MemoryError, torch.OutOfMemoryError)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.out = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.q_proj(x) * self.k_proj(x)))


def adapted(**fields: Any) -> Any:
    torch.manual_seed(0)
    config = lk.LoRAConfig(**{"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **fields})
    return lk.inject(Net(), config)


def accelerated() -> Any:
    torch.manual_seed(0)
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "out"], init_lora_weights=False), Net()
    )
    lk.accelerate(model)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "grouped": adapted,
    "dropout": lambda: adapted(lora_dropout=0.3),
    "dora": lambda: adapted(use_dora=True),
    "accelerated": accelerated,
}


def step(model: Any) -> list[torch.Tensor]:
    """The loss and the gradients."""
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(torch.linspace(-1, 1, 40).view(5, 8)).square().mean()
    loss.backward()
    return [loss.detach(), *[parameter.grad for parameter in model.parameters() if parameter.grad is not None]]


def fail_steps(make: Callable[[], Any], numbers: Iterable[int]) -> int:
    """Fail at each of these operators, until there is none left: the next step's results are those of a new model."""
    expected, model = step(make()), make()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for number in numbers:
        fails = FailAt(number, ERRORS[number % 2]("injected"))
        try:
            with fails:
                step(model)
            return number
        except ERRORS as raised:
            assert raised is fails.error
        assert all(torch.equal(found, right) for found, right in zip(step(model), expected, strict=True)), number
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items()), number
    return 0


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_step_without_memory(make: Callable[[], Any], every: int) -> None:
    assert fail_steps(make, itertools.count(0, every)) > 20


def test_a_save_without_memory(tmp_path: Path) -> None:
    """The folder has the old adapter, or the new one."""
    old, new = adapted(r=2), adapted(r=3)
    for number in itertools.count():
        lk.save_adapter(old, tmp_path / "one")
        fails = FailAt(number, ERRORS[number % 2]("injected"))
        try:
            with fails:
                lk.save_adapter(new, tmp_path / "one")
        except ERRORS as raised:
            assert raised is fails.error
        loaded = lk.load_adapter(Net(), tmp_path / "one")
        rows = {
            tensor.shape[0]
            for name, tensor in load_file(tmp_path / "one" / "adapter_model.safetensors").items()
            if "lora_A" in name
        }
        assert rows == {loaded.out.adapters["default"].r} and {path.name for path in (tmp_path / "one").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        if fails.left >= 0:
            break
    assert number > 3
