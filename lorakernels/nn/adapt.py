"""Which layer adapts which."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lorakernels.config import LoRAConfig
from lorakernels.nn.base import DEFAULT
from lorakernels.nn.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from lorakernels.nn.embedding import LoRAEmbedding
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.linear import LoRALinear
from lorakernels.quant.layers import kind_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lorakernels.config import AdapterFields

LAYERS: dict[type[nn.Module], type[LoRALayer]] = {
    layer.BASE: layer for layer in (LoRALinear, LoRAEmbedding, LoRAConv1d, LoRAConv2d, LoRAConv3d)
}


def layer_for(base_layer: nn.Module) -> type[LoRALayer] | None:
    """The adapted layer of a module: by its exact class, or because its weight is packed in a way that is known."""
    return LAYERS.get(type(base_layer)) or (LoRALinear if kind_of(base_layer) else None)


def adapt(
    base_layer: nn.Module,
    adapter_name: str = DEFAULT,
    config: LoRAConfig | None = None,
    **fields: Unpack[AdapterFields],
) -> LoRALayer:
    """The adapted layer around `base_layer`, see `LoRALayer.from_base`.

    Raises TypeError unless it is exactly of a class in `LAYERS`, or has a packed weight: another subclass may hold its
    weight in any form. When anything is raised `base_layer` is as it was.
    """
    kind = layer_for(base_layer)
    if kind is None:
        names = ", ".join(f"torch.nn.{base.__name__}" for base in LAYERS)
        raise TypeError(
            f"{type(base_layer).__module__}.{type(base_layer).__qualname__} has no adapted layer; "
            f"expected exactly one of {names}"
        )
    return kind.from_base(base_layer, adapter_name, config, **fields)
