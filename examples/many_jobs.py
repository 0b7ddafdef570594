"""Three training jobs share a frozen network and each batch: digits of three changed worlds. Needs scikit-learn."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import lorakernels as lk

torch.manual_seed(0)
bunch = load_digits()
images, labels = torch.tensor(bunch.data / 8 - 1, dtype=torch.float32), torch.tensor(bunch.target)
square = images.view(-1, 8, 8)
WORLDS = {"inverted": -images, "mirrored": square.flip(2).flatten(1), "rotated": square.rot90(1, (1, 2)).flatten(1)}
RANKS, SCALINGS, TRAIN, ROWS = (4, 8, 16), (4.0, 2.0, 1.0), 1300, 64

base = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(base.parameters(), lr=5e-3)
for _ in range(200):
    batch = torch.randint(0, TRAIN, (128,))
    F.cross_entropy(base(images[batch]), labels[batch]).backward()
    optimizer.step()
    optimizer.zero_grad()
layers = [layer.requires_grad_(False) for layer in base if isinstance(layer, nn.Linear)]

# A stack of adapters for each layer: a slot for each job, as large as the largest rank.
As = [torch.empty(3, max(RANKS), each.in_features).uniform_(-0.1, 0.1).requires_grad_() for each in layers]
Bs = [torch.zeros(3, each.out_features, max(RANKS), requires_grad=True) for each in layers]


def forward(x: torch.Tensor, plan: lk.BatchPlan) -> torch.Tensor:
    for i, (layer, A, B) in enumerate(zip(layers, As, Bs, strict=True)):
        x = lk.multi_lora_linear(F.relu(x) if i else x, layer.weight, A, B, plan, bias=layer.bias)
    return x


plan = lk.BatchPlan(num_slots=3, max_tokens=3 * len(images), max_rank=max(RANKS), device="cpu")
optimizer = torch.optim.AdamW([*As, *Bs])
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=500)
for _ in range(500):
    batch = torch.randint(0, TRAIN, (ROWS,))
    x = torch.cat([world[batch] for world in WORLDS.values()])
    plan.update([slot for slot in range(3) for _ in range(ROWS)], RANKS, SCALINGS)
    losses = F.cross_entropy(forward(x, plan), labels[batch].repeat(3), reduction="none").view(3, ROWS).mean(1)
    losses.sum().backward()  # each job's gradients are its own
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()

with torch.no_grad():
    for slot, (name, world) in enumerate(WORLDS.items()):
        plan.update([slot] * len(images[TRAIN:]), RANKS, SCALINGS)
        before, after = base(world[TRAIN:]), forward(world[TRAIN:], plan)
        before, after = ((y.argmax(1) == labels[TRAIN:]).float().mean() for y in (before, after))
        print(f"{name}, rank {RANKS[slot]}: {before:.1%} right by the frozen network, {after:.1%} with its adapter")
        assert after > 0.8
