"""The orders of products of Unsloth and of LoRAFusion, written anew in plain torch from what is published of them.

They show what an order costs; where a kernel of theirs fuses passes, these do not.
"""

from __future__ import annotations

from typing import Any

import torch

SCALING = 2.0  # of every layer that is measured


class UnslothOrder(torch.autograd.Function):
    """Six products of rank r become eight: S again for dB, and dy B for dA and for dx."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, lora_A: Any, lora_B: Any) -> torch.Tensor:
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        y = x @ weight.t()
        return y.addmm_(x @ lora_A.t(), lora_B.t(), alpha=SCALING)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,), (x, weight, lora_A, lora_B) = grads, ctx.saved_tensors
        dA = torch.addmm(lora_A, (dy @ lora_B).t(), x, beta=0, alpha=SCALING)
        dB = torch.addmm(lora_B, dy.t(), x @ lora_A.t(), beta=0, alpha=SCALING)
        dx = dy @ weight
        dx.addmm_(dy @ lora_B, lora_A, alpha=SCALING)
        return dx, None, dA, dB


class LoRAFusionOrder(torch.autograd.Function):
    """D(x) and a byte mask are kept, S is kept, dy B is made once. Its fused products are `addmm_` here."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, lora_A: Any, lora_B: Any, dropout: float) -> torch.Tensor:
        dropped, mask = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        s = dropped @ lora_A.t()
        ctx.save_for_backward(dropped, mask, s, weight, lora_A, lora_B)
        ctx.keep = 1 / (1 - dropout)
        return (x @ weight.t()).addmm_(s, lora_B.t(), alpha=SCALING)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,), (dropped, mask, s, weight, lora_A, lora_B) = grads, ctx.saved_tensors
        g = (dy @ lora_B).mul_(SCALING)
        dB = (dy.t() @ s).mul_(SCALING)
        dA = g.t() @ dropped
        dx = dy @ weight
        if mask is None:
            dx.addmm_(g, lora_A)
        else:
            dx += torch.ops.aten.native_dropout_backward(g @ lora_A, mask, ctx.keep)
        return dx, None, dA, dB, None
