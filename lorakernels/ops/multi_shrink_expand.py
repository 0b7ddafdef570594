"""The low-rank products alone as torch sees them: shrink, expand, both. They are for inference and have no gradient."""

from __future__ import annotations

from typing import Any

import torch

from lorakernels.eager import multi_lora as eager_multi_lora
from lorakernels.ops.flops import multi_lora_add_flops, multi_lora_expand_flops, multi_lora_shrink_flops
from lorakernels.ops.multi_shared import PlanOperator, Tensors, implementation_of, on_host, refuse_transforms, width_of
from lorakernels.plan import BatchPlan, PlanTensors


def _shrink(x: torch.Tensor, lora_As: Tensors, plan: PlanTensors, impl: str, **route: Any) -> torch.Tensor:
    return implementation_of(impl, x).shrink(x, lora_As, plan, **route)


def _shrink_fake(x: torch.Tensor, lora_As: Tensors, plan: PlanTensors, impl: str) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((len(lora_As), x.shape[0], width_of(lora_As, plan.page_table)), dtype=dtype)


def _expand(s: torch.Tensor, lora_Bs: Tensors, plan: PlanTensors, outs: Tensors, impl: str, **route: Any) -> None:
    implementation_of(impl, outs[0]).expand(s, lora_Bs, plan, outs, **route)


def _add(
    outs: Tensors,
    x: torch.Tensor,
    lora_As: Tensors,
    lora_Bs: Tensors,
    plan: PlanTensors,
    skip_on_host: torch.Tensor | None,
    add_inputs: bool,
    impl: str,
    **route: Any,
) -> None:
    if not add_inputs:
        for out in outs:
            out.zero_()
    if skip_on_host is None or not skip_on_host.item():
        implementation_of(impl, x).add(x, lora_As, lora_Bs, plan, outs, **route)


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

ADD = PlanOperator(
    "multi_lora_add(Tensor(a!)[] outs, Tensor x, Tensor[] lora_As, Tensor[] lora_Bs, PLAN, Tensor? skip_on_host, "
    "bool add_inputs, str impl) -> ()",
    _add,
    lambda *_: None,
    multi_lora_add_flops,
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


def multi_lora_add(
    outs: Tensors,
    x: torch.Tensor,
    lora_As: Tensors,
    lora_Bs: Tensors,
    plan: BatchPlan,
    skip_on_host: torch.Tensor | None = None,
    *,
    add_inputs: bool = True,
    impl: str = "auto",
) -> None:
    """Add each token's own update of x [T, K] to every one of outs [T, N], in place: what a serving engine asks for.

    Traced, it is one graph for every T, also with all guards dropped: no number of the plan is looked at, and T may be
    smaller than the plan's. A stack of R rows serves slots of up to the plan's max_rank: a shard of adapters has
    R / shards rows of each.

    Args:
        outs: a tensor a slice, of any strides, such as the columns of one; rows of the base are left to the bit.
        x: [T, K], of the first T of the plan's tokens; what follows is the base's (`update_host`'s capacity).
        lora_As: [S, R, K] a slice, or pages. lora_Bs: [S, N, R], or pages.
        skip_on_host: a bool on the CPU, [1], read where the operator runs: True where no token has an adapter.
        add_inputs: False overwrites outs, with zeros in rows of the base.
    """
    refuse_transforms("multi_lora_add")
    call = ADD.pick((x, *lora_As, *lora_Bs, *outs))
    on_torch = call is ADD.body and implementation_of(impl, x) is eager_multi_lora
    if not on_torch:
        call = ADD.dispatch  # as in multi_lora_expand
    route = on_host(plan, impl, x, on_torch and x.shape[0] == plan.num_tokens)
    call(outs, x, lora_As, lora_Bs, plan.tensors, skip_on_host, add_inputs, impl, **route)
