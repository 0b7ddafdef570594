"""One or several LoRA linears of one x as a sequence of kernels. Same signatures as `eager.lora_linear`.

Of several members the A's lie one below the other, so that one pass over x makes S for all and draws one mask, and
another makes every dA. dx is one product over all output features together: no member's own dx is ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorakernels.configs.table import choose, takes_few_tokens_form
from lorakernels.dropout import inverse_keep
from lorakernels.kernels.few_tokens import few_tokens
from lorakernels.kernels.launch import is_captured, side_stream
from lorakernels.kernels.linear_expand import linear_expand
from lorakernels.kernels.outer import dy_pass, grad_A
from lorakernels.kernels.packed import fits_kernel
from lorakernels.kernels.shrink import shrink
from lorakernels.kernels.tape import taped
from lorakernels.low_rank import low_rank_dtype
from lorakernels.member import Member, columns, grad_dtype, stacked, sum_rows
from lorakernels.weight import multiply

Tensors = Sequence[torch.Tensor]


@taped
def forward(
    x: torch.Tensor, members: Sequence[Member], seed: torch.Tensor | None, threshold: int
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """y's [M, N], S = D(x) Aᵀ [M, Σ r], and the mask [M, ceil(K / 8)] uint8 (None without dropout), of x [M, K].

    Few tokens take a kernel a member: reading W is the cost, not x, and only that kernel splits its sum over the
    device. Of one seed each draws the same mask. But in a CUDA graph the library multiplies by a large W, the pass over
    x beside it, and what adds S Bᵀ is the one launch more.
    """
    bases: list[torch.Tensor | None] = [None] * len(members)
    if not _takes_few_tokens(x, members):
        s, mask = shrink(x, stacked(members), seed, threshold)
    elif is_captured(x.device) and _forks(x, members):
        A = stacked(members)
        with side_stream(x.device, True) as side:
            with side:
                s, mask = shrink(x, A, seed, threshold)
            bases = [multiply(x, m.weight, m.bias if m.row_scale is None else None) for m in members]
        members = [m if m.row_scale is not None else m._replace(bias=None) for m in members]
    else:
        results = [
            few_tokens(x, W, A, B, bias=bias, row_scale=row_scale, y_scale=scaling, seed=seed, threshold=threshold)
            for W, A, B, bias, row_scale, scaling in members
        ]
        _, s, mask = results[0]
        return [y for y, _, _ in results], s if len(members) == 1 else torch.cat([s for _, s, _ in results], 1), mask
    ys = [
        linear_expand(x, W, s_i, B, base=base, bias=bias, row_scale=row_scale, scale=scaling)
        for base, s_i, (W, _, B, bias, row_scale, scaling) in zip(bases, columns(s, members), members, strict=True)
    ]
    return ys, s, mask


def _forks(x: torch.Tensor, members: Sequence[Member]) -> bool:
    """Whether few tokens are, in a CUDA graph, the library's products with the pass over x beside them."""
    if not all([isinstance(member.weight, torch.Tensor) for member in members]):
        return False  # a packed weight is unpacked inside the one kernel
    M, K, itemsize = *x.shape, x.element_size()
    sizes = [(member.weight.shape[0], member.lora_A.shape[0]) for member in members]
    return any([choose("few_tokens", M, N, K, r, itemsize, x.device).side_stream for N, r in sizes])


def _takes_few_tokens(x: torch.Tensor, members: Sequence[Member]) -> bool:
    """Whether x or dy are so few rows that one kernel makes a member's product and its update."""
    if not takes_few_tokens_form(x.shape[0], max([member.lora_A.shape[0] for member in members]), x.element_size()):
        return False
    return all([isinstance(member.weight, torch.Tensor) or fits_kernel(member.weight) for member in members])


@taped
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

    `dys` are of what a row scale multiplies, `s` has the columns of each member's S. Several members take the same
    kernels for few tokens: a product a member, each with the sums of its planes and an addition into dx, would be more
    launches.
    """
    keep = inverse_keep(threshold)
    dx = g = None
    if need_dx and len(members) == 1:
        [(W, A, B, *_, scaling)], [dy] = members, dys
        if _takes_few_tokens(dy, members):
            dx, g, _ = few_tokens(dy, W.t(), B.t(), A.t(), s_scale=scaling, y_scale=keep, mask=mask)
    need_g = g is None and (need_dx or need_dA)
    dBs = [
        dy.new_empty(m.lora_B.shape, dtype=m.lora_B.dtype) if need else None
        for dy, m, need in zip(dys, members, need_dB, strict=True)
    ]
    dbiases = [dy.new_empty((dy.shape[1],)) if need else None for dy, need in zip(dys, need_dbias, strict=True)]
    rank = sum([member.lora_A.shape[0] for member in members])
    dA = x.new_empty((rank, x.shape[1]), dtype=grad_dtype(members)) if need_dA and x is not None else None
    M, N = dys[0].shape
    beside = need_dx and dx is None and choose("outer", M, N, N, rank, dys[0].element_size(), dys[0].device).side_stream

    def read_dys(need_g: bool) -> list[torch.Tensor | None]:
        wanted = zip(dys, members, s, dBs, dbiases, strict=True)
        return [dy_pass(dy, m.lora_B, s_i, m.scaling, need_g, dB, dbias) for dy, m, s_i, dB, dbias in wanted]

    # G first, for dx waits for it; dB and dA, which wait for nothing more, run beside the product that dx is.
    gs: list[torch.Tensor | None]
    if beside and need_g:
        gs = [shrink(dy, m.lora_B.t(), scale=m.scaling)[0] for dy, m in zip(dys, members, strict=True)]
    else:
        gs = read_dys(need_g)
    if need_g:
        g = gs[0] if len(gs) == 1 else torch.cat(gs, dim=1)  # type: ignore[arg-type]
    with side_stream(dys[0].device, beside) as side:
        if need_dx and dx is None:
            assert g is not None
            (dy, W), *more = [(dy, member.weight.t()) for dy, member in zip(dys, members, strict=True)]
            dx = linear_expand(dy, W, g, stacked(members).t(), more=more, scale=keep, mask=mask)
        with side:
            if beside:
                read_dys(False)
            if dA is not None:
                assert g is not None and x is not None
                grad_A(x, g, mask, keep, dA)
    return dx, dA, dBs, dbiases


@taped
def grad_row_scale(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None,
    scaling: float,
) -> torch.Tensor:
    """[N] float32 = Σ over tokens of dy ∘ (x Wᵀ + scaling · S Bᵀ), with `low_rank` = (S, B); nothing [M, N] is made."""
    s, lora_B = low_rank or (x.new_empty((x.shape[0], 0)), x.new_empty((weight.shape[0], 0)))
    if not isinstance(weight, torch.Tensor):
        return sum_rows(linear_expand(x, weight, s, lora_B, scale=scaling).mul_(dy))
    return linear_expand(x, weight, s, lora_B, scale=scaling, dot=dy)


@taped
def project(weight: torch.Tensor, lora_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W Aᵀ [N, r] float32, which DoRA's norm needs, W read as x is; and A as it was multiplied."""
    lora_A = lora_A.to(low_rank_dtype(weight.dtype))
    return shrink(weight, lora_A, dtype=torch.float32)[0], lora_A
