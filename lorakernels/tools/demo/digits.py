"""The demo's data and network: scans of handwritten digits, the ways their world changes, and training."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

PIXELS, HIDDEN, CLASSES = 64, 256, 10
BATCH = 128

# Images are [..., 8, 8] with ink 1 and paper -1.
WORLDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rotated": lambda images: torch.rot90(images, 1, (-2, -1)),
    "inverted": lambda images: -images,
    "mirrored": lambda images: images.flip(-1),
}


@dataclass(frozen=True)
class Digits:
    """A split of the 1,797 digits: images [n, 8, 8] and labels [n]."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load(seed: int, device: torch.device) -> Digits:
    """The digits that scikit-learn brings along, a quarter of them kept for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    parts = train_test_split(bunch.images, bunch.target, test_size=0.25, stratify=bunch.target, random_state=seed)
    train_images, test_images = (torch.tensor(p / 8 - 1, dtype=torch.float32, device=device) for p in parts[:2])
    train_labels, test_labels = (torch.tensor(p, device=device) for p in parts[2:])
    return Digits(train_images, train_labels, test_images, test_labels)


def network(device: torch.device) -> nn.Sequential:
    """A plain torch network: nothing in it knows of adapters."""
    hidden = {"hidden1": nn.Linear(PIXELS, HIDDEN), "relu1": nn.ReLU(), "hidden2": nn.Linear(HIDDEN, HIDDEN)}
    layers = {"flatten": nn.Flatten(), **hidden, "relu2": nn.ReLU(), "head": nn.Linear(HIDDEN, CLASSES)}
    return nn.Sequential(OrderedDict(layers)).to(device)


def train(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    steps: int,
    learning_rate: float,
    advance: Callable[[], object],
) -> float:
    """Train what is trainable in `model`, leave it in eval mode, and return the seconds."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    start = time.perf_counter()
    for _ in range(steps):
        batch = torch.randint(len(labels), (BATCH,), device=labels.device)
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
        advance()
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    model.eval()
    return time.perf_counter() - start


@torch.no_grad()
def answers(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The logits, [n, 10]."""
    return model(images)


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(-1) == labels).double().mean().item()
