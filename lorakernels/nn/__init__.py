"""Layers: LoRALinear and its kin."""

from lorakernels.nn.linear import LoRALinear

__all__ = ["LoRALinear"]
