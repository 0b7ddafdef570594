"""The oracle: each operation and its gradients in a line of torch, with its source.

The LoRA linear is that of Hu et al., arXiv 2106.09685, eq. 3; its row scale is from Liu et al., "DoRA", arXiv
2402.09353, eq. 5. Slow and obvious on purpose: in float64 this is what every other path is held against, and it is what
second derivatives are made of.
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
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = row_scale ∘ (x Wᵀ + scaling · ((x ∘ keep) Aᵀ) Bᵀ) + bias; `keep` is dropout's mask divided by 1 - p."""
    adapted = x if keep is None else x * keep
    low_rank = (adapted @ lora_A.to(x.dtype).mT) @ lora_B.to(x.dtype).mT
    if row_scale is None:
        return torch.nn.functional.linear(x, weight, bias) + scaling * low_rank
    y = (torch.nn.functional.linear(x, weight) + scaling * low_rank) * row_scale.to(x.dtype)
    return y if bias is None else y + bias


def lora_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    keep: torch.Tensor | None,
    row_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """dx, dweight, dA, dB, dbias and drow_scale of `lora_linear` for x [M, K] and dy [M, N], differentiable again.

    Without x there is no dweight, dA, dB or drow_scale.
    """
    A, B = lora_A.to(dy.dtype), lora_B.to(dy.dtype)
    dbias, drow_scale = dy.sum(0), None
    if row_scale is not None:
        if x is not None:
            scaled = lora_linear(x, weight, lora_A, lora_B, scaling=scaling, keep=keep)
            drow_scale = (dy * scaled).sum(0).to(row_scale.dtype)
        dy = dy * row_scale.to(dy.dtype)
    g = scaling * (dy @ B)
    through_adapter = g @ A
    dx = dy @ weight + (through_adapter if keep is None else through_adapter * keep)
    if x is None:
        return dx, None, None, None, dbias, None
    adapted = x if keep is None else x * keep
    dA = (g.mT @ adapted).to(lora_A.dtype)
    dB = (scaling * (dy.mT @ (adapted @ A.mT))).to(lora_B.dtype)
    return dx, dy.mT @ x, dA, dB, dbias, drow_scale


def spread_over_groups(lora_A: torch.Tensor, pooled: int) -> torch.Tensor:
    """QA-LoRA's A [r, K / L] as one [r, K] that acts on x: on the mean of L features, times K / L, as PEFT has it."""
    return lora_A.repeat_interleave(pooled, dim=1) * (lora_A.shape[1] / pooled)


def expert_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    experts: torch.Tensor,
    bias: torch.Tensor | None = None,
    scaling: float = 1.0,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """`lora_linear` of each row of x [P, K] with the weight, adapter and bias of its own expert, experts [P]."""
    adapted = x if keep is None else x * keep
    A, B = lora_A.to(x.dtype)[experts], lora_B.to(x.dtype)[experts]
    y = (weight[experts] @ x[..., None] + scaling * (B @ (A @ adapted[..., None]))).squeeze(-1)
    return y if bias is None else y + bias[experts]
