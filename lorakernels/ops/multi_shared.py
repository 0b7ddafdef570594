"""What the operators of many adapters share: how they are given a plan, and which implementation takes it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from lorakernels.backend import resolve_impl
from lorakernels.eager import multi_lora as eager_multi_lora
from lorakernels.ops.operator import Operator
from lorakernels.plan import BatchPlan, PlanTensors

Tensors = list[torch.Tensor]


class PlanOperator(Operator):
    """An operator whose body takes a `PlanTensors`, which the schema has field by field where it says PLAN."""

    def __init__(
        self, schema: str, body: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int] | None = None
    ) -> None:
        at = schema.partition("PLAN")[0].count(",")
        fields = "Tensor plan, Tensor scales, Tensor? page_table, int num_slots, int max_tokens, int unit"
        end = at + fields.count(",") + 1

        def packed(function: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *given: function(*given[:at], PlanTensors(*given[at:end]), *given[end:])

        registered = packed(body)
        super().__init__(
            schema.replace("PLAN", fields), body, packed(fake), registered=registered, flops=flops, reads=True
        )
        packet = self.dispatch
        self.dispatch = lambda *given: packet(*given[:at], *given[at], *given[at + 1 :])


def implementation_of(impl: str, x: torch.Tensor) -> ModuleType:
    if resolve_impl(impl, x.device, x.dtype) == "torch":
        return eager_multi_lora
    from lorakernels.kernels import multi_lora as kernels_multi_lora

    return kernels_multi_lora


def on_host(plan: BatchPlan, impl: str, x: torch.Tensor, direct: bool) -> dict[str, Any]:
    """For a body that is called directly, the plan's route for the torch path, read once a version.

    Elsewhere than on a CPU each call waits for it.
    """
    if not direct or not plan.tensors.buffer.is_cpu or implementation_of(impl, x) is not eager_multi_lora:
        return {}
    if plan.on_host is None:
        plan.on_host = eager_multi_lora.route(plan.tensors, plan.num_tokens)
    return {"where": plan.on_host}


def stamp_of(plan: BatchPlan) -> torch.Tensor | None:
    """The plan's version, for `check_stamp`; None where a graph is traced, in which it would be a constant."""
    return None if torch.compiler.is_compiling() else torch.tensor(plan.version, device="cpu")


def check_stamp(name: str, saved: torch.Tensor | None, version: int | None) -> None:
    """Raise RuntimeError where a saved plan is of another version than the forward's.

    Of saved tensors alone activation checkpointing gives what it has recomputed, with the plan as it was by then.
    """
    if saved is not None and saved.item() != version:
        raise RuntimeError(
            f"{name} was recomputed for its backward (activation checkpointing) with version {saved.item()} of the "
            f"plan; expected version {version}, the forward's: update the plan after the backward, or use another plan"
        )


def width_of(lora_As: Tensors, page_table: torch.Tensor | None) -> int:
    return lora_As[0].shape[1] if page_table is None else page_table.shape[1]


def is_transformed() -> bool:
    """Under forward-mode AD or a transform of torch.func, for which the operators would lose the tangent silently.

    The autograd.Functions refuse them.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return any(one.key() != TransformType.Functionalize for one in get_interpreter_stack() or ())
    return forward_ad._current_level >= 0


def refuse_transforms(name: str) -> None:
    if is_transformed():
        raise RuntimeError(f"{name} has no derivative and runs under no transform of torch.func; use multi_lora_linear")
