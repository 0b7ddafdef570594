"""What is done to an adapted layer: adapters are added, started, chosen, scaled, merged and taken away."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from lorakernels.config import LoRAConfig, check_alpha, layer_config
from lorakernels.nn import init
from lorakernels.nn.base import DEFAULT, MAGNITUDE, Adapter, LoRABase, check_adapter_name
from lorakernels.nn.dora import Magnitude
from lorakernels.nn.whole import whole
from lorakernels.quant.layers import is_linear

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lorakernels.config import AdapterFields

Self = TypeVar("Self", bound="LoRALayer")


class LoRALayer(init.Startable):
    __doc__ = LoRABase.__doc__

    @classmethod
    def from_base(
        cls: type[Self],
        base_layer: nn.Module,
        adapter_name: str = DEFAULT,
        config: LoRAConfig | None = None,
        **fields: Unpack[AdapterFields],
    ) -> Self:
        """An adapted layer around `base_layer`, which is kept, shared and frozen: nothing is copied.

        The other arguments are those of `add_adapter`.

        Raises TypeError unless it is exactly of the class that this layer adapts: a subclass may hold its weight
        in another form, as quantised layers do. When anything is raised `base_layer` is as it was.
        """
        if type(base_layer) is not cls.BASE and not (cls.BASE is nn.Linear and is_linear(base_layer)):
            raise TypeError(
                f"from_base takes exactly torch.nn.{cls.BASE.__name__}; got {type(base_layer).__module__}."
                f"{type(base_layer).__qualname__}, whose weight and forward may not be those of the plain layer"
            )

        @whole
        def around(base_layer: nn.Module) -> Self:
            layer = cls.__new__(cls)
            LoRABase.__init__(layer, base_layer)
            layer.add_adapter(adapter_name, config, **fields)
            return layer

        return around(base_layer)

    @classmethod
    def check_adapter(cls, base_layer: nn.Module, config: LoRAConfig) -> None:
        """Raise ValueError where `base_layer` cannot have such an adapter, or not one that starts so.

        Raises TypeError where its weight is a subclass of torch.Tensor that may hold its numbers in another form.
        """
        start = config.init_lora_weights
        init.check_base(base_layer, start)
        A, B = list(
            cls.adapter_shapes(base_layer, config.r, config.use_dora, config.lora_bias, config.pooled).values()
        )[:2]
        scaling = Adapter.of(config).own_scaling
        init.check_start(start, B[0], torch.Size(A).numel() // config.r, config.r, scaling)

    @whole
    def add_adapter(
        self, adapter_name: str = DEFAULT, config: LoRAConfig | None = None, **fields: Unpack[AdapterFields]
    ) -> None:
        """Add an adapter on the base weight's device, in float32 where the base is 16-bit (PEFT's default).

        The first adapter of a layer becomes its active one. It is as `config` says, or as its fields that are about
        one layer: r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, use_dora, lora_bias.
        """
        config = layer_config(config, fields)
        check_adapter_name(adapter_name)
        self.check_adapter(self.target, config)
        self._refuse_while_merged()
        if adapter_name in self.adapters:
            raise ValueError(f"this layer has an adapter {adapter_name!r} already; its adapters: {self.adapter_names}")
        if init.changes_base(config.init_lora_weights):
            self._refuse_a_second_change(adapter_name)
        dtype = torch.float32 if self.weight.dtype in (torch.float16, torch.bfloat16) else self.weight.dtype
        factory = {"device": self.weight.device, "dtype": dtype}
        self._add_parameters(adapter_name, config.r, config.lora_bias, config.pooled, **factory)
        self.adapters[adapter_name] = Adapter.of(config)
        if config.use_dora:
            shape = self.adapter_shapes(self.target, config.r, True)[MAGNITUDE]
            self.lora_magnitude_vector[adapter_name] = Magnitude(
                torch.empty(shape, device=self.weight.device, dtype=dtype)
            )
            self.lora_magnitude_vector[adapter_name].train(self.training)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self.set_adapter(self.active_adapters or [adapter_name])

    @whole
    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter away; what PiSSA or OLoRA took out of the base weight goes back, to within rounding.

        If it was active it is so no more, and no other takes its place.
        """
        self._adapter(adapter_name)
        self._refuse_while_merged()
        self._give_back(adapter_name)
        for modules in self.children():
            if isinstance(modules, (nn.ModuleDict, nn.ParameterDict)) and adapter_name in modules:
                del modules[adapter_name]
        del self.adapters[adapter_name]
        self.active_adapters = [active for active in self.active_adapters if active != adapter_name]

    @whole
    def set_adapter(self, adapter_names: str | list[str]) -> None:
        """Make these adapters the active ones, and the only ones that train; their updates add up.

        An empty list leaves the base layer alone.
        """
        self._refuse_while_merged()
        names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
        for name in names:
            self._adapter(name)
        self.active_adapters = names
        for name in self.adapters:
            for parameter in self.adapter_tensors(name).values():
                parameter.requires_grad_(name in names)

    @property
    def scaling(self) -> float | torch.Tensor:
        """The active adapter's scaling. Settable; 0 switches it off, to the base layer's output to the bit."""
        return self.adapters[self._only_active("scaling")].scaling

    @scaling.setter
    def scaling(self, value: float) -> None:
        check_alpha(value, "scaling")
        self._refuse_while_merged()
        self.adapters[self._only_active("scaling")].rescale(float(value))
