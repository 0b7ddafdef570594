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

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lorakernels.config import AdapterFields

LAYERS: dict[type[nn.Module], type[LoRALayer]] = {
    layer.BASE: layer for layer in (LoRALinear, LoRAEmbedding, LoRAConv1d, LoRAConv2d, LoRAConv3d)
}


def adapt(
    base_layer: nn.Module,
    adapter_name: str = DEFAULT,
    config: LoRAConfig | None = None,
    **fields: Unpack[AdapterFields],
) -> LoRALayer:
    """The adapted layer around `base_layer`, see `LoRALayer.from_base`.

    Raises TypeError unless it is exactly of a class in `LAYERS`: a subclass may hold its weight in another form, as
    quantised layers do. When anything is raised `base_layer` is as it was.
    """
    kind = LAYERS.get(type(base_layer))
    if kind is None:
        names = ", ".join(f"torch.nn.{base.__name__}" for base in LAYERS)
        raise TypeError(
            f"{type(base_layer).__module__}.{type(base_layer).__qualname__} has no adapted layer; "
            f"expected exactly one of {names}"
        )
    return kind.from_base(base_layer, adapter_name, config, **fields)
