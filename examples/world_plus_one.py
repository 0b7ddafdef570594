"""Every entry of a known linear map grows by one, and rank 1 follows. An argument is a file for a picture."""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F

import lorakernels as lk

KEPT = (0, 10, 300)  # the steps whose Δ is drawn


def learn() -> tuple[list[float], dict[int, torch.Tensor]]:
    """The loss of each step, and the update Δ [10, 20] after some of them."""
    torch.manual_seed(0)
    theta, x = torch.randn(20, 10), torch.randn(200, 20)
    y = x @ (theta + 1)  # the world has moved
    known = torch.nn.Linear(20, 10, bias=False)
    known.weight.data.copy_(theta.T)
    layer = lk.LoRALinear.from_linear(known, r=1, lora_alpha=1)
    optimizer = torch.optim.Adam(lk.trainable_parameters(layer), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    losses, deltas = [], {0: layer.delta_weight()}
    for step in range(1, KEPT[-1] + 1):
        loss = F.mse_loss(layer(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step in KEPT:
            deltas[step] = layer.delta_weight()
    return losses, deltas


def draw(losses: list[float], deltas: dict[int, torch.Tensor], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "", "font.size": 9})
    figure = Figure(figsize=(6.2, 3.2), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(3, 2)
    curve = figure.add_subplot(grid[:, 0], xlabel="step", yscale="log", title="loss of an adapter of rank 1")
    curve.plot(losses, color="#0072b2")
    for row, (step, delta) in enumerate(deltas.items()):
        axes = figure.add_subplot(grid[row, 1], xticks=[], yticks=[], title=f"Δ after {step} steps")
        image = axes.imshow(delta.detach(), vmin=0, vmax=1.5, cmap="viridis", aspect="auto")
    figure.colorbar(image, ax=figure.axes[1:], ticks=[0, 0.5, 1, 1.5])
    figure.savefig(path, metadata={"Date": None})


losses, deltas = learn()
print(f"loss {losses[0]:.2f} -> {losses[-1]:.1e}; Δ lies in {deltas[300].min():.4f} … {deltas[300].max():.4f}")
assert losses[-1] < 1e-5 * losses[0]
if sys.argv[1:]:
    draw(losses, deltas, Path(sys.argv[1]))
