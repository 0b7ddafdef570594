"""The LoRA linear as a sequence of kernels, forward and backward. Same signatures as `reference.lora_linear`."""

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
    """y [M, N], S = D(x) Aᵀ [M, r] and the mask [M, ceil(K / 8)] uint8 (None without dropout) of x [M, K]."""
    if takes_few_tokens_form(x.shape[0], lora_A.shape[0], x.element_size()):
        return few_tokens(
            x, weight, lora_A, lora_B, bias=bias, row_scale=row_scale, y_scale=scaling, seed=seed, threshold=threshold
        )
    s, mask = shrink(x, lora_A, seed, threshold)
    return linear_expand(x, weight, s, lora_B, bias=bias, row_scale=row_scale, scale=scaling), s, mask


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
    keep = inverse_keep(threshold)
    few = takes_few_tokens_form(dy.shape[0], lora_A.shape[0], dy.element_size())
    dx: torch.Tensor | None = None
    g: torch.Tensor | None = None
    if need_dx and few:
        dx, g, _ = few_tokens(dy, weight.t(), lora_B.t(), lora_A.t(), s_scale=scaling, y_scale=keep, mask=mask)
    need_g = g is None and (need_dx or need_dA)
    dB = dbias = None
    if need_g or need_dB or bias_dtype is not None:
        g_pass, dB, dbias = dy_pass(dy, lora_B, s, scaling, need_g=need_g, need_dB=need_dB, bias_dtype=bias_dtype)
        g = g if g_pass is None else g_pass
    dA = None
    with contextlib.ExitStack() as beside:  # dA needs x and G only: it may run while dx is multiplied
        if need_dA:
            assert g is not None and x is not None
            M, K = x.shape
            config = choose("outer", M, K, K, g.shape[1], x.element_size(), x.device)
            with beside.enter_context(side_stream(x.device, config.side_stream and need_dx)):
                dA = grad_A(x, g, mask, keep, lora_A.dtype)
        if need_dx and dx is None:
            assert g is not None
            dx = linear_expand(dy, weight.t(), g, lora_A.t(), scale=keep, mask=mask)
    return dx, dA, dB, dbias


def grad_row_scale(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None,
    scaling: float,
) -> torch.Tensor:
    """[N] float32 = Σ over tokens of dy ∘ (x Wᵀ + scaling · S Bᵀ), with `low_rank` = (S, B); nothing [M, N] is made."""
    s, lora_B = low_rank or (x.new_empty((x.shape[0], 0)), weight.new_empty((weight.shape[0], 0)))
    return linear_expand(x, weight, s, lora_B, scale=scaling, dot=dy)


def project(weight: torch.Tensor, lora_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W Aᵀ [N, r] float32, which DoRA's norm needs, W read as x is; and A as it was multiplied."""
    lora_A = lora_A.to(weight.dtype)
    return shrink(weight, lora_A, dtype=torch.float32)[0], lora_A
