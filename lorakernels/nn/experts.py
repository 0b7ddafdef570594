"""The one algorithm of adapted experts, whoever holds their adapters: a mixture's module, run past its own forward.

It is what `grouped_mm_experts_forward` of transformers does, with a term of low rank beside each frozen product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from lorakernels import ops
from lorakernels.experts import combine_experts, expert_lora_linear, expert_route, multi_expert_lora_linear
from lorakernels.nn.modules import parameter_of, runs_more_than_forward
from lorakernels.plan import BatchPlan
from lorakernels.quant.packed import PackedWeight
from lorakernels.quant.stacks import stack_of
from lorakernels.route import ExpertRoute

# The implementations whose numbers are those of a product an expert; of others only their own kernels know.
_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")
_LLAMA4 = "transformers.models.llama4.modeling_llama4.Llama4TextExperts"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ExpertTerm(NamedTuple):
    """One adapter of a stack: it adds scaling · (dropout(x) A_eᵀ) B_eᵀ."""

    A: torch.Tensor  # [E, r, K]
    B: torch.Tensor  # [E, N, r]
    scaling: float | torch.Tensor
    p: float = 0.0


class ExpertPages(NamedTuple):
    """Many adapters of a mixture, of which each row of a batch has its own."""

    stacks: Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # A [pages, K] and B [pages, N] of each, by name
    plan: Callable[[ExpertRoute], BatchPlan]  # of `expert_plan`


Adapters = Mapping[str, Sequence[ExpertTerm]] | ExpertPages


def why_not_run(experts: Any) -> str:
    """Why `run_experts` cannot stand for this module's forward; empty where it can."""
    kind = type(experts)
    if not is_mixture(experts):
        return f"{kind.__module__}.{kind.__qualname__} is not a mixture whose experts transformers dispatches"
    if runs_more_than_forward(experts) or "parametrizations" in experts._modules:
        return "the experts have hooks, a replaced forward or a parametrization"
    names = stack_names(experts)
    stacks = [stack_weight(experts, name) for name in names]
    if not all(stack.dim() == 3 and stack.dtype in _FLOATS for stack in stacks):
        return f"{' and '.join(names)} are not both stacks of three dimensions, of floats"
    if stacks[0].dtype is not stacks[1].dtype or stacks[0].shape[0] == 1:
        return f"{' and '.join(names)} are not of one dtype and of several experts"
    if _is_llama4(experts):
        return ""
    if getattr(experts, "_is_expert_parallel", False):
        return "the experts are spread over processes"
    if implementation_of(experts) not in _IMPLEMENTATIONS:
        return f"the experts' implementation is {implementation_of(experts)!r}; expected one of {_IMPLEMENTATIONS[1:]}"
    return ""


def is_mixture(module: Any) -> bool:
    """Whether these are experts whose forward is known."""
    forward = getattr(_class_of(module).forward, "__globals__", {})
    return _is_llama4(module) or forward.get("__name__") == "transformers.integrations.moe"


def _class_of(module: Any) -> Any:
    """A store's subclass of a class is that; another may run anything."""
    return next(kind for kind in type(module).__mro__ if not kind.__module__.startswith("lorakernels."))


def implementation_of(experts: Any) -> str | None:
    """Of transformers' experts: how they are multiplied."""
    return "batched_mm" if _is_llama4(experts) else experts.config._experts_implementation


def is_transposed(experts: Any) -> bool:
    """Whether the stacks are [E, K, N]."""
    return _is_llama4(experts) or experts.is_transposed


def stack_weight(experts: Any, name: str) -> Any:
    """A stack as it lies, a tensor or packed."""
    text = experts.__dict__.get("packed_stacks", {}).get(name, "")
    parts = [experts._parameters.get(f"{name}_{part}") for part in PackedWeight._fields[2:]] if text else ()
    return stack_of(parameter_of(experts, name), parts, text)


def stack_names(experts: Any) -> tuple[str, str]:
    """The parameters that hold the experts, in the order in which they are multiplied."""
    return "gate_up_proj" if _is_llama4(experts) or experts.has_gate else "up_proj", "down_proj"


