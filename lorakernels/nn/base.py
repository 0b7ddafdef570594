"""What every adapted layer has: a frozen base layer, its adapters, and which of them are active."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import nn

from lorakernels.config import LoRAConfig, scaling_of
from lorakernels.formula import spread_over_groups
from lorakernels.nn.dora import change_of_base
from lorakernels.nn.modules import parameter_of
from lorakernels.nn.whole import write
from lorakernels.quant.layers import is_transposed, kind_of, read

DEFAULT = "default"
MAGNITUDE = "lora_magnitude_vector"


@dataclass
class Adapter:
    """What an adapter of one layer is, beside its parameters. Fields as in `LoRAConfig`."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    pooled: int  # QA-LoRA's features that A sees as one, 0 without
    scaling: float | torch.Tensor = field(init=False)  # what its update is multiplied with now; 0 switches it off

    def __post_init__(self) -> None:
        self.scaling = self.own_scaling

    @classmethod
    def of(cls, config: LoRAConfig) -> Adapter:
        return cls(
            config.r, config.lora_alpha, config.lora_dropout, config.use_rslora, config.use_dora, config.lora_bias,
            config.pooled,
        )  # fmt: skip

    @property
    def own_scaling(self) -> float:
        """The scaling that it was made with."""
        return scaling_of(self.lora_alpha, self.r, self.use_rslora)

    @property
    def is_off(self) -> bool:
        """A scaling of zero. One that is a tensor is not looked into: that breaks a graph, and waits for the device."""
        return not isinstance(self.scaling, torch.Tensor) and self.scaling == 0

    def rescale(self, scaling: float) -> None:
        """In a slot for hot swaps the tensor stays, and gets the value."""
        if isinstance(self.scaling, torch.Tensor):
            write(self.scaling, torch.tensor(scaling, dtype=torch.float64))
        else:
            self.scaling = scaling

    def __str__(self) -> str:
        dora = ", DoRA" if self.use_dora else ""
        numbers = f"r={self.r}, lora_alpha={self.lora_alpha:g}, scaling={self.scaling:g}, dropout={self.lora_dropout:g}"
        return numbers + dora


