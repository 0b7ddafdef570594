"""A model whose layers can be adapted, and an adapter of it in files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakernels as lk


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(12, 12), nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.v_proj(torch.tanh(self.q_proj(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def net() -> Net:
    """Always the same weights."""
    torch.manual_seed(5)
    return Net()


def trained(model: nn.Module) -> nn.Module:
    for parameter in lk.trainable_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


X = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))


def adapted_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, lk.LoRALinear)]


def saved(folder: Path, **fields: Any) -> tuple[nn.Module, Path]:
    config = lk.LoRAConfig(**{"r": 3, "target_modules": ["q_proj", "head"], "use_rslora": True, **fields})
    model = trained(lk.inject(net(), config)).eval()
    return model, lk.save_adapter(model, folder)


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")

    return edit


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None
