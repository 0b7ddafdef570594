"""One or several LoRA linears of one x in plain torch, with nothing kept or made that is not needed.

Same signatures as `kernels.lora_linear`. Against the formula read literally: A and B are cast to x's dtype and x never
is, the low-rank term is added into the base product in place, the scale of dropout is applied to the [M, r] matrices,
and D(x) is made again rather than kept. Of several members the A's are multiplied as one matrix, D(x) and its mask are
made once, and dx is one sum that is added up in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorakernels.dropout import inverse_keep
from lorakernels.eager.dropout import draw_mask
from lorakernels.eager.weight_norm import project as project
from lorakernels.low_rank import add_expand, outer, shrink
from lorakernels.member import Member, cast, columns, grad_dtype, stacked, sum_rows
from lorakernels.weight import multiply, scaled_linear, sum_products

Tensors = Sequence[torch.Tensor]


def add_update(
    y: torch.Tensor, x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """y [M, N] += scaling · (x Aᵀ) Bᵀ of x [M, K] and factors of its dtype; where autograd watches it keeps x and S."""
    return y.addmm_(torch.nn.functional.linear(x, lora_A), lora_B.t(), alpha=scaling)


def forward(
    x: torch.Tensor, members: Sequence[Member], seed: torch.Tensor | None, threshold: int
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """y's [M, N], S = D(x) Aᵀ [M, Σ r], and the mask [M, K] uint8 (None without dropout), of x [M, K]."""
    mask, adapted = None, x
    if threshold:
        assert seed is not None
        mask = draw_mask(seed, x.shape[0], x.shape[1], threshold)
        adapted = mask.to(x.dtype).mul_(x)
    s = shrink(adapted, stacked(members))
    if threshold:
        s *= inverse_keep(threshold)
    ys = []
    for s_i, (weight, _, lora_B, bias, row_scale, scaling) in zip(columns(s, members), members, strict=True):
        ys.append(scaled_linear(x, weight, bias, row_scale, (s_i, lora_B, scaling)))
    return ys, s, mask


def backward(
    dys: Tensors,
    x: torch.Tensor | None,
    members: Sequence[Member],
    s: Tensors,
    mask: torch.Tensor | None,
    threshold: int,
    *,
    need_dx: bool,
    need_dA: bool,
    need_dB: Sequence[bool],
    need_dbias: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """dx [M, K], dA [Σ r, K] of all A's, dB's [N, r], dbias's [N] in dy's dtype; None for what is not asked for.

    `dys` are of what a row scale multiplies, `s` has the columns of each member's S.
    """
    dx = dA = g = adapted = None
    dtype, need_g = dys[0].dtype, need_dx or need_dA
    # In x's dtype once: a product with the bytes themselves would convert them every time.
    kept = mask.to(dtype) if mask is not None and need_g else None
    gs: list[torch.Tensor] = []
    dBs: list[torch.Tensor | None] = [None] * len(dys)
    dbiases = dBs.copy()
    for i, (dy, (_, _, lora_B, _, _, scaling)) in enumerate(zip(dys, members, strict=True)):
        if need_g:
            # 1 / (1 - p) and scaling go onto the [M, r] matrix, a K-th of the work of scaling D(x).
            gs.append(shrink(dy, lora_B.t()).mul_(scaling * inverse_keep(threshold)))
        if need_dB[i]:
            # As (Sᵀ dy)ᵀ: 0.34 ms where dyᵀ S took 0.52 ms (512 × 2048, r = 16, float32).
            dBs[i] = cast(outer(s[i], dy).mul_(scaling).t().contiguous(), lora_B.dtype)
        if need_dbias[i]:
            dbiases[i] = sum_rows(dy).to(dtype)
    if need_g:
        g = gs[0] if len(gs) == 1 else torch.cat(gs, dim=1)
    if need_dA:
        assert x is not None and g is not None
        adapted = x if kept is None else x * kept
        dA = cast(outer(g, adapted), grad_dtype(members))
    if need_dx:
        assert g is not None
        dx = sum_products(dys, [member.weight.t() for member in members])
        add_expand(dx, g, stacked(members).t(), kept=kept, room=None if kept is None else adapted)  # D(x) has been used
    return dx, dA, dBs, dbiases


def grad_row_scale(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None,
    scaling: float,
) -> torch.Tensor:
    """[N] = Σ over tokens of dy ∘ (x Wᵀ + scaling · S Bᵀ), with `low_rank` = (S, B); the product is made again."""
    y = multiply(x, weight)
    if low_rank is not None:
        s, lora_B = low_rank
        add_expand(y, s, lora_B, scaling)
    return sum_rows(y.mul_(dy))
