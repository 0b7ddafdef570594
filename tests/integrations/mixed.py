"""PEFT's model with several adapters, and its accelerated copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from accelerated import Two, config, randomised
from peft import LoraConfig, get_peft_model

import lorakernels as lk

RANKS = (4, 7, 1, 4, 16, 4, 2, 5)
BASE = "__base__"
MIXED = ["a0", "a1", BASE, "a2", "a3", "a4", "a0", "a5", "a6", "a7", "a3", "a3"]
ADAPTERS = {
    "mixed ranks": [config(r=r, lora_alpha=3 + r) for r in RANKS],
    "equal ranks": [config() for _ in RANKS],
    "rslora": [config(r=r, use_rslora=True) for r in RANKS],
    "rank_pattern": [config(r=r, rank_pattern={"up": 9 - r % 4}, alpha_pattern={"down": 1.7}) for r in RANKS],
    "missing on some layers": [
        config(r=r, target_modules=["down"] if i in (1, 7) else ["up"] if i == 3 else ["up", "down"])
        for i, r in enumerate(RANKS)
    ],
    "lora_bias": [config(r=r, lora_bias=i % 2 == 0) for i, r in enumerate(RANKS)],
    "ranks far apart": [config(r=1 if i else 3000) for i in range(8)],
    "dropout": [config(r=r, lora_dropout=0.5) for r in RANKS],
}


def models(*configs: LoraConfig, dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Any, Any]:
    """PEFT's model with adapters a0, a1, … and its accelerated copy, both to infer with."""
    torch.manual_seed(0)
    plain = get_peft_model(Two(bias).to(dtype), configs[0], adapter_name="a0")
    for i, other in enumerate(configs[1:], 1):
        plain.add_adapter(f"a{i}", other)
    plain = randomised(plain.to(dtype)).eval()
    fast = copy.deepcopy(plain)
    lk.accelerate(fast)
    return plain, fast
