"""Adapters of a small Llama learn to count by ones, twos and threes, and answer in one batch. Needs transformers."""

import tempfile
from itertools import pairwise

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorakernels as lk

WORDS, PROMPT, STRIDES = 32, 4, {"ones": 1, "twos": 2, "threes": 3}


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.1, pad_token_id=0))


def counting(stride: int, rows: int, length: int) -> torch.Tensor:
    """[rows, length] tokens, the pad token left out."""
    return (torch.randint(WORDS - 1, (rows, 1)) + stride * torch.arange(length)) % (WORDS - 1) + 1


def train(stride: int, rank: int, folder: str) -> None:
    model = lk.inject(base(), lk.LoRAConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(lk.trainable_parameters(model), lr=2e-2)
    for _ in range(100):
        tokens = counting(stride, 16, 12)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lk.save_adapter(model, folder)


root = tempfile.mkdtemp()
for rank, (name, stride) in zip((4, 8, 16), STRIDES.items(), strict=True):  # ranks may differ
    train(stride, rank, f"{root}/{name}")

model = base().eval()
store = lk.AdapterStore(model, max_adapters=8, max_rank=16, root=root)
for name in STRIDES:
    store.load(name)

rows = [*STRIDES, None, *STRIDES]  # an adapter, or none, for each row
prompts = torch.cat([counting(STRIDES.get(name, 1), 1, PROMPT) for name in rows])
with torch.no_grad(), store.batch(rows):
    answers = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, do_sample=False)
right = []
for name, answer in zip(rows, answers.tolist(), strict=True):
    print(f"{name or 'the base':8} {answer[:PROMPT]} -> {answer[PROMPT:]}")
    steps = {(b - a) % (WORDS - 1) for a, b in pairwise(answer)}
    right.append(steps == {STRIDES.get(name)})
print(store.stats())
assert sum(right) >= 5, right
