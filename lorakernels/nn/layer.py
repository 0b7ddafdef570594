"""What every adapted layer has in common: its adapters, which of them are active, and merging."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakernels.config import check_alpha, check_dropout, check_init, check_rank, scaling_of

DEFAULT = "default"


@dataclass(frozen=True)
class _Merged:
    """What went into the base weight, so that exactly that comes out again, whatever became of the adapter."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


class LoRALayer(nn.Module):
    """Adapters beside a frozen `base_layer`, under PEFT's names.

    The state dict has `base_layer.weight`, `lora_A.<adapter>.weight` and `lora_B.<adapter>.weight`.
    A subclass says what A and B are (`_new_pair`), what they add to the weight (`_delta`), and
    how the layer runs (`forward`).
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.train(base_layer.training)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.scalings: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.active_adapters: list[str] = []
        self._merged: dict[str, _Merged] = {}
        self._kept_base: torch.Tensor | None = None

    def _new_pair(self, r: int, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        raise NotImplementedError("a layer says what its lora_A and lora_B are")

    def _delta(self, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
        raise NotImplementedError("a layer says what its adapters add to its weight")

    def delta_weight(self, adapter_name: str | None = None) -> torch.Tensor:
        """scaling · B A in the base weight's shape, float32 (float64 for a float64 adapter): what merging adds."""
        name = self._only_active("delta_weight") if adapter_name is None else self._known(adapter_name)
        return self._delta(*self._factors(name), self.scalings[name])

    @property
    def weight(self) -> torch.Tensor:
        """The base weight."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def adapter_names(self) -> list[str]:
        return list(self.r)

    def add_adapter(
        self,
        adapter_name: str = DEFAULT,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> None:
        """Add an adapter on the base weight's device, in float32 where the base is 16-bit (PEFT's default).

        The first adapter of a layer becomes its active one.
        """
        check_rank(r)
        check_alpha(lora_alpha)
        check_dropout(lora_dropout)
        check_init(init_lora_weights)
        check_adapter_name(adapter_name)
        self._refuse_while_merged()
        if adapter_name in self.r:
            raise ValueError(f"this layer has an adapter {adapter_name!r} already; its adapters: {self.adapter_names}")
        dtype = torch.float32 if self.weight.dtype in (torch.float16, torch.bfloat16) else self.weight.dtype
        self.lora_A[adapter_name], self.lora_B[adapter_name] = self._new_pair(r, self.weight.device, dtype)
        self.r[adapter_name] = r
        self.configure(adapter_name, lora_alpha, lora_dropout, use_rslora)
        self.reset_lora_parameters(adapter_name, init_lora_weights)
        self.set_adapter(self.active_adapters or [adapter_name])

    def configure(self, adapter_name: str, lora_alpha: float, lora_dropout: float, use_rslora: bool) -> None:
        """Set what scales an adapter and drops its inputs; its scaling becomes its own again."""
        name = self._known(adapter_name)
        self.lora_alpha[name], self.lora_dropout[name], self.use_rslora[name] = lora_alpha, lora_dropout, use_rslora
        self.scalings[name] = self.own_scaling(name)

    def reset_lora_parameters(self, adapter_name: str = DEFAULT, init_lora_weights: bool | str = True) -> None:
        """Start an adapter anew: B zero, A Kaiming-uniform (True) or normal ("gaussian"); False makes both random."""
        check_init(init_lora_weights)
        name = self._known(adapter_name)
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        if init_lora_weights == "gaussian":
            nn.init.normal_(A, std=1 / self.r[name])  # type: ignore[arg-type]
        else:
            # a = √5 as nn.Linear and PEFT have it: uniform within ± 1 / √in_features.
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # type: ignore[arg-type]
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))  # type: ignore[arg-type]
        else:
            nn.init.zeros_(B)  # type: ignore[arg-type]

    def set_adapter(self, adapter_names: str | list[str]) -> None:
        """Make these adapters the active ones, and the only ones that train; their updates add up.

        An empty list leaves the base layer alone.
        """
        self._refuse_while_merged()
        names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
        self.active_adapters = [self._known(name) for name in names]
        for name in self.r:
            for module in (self.lora_A[name], self.lora_B[name]):
                module.requires_grad_(name in names)

    @property
    def scaling(self) -> float:
        """The active adapter's scaling. Settable; 0 switches it off, to the base layer's output to the bit."""
        return self.scalings[self._only_active("scaling")]

    @scaling.setter
    def scaling(self, value: float) -> None:
        check_alpha(value, "scaling")
        self._refuse_while_merged()
        self.scalings[self._only_active("scaling")] = float(value)

    def own_scaling(self, adapter_name: str) -> float:
        """The scaling that an adapter was made with."""
        name = self._known(adapter_name)
        return scaling_of(self.lora_alpha[name], self.r[name], self.use_rslora[name])

    @property
    def merged(self) -> bool:
        return bool(self._merged)

    @property
    def merged_adapters(self) -> list[str]:
        return list(self._merged)

    @torch.no_grad()
    def merge(self, keep_base: bool = False) -> None:
        """Add the active adapters to the base weight, summed in float32 and rounded once to its dtype.

        `keep_base` keeps a copy of the weight, so that `unmerge` brings it back to the bit; without it
        the weight comes back within one rounding.
        """
        if self.merged:
            warnings.warn(f"adapters {self.merged_adapters} are merged already: nothing to do", stacklevel=2)
            return
        merged = self.merged_weight()
        self._kept_base = self.weight.detach().clone() if keep_base else None
        self.weight.copy_(merged)
        for name in self.active_adapters:
            A, B = self._factors(name)
            self._merged[name] = _Merged(A.detach().clone(), B.detach().clone(), self.scalings[name])

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """The base weight with the active adapters in it, float32 (float64 for a float64 base).

        Raises ValueError when it is not finite.
        """
        merged = self.weight.to(_sum_dtype(self.weight))
        for name in self.active_adapters:
            merged = merged + self.delta_weight(name).to(merged.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(f"merging {self.active_adapters} would give a weight that is not finite; nothing changed")
        return merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take out of the base weight what `merge` has put in."""
        if not self.merged:
            warnings.warn("no adapter is merged: nothing to do", stacklevel=2)
            return
        weight = self.weight
        if self._kept_base is not None:
            weight.copy_(self._kept_base)
        else:
            base = weight.to(_sum_dtype(weight))
            for record in self._merged.values():
                A, B = record.A.to(weight.device), record.B.to(weight.device)
                base = base - self._delta(A, B, record.scaling).to(base.dtype)
            weight.copy_(base)
        self._merged, self._kept_base = {}, None

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[return-value]

    def _known(self, name: str) -> str:
        if name not in self.r:
            raise KeyError(f"this layer has no adapter {name!r}; its adapters: {self.adapter_names}")
        return name

    def _only_active(self, what: str) -> str:
        if len(self.active_adapters) != 1:
            raise RuntimeError(
                f"{what} is that of the one active adapter, and {len(self.active_adapters)} are active "
                f"({self.active_adapters}); use scalings[name]"
            )
        return self.active_adapters[0]

    def _refuse_while_merged(self) -> None:
        if self.merged:
            raise RuntimeError(f"adapters {self.merged_adapters} are merged into the base weight; call unmerge() first")

    def _refuse_training_while_merged(self) -> None:
        if self.training and torch.is_grad_enabled():
            trained = [name for name in self._merged if self.lora_A[name].weight.requires_grad]  # type: ignore[union-attr]
            if trained:
                raise RuntimeError(
                    f"adapters {trained} are merged into the base weight, so training would not reach them; "
                    "call unmerge() first, or eval()"
                )

    def extra_repr(self) -> str:
        adapters = ", ".join(
            f"{name}: r={self.r[name]}, lora_alpha={self.lora_alpha[name]:g}, scaling={self.scalings[name]:g}, "
            f"dropout={self.lora_dropout[name]:g}"
            for name in self.r
        )
        return f"{adapters}, active={self.active_adapters}, merged={self.merged}"


def check_adapter_name(name: Any) -> None:
    """A name is part of parameter names and of paths: no dots, no separators, not empty."""
    if not isinstance(name, str) or not name or any(c in name for c in "./\\\0") or name != name.strip():
        raise ValueError(f"adapter name {name!r}: expected text without dots, slashes or spaces around it")
    if hasattr(nn.ModuleDict, name):
        raise ValueError(f"adapter name {name!r} is an attribute of torch.nn.ModuleDict; expected another name")


def runs_more_than_forward(module: nn.Module) -> bool:
    """Whether a call of `module` does other things than its class's forward: hooks, or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _sum_dtype(weight: torch.Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype is torch.float64 else torch.float32
