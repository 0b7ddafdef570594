"""A training step and a single token of a layer over NF4, beside PEFT with bitsandbytes and the frozen layers.

pytest bench/test_quantised.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import lorakernels as lk
from lorakernels.tools.bench.timing import interleaved_seconds, p20_50_80

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

K, N, R = 2048, 2048, 16
ROUNDS = 20


class OneLinear(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def packed(weight: torch.Tensor) -> nn.Module:
    layer = bnb.nn.Linear4bit(K, N, bias=False, quant_type="nf4", compute_dtype=weight.dtype)
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")._quantize("cpu")
    return layer


def layers_of(dtype: torch.dtype) -> dict[str, nn.Module]:
    """Each around a packed weight of its own: bitsandbytes' forward in evaluation changes it."""
    torch.manual_seed(0)
    weight = (torch.randn(N, K) / K**0.5).to(dtype)
    plain = nn.Linear(K, N, bias=False, dtype=dtype).requires_grad_(False)
    plain.weight.copy_(weight)
    config = peft.LoraConfig(r=R, lora_alpha=R, target_modules=["linear"])
    return {
        "ours": lk.LoRALinear.from_linear(packed(weight), r=R, lora_alpha=R),
        "PEFT": peft.get_peft_model(OneLinear(packed(weight)), config),
        "frozen nf4": packed(weight),
        "frozen": plain,
    }


def step(layer: nn.Module, x: torch.Tensor, train: bool) -> Callable[[], None]:
    layer.train(train)
    dy = torch.ones(*x.shape[:-1], N, dtype=x.dtype)

    def run() -> None:
        with torch.set_grad_enabled(train):
            y = layer(x)
        if train:
            y.backward(dy)
            x.grad = None

    return run


def peak_mib(run: Callable[[], None]) -> float:
    """The most bytes that a step holds beside what there was before it, y and x's gradient among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        run()
    memory = (event for event in events.profiler.kineto_results.events() if event.name() == "[memory]")
    changes = [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]
    return float(np.cumsum([0, *changes]).max()) / 2**20


@pytest.mark.parametrize("tokens", [512, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_quantised(benchmark: Any, record_ratio: Any, dtype: torch.dtype, tokens: int) -> None:
    layers = layers_of(dtype)
    x = torch.randn(tokens, K, dtype=dtype, requires_grad=True)
    steps = [step(layer, x, train=tokens > 1) for layer in layers.values()]
    seconds = dict(zip(layers, interleaved_seconds(steps, ROUNDS), strict=True))
    ours = seconds["ours"]
    record_ratio(
        {
            "dtype": str(dtype).removeprefix("torch."),
            "what": "training step" if tokens > 1 else "inference",
            "tokens": tokens,
            **{f"ours / {name}": p20_50_80(ours / seconds[name]) for name in list(layers)[1:]},
            "ours ms": f"{np.median(ours) * 1e3:.2f}",
            "peak MiB, ours / PEFT": f"{peak_mib(steps[0]):.1f} / {peak_mib(steps[1]):.1f}",
        }
    )
    benchmark.pedantic(steps[0], rounds=3)
