"""Layers: LoRALinear and its kin."""

from lorakernels.nn.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from lorakernels.nn.embedding import LoRAEmbedding
from lorakernels.nn.linear import LoRALinear

__all__ = ["LoRAConv1d", "LoRAConv2d", "LoRAConv3d", "LoRAEmbedding", "LoRALinear"]
