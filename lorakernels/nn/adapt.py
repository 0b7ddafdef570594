"""Which layer adapts which."""

from __future__ import annotations

from torch import nn

from lorakernels.nn.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from lorakernels.nn.embedding import LoRAEmbedding
from lorakernels.nn.expert_layer import LoRAExperts, Stack
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.linear import LoRALinear
from lorakernels.quant.layers import is_linear

LAYERS: dict[type[nn.Module], type[LoRALayer]] = {
    layer.BASE: layer for layer in (LoRALinear, LoRAEmbedding, LoRAConv1d, LoRAConv2d, LoRAConv3d)
}


def layer_for(base_layer: nn.Module | Stack) -> type[LoRALayer] | None:
    """The adapted layer of a module or stack: by its exact class, or because it is a linear one that is known.

    None for any other: a subclass may hold its weight in any form.
    """
    if isinstance(base_layer, Stack):
        return LoRAExperts
    return LAYERS.get(type(base_layer)) or (LoRALinear if is_linear(base_layer) else None)
