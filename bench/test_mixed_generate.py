"""Greedy generation with a small Llama on a CPU: eight adapters in one batch, and one for all, beside the base model.

pytest bench/test_mixed_generate.py
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
transformers = pytest.importorskip("transformers")

ROWS, PROMPT, NEW, ADAPTERS, ROUNDS = 16, 16, 32, 8, 12


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=2048,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def with_adapters(base: nn.Module) -> Any:
    """Eight adapters of rank 16 on all seven projections, all of which do something; the first is active."""
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, config, adapter_name="adapter0")
    for i in range(1, ADAPTERS):
        model.add_adapter(f"adapter{i}", config)
    return model.eval()


def generates(model: Any, tokens: torch.Tensor, **options: Any) -> Callable[[], None]:
    def run() -> None:
        made = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            **options,
        )
        assert made.shape[1] == PROMPT + NEW

    return run


@pytest.mark.parametrize("batch", ["in turn", "in any order", "in turn, two rows of the base", "one adapter"])
def test_mixed_generate(record_ratio: Any, batch: str) -> None:
    torch.manual_seed(0)
    base = llama()
    theirs = with_adapters(copy.deepcopy(base))
    ours = copy.deepcopy(theirs)
    assert not lk.accelerate(ours).not_accelerated
    tokens = torch.randint(1, 2048, (ROWS, PROMPT))
    options: dict[str, Any] = {}
    if batch != "one adapter":
        order = np.random.default_rng(0).permutation(ROWS) if "any order" in batch else range(ROWS)
        names = [f"adapter{i % ADAPTERS}" for i in order]
        if "base" in batch:
            names[3] = names[12] = "__base__"
        options["adapter_names"] = names
    steps = [generates(ours, tokens, **options), generates(theirs, tokens, **options), generates(base, tokens)]
    ours_s, peft_s, base_s = interleaved_seconds(steps, ROUNDS, warm_up=2)
    record_ratio(
        {
            "batch": batch,
            "accelerated / base": p20_50_80(ours_s / base_s),
            "PEFT / base": p20_50_80(peft_s / base_s),
            "accelerated / PEFT": p20_50_80(ours_s / peft_s),
            "base ms": f"{np.median(base_s) * 1e3:.1f}",
        }
    )
