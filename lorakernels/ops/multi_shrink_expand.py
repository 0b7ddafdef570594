"""`lora_shrink` and `lora_expand` as torch sees them: schemas, fakes. They are for inference and have no gradient."""

from __future__ import annotations

from typing import Any

import torch

from lorakernels.eager import multi_lora as eager_multi_lora
from lorakernels.ops.library import library
from lorakernels.ops.multi_shared import (
    PLAN,
    Tensors,
    body_runs_directly,
    implementation_of,
    on_host,
    refuse_transforms,
    register,
    width_of,
)
from lorakernels.plan import BatchPlan, PlanTensors

library.define(f"multi_lora_shrink(Tensor x, Tensor[] lora_As, {PLAN}, str impl) -> Tensor")
library.define(f"multi_lora_expand(Tensor s, Tensor[] lora_Bs, {PLAN}, Tensor(a!)[] outs, str impl) -> ()")


def _shrink(
    x: torch.Tensor,
    lora_As: Tensors,
    plan: torch.Tensor,
    scales: torch.Tensor,
    pages: torch.Tensor | None,
    num_slots: int,
    max_tokens: int,
    impl: str,
) -> torch.Tensor:
    tensors = PlanTensors(plan, scales, pages, num_slots, max_tokens)
    return implementation_of(impl, x).shrink(x, lora_As, tensors)


def _shrink_fake(
    x: torch.Tensor,
    lora_As: Tensors,
    plan: torch.Tensor,
    scales: torch.Tensor,
    pages: torch.Tensor | None,
    num_slots: int,
    max_tokens: int,
    impl: str,
) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((len(lora_As), x.shape[0], width_of(lora_As, pages)), dtype=dtype)


def _expand(
    s: torch.Tensor,
    lora_Bs: Tensors,
    plan: torch.Tensor,
    scales: torch.Tensor,
    pages: torch.Tensor | None,
    num_slots: int,
    max_tokens: int,
    outs: Tensors,
    impl: str,
) -> None:
    tensors = PlanTensors(plan, scales, pages, num_slots, max_tokens)
    implementation_of(impl, outs[0]).expand(s, lora_Bs, tensors, outs)


def _expand_fake(*_: Any) -> None:
    return None


register("multi_lora_shrink", _shrink, _shrink_fake)
register("multi_lora_expand", _expand, _expand_fake)


def multi_lora_shrink(x: torch.Tensor, lora_As: Tensors, plan: BatchPlan, impl: str) -> torch.Tensor:
    refuse_transforms("lora_shrink")
    if body_runs_directly(x, *lora_As):
        body = implementation_of(impl, x)
        return body.shrink(x, lora_As, plan.tensors, **on_host(plan, body))
    return torch.ops.lorakernels.multi_lora_shrink(x, lora_As, *plan.tensors, impl)


def multi_lora_expand(s: torch.Tensor, lora_Bs: Tensors, plan: BatchPlan, outs: Tensors, impl: str) -> None:
    refuse_transforms("lora_expand")
    body = implementation_of(impl, outs[0])
    # Kernels write without the dispatcher's knowing, which then has to count the version of each out.
    if body is eager_multi_lora and body_runs_directly(s, *lora_Bs, *outs):
        return eager_multi_lora.expand(s, lora_Bs, plan.tensors, outs, **on_host(plan, body))
    torch.ops.lorakernels.multi_lora_expand(s, lora_Bs, *plan.tensors, outs, impl)
