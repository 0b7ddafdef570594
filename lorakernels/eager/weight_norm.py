"""‖W + scaling · B A‖ by rows, without B A: DoRA's norm (Liu et al., arXiv 2402.09353, eq. 5)."""

from __future__ import annotations

import torch

# Of a 16-bit weight so many rows at a time are widened: one float32 copy of all of it would be twice its size.
_ROWS = 1024


def sum_dtype(weight: torch.Tensor) -> torch.dtype:
    """float32, or float64 for a float64 weight."""
    return torch.float64 if weight.dtype is torch.float64 else torch.float32


def row_norm(weight: torch.Tensor) -> torch.Tensor:
    """‖W‖ by rows: [N] float32 (float64 for a float64 weight) of weight [N, K]."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=sum_dtype(weight))


def project(weight: torch.Tensor, lora_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W Aᵀ [N, r] in `sum_dtype`, and A as it was multiplied."""
    dtype = sum_dtype(weight)
    A = lora_A.to(dtype).t()
    if weight.dtype is dtype:
        return weight @ A, lora_A
    projected = A.new_empty((weight.shape[0], A.shape[1]))
    for rows, out in zip(weight.split(_ROWS), projected.split(_ROWS), strict=True):
        torch.mm(rows.to(dtype), A, out=out)
    return projected, lora_A


def from_projection(
    projected: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, base_norm: torch.Tensor, scaling: float
) -> torch.Tensor:
    """√(‖W‖² + 2 s ⟨W, B A⟩ + s² ‖B A‖²) by rows, [N] in base_norm's dtype, from `projected` = W Aᵀ [N, r].

    The inner product is row by row that of W Aᵀ and B; ‖B A‖² is that of B (A Aᵀ) and B. An update of zeros gives
    `base_norm` itself, so that a new adapter changes nothing.
    """
    dtype = base_norm.dtype
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    added = (2 * scaling) * projected.to(dtype) + (scaling * scaling) * (B @ (A @ A.t()))
    added = added.mul_(B).sum(1)
    # Rounding may take a row that the update all but cancels below zero.
    scaled = base_norm * (1 + added / base_norm.square()).clamp_min_(0).sqrt_()
    return torch.where(base_norm > 0, scaled, added.clamp_min(0).sqrt())