def factors_of_each(
    A: torch.Tensor, B: torch.Tensor, num_experts: int, *, by_columns: bool, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of PEFT's A [r · E, in], expert slowest, and B [out, r · E], expert fastest, those of each expert's W_e [N, K].

    They are views, [E, r, K] and [E, N, r]. PEFT adds L_e R_e to the stack's own matrix of each expert; whether that is
    W_e or its transpose, the model knows. With `by_columns`, where `in` is the stack's last dimension, L is B and R is
    A; else L is Aᵀ and R is Bᵀ.
    """
    of_A, of_B = A.unflatten(0, (num_experts, -1)), B.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
    return (of_A, of_B) if by_columns is not transposed else (of_B.mT, of_A.mT)


def _is_llama4(experts: Any) -> bool:
    kind = _class_of(experts)
    return f"{kind.__module__}.{kind.__qualname__}" == _LLAMA4


def run_experts(experts: Any, adapters: Adapters, hidden: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    """What the module gives for hidden [T, H] and top_k_index and top_k_weights [T, k] of its router, adapted.

    `adapters` has the terms of each stack by its name, or pages of many. Llama 4's experts have no `routing`: each has
    as many rows as another.
    """
    first, last = stack_names(experts)
    if _is_llama4(experts):
        num_experts = stack_weight(experts, first).shape[0]
        rows = torch.arange(len(hidden), device=hidden.device)
        route = expert_route((rows // (len(hidden) // num_experts))[:, None], num_experts)
        linear = _linears(experts, adapters, route)
        gate, up = linear(first, hidden, True).chunk(2, dim=-1)
        return linear(last, up * experts.act_fn(gate), True)
    top_k_index, top_k_weights = routing
    route = expert_route(top_k_index, experts.num_experts)
    linear = _linears(experts, adapters, route)
    y = linear(first, hidden, False)
    y = experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)
    y = linear(last, y, True)
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    return combine_experts(y, top_k_weights, route).to(hidden.dtype)


def _linears(experts: Any, adapters: Adapters, route: ExpertRoute) -> Callable[[str, torch.Tensor, bool], torch.Tensor]:
    """What multiplies rows, sorted or not, by the stack of a name."""
    plan = adapters.plan(route) if isinstance(adapters, ExpertPages) else None

    def linear(name: str, x: torch.Tensor, sorted_x: bool) -> torch.Tensor:
        weight = stack_weight(experts, name)
        weight = weight.mT if is_transposed(experts) else weight
        bias = getattr(experts, f"{name}_bias", None)
        x = x.to(weight.dtype)
        if isinstance(adapters, ExpertPages):
            A, B = adapters.stacks[name]
            return multi_expert_lora_linear(x, weight, A, B, route, plan, bias=bias, sorted_x=sorted_x)  # type: ignore[arg-type]
        return adapted_stack(x, weight, bias, adapters.get(name, ()), route, sorted_x=sorted_x)

    return linear


def adapted_stack(
    x: torch.Tensor,
    weight: Any,
    bias: torch.Tensor | None,
    terms: Sequence[ExpertTerm],
    route: ExpertRoute,
    *,
    sorted_x: bool,
) -> torch.Tensor:
    """x to [T · k, N]: x W_eᵀ + bias_e and what each term adds; several without dropout are one of their ranks' sum."""
    if not terms:
        return ops.frozen_experts(x, weight, bias, route, sorted_x, "auto")
    (A, B, scaling, p), *more = terms
    if more and not any(term.p for term in terms):
        A = torch.cat([term.A for term in terms], 1)
        # By the columns that PEFT has, so that the expert stays the fastest dimension of what is copied.
        B = torch.cat([term.B.permute(1, 2, 0) * term.scaling for term in terms], 1).permute(2, 0, 1)
        scaling, more = 1.0, []
    y = expert_lora_linear(x, weight, A, B, route, bias=bias, scaling=scaling, dropout_p=p, sorted_x=sorted_x)
    for A, B, scaling, p in more:
        rows = F.dropout(x if sorted_x else route.take(x), p)
        low_rank = ops.frozen_experts(rows, A.to(x.dtype), None, route, True, "auto") * scaling
        y = y + ops.frozen_experts(low_rank, B.to(x.dtype), None, route, True, "auto")
    return y
