"""A mixture's experts whose frozen stacks have 4 or 8 bits a number, and how plain ones become them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn

from lorakernels.nn.experts import run_experts, stack_names, why_not_run
from lorakernels.nn.quantized import PARTS, pack_stack


class QuantizedExperts(nn.Module):
    """Beside the class of the experts: they give what these do, one expert unpacked at a time.

    The parameter of a stack has its packed numbers, and `<stack>_scale` and the like what `PackedWeight` says.
    """

    packed_stacks: dict[str, str]  # what each is beside its tensors

    def forward(self, hidden: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        return run_experts(self, {}, hidden, *routing)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {text}" for name, text in self.packed_stacks.items())


@torch.no_grad()
def quantized_experts(experts: nn.Module, kind: str, block: int | None, double_quant: bool) -> nn.Module:
    """The same with packed stacks, as `pack_stack` packs them; what else they hold is shared.

    Raises ValueError for experts that are not known, or whose stacks are not finite or not of whole blocks.
    """
    if why := why_not_run(experts):
        raise ValueError(why)
    own: Any = type(experts)
    made: Any = object.__new__(_class_for(own))
    made.__dict__.update(experts.__dict__)
    made._parameters, made.packed_stacks = dict(experts._parameters), {}
    for name in stack_names(experts):
        weight: Any = experts._parameters[name]
        if weight.is_meta or not torch.isfinite(weight).all():
            raise ValueError(f"{name} has no values, or numbers that are not finite")
        packed = pack_stack(weight.detach(), kind, block, double_quant)
        made.packed_stacks[name] = packed.text
        for part, tensor in zip(("", *PARTS), packed.weight[1:], strict=True):
            if tensor is not None:
                made._parameters[f"{name}_{part}" if part else name] = nn.Parameter(tensor, requires_grad=False)
    return made


@lru_cache(maxsize=64)
def _class_for(kind: Any) -> Any:
    return type(f"Quantized{kind.__name__}", (QuantizedExperts, kind), {"__module__": __name__})
