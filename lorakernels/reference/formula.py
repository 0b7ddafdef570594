"""The LoRA linear as one line of differentiable torch (Hu et al., arXiv 2106.09685, eq. 3), and its gradients.

Slow and obvious on purpose: in float64 this is what every other path is held against, and it is
what second derivatives are made of.
"""

from __future__ import annotations

import torch


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None = None,
    scaling: float = 1.0,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x Wᵀ + bias + scaling · ((x ∘ keep) Aᵀ) Bᵀ; `keep` is dropout's mask divided by 1 - p."""
    adapted = x if keep is None else x * keep
    y = torch.nn.functional.linear(x, weight, bias)
    low_rank = (adapted @ lora_A.to(x.dtype).mT) @ lora_B.to(x.dtype).mT
    return y + scaling * low_rank


def lora_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    keep: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """dx, dweight, dA, dB and dbias of `lora_linear` for x [M, K] and dy [M, N], differentiable again.

    Without x there is no dweight, dA or dB.
    """
    A, B = lora_A.to(dy.dtype), lora_B.to(dy.dtype)
    g = scaling * (dy @ B)
    through_adapter = g @ A
    dx = dy @ weight + (through_adapter if keep is None else through_adapter * keep)
    if x is None:
        return dx, None, None, None, dy.sum(0)
    adapted = x if keep is None else x * keep
    dA = (g.mT @ adapted).to(lora_A.dtype)
    dB = (scaling * (dy.mT @ (adapted @ A.mT))).to(lora_B.dtype)
    return dx, dy.mT @ x, dA, dB, dy.sum(0)
