"""A model's plain linear layers into ones with a packed frozen weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from tqdm import tqdm

from lorakernels.adapters.inject import refuse_tied, replace_modules, uncompiled
from lorakernels.adapters.targets import matches, output_layer, plain_modules
from lorakernels.config import check_modules
from lorakernels.nn.quantized import QuantizedLinear, pack


def quantize(model: nn.Module, kind: str = "nf4", *, block: int = 64, exclude: str | Sequence[str] = ()) -> nn.Module:
    """Pack the weight of every `torch.nn.Linear` of `model` but its output layer, in place and frozen.

    Args:
        model: any module; a model with adapters keeps them, and its adapted layers stay plain.
        kind: "nf4" or "fp4" (Dettmers et al., arXiv 2305.14314), "int4" with a float zero and scale for each group, or
            "int8" or "fp8" with a scale for each row.
        block: how many numbers share a scale in the formats of 4 bits; for "int4" a divisor of in_features.
        exclude: names or suffixes of layers to leave alone, or a regular expression that matches whole names.

    Returns:
        `model` itself, with `QuantizedLinear` layers. Nothing changes when an error is raised.

    Raises:
        ValueError: `kind` is unknown, a size does not fit `block`, a weight is not finite, has no values or is tied to
            another module's, or there is nothing to pack.
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    check_modules(exclude, "exclude")
    plain = uncompiled(model)
    head = output_layer(plain)
    found = {
        name: module
        for name, module in plain_modules(plain)
        if type(module) is nn.Linear and module is not head and not (exclude and matches(name, exclude))
    }
    if not found:
        raise ValueError(f"{type(plain).__name__} has no torch.nn.Linear to pack, or exclude={exclude!r} leaves none")
    refuse_tied(plain, [module.weight for module in found.values()], f"quantize to {kind}")
    made: dict[nn.Module, nn.Module] = {}
    for name, module in tqdm(found.items(), desc=f"packing to {kind}", unit="layer", disable=len(found) < 64):
        if module not in made:
            if module.weight.is_meta or not torch.isfinite(module.weight).all():
                raise ValueError(f"the weight of {name!r} has no values, or numbers that are not finite")
            try:
                packed = pack(module.weight.detach(), kind, block)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
            made[module] = QuantizedLinear(packed, module.bias).train(module.training)
    replace_modules(plain, made)
    return model
