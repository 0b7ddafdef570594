"""LoRALinear: a drop-in `torch.nn.Linear` with low-rank adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lorakernels.functional import lora_linear
from lorakernels.nn.layer import DEFAULT, LoRALayer, runs_more_than_forward


class LoRALinear(LoRALayer):
    """y = x Wᵀ + bias + scaling · (dropout(x) Aᵀ) Bᵀ with W and bias frozen (arXiv 2106.09685).

    `base_layer` is a `torch.nn.Linear`; `lora_A[name].weight` is [r, in_features] and
    `lora_B[name].weight` [out_features, r], as in PEFT. B starts at zero, so the layer starts as its base.

    Args:
        in_features, out_features, bias, device, dtype: as for `torch.nn.Linear`.
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights: as for `LoRAConfig`.
        adapter_name: the name of the first adapter.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is expected.
    """

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
        adapter_name: str = DEFAULT,
    ) -> None:
        super().__init__(nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype))
        self.add_adapter(adapter_name, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)

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
        adapter_name: str = DEFAULT,
    ) -> LoRALinear:
        """An adapted layer around `linear`, which is kept, shared and frozen: nothing is copied.

        Raises TypeError unless `linear` is a plain `torch.nn.Linear`: a subclass may hold its weight in
        another form, as quantised layers do.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"from_linear takes exactly torch.nn.Linear; got {type(linear).__module__}."
                f"{type(linear).__qualname__}, whose weight and forward may not be those of a plain linear layer"
            )
        layer = cls.__new__(cls)
        LoRALayer.__init__(layer, linear)
        layer.add_adapter(adapter_name, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        return layer

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return self.base_layer.out_features  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def _new_pair(self, r: int, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        def linear(in_features: int, out_features: int) -> nn.Module:
            factory: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
            return torch.nn.utils.skip_init(nn.Linear, in_features, out_features, **factory)

        return linear(self.in_features, r), linear(r, self.out_features)

    def _delta(self, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
        dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
        return (B.to(dtype) @ A.to(dtype)) * scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        if self.merged:
            self._refuse_training_while_merged()
            return self.base_layer(x)
        names = self.active_adapters
        if len(names) > 1:  # one alone gets gradients that are zero; of several those that are off are left out
            names = [name for name in names if self.scalings[name] != 0]
        if not names:
            return self.base_layer(x)
        first, *others = names
        if runs_more_than_forward(self.base_layer):
            # Somebody watches or changes what goes through the base layer: let it run as a module.
            return self._add_low_rank(self.base_layer(x), x, [name for name in names if self.scalings[name] != 0])
        if not others:
            A, B = self._factors(first)
            return self._fused(x, A, B, self.scalings[first], self.lora_dropout[first])
        if not self.training or not any(self.lora_dropout[name] for name in names):
            # Several adapters are one of their ranks' sum: still one pass over x.
            A = torch.cat([self._factors(name)[0] for name in names])
            B = torch.cat([self._factors(name)[1] * self.scalings[name] for name in names], dim=1)
            return self._fused(x, A, B, 1.0, 0.0)
        A, B = self._factors(first)
        y = self._fused(x, A, B, self.scalings[first], self.lora_dropout[first])
        return self._add_low_rank(y, x, others)

    def _fused(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float, p: float) -> torch.Tensor:
        return lora_linear(x, self.weight, A, B, bias=self.bias, scaling=scaling, dropout_p=p, training=self.training)

    def _add_low_rank(self, y: torch.Tensor, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        """The updates of adapters that cannot share the fused call, each with its own dropout mask."""
        for name in names:
            A, B = self._factors(name)
            dropped = F.dropout(x, self.lora_dropout[name], self.training)
            y = y + F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype)) * self.scalings[name]
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"
