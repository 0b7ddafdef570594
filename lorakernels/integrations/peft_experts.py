"""PEFT's adapters of experts (`target_parameters`): no copy of a stack, where PEFT adds each update to all of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorakernels.integrations.peft_terms import autocast_is_on, is_plain
from lorakernels.nn.experts import (
    ExpertTerm,
    factors_of_each,
    implementation_of,
    is_transposed,
    run_experts,
    stack_names,
    why_not_run,
)
from lorakernels.nn.modules import parameter_of, runs_more_than_forward

Terms = dict[str, list[ExpertTerm]]


def experts_forward(layer: Any, x: torch.Tensor, args: tuple[Any, ...]) -> torch.Tensor | None:
    """What a mixture's outermost wrapper gives by the fused path, or None where PEFT's own forward is to run."""
    if not all(map(is_plain, (x, *args))) or x.dim() != 2 or torch._C._get_tracing_state() is not None:
        return None
    wrapper = layer
    while hasattr(wrapper, "parameter_name"):
        if wrapper._disable_adapters or wrapper.merged_adapters:
            return None
        wrapper = wrapper._modules["base_layer"]
    terms = expert_terms(layer)
    if isinstance(terms, str) or not any(terms.values()) or len(args) != (2 if hasattr(wrapper, "has_gate") else 0):
        return None
    weight = parameter_of(wrapper, stack_names(wrapper)[0])
    # Only the grouped product casts x, and only it is none of autocast's.
    if implementation_of(wrapper) != "grouped_mm":
        autocasts = autocast_is_on(x)
        if weight.dtype is not (torch.get_autocast_dtype(x.device.type) if autocasts else x.dtype):
            return None
    return run_experts(wrapper, terms, x, *args)


def expert_terms(layer: Any) -> Terms | str:
    """What the active adapters add to each stack of the mixture inside this wrapper, or why that cannot be fused.

    The innermost wrapper is of the target that PEFT found first, with a wrapper around it for each further one.
    """
    base = layer
    while hasattr(base, "parameter_name"):
        base = base._modules["base_layer"]
    why = why_not_run(base)
    if why:
        return why
    names = stack_names(base)
    if not all(is_plain(parameter_of(base, name)) for name in names):
        return f"{' and '.join(names)} are not both plain tensors"
    terms: Terms = {}
    while hasattr(layer, "parameter_name"):
        name, wrapper, layer = layer.parameter_name, layer, layer._modules["base_layer"]
        if name not in names:
            return f"the target is {name!r}; expected {' or '.join(names)}"
        if hasattr(layer, "parameter_name") and runs_more_than_forward(layer):
            return "a wrapper of the experts has hooks or a replaced forward"
        terms[name] = found = []
        for adapter in wrapper.active_adapters:
            if adapter in wrapper.lora_A:
                term = _term(wrapper, adapter, parameter_of(base, name), is_transposed(base))
                if isinstance(term, str):
                    return term
                found.append(term)
    return terms


def _term(wrapper: Any, adapter: str, stack: torch.Tensor, transposed: bool) -> ExpertTerm | str:
    # PEFT before 0.19 has A over the dimension before the last always.
    A, B = wrapper.lora_A[adapter], wrapper.lora_B[adapter]
    scaling = wrapper.scaling[adapter]
    if type(A) is not nn.Linear or type(B) is not nn.Linear or not (is_plain(A.weight) and is_plain(B.weight)):
        return f"lora_A or lora_B of adapter {adapter!r} is not the torch.nn.Linear that PEFT makes"
    if isinstance(scaling, torch.Tensor) and scaling.dim() != 0:
        return f"the scaling of adapter {adapter!r} is a tensor of shape {list(scaling.shape)}, not a number"
    E, rows, columns = stack.shape
    by_columns = getattr(wrapper, "_did_swap_in_out_features", False)
    wide, tall = (columns, rows) if by_columns else (rows, columns)
    r = A.weight.shape[0] // E
    if A.weight.shape != (r * E, wide) or B.weight.shape != (tall, r * E):
        return f"lora_A and lora_B of adapter {adapter!r} are not of the stack {list(stack.shape)}"
    factors = factors_of_each(A.weight, B.weight, E, by_columns=by_columns, transposed=transposed)
    return ExpertTerm(*factors, scaling)
