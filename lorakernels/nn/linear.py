"""LoRALinear: a drop-in `torch.nn.Linear` with low-rank adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lorakernels.functional import lora_linear
from lorakernels.nn.dora import scale_product
from lorakernels.nn.layer import DEFAULT, MAGNITUDE, LoRALayer
from lorakernels.nn.modules import of_base_layer, parameter_of, runs_more_than_forward
from lorakernels.nn.siblings import Call, from_group


class LoRALinear(LoRALayer):
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ with W and bias frozen (arXiv 2106.09685).

    `base_layer` is a `torch.nn.Linear`; `lora_A[name].weight` is [r, in_features] and
    `lora_B[name].weight` [out_features, r], as in PEFT. B starts at zero, so the layer starts as its base.

    With DoRA (arXiv 2402.09353) y = c ∘ (x Wᵀ + scaling · (dropout(x) Aᵀ) Bᵀ) + bias, where
    c = magnitude / ‖W + scaling · B A‖ by rows, the norm without a gradient. Dropout acts on what reaches A alone.
    Several active adapters add up: each one with DoRA adds (c - 1) ∘ x Wᵀ + c ∘ scaling · (dropout(x) Aᵀ) Bᵀ.

    Args:
        in_features, out_features, bias, device, dtype: as for `torch.nn.Linear`.
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, use_dora, lora_bias: as for `LoRAConfig`.
        adapter_name: the name of the first adapter.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is expected.
    """

    BASE = nn.Linear
    in_features, out_features = of_base_layer("in_features"), of_base_layer("out_features")

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
        adapter_name: str = DEFAULT,
    ) -> None:
        super().__init__(nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype))
        self.add_adapter(adapter_name, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, use_dora, lora_bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
        lora_bias: bool = False,
        adapter_name: str = DEFAULT,
    ) -> LoRALinear:
        """An adapted layer around `linear`, which is kept, shared and frozen: nothing is copied.

        Raises TypeError unless `linear` is a plain `torch.nn.Linear`: a subclass may hold its weight in
        another form, as quantised layers do.
        """
        return cls.from_base(
            linear,
            r,
            lora_alpha,
            lora_dropout,
            use_rslora,
            init_lora_weights=init_lora_weights,
            use_dora=use_dora,
            lora_bias=lora_bias,
            adapter_name=adapter_name,
        )

    @classmethod
    def adapter_shapes(
        cls, base_layer: nn.Module, r: int, use_dora: bool = False, lora_bias: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """lora_A [r, in_features], lora_B [out_features, r], a bias and DoRA's magnitude [out_features]."""
        N, K = base_layer.weight.shape  # type: ignore[union-attr,misc]
        shapes: dict[str, tuple[int, ...]] = {"lora_A.weight": (r, K), "lora_B.weight": (N, r)}
        return shapes | ({"lora_B.bias": (N,)} if lora_bias else {}) | ({MAGNITUDE: (N,)} if use_dora else {})

    def _add_parameters(self, name: str, r: int, lora_bias: bool, **factory: Any) -> None:
        skip_init = torch.nn.utils.skip_init
        self.lora_A[name] = skip_init(nn.Linear, self.in_features, r, bias=False, **factory)
        self.lora_B[name] = skip_init(nn.Linear, r, self.out_features, bias=lora_bias, **factory)

    def _matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def _from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        modules: dict[str, Any] = self._modules
        A, B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        return parameter_of(A, "weight"), parameter_of(B, "weight")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        x = input  # torch's name
        if self.merged:
            self._refuse_training_while_merged()
            return self.base_layer(x)
        names = self.active_adapters
        if len(names) > 1:  # one alone gets gradients that are zero; of several those that are off are left out
            names = self._running()
        if not names:
            return self.base_layer(x)
        first, *others = names
        if runs_more_than_forward(self._modules["base_layer"]) or getattr(x, "is_nested", False):
            # Somebody watches or changes what goes through the base layer: let it run as a module. The operator takes
            # no nested tensors, which torch's linear does, and torch's TransformerEncoder makes.
            names = self._running()
            scales, base_scale = self._sum_of_row_scales(names)
            y = self.base_layer(x)
            if base_scale is not None:
                bias = 0 if self.bias is None else self.bias.to(y.dtype)
                y = (y - bias) * base_scale.to(y.dtype) + bias
            return self._add_low_rank(y, x, scales)
        if not others:
            A, B = self._factors(first)
            scaling, p = self.scalings[first], self.lora_dropout[first]
            if not (self.use_dora[first] or self.lora_bias[first]):
                call = Call(self.weight, self.bias, A, B, scaling, p if self.training else 0.0)
                grouped = from_group(self, x, call)
                if grouped is not None:
                    return grouped
            return self._fused(x, A, B, names, scaling, p, self._row_scale(first))
        scales, base_scale = self._sum_of_row_scales(names)
        if base_scale is not None:
            y = scale_product(base_scale, lambda x: F.linear(x, self.weight), x)
            return self._add_low_rank(y if self.bias is None else y + self.bias.to(y.dtype), x, scales)
        if not self.training or not any(self.lora_dropout[name] for name in names):
            # Several adapters are one of their ranks' sum: still one pass over x.
            A = torch.cat([self._factors(name)[0] for name in names])
            B = torch.cat([self._factors(name)[1] * self.scalings[name] for name in names], dim=1)
            return self._fused(x, A, B, names, 1.0, 0.0)
        A, B = self._factors(first)
        y = self._fused(x, A, B, [first], self.scalings[first], self.lora_dropout[first])
        return self._add_low_rank(y, x, {name: None for name in others})

    def group_call(self, x: torch.Tensor) -> Call | None:
        """What this layer does with x where that is one LoRA linear and nothing else."""
        if self.merged or len(self.active_adapters) != 1:
            return None
        (name,) = self.active_adapters
        if self.use_dora[name] or self.lora_bias[name] or runs_more_than_forward(self._modules["base_layer"]):
            return None
        A, B = self._factors(name)
        p = self.lora_dropout[name] if self.training else 0.0
        return Call(self.weight, self.bias, A, B, self.scalings[name], p)

    def _fused(
        self,
        x: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        names: list[str],
        scaling: float,
        p: float,
        row_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        weight, base_bias = self.weight, self.bias
        bias = base_bias
        for name in names:
            if self.lora_bias[name] and not self._is_off(name):
                update = self._lora_bias(name) * self.scalings[name]
                bias = update if bias is None else bias + update
        if bias is not None and bias is not base_bias:
            bias = bias.to(weight.dtype)
        return lora_linear(
            x,
            weight,
            A,
            B,
            bias=bias,
            row_scale=row_scale,
            scaling=scaling,
            dropout_p=p,
            training=self.training,
        )

    def _lora_bias(self, name: str) -> torch.Tensor:
        return self.lora_B[name].bias  # type: ignore[return-value]

    def _add_low_rank(self, y: torch.Tensor, x: torch.Tensor, scales: dict[str, torch.Tensor | None]) -> torch.Tensor:
        """The updates of adapters that cannot share the fused call, each with its own dropout mask."""
        for name, row_scale in scales.items():
            scaling = self.scalings[name]
            A, B = self._factors(name)
            B = B * scaling if row_scale is None else B * (scaling * row_scale)[:, None]
            bias = (self._lora_bias(name) * scaling).to(x.dtype) if self.lora_bias[name] else None
            dropped = F.dropout(x, self.lora_dropout[name], self.training)
            y = y + F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype), bias)
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"