class LoRABase(nn.Module):
    """Adapters beside a frozen `base_layer`, under PEFT's names.

    The state dict has `base_layer.weight`, `lora_A.<adapter>.weight`, `lora_B.<adapter>.weight`, with DoRA
    `lora_magnitude_vector.<adapter>.weight`, and after PiSSA or OLoRA `lora_initial.<adapter>.A` and `.B`.

    A subclass says which layers it adapts (`BASE`), what its parameters are (`adapter_shapes`, `adapter_tensors`,
    `_add_parameters`), how its weight is a matrix (`_matrix`, `_from_matrix`) and how it runs (`forward`).
    """

    BASE: ClassVar[type[nn.Module]]
    ran: ClassVar[WeakSet[nn.Module] | None] = None  # the layers that were called, while somebody asks

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self._is_packed = bool(kind_of(base_layer))
        self._is_transposed = is_transposed(base_layer)
        self.train(base_layer.training)
        self.lora_A = nn.ModuleDict()
        # In evaluation torch's TransformerEncoderLayer reads its linears' weights and calls none of them, unless a
        # module in it has a hook. This one costs nothing: nobody calls the container.
        self.lora_A.register_forward_pre_hook(no_fast_path)
        self.lora_B = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.lora_initial = nn.ModuleDict()
        self._make_containers()
        self.adapters: dict[str, Adapter] = {}
        self.active_adapters: list[str] = []
        self._merged: dict[str, Any] = {}  # what went into the base weight, by adapter
        self._kept_base: Any = None
        self.in_merged_model = False

    def _make_containers(self) -> None:
        """What holds a subclass's own parameters, by adapter."""

    @classmethod
    def adapter_shapes(
        cls, base_layer: nn.Module, r: int, use_dora: bool = False, lora_bias: bool = False, pooled: int = 0
    ) -> dict[str, tuple[int, ...]]:
        """The shapes of an adapter's parameters, by what they are called behind the module's name in PEFT's files.

        Raises ValueError where `base_layer` cannot have such an adapter.
        """
        raise NotImplementedError("a layer says what its parameters are")

    def adapter_tensors(self, adapter_name: str = DEFAULT) -> dict[str, nn.Parameter]:
        """An adapter's parameters, by the names that `adapter_shapes` has."""
        adapter = self._adapter(adapter_name)
        A, B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        tensors: dict[str, Any] = {"lora_A.weight": A.weight, "lora_B.weight": B.weight}
        if adapter.lora_bias:
            tensors["lora_B.bias"] = B.bias
        return tensors | self._magnitude(adapter_name)

    def _magnitude(self, name: str) -> dict[str, Any]:
        return {MAGNITUDE: self.lora_magnitude_vector[name].weight} if self.adapters[name].use_dora else {}

    def _add_parameters(self, name: str, r: int, lora_bias: bool, pooled: int, **factory: Any) -> None:
        raise NotImplementedError("a layer makes its parameters")

    def _matrix(self, weight: Any) -> Any:
        """A tensor of the base weight's shape as [N, K], a row for each output."""
        return weight

    def _from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """[N, K] in the base weight's shape."""
        return matrix

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, K] and B [N, r], the parameters or views of them."""
        A, B = list(self.adapter_tensors(name).values())[:2]
        return A.flatten(1), B.flatten(1)

    def _effective(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, K] and B as they act on x: with QA-LoRA every feature of a group has the group's column."""
        A, B = self._factors(name)
        return (spread_over_groups(A, self.adapters[name].pooled) if self.adapters[name].pooled else A), B

    @property
    def weight(self) -> Any:
        """The base weight, a tensor or a `PackedWeight`. Settable, as the bias is, while no adapter is merged."""
        base = self._modules["base_layer"]
        return read(base) if self._is_packed else parameter_of(base, "weight")

    @property
    def target(self) -> Any:
        """What its adapters are made for, as `adapter_shapes` takes it: the base layer, or one stack of its experts."""
        return self.base_layer

    @property
    def plain_layer(self) -> nn.Module:
        """What stands in its place in the model without adapters."""
        return self.base_layer

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's bias."""
        return parameter_of(self._modules["base_layer"], "bias")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_layer" and "base_layer" in getattr(value, "_modules", ()):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise TypeError(
                f"a base layer with adapters of its own ({kind}): they would have no effect, since its weight is read "
                "and it is not called; call lorakernels.unload first"
            )
        if name not in ("weight", "bias"):
            return super().__setattr__(name, value)
        # Tying a weight, `head.weight = table.weight`, goes on meaning what it did.
        self._refuse_while_merged()
        setattr(self.base_layer, name, value)

    @property
    def adapter_names(self) -> list[str]:
        return list(self.adapters)

    @property
    def base_changed_by(self) -> list[str]:
        """The adapters whose start took scaling · B A out of the base weight (PiSSA, OLoRA)."""
        return list(self.lora_initial)

    @property
    def merged(self) -> bool:
        return bool(self._merged)

    @property
    def is_plain(self) -> bool:
        """Whether its state dict is the plain layer's: merged, or not active in a model that is."""
        return self.merged or self.in_merged_model

    @property
    def merged_adapters(self) -> list[str]:
        return list(self._merged)

    def _check_mergeable(self) -> None:
        """Raise ValueError where no weight of the base layer does what its adapters do."""

    def _row_scale(self, name: str, weight: Any = None) -> torch.Tensor | None:
        """DoRA's factor of each row [N], None for an adapter without it or one that is off."""
        adapter = self.adapters[name]
        if not adapter.use_dora or adapter.is_off:
            return None
        weight = self.weight if weight is None else weight
        magnitude: Any = self.lora_magnitude_vector[name]
        return magnitude.row_scale(weight, self._matrix(weight), *self._factors(name), adapter.scaling)

    def _row_scales(self) -> tuple[dict[str, torch.Tensor | None], torch.Tensor | None]:
        """The factors of each adapter that runs, and what the base product is multiplied by; None without DoRA."""
        scales = {name: self._row_scale(name) for name in self._running()}
        return scales, change_of_base(scales.values())

    def _running(self) -> list[str]:
        """The active adapters but those that are switched off."""
        return [name for name in self.active_adapters if not self.adapters[name].is_off]

    def _adapter(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise KeyError(f"this layer has no adapter {name!r}; its adapters: {self.adapter_names}")
        return self.adapters[name]

    def _only_active(self, what: str) -> str:
        if len(self.active_adapters) != 1:
            raise RuntimeError(
                f"{what} is that of the one active adapter, and {len(self.active_adapters)} are active "
                f"({self.active_adapters}); use adapters[name].scaling"
            )
        return self.active_adapters[0]

    def _refuse_while_merged(self) -> None:
        if self.merged:
            raise RuntimeError(f"adapters {self.merged_adapters} are merged into the base weight; call unmerge() first")

    def _refuse_training_while_merged(self) -> None:
        if self.training and torch.is_grad_enabled():
            trained = [n for n in self._merged if any(p.requires_grad for p in self.adapter_tensors(n).values())]
            if trained:
                raise RuntimeError(
                    f"adapters {trained} are merged into the base weight, so training would not reach them; "
                    "call unmerge() first, or eval()"
                )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """While adapters are merged that of the plain layer, which the weight is then: no adapter counts twice."""
        return self.base_layer.state_dict(*args, **kwargs) if self.is_plain else super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.merged:
            *_, error_messages = args
            error_messages.append(f"{prefix[:-1]!r} has adapters merged into its base weight; call unmerge() first")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: {adapter}" for name, adapter in self.adapters.items())
        changed = f", base_changed_by={self.base_changed_by}" if self.base_changed_by else ""
        return f"{adapters}, active={self.active_adapters}, merged={self.merged}{changed}"


def no_fast_path(module: nn.Module, args: Any) -> None:
    """A hook that is there to be seen."""


def check_adapter_name(name: Any) -> None:
    """A name is part of parameter names and of paths: no dots, no separators, not empty."""
    if not isinstance(name, str) or not name or any(c in name for c in "./\\\0") or name != name.strip():
        raise ValueError(f"adapter name {name!r}: expected text without dots, slashes or spaces around it")
    for container in (nn.ModuleDict, nn.ParameterDict):
        if hasattr(container(), name):
            raise ValueError(f"adapter name {name!r} is an attribute of torch.nn.{container.__name__}; use another")
