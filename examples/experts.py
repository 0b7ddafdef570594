"""A small mixture of experts learns to count: PEFT beside accelerated. Needs peft and transformers."""

import copy
import time

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import lorakernels as lk

WORDS, LENGTH = 64, 24


def mixture(experts: int = 32) -> PeftModel:
    """A model of random weights, with adapters on all experts of all layers."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=WORDS, hidden_size=256, moe_intermediate_size=128, num_experts=experts, num_experts_per_tok=4,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64, pad_token_id=0,
    )  # fmt: skip
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], target_parameters=targets)
    return get_peft_model(Qwen3MoeForCausalLM(config), lora)


def main(steps: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Losses and seconds [2, steps], PEFT's first."""
    models = [mixture()]
    models.append(copy.deepcopy(models[0]))
    print(lk.accelerate(models[1]))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3) for model in models]
    losses, seconds = np.zeros((2, 2, steps))
    for i in range(steps):
        first, stride = torch.randint(1, WORDS, (8, 1)), torch.randint(1, 4, (8, 1))
        tokens = (first + stride * torch.arange(LENGTH)) % (WORDS - 1) + 1
        for j in (i % 2, 1 - i % 2):  # in turns, so that a slow spell of the machine hits both
            start = time.perf_counter()
            loss = models[j](input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizers[j].step()
            optimizers[j].zero_grad()
            losses[j, i], seconds[j, i] = loss.item(), time.perf_counter() - start
        print(f"step {i}: loss {losses[0, i]:.6f}, accelerated {losses[1, i]:.6f}")
    low, middle, high = np.percentile(seconds[1, 1:] / seconds[0, 1:], [20, 50, 80])  # the first step warms up
    print(f"accelerated / PEFT: {middle:.3f} ({low:.3f} … {high:.3f}) of the time")
    return losses, seconds


if __name__ == "__main__":
    main()
