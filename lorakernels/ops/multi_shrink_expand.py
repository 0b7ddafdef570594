"""`lora_shrink` and `lora_expand` as torch sees them. They are for inference and have no gradient."""

from __future__ import annotations

from typing import Any

import torch

from lorakernels.eager import multi_lora as eager_multi_lora
from lorakernels.ops.flops import multi_lora_expand_flops, multi_lora_shrink_flops
from lorakernels.ops.multi_shared import PlanOperator, Tensors, implementation_of, on_host, refuse_transforms, width_of
from lorakernels.plan import BatchPlan, PlanTensors


def _shrink(x: torch.Tensor, lora_As: Tensors, plan: PlanTensors, impl: str, **route: Any) -> torch.Tensor:
    return implementation_of(impl, x).shrink(x, lora_As, plan, **route)


def _shrink_fake(x: torch.Tensor, lora_As: Tensors, plan: PlanTensors, impl: str) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((len(lora_As), x.shape[0], width_of(lora_As, plan.page_table)), dtype=dtype)


def _expand(s: torch.Tensor, lora_Bs: Tensors, plan: PlanTensors, outs: Tensors, impl: str, **route: Any) -> None:
    implementation_of(impl, outs[0]).expand(s, lora_Bs, plan, outs, **route)


SHRINK = PlanOperator(
    "multi_lora_shrink(Tensor x, Tensor[] lora_As, PLAN, str impl) -> Tensor",
    _shrink,
    _shrink_fake,
    multi_lora_shrink_flops,
)
EXPAND = PlanOperator(
    "multi_lora_expand(Tensor s, Tensor[] lora_Bs, PLAN, Tensor(a!)[] outs, str impl) -> ()",
    _expand,
    lambda *_: None,
    multi_lora_expand_flops,
)


def multi_lora_shrink(x: torch.Tensor, lora_As: Tensors, plan: BatchPlan, impl: str) -> torch.Tensor:
    refuse_transforms("lora_shrink")
    call = SHRINK.pick((x, *lora_As))
    return call(x, lora_As, plan.tensors, impl, **on_host(plan, impl, x, call is SHRINK.body))


def multi_lora_expand(s: torch.Tensor, lora_Bs: Tensors, plan: BatchPlan, outs: Tensors, impl: str) -> None:
    refuse_transforms("lora_expand")
    # Kernels write without the dispatcher's knowing, which then has to count the version of each out.
    on_torch = implementation_of(impl, outs[0]) is eager_multi_lora
    call = EXPAND.pick((s, *lora_Bs, *outs)) if on_torch else EXPAND.dispatch
    call(s, lora_Bs, plan.tensors, outs, impl, **on_host(plan, impl, outs[0], call is EXPAND.body))
