"""A training step of a small Llama, all linear layers adapted: PEFT, the same accelerated, and frozen.

pytest bench/test_llama_step.py
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

BATCH, LENGTH, ROUNDS = 4, 256, 12


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=2048,
    )
    return transformers.LlamaForCausalLM(config)


def step(model: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    """Forward and backward from embeddings that need a gradient, so that the frozen model has a backward too."""
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()

    def run() -> None:
        embedded.grad = None
        for parameter in model.parameters():
            parameter.grad = None
        model(inputs_embeds=embedded, labels=tokens).loss.backward()

    return run


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_llama_step(record_ratio: Any, dropout: float) -> None:
    torch.manual_seed(0)
    frozen = llama().requires_grad_(False)
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear")
    theirs = peft.get_peft_model(copy.deepcopy(frozen), config)
    ours = copy.deepcopy(theirs)
    report = lk.accelerate(ours)
    assert all(row.accelerated for row in report.rows)
    tokens = torch.randint(0, 2048, (BATCH, LENGTH))
    times = interleaved_seconds([step(model, tokens) for model in (ours, theirs, frozen)], ROUNDS, warm_up=2)
    ours_s, peft_s, frozen_s = times
    record_ratio(
        {
            "model": "Llama, 4 layers of 512",
            "dropout": dropout,
            "accelerated / PEFT": p20_50_80(ours_s / peft_s),
            "accelerated / frozen": p20_50_80(ours_s / frozen_s),
            "PEFT / frozen": p20_50_80(peft_s / frozen_s),
            "frozen ms": f"{np.median(frozen_s) * 1e3:.1f}",
        }
    )
