"""A block of Qwen3-MoE with adapters on its experts: ours beside PEFT and the frozen block.

pytest bench/test_experts.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lorakernels as lk
from lorakernels.tools.bench.timing import interleaved_seconds, p20_50_80

peft = pytest.importorskip("peft")
qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")

ROUNDS = 9
# Width, inner width, experts, choices, tokens; of one token the forward alone.
SHAPES = ((1024, 512, 32, 4, 512), (256, 128, 64, 8, 256), (1024, 512, 64, 8, 1))


def blocks_of(hidden: int, inner: int, experts: int, top_k: int, dtype: torch.dtype, how: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "moe_intermediate_size": inner, "num_experts": experts}
    config = qwen.Qwen3MoeConfig(**sizes, num_experts_per_tok=top_k, norm_topk_prob=True)
    config._experts_implementation = how
    block = nn.Sequential(qwen.Qwen3MoeSparseMoeBlock(config)).to(dtype).requires_grad_(False)
    for weight in block.parameters():
        weight.normal_(0, weight.shape[-1] ** -0.5)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    theirs = copy.deepcopy(block)
    peft.inject_adapter_in_model(peft.LoraConfig(r=16, target_modules=[], target_parameters=targets), theirs)
    ours = copy.deepcopy(theirs)
    lk.accelerate(ours)
    return {"ours": ours, "PEFT": theirs, "frozen": block}


def step(block: nn.Module, x: torch.Tensor, train: bool) -> Callable[[], None]:
    def run() -> None:
        with torch.set_grad_enabled(train):
            y = block(x)
        if train:
            y.backward(torch.ones_like(y))
            x.grad = None

    return run


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_experts(benchmark: Any, record_ratio: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    *sizes, tokens = shape
    blocks = blocks_of(*sizes, dtype, "grouped_mm")
    x = torch.randn(1, tokens, sizes[0], dtype=dtype, requires_grad=True)
    steps = [step(block, x, train=tokens > 1) for block in blocks.values()]
    seconds = dict(zip(blocks, interleaved_seconds(steps, ROUNDS), strict=True))
    record_ratio(
        {
            "dtype": str(dtype).removeprefix("torch."),
            "what": "training step" if tokens > 1 else "inference",
            "hidden, inner, experts, top k, tokens": str(shape),
            **{f"{name} / frozen": p20_50_80(seconds[name] / seconds["frozen"]) for name in ("ours", "PEFT")},
            "ours ms": f"{np.median(seconds['ours']) * 1e3:.2f}",
        }
    )
    benchmark.pedantic(steps[0], rounds=3)
