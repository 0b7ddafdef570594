"""`lora_linear` by torch's own operators, for layers so small on a CPU that what is around ours takes longer."""

from __future__ import annotations

import torch

from lorakernels.backend import resolve_impl
from lorakernels.eager.lora_linear import add_update
from lorakernels.ops.operator import as_matrix, as_output, linear_to_edit, runs_directly

# On a CPU, below this many multiplications M N K, what Python does around torch's own operators costs more than what
# is saved by writing into them: 84 µs a training step where the Function takes 146 (4 × 16 × 16, the frozen layer 25),
# 380 beside 435 at 128 × 256 × 256, 925 beside 793 at 16 × 1024 × 1024.
SMALL = 1 << 24


def is_small(x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, impl: str) -> bool:
    """Whether torch's own operators compute the layer faster than the Function, and nobody would see a difference."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and x.numel() * weight.shape[0] < SMALL
        and lora_A.dtype is lora_B.dtype is x.dtype  # else their casts would be kept for the backward
        and runs_directly(x, weight, lora_A, lora_B)
        and torch.autograd.forward_ad._current_level < 0
        and resolve_impl(impl, x.device, x.dtype) == "torch"
    )


def small_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """The layer where `is_small` says so, with a scaling that is not 0 and dtypes that fit."""
    rows = as_matrix(x)
    if torch.is_grad_enabled():
        return as_output(add_update(torch.nn.functional.linear(rows, weight, bias), rows, lora_A, lora_B, scaling), x)
    y = linear_to_edit(x, weight, bias)
    add_update(as_matrix(y), rows, lora_A, lora_B, scaling)
    return y
