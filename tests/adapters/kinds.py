"""A model with every kind of layer, and every kind of adapter of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

peft = pytest.importorskip("peft")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
IDS = torch.tensor([[1, 4, 0, 9, 9], [3, 2, 7, 5, 6]])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.picture = nn.Conv2d(1, 4, 3, padding=1, stride=2)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).transpose(1, 2)
        x = (x + torch.tanh(self.conv(x)) + self.grouped(x)).transpose(1, 2)
        x = x + self.picture(x[:, None]).flatten(1).mean(1)[:, None, None]
        return self.head(self.norm(x + self.v_proj(torch.tanh(self.q_proj(x)))).mean(1))


def net() -> Any:
    """Always the same weights, in float64."""
    torch.manual_seed(5)
    return Net().double().eval()


PLAIN = ["embed", "conv", "picture", "q_proj", "v_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "linear": dict(target_modules=["q_proj", "v_proj"]),
    "embedding": dict(target_modules=["embed"]),
    "conv": dict(target_modules=["conv", "picture"]),
    "grouped conv": dict(target_modules=["grouped"]),
    "all kinds": dict(target_modules=[*PLAIN, "grouped"], use_rslora=True),
    "patterns": dict(target_modules=PLAIN, rank_pattern={"embed": 2, "conv": 6}, alpha_pattern={"q_proj": 3}),
    "DoRA": dict(target_modules=PLAIN, use_dora=True),
    "lora_bias": dict(target_modules=["q_proj", "conv", "picture"], lora_bias=True),
    "modules_to_save": dict(target_modules=PLAIN, modules_to_save=["head"]),
    "a norm to save": dict(target_modules=["q_proj"], modules_to_save=["norm", "head.2"]),
    "biases": dict(target_modules=PLAIN, bias="lora_only"),
    "all biases": dict(target_modules=["embed", "q_proj"], bias="all", modules_to_save=["head"]),
    "all biases, lora_bias": dict(target_modules=["q_proj"], bias="all", lora_bias=True),
}


def arguments(kind: str) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 7, **KINDS[kind]}


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """Every trainable parameter and the buffers of copies, moved by a small step: some are lengths."""
    generator = torch.Generator().manual_seed(11)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.requires_grad or (".modules_to_save." in name and "running" in name):
            tensor += torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.3
    return model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Without what PEFT repeats of its wrapper's copies when it saves all biases."""
    return {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if ".modules_to_save." not in key}


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


Edit = Callable[[Path], None]


def change(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)

    return apply


def drop(key: str) -> Edit:
    return change(lambda tensors: tensors.pop(PREFIX + key))


def put(key: str, *shape: int, value: float = 0.5, dtype: torch.dtype = torch.float64) -> Edit:
    return change(lambda tensors: tensors.update({PREFIX + key: torch.full(shape, value).to(dtype)}))


def fields(**values: Any) -> Edit:
    def apply(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return apply
