"""Several LoRA linears of one x in plain torch, forward and backward. Same signatures as `kernels.lora_linear_group`.

A's are multiplied as one matrix, D(x) and its mask are made once, and dx is one sum that is added up in place.
"""

from __future__ import annotations

import torch

from lorakernels.dropout import inverse_keep
from lorakernels.eager.dropout import draw_mask
from lorakernels.eager.product import add_linear, cast, linear, scaled_linear, sum_rows

Tensors = list[torch.Tensor]


def forward(
    x: torch.Tensor,
    weights: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    biases: list[torch.Tensor | None],
    seed: torch.Tensor | None,
    scalings: list[float],
    threshold: int,
) -> tuple[Tensors, torch.Tensor, torch.Tensor | None]:
    """y's [M, N], S = D(x) Aᵀ [M, Σ r] of all A's in order, and the mask [M, K] uint8 (None without dropout)."""
    mask = None
    adapted = x
    if threshold:
        assert seed is not None
        mask = draw_mask(seed, x.shape[0], x.shape[1], threshold)
        adapted = mask.to(x.dtype).mul_(x)
    s = adapted @ _stacked(lora_As, x.dtype).t()
    if threshold:
        s *= inverse_keep(threshold)
    parts = s.split([A.shape[0] for A in lora_As], dim=1)
    members = zip(weights, biases, parts, lora_Bs, scalings, strict=True)
    return [scaled_linear(x, W, bias, None, (s_i, cast(B, x.dtype), c)) for W, bias, s_i, B, c in members], s, mask


def backward(
    dys: Tensors,
    x: torch.Tensor | None,
    weights: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    s: Tensors,
    mask: torch.Tensor | None,
    scalings: list[float],
    threshold: int,
    *,
    need_dx: bool,
    dA_dtype: torch.dtype | None,
    need_dB: list[bool],
    bias_dtypes: list[torch.dtype | None],
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """dx [M, K], dA [Σ r, K] of all A's in `dA_dtype`, dB's [N, r], dbias's [N]; None for what is not asked for.

    `s` has the columns of each member's S.
    """
    dx = dA = g = adapted = None
    dtype = dys[0].dtype
    kept = mask.to(dtype) if mask is not None and (need_dx or dA_dtype is not None) else None
    if need_dx or dA_dtype is not None:
        ranks = [A.shape[0] for A in lora_As]
        g = dys[0].new_empty((dys[0].shape[0], sum(ranks)))
        # Each into its columns of one G.
        for g_i, dy, B, scaling in zip(g.split(ranks, dim=1), dys, lora_Bs, scalings, strict=True):
            torch.mm(dy, cast(B, dtype), out=g_i).mul_(scaling * inverse_keep(threshold))
    if dA_dtype is not None:
        assert x is not None and g is not None
        adapted = x if kept is None else x * kept
        dA = cast(g.t() @ adapted, dA_dtype)
    dBs = [
        cast((s_i.t() @ dy).mul_(scaling).t().contiguous(), B.dtype) if need else None
        for need, s_i, dy, B, scaling in zip(need_dB, s, dys, lora_Bs, scalings, strict=True)
    ]
    if need_dx:
        assert g is not None
        dx = linear(dys[0], weights[0].t())
        for dy, W in zip(dys[1:], weights[1:], strict=True):
            dx = add_linear(dx, dy, W.t())
        A = _stacked(lora_As, dtype)
        if kept is None:
            dx.addmm_(g, A)
        else:
            # Into D(x), which has been used: another [M, K] would cost its page faults.
            dx += torch.mm(g, A, out=adapted).mul_(kept)
    dbiases = [None if to is None else sum_rows(dy).to(to) for dy, to in zip(dys, bias_dtypes, strict=True)]
    return dx, dA, dBs, dbiases


def _stacked(lora_As: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """[Σ r, K], a small copy."""
    return torch.cat([cast(A, dtype) for A in lora_As])
