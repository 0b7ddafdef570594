"""The LoRA linear in plain torch, forward and backward, with nothing kept or made that is not needed.

Same signatures as `kernels.lora_linear`. Against the formula read literally: A and B are cast to
x's dtype and x never is, the low-rank term is added into the base product in place, the scale of
dropout is applied to the [M, r] matrices, and D(x) is made again rather than kept.
"""

from __future__ import annotations

import torch

from lorakernels.dropout import inverse_keep
from lorakernels.eager.dropout import draw_mask
from lorakernels.eager.product import cast, linear, scaled_linear, sum_rows
from lorakernels.eager.weight_norm import project as project


def add_update(
    y: torch.Tensor, x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """y [M, N] += scaling · (x Aᵀ) Bᵀ of x [M, K] and factors of its dtype; where autograd watches it keeps x and S."""
    return y.addmm_(torch.nn.functional.linear(x, lora_A), lora_B.t(), alpha=scaling)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    threshold: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y [M, N], S = D(x) Aᵀ [M, r] and the mask [M, K] uint8 (None without dropout) of x [M, K]."""
    A, B = cast(lora_A, x.dtype), cast(lora_B, x.dtype)
    mask = None
    adapted = x
    if threshold:
        assert seed is not None
        mask = draw_mask(seed, x.shape[0], x.shape[1], threshold)
        adapted = mask.to(x.dtype).mul_(x)
    s = adapted @ A.t()
    if threshold:
        s *= inverse_keep(threshold)
    return scaled_linear(x, weight, bias, row_scale, (s, B, scaling)), s, mask


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    s: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    threshold: int,
    *,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx [M, K], dA [r, K], dB [N, r], dbias [N] in `bias_dtype`; None for what is not asked for."""
    dx = dA = dB = dbias = adapted = None
    # In x's dtype once: a product with the bytes themselves would convert them every time.
    kept = mask.to(dy.dtype) if mask is not None and (need_dx or need_dA) else None
    if need_dx or need_dA:
        # 1 / (1 - p) and scaling go onto the [M, r] matrix, a K-th of the work of scaling D(x).
        g = (dy @ cast(lora_B, dy.dtype)).mul_(scaling * inverse_keep(threshold))
    if need_dA:
        assert x is not None
        adapted = x if kept is None else x * kept
        dA = cast(g.t() @ adapted, lora_A.dtype)
    if need_dB:
        # As (Sᵀ dy)ᵀ: 0.34 ms where dyᵀ S took 0.52 ms (512 × 2048, r = 16, float32).
        dB = cast((s.t() @ dy).mul_(scaling).t().contiguous(), lora_B.dtype)
    if need_dx:
        A = cast(lora_A, dy.dtype)
        dx = linear(dy, weight.t())
        if kept is None:
            dx.addmm_(g, A)
        else:
            assert kept is not None
            # Into D(x), which has been used: another [M, K] would cost its page faults.
            dx += torch.mm(g, A, out=adapted).mul_(kept)
    if bias_dtype is not None:
        dbias = sum_rows(dy).to(bias_dtype)
    return dx, dA, dB, dbias


def grad_row_scale(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None,
    scaling: float,
) -> torch.Tensor:
    """[N] = Σ over tokens of dy ∘ (x Wᵀ + scaling · S Bᵀ), with `low_rank` = (S, B); the product is made again."""
    y = linear(x, weight)
    if low_rank is not None:
        s, lora_B = low_rank
        y.addmm_(s, lora_B.to(s.dtype).t(), alpha=scaling)
    return sum_rows(y.mul_(dy))
