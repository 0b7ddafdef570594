"""What the operators of many adapters share: how they are given a plan, and which implementation takes it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from lorakernels.backend import resolve_impl
from lorakernels.eager import multi_lora as eager_multi_lora
from lorakernels.ops.library import library, runs_directly, without_autocast
from lorakernels.plan import BatchPlan

Tensors = list[torch.Tensor]
# Of an operator's schema: the fields of `PlanTensors`.
PLAN = "Tensor plan, Tensor scales, Tensor? pages, int num_slots, int max_tokens"


def implementation_of(impl: str, x: torch.Tensor) -> ModuleType:
    if resolve_impl(impl, x.device, x.dtype) == "torch":
        return eager_multi_lora
    from lorakernels.kernels import multi_lora as kernels_multi_lora

    return kernels_multi_lora


def body_runs_directly(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """As `runs_directly`, but for meta tensors: a body may read the plan, which then holds no numbers."""
    return runs_directly(x, *others) and not x.is_meta


def on_host(plan: BatchPlan, implementation: ModuleType) -> dict[str, Any]:
    """The plan's route for the torch path, read once a version; elsewhere than on a CPU each call waits for it."""
    if implementation is not eager_multi_lora or not plan.tensors.buffer.is_cpu:
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


def width_of(lora_As: Tensors, pages: torch.Tensor | None) -> int:
    return lora_As[0].shape[1] if pages is None else pages.shape[1]


def register(name: str, implemented: Any, fake: Any) -> None:
    """The body and the fake of an operator that autocast leaves alone."""
    library.impl(name, implemented, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorakernels::{name}", fake, lib=library)
    for device_type in ("cpu", "cuda"):
        without_autocast(name, device_type)


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
