"""LoRAExperts: a stack of a mixture's experts with low-rank adapters, one of each expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from lorakernels.config import LoRAConfig
from lorakernels.nn import init
from lorakernels.nn.experts import (
    ExpertTerm,
    factors_of_each,
    is_transposed,
    run_experts,
    stack_names,
    stack_weight,
    why_not_run,
)
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.modules import parameter_of
from lorakernels.quant.stacks import PackedStack


class Stack(NamedTuple):
    """A stack that may be adapted: a parameter of `module`, the experts or the outermost layer around them."""

    module: nn.Module
    name: str

    @property
    def experts(self) -> nn.Module:
        return plain_experts(self.module)

    @property
    def weight(self) -> Any:
        return stack_weight(self.experts, self.name)

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    @property
    def by_columns(self) -> bool:
        """Whether PEFT's A is over the stack's last dimension: where the experts do not say that it is transposed."""
        return not getattr(self.experts, "is_transposed", False)

    @property
    def sizes(self) -> tuple[int, int]:
        """`in` and `out` of PEFT's A and B."""
        _, rows, columns = self.weight.shape
        return (columns, rows) if self.by_columns else (rows, columns)


def plain_experts(module: nn.Module) -> nn.Module:
    """The experts inside the layers that adapt them."""
    while isinstance(module, LoRAExperts):
        module = module._modules["base_layer"]  # type: ignore[assignment]
    return module


class LoRAExperts(LoRALayer):
    """The experts of a mixture of transformers, of whose parameter `parameter_name` each expert is adapted.

    y = x W_eᵀ + bias_e + scaling · (dropout(x) A_eᵀ) B_eᵀ in the place of x W_eᵀ + bias_e (arXiv 2106.09685), and no
    tensor of the stack's size is made. Names and shapes are PEFT's: `lora_A[name].weight` is [r · E, in], the expert
    slowest, and `lora_B[name].weight` [out, r · E], the expert fastest. `in` is the stack's last dimension, or the one
    before where the experts say that they are transposed. Of two stacks one's layer is around the other's, and the
    outermost runs both.
    """

    BASE = nn.Module  # known by what transformers has made of their class: see `why_not_run`

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        super().__init__(base_layer)
        self.parameter_name = parameter_name

    @classmethod
    def adapter_shapes(
        cls, base_layer: Any, r: int, use_dora: bool = False, lora_bias: bool = False, pooled: int = 0
    ) -> dict[str, tuple[int, ...]]:
        """lora_A [r · E, in] and lora_B [out, r · E] of a `Stack`.

        Raises TypeError where it is none that can be run, ValueError for what experts cannot have.
        """
        why = why_not_run(base_layer.experts)
        if not why and base_layer.name not in stack_names(base_layer.experts):
            why = f"{base_layer.name!r} is none of its stacks, {' and '.join(stack_names(base_layer.experts))}"
        if why:
            raise TypeError(f"experts that cannot be adapted: {why}")
        for name, given in (("use_dora", use_dora), ("lora_bias", lora_bias), ("use_qalora", bool(pooled))):
            if given:
                raise ValueError(f"{name}=True is not for the experts of target_parameters")
        wide, tall = base_layer.sizes
        ranks = r * base_layer.num_experts
        return {"lora_A.weight": (ranks, wide), "lora_B.weight": (tall, ranks)}

    @classmethod
    def check_adapter(cls, base_layer: Any, config: LoRAConfig) -> None:
        if init.changes_base(config.init_lora_weights):
            raise ValueError(f"init_lora_weights={config.init_lora_weights!r} is not for the experts of a stack")
        super().check_adapter(base_layer, config)

    def _add_parameters(self, name: str, r: int, lora_bias: bool, pooled: int, **factory: Any) -> None:
        (wide, tall), ranks = self.target.sizes, r * self.target.num_experts
        self.lora_A[name] = torch.nn.utils.skip_init(nn.Linear, wide, ranks, bias=False, **factory)
        self.lora_B[name] = torch.nn.utils.skip_init(nn.Linear, ranks, tall, bias=False, **factory)

    def _start(self, A: torch.Tensor, B: torch.Tensor, init_lora_weights: bool | str) -> None:
        E = self.target.num_experts
        for of_A, of_B in zip(A.unflatten(0, (E, -1)), B.unflatten(1, (-1, E)).permute(2, 0, 1), strict=True):
            init.start_random(of_A, of_B, init_lora_weights)

    @property
    def target(self) -> Stack:
        return Stack(self.base_layer, self.parameter_name)

    @property
    def plain_layer(self) -> nn.Module:
        return plain_experts(self)

    @property
    def weight(self) -> Any:
        return self.target.weight

    @property
    def bias(self) -> None:
        """None that an adapter changes."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The layer of another stack is run by this one.
        nn.Module.__setattr__(self, name, value) if name == "base_layer" else super().__setattr__(name, value)

    def around(self) -> Iterator[LoRAExperts]:
        """This layer and those inside it, of the other stacks."""
        layer: Any = self
        while isinstance(layer, LoRAExperts):
            yield layer
            layer = layer._modules["base_layer"]

    def _effective(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [E, r, K] and B [E, N, r]."""
        A, B = (parameter_of(factor[name], "weight") for factor in (self.lora_A, self.lora_B))
        stack = self.target
        transposed = is_transposed(stack.experts)
        return factors_of_each(A, B, stack.num_experts, by_columns=stack.by_columns, transposed=transposed)

    def _matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.mT if is_transposed(self.plain_layer) else weight

    def _from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        return self._matrix(matrix)

    def _check_mergeable(self) -> None:
        if isinstance(self.weight, PackedStack):
            raise ValueError(
                "the stacks of these experts are packed, and are not merged into: keep the adapter unmerged"
            )

    def _check_can_change(self) -> None:
        """No experts that are computed at each call are adapted."""

    def forward(self, hidden: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        """hidden [T, H] to [T, H], by the top_k_index and top_k_weights [T, k] of a router; Llama 4's need none."""
        terms: dict[str, list[ExpertTerm]] = {}
        for layer in self.around():
            if (ran := self.ran) is not None:  # read once: another thread may end it
                ran.add(layer)
            if layer.merged:
                layer._refuse_training_while_merged()
            elif names := layer._running():
                terms[layer.parameter_name] = [layer._term(name) for name in names]
        experts = self.plain_layer
        if not terms:
            return experts(hidden, *routing)
        if why := why_not_run(experts):
            raise RuntimeError(f"the adapters of these experts cannot be run: {why}")
        return run_experts(experts, terms, hidden, *routing)

    def _term(self, name: str) -> ExpertTerm:
        adapter = self.adapters[name]
        return ExpertTerm(*self._effective(name), adapter.scaling, adapter.lora_dropout if self.training else 0.0)

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}, {super().extra_repr()}"
