"""Many adapters of a stack of experts as torch sees them: each row through its own expert, with its own adapter."""

from __future__ import annotations

from typing import Any

import torch

from lorakernels.backend import resolve_impl
from lorakernels.low_rank import low_rank_dtype
from lorakernels.ops.experts import frozen_experts
from lorakernels.ops.multi_linear import MULTI_BACKWARD
from lorakernels.ops.multi_shared import is_transformed
from lorakernels.ops.multi_shrink_expand import ADD, EXPAND, SHRINK, multi_lora_add
from lorakernels.ops.operator import runs_directly
from lorakernels.plan import BatchPlan, PlanTensors
from lorakernels.plan_layout import plan_layout
from lorakernels.route import ExpertRoute


class _Update(torch.autograd.Function):
    """scaling · (x Aᵀ) Bᵀ [P, N] by a plan; like `multi_lora_linear` without its base product."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, options: Any, *tensors: Any
    ) -> torch.Tensor:
        *sizes, N, impl = options
        plan = PlanTensors(*tensors, *sizes)
        s = SHRINK.dispatch(x, [lora_A], plan, impl)
        y = x.new_zeros((x.shape[0], N))
        EXPAND.dispatch(s, [lora_B], plan, [y], impl)
        ctx.options = options
        _, need_A, need_B = ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if need_A else None, lora_A, lora_B, s if need_B else None, *tensors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        *sizes, N, impl = ctx.options
        x, lora_A, lora_B, s, *tensors = ctx.saved_tensors
        plan, paged = PlanTensors(*tensors, *sizes), tensors[2] is not None
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        dx = dA = dB = None
        if need_x:  # the same update with B and A in each other's place
            to_B, to_A = (lora_B, lora_A) if paged else (lora_B.mT, lora_A.mT)
            dx = dy.new_zeros((dy.shape[0], lora_A.shape[-1]))
            ADD.dispatch([dx], dy, [to_B], [to_A], plan, None, True, impl)
        if need_A or need_B:
            if s is not None and resolve_impl(impl, dy.device, dy.dtype) == "torch":
                s = s.to(low_rank_dtype(dy.dtype))
            weight = dy.new_empty((1, 1)).expand(N, lora_A.shape[-1])  # of which no more than the shape is looked at
            _, dAs, dBs = MULTI_BACKWARD.dispatch(
                [dy], x, [weight], [], [], [lora_A], [lora_B], plan, s, None, False, need_A, need_B, impl
            )
            dA, dB = dAs[0] if need_A else None, dBs[0] if need_B else None
        return dx, dA, dB, *[None] * 4


def route_adapters(
    plan: BatchPlan, where: ExpertRoute, adapters: torch.Tensor, ranks: Any, scalings: Any, page_table: Any
) -> bool:
    """Write `plan`, of slots expert · S + adapter, by kernels: False where they do not run here."""
    if where.plan is None or not len(where.order) or adapters.is_meta or not runs_directly(adapters, where.order):
        return False
    from lorakernels.kernels.expert_route import route_adapters

    plan.check_pages(page_table)
    ranks = plan.as_tensor("slot_ranks", ranks, torch.int32).contiguous()
    scalings = plan.as_tensor("slot_scalings", scalings, torch.float32).contiguous()
    pages = None if page_table is None else page_table.contiguous()
    first = plan_layout(where.num_experts, len(where.order)).slots
    experts = where.plan[first : first + len(where.order)]
    route_adapters(
        plan.rewrite(len(where.order)), plan.masked, experts, where.order, where.top_k, where.num_experts,
        adapters.contiguous(), ranks, scalings, pages, plan.num_pages or 0, plan.max_rank,
    )  # fmt: skip
    return True


def multi_expert_lora_linear(
    x: torch.Tensor,
    weight: Any,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    where: ExpertRoute,
    plan: BatchPlan,
    sorted_x: bool,
    impl: str,
) -> torch.Tensor:
    """y [P, N] of checked arguments."""
    rows = x if sorted_x else where.take(x)
    y = frozen_experts(rows, weight, bias, where, True, impl)
    if is_transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in (rows, lora_A, lora_B))):
        buffer, scales, page_table, *sizes = plan.snapshot()
        options = (*sizes, weight.shape[1], impl)
        return y + _Update.apply(rows, lora_A, lora_B, options, buffer, scales, page_table)
    y = y if not y.requires_grad else y.clone()  # of a weight or bias that trains
    multi_lora_add([y], rows, [lora_A], [lora_B], plan, impl=impl)
    return y
