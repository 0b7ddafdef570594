"""LoRALinear: a drop-in `torch.nn.Linear` with low-rank adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorakernels.formula import spread_over_groups
from lorakernels.nn.adapted import adapted_linear
from lorakernels.nn.base import DEFAULT, MAGNITUDE
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.modules import of_base_layer, parameter_of, runs_more_than_forward
from lorakernels.nn.terms import Call, Term
from lorakernels.quant.layers import read, weight_of


class LoRALinear(LoRALayer):
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ with W and bias frozen (arXiv 2106.09685).

    `base_layer` is a `torch.nn.Linear`, or GPT-2's `Conv1D`, of whose weight [K, N] the transpose is read;
    `lora_A[name].weight` is [r, in_features] and `lora_B[name].weight` [out_features, r], as in PEFT. B starts at zero,
    so the layer starts as its base.

    With DoRA (arXiv 2402.09353) y = c ∘ (x Wᵀ + scaling · (dropout(x) Aᵀ) Bᵀ) + bias, where
    c = magnitude / ‖W + scaling · B A‖ by rows, the norm without a gradient. Dropout acts on what reaches A alone.
    Several active adapters add up: each one with DoRA adds (c - 1) ∘ x Wᵀ + c ∘ scaling · (dropout(x) Aᵀ) Bᵀ.

    Args:
        in_features, out_features, bias, device, dtype: as for `torch.nn.Linear`.
        r, lora_alpha, lora_dropout: as for `LoRAConfig`.
        use_rslora, init_lora_weights, use_dora, lora_bias, use_qalora, qalora_group_size: as for `LoRAConfig`.
        adapter_name: the name of the first adapter.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is expected.
    """

    BASE = nn.Linear
    in_features, out_features = of_base_layer("in_features", "nx"), of_base_layer("out_features", "nf")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
        lora_bias: bool = False,
        use_qalora: bool = False,
        qalora_group_size: int = 16,
        adapter_name: str = DEFAULT,
    ) -> None:
        super().__init__(nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype))
        self.add_adapter(
            adapter_name,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            use_dora=use_dora,
            lora_bias=lora_bias,
            use_qalora=use_qalora,
            qalora_group_size=qalora_group_size,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 8,
        lora_alpha: float = 16,
        *,
        adapter_name: str = DEFAULT,
        **fields: Any,
    ) -> LoRALinear:
        """An adapted layer around `linear`, which is kept, shared and frozen: nothing is copied.

        The other arguments are those of the class. Raises TypeError unless `linear` is exactly a `torch.nn.Linear`,
        GPT-2's `Conv1D`, or a quantised layer that is known: see docs/quantised.md.
        """
        return cls.from_base(linear, adapter_name, r=r, lora_alpha=lora_alpha, **fields)

    @classmethod
    def adapter_shapes(
        cls, base_layer: nn.Module, r: int, use_dora: bool = False, lora_bias: bool = False, pooled: int = 0
    ) -> dict[str, tuple[int, ...]]:
        """lora_A [r, in_features], lora_B [out_features, r], a bias and DoRA's magnitude [out_features].

        With QA-LoRA lora_A is [r, in_features / pooled].
        """
        N, K = weight_of(base_layer).shape
        if pooled and K % pooled:
            raise ValueError(f"qalora_group_size is {pooled}; expected a divisor of the layer's {K} in_features")
        shapes: dict[str, tuple[int, ...]] = {"lora_A.weight": (r, K // (pooled or 1)), "lora_B.weight": (N, r)}
        return shapes | ({"lora_B.bias": (N,)} if lora_bias else {}) | ({MAGNITUDE: (N,)} if use_dora else {})

    def _add_parameters(self, name: str, r: int, lora_bias: bool, pooled: int, **factory: Any) -> None:
        skip_init = torch.nn.utils.skip_init
        self.lora_A[name] = skip_init(nn.Linear, self.in_features // (pooled or 1), r, bias=False, **factory)
        self.lora_B[name] = skip_init(nn.Linear, r, self.out_features, bias=lora_bias, **factory)

    def _matrix(self, weight: Any) -> Any:
        return weight.t() if self._is_transposed else weight

    def _from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.t() if self._is_transposed else matrix

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        modules: dict[str, Any] = self._modules
        A, B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        return parameter_of(A, "weight"), parameter_of(B, "weight")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        x = input  # torch's name
        if (ran := self.ran) is not None:  # read once: another thread may end it
            ran.add(self)
        call = self.linear_call(x)
        if call is None:
            if self._merged:
                self._refuse_training_while_merged()
            if self._is_packed and not runs_more_than_forward(self._modules["base_layer"]):
                # bitsandbytes' own forward packs its weight again in evaluation on a CPU, and training is wrong then.
                return adapted_linear(x, self.weight, self.bias, ())
            return self.base_layer(x)
        return adapted_linear(x, *call, self)

    def linear_call(self, x: torch.Tensor) -> Call | None:
        """What this layer does with x now; None where that is what its base layer does."""
        base: Any = self._modules["base_layer"]
        # The operator takes no nested tensors, which torch's linear does, and torch's TransformerEncoder makes.
        watched = runs_more_than_forward(base) or getattr(x, "is_nested", False)
        names = self.active_adapters
        if watched or len(names) > 1:  # without those that are off; one alone gets gradients that are zero
            names = self._running()
        if self._merged or not names:
            return None
        terms = [self._term(name) for name in names]
        weight = read(base) if self._is_packed else self._matrix(parameter_of(base, "weight"))
        return weight, parameter_of(base, "bias"), terms, base if watched else None

    def _term(self, name: str) -> Term:
        adapter, (A, B) = self.adapters[name], self._factors(name)
        if adapter.pooled:
            A = spread_over_groups(A, adapter.pooled)
        bias = magnitude = None
        if (adapter.lora_bias or adapter.use_dora) and not adapter.is_off:
            parts: Any = self.lora_B[name], self.lora_magnitude_vector
            bias = parts[0].bias if adapter.lora_bias else None
            magnitude = parts[1][name] if adapter.use_dora else None
        return Term(A, B, bias, adapter.scaling, adapter.lora_dropout if self.training else 0.0, magnitude)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"
