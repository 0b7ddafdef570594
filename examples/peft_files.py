"""An adapter made in PEFT, used here, trained on, and taken back to PEFT. Needs peft."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lorakernels as lk


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))


x = torch.randn(16, 32)

theirs = get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False))
theirs.save_pretrained("from-peft")

ours = lk.load_adapter(base(), "from-peft", trainable=True)
print("PEFT's adapter here, largest difference:", (ours(x) - theirs(x)).abs().max().item())

optimizer = torch.optim.SGD(lk.trainable_parameters(ours), lr=0.1)
ours(x).square().mean().backward()
optimizer.step()
lk.save_adapter(ours, "back-to-peft")

again = PeftModel.from_pretrained(base(), "back-to-peft")
difference = (ours(x) - again(x)).abs().max().item()
print("trained here, loaded by PEFT, largest difference:", difference)
assert difference < 1e-4
