"""The embedding of many adapters as torch sees it: a lookup, and `multi_lora_expand` with a gradient."""

from __future__ import annotations

from typing import Any

import torch

from lorakernels.ops.multi_linear import MULTI_BACKWARD
from lorakernels.ops.multi_shared import check_stamp, is_transformed, stamp_of
from lorakernels.ops.multi_shrink_expand import EXPAND, SHRINK
from lorakernels.ops.operator import is_batched, one_by_one
from lorakernels.plan import BatchPlan, PlanTensors


class _Expand(torch.autograd.Function):
    """y += S Bᵀ in place, with gradients for y, S and B."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, s: torch.Tensor, lora_B: torch.Tensor, options: Any, *plan_and_stamp: Any
    ) -> Any:
        *sizes, impl = options
        *plan, stamp = plan_and_stamp
        EXPAND.dispatch(s, [lora_B], PlanTensors(*plan, *sizes), [y], impl)
        ctx.mark_dirty(y)
        ctx.options = options
        ctx.version = None if stamp is None else stamp.item()
        ctx.save_for_backward(s, lora_B, *plan, stamp)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("multi_lora_embedding cannot be differentiated twice")
        if is_batched((dy,)):
            return tuple(one_by_one(lambda dy: _Expand.backward(ctx, dy), (dy,)))
        *sizes, impl = ctx.options
        s, lora_B, buffer, scales, page_table, stamp = ctx.saved_tensors
        check_stamp("multi_lora_embedding", stamp, ctx.version)
        need_y, need_s, need_B, *_ = ctx.needs_input_grad
        routing = PlanTensors(buffer, torch.ones_like(scales), page_table, *sizes)  # the scale is in S
        by_rank = lora_B if page_table is not None else lora_B.transpose(1, 2)
        ds = dB = None
        if need_s:
            ds = SHRINK.dispatch(dy, [by_rank], routing, impl)
        if need_B:
            _, _, [dB] = MULTI_BACKWARD.dispatch(
                [dy], None, [lora_B], [], [], [by_rank], [lora_B], routing, s, None, False, False, True, impl
            )
        return (dy if need_y else None, ds, dB, *[None] * 5)


def multi_lora_embedding(
    ids: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, plan: BatchPlan, impl: str
) -> torch.Tensor:
    """[T, N] of checked arguments, ids [T]."""
    need_grad = is_transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in (weight, lora_A, lora_B)))
    tensors = plan.snapshot() if need_grad else plan.tensors
    layout, T = tensors.layout, ids.shape[0]
    slots, ranks = tensors.part(layout.slots, T), tensors.part(layout.token_ranks, T)
    # What the base's slot finds is put aside by its rank, 0.
    real = slots.long().clamp(max=plan.num_slots - 1)
    if tensors.page_table is None:
        columns = lora_A[real, :, ids]
    else:
        columns = lora_A[tensors.page_table.index_select(0, real).long(), ids[:, None]]
    # In the weight's dtype, as `multi_lora_linear` casts A to x's.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    within = torch.arange(columns.shape[1], device=ids.device) < ranks[:, None]
    scale = tensors.scales.index_select(0, slots)[:, None]
    s = torch.where(within, columns.to(weight.dtype).to(dtype) * scale, 0.0)[None]
    y = torch.nn.functional.embedding(ids, weight)
    if need_grad:
        options = (tensors.num_slots, tensors.max_tokens, impl)
        return _Expand.apply(y, s, lora_B, options, tensors.buffer, tensors.scales, tensors.page_table, stamp_of(plan))
    EXPAND.dispatch(s, [lora_B], tensors, [y], impl)
    return y
