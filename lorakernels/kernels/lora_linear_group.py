"""Several LoRA linears of one x as a sequence of kernels. Same signatures as `reference.lora_linear_group`.

The A's lie one below the other, so that one pass over x makes S for all and draws one mask, and another makes every
dA. dx is one product over all output features together: no member's own dx is ever stored.
"""

from __future__ import annotations

import contextlib

import torch

from lorakernels.configs.table import choose, takes_few_tokens_form
from lorakernels.dropout import inverse_keep
from lorakernels.kernels.few_tokens import few_tokens
from lorakernels.kernels.linear_expand import linear_expand
from lorakernels.kernels.outer import dy_pass, grad_A
from lorakernels.kernels.shrink import shrink
from lorakernels.kernels.streams import side_stream

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
    """y's [M, N], S = D(x) Aᵀ [M, Σ r] of all A's in order, and the mask [M, ceil(K / 8)] uint8 (None without dropout).

    Few tokens take a kernel a member: reading W is the cost, not x, and only that kernel splits its sum over the
    device. Of one seed each draws the same mask.
    """
    members = zip(weights, lora_As, lora_Bs, biases, scalings, strict=True)
    if takes_few_tokens_form(x.shape[0], max(A.shape[0] for A in lora_As), x.element_size()):
        results = [
            few_tokens(x, W, A, B, bias=bias, y_scale=scaling, seed=seed, threshold=threshold)
            for W, A, B, bias, scaling in members
        ]
        return [y for y, _, _ in results], torch.cat([s for _, s, _ in results], dim=1), results[0][2]
    s, mask = shrink(x, torch.cat(lora_As), seed, threshold)
    parts = s.split([A.shape[0] for A in lora_As], dim=1)
    ys = [
        linear_expand(x, W, s_i, B, bias=bias, scale=scaling)
        for s_i, (W, _, B, bias, scaling) in zip(parts, members, strict=True)
    ]
    return ys, s, mask


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

    `s` has the columns of each member's S. Few tokens take the same kernels: a product a member, each with the sums of
    its planes and an addition into dx, would be more launches.
    """
    keep = inverse_keep(threshold)
    need_g = need_dx or dA_dtype is not None
    gs: Tensors = []
    dBs: list[torch.Tensor | None] = []
    dbiases: list[torch.Tensor | None] = []
    for dy, B, s_i, scaling, need, to in zip(dys, lora_Bs, s, scalings, need_dB, bias_dtypes, strict=True):
        g_i, dB, dbias = dy_pass(dy, B, s_i, scaling, need_g=need_g, need_dB=need, bias_dtype=to)
        gs += [] if g_i is None else [g_i]
        dBs.append(dB)
        dbiases.append(dbias)
    dx = dA = None
    if need_g:
        g = torch.cat(gs, dim=1)
        with contextlib.ExitStack() as beside:  # dA needs x and G only: it may run while dx is multiplied
            if dA_dtype is not None:
                assert x is not None
                M, K = x.shape
                config = choose("outer", M, K, K, g.shape[1], x.element_size(), x.device)
                with beside.enter_context(side_stream(x.device, config.side_stream and need_dx)):
                    dA = grad_A(x, g, mask, keep, dA_dtype)
            if need_dx:
                A = torch.cat(lora_As)
                (dy, W), *more = [(dy, W.t()) for dy, W in zip(dys, weights, strict=True)]
                dx = linear_expand(dy, W, g, A.t(), more=more, scale=keep, mask=mask)
    return dx, dA, dBs, dbiases
