"""Adapters of kohya and mlx-lm, and the model that they are for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

Tensors = dict[str, torch.Tensor]
NAN = float("nan")


class Block(nn.Module):
    """Names with underscores, digits and one inside another: what makes kohya's names ambiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 8, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(8, 6), nn.Dropout(0.0)])
        self.conv_in = nn.Conv2d(3, 5, 3)
        self.proj = nn.Conv2d(5, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_out[0](self.to_q(x))


def fresh_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.down_blocks = nn.ModuleList([Block(), Block()])
    model.forward = lambda x: model.down_blocks[1](model.down_blocks[0](x))  # type: ignore[method-assign]
    return model.double()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def kohya_tensors() -> Tensors:
    """Ranks and alphas that differ, alpha as an integer and left out, convolutions of both sizes."""
    torch.manual_seed(1)
    return {
        "lora_unet_down_blocks_0_to_q.lora_down.weight": randn(2, 6),
        "lora_unet_down_blocks_0_to_q.lora_up.weight": randn(8, 2),
        "lora_unet_down_blocks_0_to_q.alpha": torch.tensor(1.5),
        "lora_unet_down_blocks_1_to_q.lora_down.weight": randn(2, 6),
        "lora_unet_down_blocks_1_to_q.lora_up.weight": randn(8, 2),
        "lora_unet_down_blocks_1_to_q.alpha": torch.tensor(1.5),
        "lora_unet_down_blocks_1_to_out_0.lora_down.weight": randn(3, 8),
        "lora_unet_down_blocks_1_to_out_0.lora_up.weight": randn(6, 3),
        "lora_unet_down_blocks_1_conv_in.lora_down.weight": randn(2, 3, 3, 3),
        "lora_unet_down_blocks_1_conv_in.lora_up.weight": randn(5, 2, 1, 1),
        "lora_unet_down_blocks_1_conv_in.alpha": torch.tensor(4),
        "lora_unet_down_blocks_0_proj.lora_down.weight": randn(1, 5, 1, 1),
        "lora_unet_down_blocks_0_proj.lora_up.weight": randn(4, 1, 1, 1),
        "lora_unet_down_blocks_0_proj.alpha": torch.tensor(-2.0),
    }


def write_kohya(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path, metadata={"ss_network_module": "networks.lora"})
    return path


MLX_CONFIG: dict[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 2,
    "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.1, "keys": ["to_q"]},
}


def mlx_tensors(dora: bool = False) -> Tensors:
    torch.manual_seed(2)
    tensors = {}
    for layer in (0, 1):
        tensors[f"down_blocks.{layer}.to_q.lora_a"] = randn(6, 2)
        tensors[f"down_blocks.{layer}.to_q.lora_b"] = randn(2, 8)
        if dora:
            tensors[f"down_blocks.{layer}.to_q.m"] = randn(8).abs()
    return tensors


def write_mlx(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def dora(config: Mapping[str, Any] = MLX_CONFIG) -> dict[str, Any]:
    return {**config, "fine_tune_type": "dora"}


def changed(tensors: Tensors, **changes: torch.Tensor | None) -> Tensors:
    """With tensors set or, for None, taken out; `__` stands for a dot."""
    result = dict(tensors)
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        if tensor is None:
            del result[key]
        else:
            result[key] = tensor
    return result
