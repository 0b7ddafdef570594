"""What every adapted layer has in common: its adapters, which of them are active, and how they scale."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from lorakernels.config import check_alpha, check_dropout, check_flag, check_init, check_rank, check_variant, scaling_of
from lorakernels.nn import init, merging
from lorakernels.nn.dora import Magnitude
from lorakernels.nn.modules import parameter_of

DEFAULT = "default"
MAGNITUDE = "lora_magnitude_vector"
Self = TypeVar("Self", bound="LoRALayer")


class LoRALayer(nn.Module):
    """Adapters beside a frozen `base_layer`, under PEFT's names.

    The state dict has `base_layer.weight`, `lora_A.<adapter>.weight`, `lora_B.<adapter>.weight`, with DoRA
    `lora_magnitude_vector.<adapter>.weight`, and after PiSSA or OLoRA `lora_initial.<adapter>.A` and `.B`.

    A subclass says which layers it adapts (`BASE`), what its parameters are (`adapter_shapes`, `adapter_tensors`,
    `_add_parameters`), how its weight is a matrix (`_matrix`, `_from_matrix`) and how it runs (`forward`).
    """

    BASE: ClassVar[type[nn.Module]]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.train(base_layer.training)
        self.lora_A = nn.ModuleDict()
        # In evaluation torch's TransformerEncoderLayer reads its linears' weights and calls none of them, unless a
        # module in it has a hook. This one costs nothing: nobody calls the container.
        self.lora_A.register_forward_pre_hook(_no_fast_path)
        self.lora_B = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.lora_initial = nn.ModuleDict()
        self._make_containers()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.scalings: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.use_dora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        self.active_adapters: list[str] = []
        self._merged: dict[str, merging.Merged] = {}
        self._kept_base: merging.KeptBase | None = None

    def _make_containers(self) -> None:
        """What holds a subclass's own parameters, by adapter."""

    @classmethod
    def from_base(
        cls: type[Self],
        base_layer: nn.Module,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
        lora_bias: bool = False,
        adapter_name: str = DEFAULT,
    ) -> Self:
        """An adapted layer around `base_layer`, which is kept, shared and frozen: nothing is copied.

        Raises TypeError unless it is exactly of the class that this layer adapts: a subclass may hold its weight
        in another form, as quantised layers do. When anything is raised `base_layer` is as it was.
        """
        if type(base_layer) is not cls.BASE:
            raise TypeError(
                f"from_base takes exactly torch.nn.{cls.BASE.__name__}; got {type(base_layer).__module__}."
                f"{type(base_layer).__qualname__}, whose weight and forward may not be those of the plain layer"
            )
        layer = cls.__new__(cls)
        needed_grad = [parameter for parameter in base_layer.parameters() if parameter.requires_grad]
        LoRALayer.__init__(layer, base_layer)
        try:
            layer.add_adapter(
                adapter_name, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, use_dora, lora_bias
            )
        except Exception:
            for parameter in needed_grad:
                parameter.requires_grad_(True)
            raise
        return layer

    @classmethod
    def adapter_shapes(
        cls, base_layer: nn.Module, r: int, use_dora: bool = False, lora_bias: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """The shapes of an adapter's parameters, by what they are called behind the module's name in PEFT's files.

        Raises ValueError where `base_layer` cannot have such an adapter.
        """
        raise NotImplementedError("a layer says what its parameters are")

    @classmethod
    def check_adapter(
        cls,
        base_layer: nn.Module,
        r: int,
        scaling: float,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
        lora_bias: bool = False,
    ) -> None:
        """Raise ValueError where `base_layer` cannot have such an adapter, or not one that starts so.

        Raises TypeError where its weight is a subclass of torch.Tensor that may hold its numbers in another form.
        """
        check_init(init_lora_weights)
        check_variant(use_dora, lora_bias, init_lora_weights)
        init.check_base(base_layer, init_lora_weights)
        shapes = cls.adapter_shapes(base_layer, r, use_dora, lora_bias)
        A, B = list(shapes.values())[:2]
        init.check_start(init_lora_weights, B[0], torch.Size(A).numel() // r, r, scaling)

    def adapter_tensors(self, adapter_name: str = DEFAULT) -> dict[str, nn.Parameter]:
        """An adapter's parameters, by the names that `adapter_shapes` has."""
        name = self._known(adapter_name)
        tensors: dict[str, Any] = {"lora_A.weight": self.lora_A[name].weight, "lora_B.weight": self.lora_B[name].weight}
        if self.lora_bias[name]:
            tensors["lora_B.bias"] = self.lora_B[name].bias
        return tensors | self._magnitude(name)

    def _magnitude(self, name: str) -> dict[str, Any]:
        return {MAGNITUDE: self.lora_magnitude_vector[name].weight} if self.use_dora[name] else {}

    def _add_parameters(self, name: str, r: int, lora_bias: bool, **factory: Any) -> None:
        raise NotImplementedError("a layer makes its parameters")

    def _matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """A tensor of the base weight's shape as [N, K], a row for each output."""
        raise NotImplementedError("a layer says how its weight is a matrix")

    def _from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """[N, K] in the base weight's shape."""
        raise NotImplementedError("a layer says how its weight is a matrix")

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, K] and B [N, r], the parameters or views of them."""
        A, B = list(self.adapter_tensors(name).values())[:2]
        return A.flatten(1), B.flatten(1)

    @property
    def weight(self) -> torch.Tensor:
        """The base weight. Settable, as the bias is, but not while adapters are merged into it."""
        return parameter_of(self._modules["base_layer"], "weight")

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's bias."""
        return parameter_of(self._modules["base_layer"], "bias")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("weight", "bias"):
            return super().__setattr__(name, value)
        # Tying a weight, `head.weight = table.weight`, goes on meaning what it did.
        self._refuse_while_merged()
        setattr(self.base_layer, name, value)

    @property
    def adapter_names(self) -> list[str]:
        return list(self.r)

    @property
    def base_changed_by(self) -> list[str]:
        """The adapters whose start took scaling · B A out of the base weight (PiSSA, OLoRA)."""
        return list(self.lora_initial)

    def add_adapter(
        self,
        adapter_name: str = DEFAULT,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
        lora_bias: bool = False,
    ) -> None:
        """Add an adapter on the base weight's device, in float32 where the base is 16-bit (PEFT's default).

        The first adapter of a layer becomes its active one. Arguments as for `LoRAConfig`.
        """
        check_rank(r)
        check_alpha(lora_alpha)
        check_dropout(lora_dropout)
        check_flag(use_rslora, "use_rslora")
        check_adapter_name(adapter_name)
        scaling = scaling_of(lora_alpha, r, use_rslora)
        self.check_adapter(self.base_layer, r, scaling, init_lora_weights, use_dora, lora_bias)
        self._refuse_while_merged()
        if adapter_name in self.r:
            raise ValueError(f"this layer has an adapter {adapter_name!r} already; its adapters: {self.adapter_names}")
        if init.changes_base(init_lora_weights):
            init.refuse_a_second_change(self, adapter_name)
        dtype = torch.float32 if self.weight.dtype in (torch.float16, torch.bfloat16) else self.weight.dtype
        self._add_parameters(adapter_name, r, lora_bias, device=self.weight.device, dtype=dtype)
        self.r[adapter_name], self.use_dora[adapter_name], self.lora_bias[adapter_name] = r, use_dora, lora_bias
        self.configure(adapter_name, lora_alpha, lora_dropout, use_rslora)
        if use_dora:
            shape = self.adapter_shapes(self.base_layer, r, use_dora)[MAGNITUDE]
            self.lora_magnitude_vector[adapter_name] = Magnitude(self.weight.new_empty(shape, dtype=dtype))
            self.lora_magnitude_vector[adapter_name].train(self.training)
        try:
            self.reset_lora_parameters(adapter_name, init_lora_weights)
        except Exception:  # an SVD that does not converge, no memory
            self._forget(adapter_name)
            raise
        self.set_adapter(self.active_adapters or [adapter_name])

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter away; what PiSSA or OLoRA took out of the base weight goes back, to within rounding.

        If it was active it is so no more, and no other takes its place.
        """
        name = self._known(adapter_name)
        self._refuse_while_merged()
        init.give_back(self, name)
        self._forget(name)

    def _forget(self, name: str) -> None:
        for modules in self.children():
            if isinstance(modules, (nn.ModuleDict, nn.ParameterDict)) and name in modules:
                del modules[name]
        for values in (self.r, self.lora_alpha, self.lora_dropout, self.scalings, self.use_rslora):
            values.pop(name, None)
        for flags in (self.use_dora, self.lora_bias):
            flags.pop(name, None)
        self.active_adapters = [active for active in self.active_adapters if active != name]

    def configure(self, adapter_name: str, lora_alpha: float, lora_dropout: float, use_rslora: bool) -> None:
        """Set what scales an adapter and drops its inputs; its scaling becomes its own again."""
        name = self._known(adapter_name)
        self.lora_alpha[name], self.lora_dropout[name], self.use_rslora[name] = lora_alpha, lora_dropout, use_rslora
        self.scalings[name] = self.own_scaling(name)

    def reset_lora_parameters(self, adapter_name: str = DEFAULT, init_lora_weights: bool | str = True) -> None:
        """Start an adapter anew, as `LoRAConfig.init_lora_weights` says; DoRA's magnitude is then the weight's norm.

        "pissa" and "olora" take scaling · B A out of the base weight, in float32 and rounded once, so that the
        layer's function stays: see `base_changed_by`, `delete_adapter` and `as_plain_lora`.
        """
        init.restart(self, self._known(adapter_name), init_lora_weights)

    def _start(self, A: torch.Tensor, B: torch.Tensor, init_lora_weights: bool | str) -> None:
        """Fill A and B without a look at the base weight."""
        init.start_random(A, B, init_lora_weights)

    def original_weight(self) -> torch.Tensor:
        """The base weight as it was before PiSSA or OLoRA changed it, to within rounding, and without what is merged.

        In float32 (float64 for a float64 base) where there is something to undo; otherwise the weight itself.
        """
        return init.original_weight(self)

    def as_plain_lora(self, adapter_name: str = DEFAULT) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, in the shapes of `adapter_shapes`, of the adapter that does the same beside the original weight.

        For one that changed the base they have rank 2 r: B' A' = B A - B0 A0, with the scaling that the adapter was
        made with (what PEFT's path_initial_model_for_weight_conversion saves). For any other they are its own.
        DoRA's magnitude is right beside both.
        """
        return init.as_plain_lora(self, self._known(adapter_name))

    def set_adapter(self, adapter_names: str | list[str]) -> None:
        """Make these adapters the active ones, and the only ones that train; their updates add up.

        An empty list leaves the base layer alone.
        """
        self._refuse_while_merged()
        names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
        self.active_adapters = [self._known(name) for name in names]
        for name in self.r:
            for parameter in self.adapter_tensors(name).values():
                parameter.requires_grad_(name in names)

    @property
    def scaling(self) -> float:
        """The active adapter's scaling. Settable; 0 switches it off, to the base layer's output to the bit."""
        return self.scalings[self._only_active("scaling")]

    @scaling.setter
    def scaling(self, value: float) -> None:
        check_alpha(value, "scaling")
        self._refuse_while_merged()
        self._set_scaling(self._only_active("scaling"), float(value))

    def _set_scaling(self, name: str, scaling: float) -> None:
        """In a slot for hot swaps the tensor stays, and gets the value."""
        old = self.scalings[name]
        if isinstance(old, torch.Tensor):
            old.fill_(scaling)
        else:
            self.scalings[name] = scaling

    def own_scaling(self, adapter_name: str) -> float:
        """The scaling that an adapter was made with."""
        name = self._known(adapter_name)
        return scaling_of(self.lora_alpha[name], self.r[name], self.use_rslora[name])

    def delta_weight(self, adapter_name: str | None = None) -> torch.Tensor:
        """What merging one adapter adds to the base weight, in its shape, float32 (float64 for a float64 adapter).

        scaling · B A; with DoRA W' - W, where W' = magnitude / ‖W + scaling · B A‖ · (W + scaling · B A).
        """
        name = self._only_active("delta_weight") if adapter_name is None else self._known(adapter_name)
        return merging.delta_weight(self, name)

    @property
    def merged(self) -> bool:
        return bool(self._merged)

    @property
    def merged_adapters(self) -> list[str]:
        return list(self._merged)

    def merge(self, keep_base: bool = False) -> None:
        """Add the active adapters to the base weight, summed in float32 and rounded once to its dtype.

        `keep_base` keeps a copy of the weight, so that `unmerge` brings it back to the bit; without it
        the weight comes back within one rounding. A `lora_bias` goes into the base layer's bias.
        """
        merging.merge(self, keep_base)

    def check_merge(self, keep_base: bool = False) -> None:
        """Raise the ValueError that `merge` would raise."""
        merging.check(self, keep_base)

    def merged_weight(self) -> torch.Tensor:
        """The base weight with the active adapters in it, float32 (float64 for a float64 base).

        Raises ValueError when it is not finite in the base's dtype, or when the adapters cannot be merged.
        """
        return merging.merged_weight(self)

    def unmerge(self) -> None:
        """Take out of the base weight what `merge` has put in.

        After PiSSA or OLoRA that is the changed base weight, as before `merge`, and not the original one.
        """
        merging.unmerge(self)

    def _check_mergeable(self) -> None:
        """Raise ValueError where no weight of the base layer does what its adapters do."""

    def _row_scale(self, name: str, weight: torch.Tensor | None = None) -> torch.Tensor | None:
        """DoRA's factor of each row [N], None for an adapter without it or one that is off."""
        if not self.use_dora[name] or self._is_off(name):
            return None
        weight = self.weight if weight is None else weight
        magnitude: Any = self.lora_magnitude_vector[name]
        scaling: Any = self.scalings[name]
        scale = magnitude.row_scale(weight, self._matrix(weight), *self._factors(name), scaling)
        # A tensor of zero is not seen by _is_off, and the layer is its base with it too.
        return torch.where(scaling == 0, 1.0, scale) if isinstance(scaling, torch.Tensor) else scale

    def _sum_of_row_scales(self, names: list[str]) -> tuple[dict[str, torch.Tensor | None], torch.Tensor | None]:
        """Each adapter's factors, and 1 + Σ (factor - 1): what the base product is multiplied by; None without DoRA."""
        scales = {name: self._row_scale(name) for name in names}
        with_dora = [scale for scale in scales.values() if scale is not None]
        return scales, sum(with_dora[1:], with_dora[0]) - (len(with_dora) - 1) if with_dora else None

    def _running(self) -> list[str]:
        """The active adapters but those that are switched off."""
        return [name for name in self.active_adapters if not self._is_off(name)]

    def _is_off(self, name: str) -> bool:
        """A scaling of zero. One that is a tensor is not looked into: that breaks a graph, and waits for the device."""
        scaling = self.scalings[name]
        return not isinstance(scaling, torch.Tensor) and scaling == 0

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
            trained = [n for n in self._merged if any(p.requires_grad for p in self.adapter_tensors(n).values())]
            if trained:
                raise RuntimeError(
                    f"adapters {trained} are merged into the base weight, so training would not reach them; "
                    "call unmerge() first, or eval()"
                )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.merged:
            *_, error_messages = args
            error_messages.append(f"{prefix[:-1]!r} has adapters merged into its base weight; call unmerge() first")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        adapters = ", ".join(
            f"{name}: r={self.r[name]}, lora_alpha={self.lora_alpha[name]:g}, scaling={self.scalings[name]:g}, "
            f"dropout={self.lora_dropout[name]:g}" + (", DoRA" if self.use_dora[name] else "")
            for name in self.r
        )
        changed = f", base_changed_by={self.base_changed_by}" if self.base_changed_by else ""
        return f"{adapters}, active={self.active_adapters}, merged={self.merged}{changed}"


def _no_fast_path(module: nn.Module, args: Any) -> None:
    """A hook that is there to be seen."""


def check_adapter_name(name: Any) -> None:
    """A name is part of parameter names and of paths: no dots, no separators, not empty."""
    if not isinstance(name, str) or not name or any(c in name for c in "./\\\0") or name != name.strip():
        raise ValueError(f"adapter name {name!r}: expected text without dots, slashes or spaces around it")
    for container in (nn.ModuleDict, nn.ParameterDict):
        if hasattr(container(), name):
            raise ValueError(f"adapter name {name!r} is an attribute of torch.nn.{container.__name__}; use another")
