"""A model's files and an adapter's become a plain model's files, one tensor at a time. Needs peft and transformers."""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorakernels as lk
from lorakernels.cli import main as lorakernels

folder = tempfile.mkdtemp()
base, adapter, merged = (f"{folder}/{name}" for name in ("base", "adapter", "merged"))

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(base, max_shard_size="100KB")
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(base),
    LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False),  # stands for a trained one
)
lk.accelerate(model)
model.save_pretrained(adapter)

# What `lorakernels merge --model base --adapter adapter --out merged` does in a shell; no model is in memory.
assert lorakernels(["merge", "--model", base, "--adapter", adapter, "--out", merged]) == 0

plain = AutoModelForCausalLM.from_pretrained(merged)  # any library reads it: there is no adapter in it any more
assert not isinstance(plain, PeftModel) and not any("lora" in name for name in plain.state_dict())
tokens = torch.randint(64, (2, 16))
with torch.no_grad():
    difference = (plain(tokens).logits - model.eval()(tokens).logits).abs().max().item()
print("merged, largest difference of a logit:", difference)
assert difference < 1e-4
