"""A training step of one adapted layer beside PEFT's and beside the frozen layer, interleaved in one process.

pytest bench/test_training_step.py

A ratio is that of two steps run one after the other, so that a slow spell of the machine hits both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lorakernels as lk
from lorakernels.tools.bench.timing import interleaved_seconds, p20_50_80

peft = pytest.importorskip("peft")

M, K, N, R = 512, 2048, 2048, 16
ROUNDS = 40


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(K, N)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def peft_layer(dtype: torch.dtype, dropout: float) -> nn.Module:
    config = peft.LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=dropout, target_modules=["linear"])
    layer = peft.get_peft_model(OneLinear().to(dtype), config).base_model.model.linear
    nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return layer


def our_layer(theirs: nn.Module, dropout: float) -> nn.Module:
    layer = lk.LoRALinear.from_linear(theirs.base_layer, r=R, lora_alpha=2 * R, lora_dropout=dropout)
    layer.load_state_dict(theirs.state_dict())
    return layer


def step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        layer(x).backward(dy)

    return run


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_training_step(benchmark: Any, record_ratio: Any, dtype: torch.dtype, dropout: float) -> None:
    torch.manual_seed(0)
    theirs = peft_layer(dtype, dropout)
    ours, frozen = our_layer(theirs, dropout), theirs.base_layer
    x, dy = torch.randn(M, K, dtype=dtype, requires_grad=True), torch.randn(M, N, dtype=dtype)
    assert dropout or torch.allclose(ours(x), theirs(x), atol=0.1 if dtype is torch.bfloat16 else 1e-4)

    steps = [step(layer, x, dy) for layer in (ours, theirs, frozen)]
    ours_s, peft_s, frozen_s = interleaved_seconds(steps, ROUNDS)
    record_ratio(
        {
            "dtype": str(dtype).removeprefix("torch."),
            "dropout": dropout,
            "ours / PEFT": p20_50_80(ours_s / peft_s),
            "ours / frozen": p20_50_80(ours_s / frozen_s),
            "PEFT / frozen": p20_50_80(peft_s / frozen_s),
            "frozen ms": f"{np.median(frozen_s) * 1e3:.1f}",
        }
    )
    benchmark.extra_info["ours_over_peft"] = float(np.median(ours_s / peft_s))
    benchmark.pedantic(steps[0], rounds=5)
