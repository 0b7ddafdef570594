"""Which layer adapts which."""

from __future__ import annotations

from torch import nn

from lorakernels.nn.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from lorakernels.nn.embedding import LoRAEmbedding
from lorakernels.nn.layer import DEFAULT, LoRALayer
from lorakernels.nn.linear import LoRALinear

LAYERS: dict[type[nn.Module], type[LoRALayer]] = {
    layer.BASE: layer for layer in (LoRALinear, LoRAEmbedding, LoRAConv1d, LoRAConv2d, LoRAConv3d)
}


def adapt(
    base_layer: nn.Module,
    adapter_name: str = DEFAULT,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    init_lora_weights: bool | str = True,
    use_dora: bool = False,
    lora_bias: bool = False,
) -> LoRALayer:
    """The adapted layer around `base_layer`, which is kept, shared and frozen.

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
    return kind.from_base(
        base_layer, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, use_dora, lora_bias, adapter_name
    )
