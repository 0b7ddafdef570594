"""A frozen network reads digits; an adapter teaches it to read them in negative. Needs scikit-learn."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import lorakernels as lk

torch.manual_seed(0)
bunch = load_digits()
images, labels = torch.tensor(bunch.data / 8 - 1, dtype=torch.float32), torch.tensor(bunch.target)
train, test = slice(0, 1300), slice(1300, None)


def fit(model: nn.Module, images: torch.Tensor, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(lk.trainable_parameters(model), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = torch.randint(0, train.stop, (128,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor) -> float:
    return (model(images[test]).argmax(-1) == labels[test]).float().mean().item()


model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
fit(model, images, steps=300, lr=5e-3)
print(f"digits: {accuracy(model, images):.1%}, in negative: {accuracy(model, -images):.1%}")

lk.inject(model, lk.LoRAConfig(r=4, lora_alpha=16, target_modules="all-linear"))
print(lk.trainable_parameters(model))
fit(model, -images, steps=600, lr=1e-2)
adapted = accuracy(model, -images)
print(f"in negative, with the adapter: {adapted:.1%}")

lk.set_scale(model, "default", 0)
print(f"digits, with the adapter switched off: {accuracy(model, images):.1%}")

lk.set_scale(model, "default", 1)
lk.save_adapter(model, "negative")
lk.merge(model)
print(f"in negative, merged into the weights: {accuracy(model, -images):.1%}")
assert adapted > 0.8, adapted
