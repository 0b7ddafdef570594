"""LoRA on a stack of experts as a sequence of kernels. Same signatures as `eager.experts`.

The rows are in the experts' order, so that each kernel of a batch of many adapters serves as it is, with an expert in
the place of a slot.
"""

from __future__ import annotations

import torch

from lorakernels.dropout import inverse_keep
from lorakernels.kernels.adapters import factor_A
from lorakernels.kernels.expert_expand import expert_expand
from lorakernels.kernels.expert_route import route as route
from lorakernels.kernels.multi_lora import added
from lorakernels.kernels.multi_outer import multi_outer
from lorakernels.kernels.multi_shrink import multi_shrink
from lorakernels.kernels.tape import taped
from lorakernels.low_rank import low_rank_dtype, rank_room, rank_rows
from lorakernels.plan import PlanTensors
from lorakernels.quant.stacks import PackedStack
from lorakernels.route import ExpertRoute


@taped
def forward(
    x: torch.Tensor,
    weight: torch.Tensor | PackedStack,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    where: ExpertRoute,
    seed: torch.Tensor | None,
    threshold: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y [P, N], S = scaling · D(x) Aᵀ [P, r], and the mask [P, ceil(K / 8)] uint8 (None without dropout)."""
    plan, dtype, r = _plan(where, scaling * inverse_keep(threshold)), low_rank_dtype(x.dtype), lora_A.shape[1]
    s, mask = x.new_empty((x.shape[0], r), dtype=dtype), None
    thresholds = None if threshold == 0 else torch.full_like(plan.scales, threshold, dtype=torch.int32)
    if r:
        planes, mask = multi_shrink([x], [factor_A(lora_A)], plan, plan.scales, r, seed, thresholds)
        s = added(planes)[0].to(dtype)
    return expert_expand(x, weight, s, rank_rows(lora_B.mT, lora_B.dtype), plan.buffer, bias=bias), s, mask


@taped
def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | PackedStack,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    where: ExpertRoute,
    s: torch.Tensor | None,
    mask: torch.Tensor | None,
    threshold: int,
    scaling: float,
    *,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx [P, K], dA [E, r, K] and dB [E, r, N], of which rows lie as those of lora_A and of lora_Bᵀ do."""
    plan, dtype, r = _plan(where, scaling * inverse_keep(threshold)), low_rank_dtype(dy.dtype), lora_A.shape[1]
    dy = dy.contiguous()
    g, dx = dy.new_empty((dy.shape[0], r), dtype=dtype), None
    dA = rank_room(lora_A, lora_A.dtype) if need_dA else None
    dB = rank_room(lora_B.mT, lora_B.dtype) if need_dB else None
    if r and (need_dx or need_dA):
        rows = factor_A(rank_rows(lora_B.mT, lora_B.dtype))
        g = added(multi_shrink([dy], [rows], plan, plan.scales, r)[0])[0].to(dtype)
    if need_dx:
        dx = expert_expand(dy, weight.mT, g, rank_rows(lora_A, lora_A.dtype), plan.buffer, mask=mask)
    if r and dA is not None and x is not None:
        multi_outer([x], g[None], [factor_A(dA)], plan, mask)
    if r and dB is not None and s is not None:
        multi_outer([dy], s[None], [factor_A(dB)], plan)
    return dx, dA, dB


def _plan(where: ExpertRoute, scale: float) -> PlanTensors:
    """With the experts as slots; made here where the route was made for plain torch."""
    order, P = where.order, where.order.shape[0]
    buffer = where.plan
    if buffer is None:
        places = torch.arange(P, device=order.device)
        buffer = route((torch.searchsorted(where.starts, places, right=True) - 1)[:, None], where.num_experts)[3]
    scales = torch.full((where.num_experts + 1,), scale, dtype=torch.float32, device=order.device)
    return PlanTensors(buffer, scales, None, where.num_experts, P)
