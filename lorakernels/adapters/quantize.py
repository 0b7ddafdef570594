"""A model's plain linear layers into ones with a packed frozen weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from tqdm import tqdm

from lorakernels.adapters import held
from lorakernels.adapters.inject import replace_modules
from lorakernels.adapters.targets import output_layer, plain_modules
from lorakernels.config import check_modules
from lorakernels.nn.experts import is_mixture
from lorakernels.nn.modules import unwrapped
from lorakernels.nn.quantized import QuantizedLinear, pack
from lorakernels.nn.quantized_experts import quantized_experts
from lorakernels.nn.whole import whole
from lorakernels.patterns import matches
from lorakernels.quant.layers import kind_of, read_on_request
from lorakernels.quant.packed import PackedWeight


@whole
def quantize(
    model: nn.Module,
    kind: str = "nf4",
    *,
    block: int | None = None,
    double_quant: bool = False,
    exclude: str | Sequence[str] = (),
    experts: bool = False,
) -> nn.Module:
    """Pack the weight of every `torch.nn.Linear` of `model` but its output layer, in place and frozen.

    Args:
        model: any module; a model with adapters keeps them, and its adapted layers stay plain. The bytes of
            bitsandbytes' `Linear8bitLt` ("int8") and of transformers' `FP8Linear` ("fp8") are taken as they are, in
            layers that leave the activations as they are, which those round.
        kind: "nf4" or "fp4" (Dettmers et al., arXiv 2305.14314), "mxfp4" (OCP's microscaling formats 1.0), "int4" with
            a float zero and scale for each group, or "int8" or "fp8" with a scale for each row.
        block: how many numbers share a scale in the formats of 4 bits, 64 if nothing is said; for "int4" a divisor of
            in_features, of "mxfp4" always 32.
        double_quant: of "nf4" and "fp4", whether the scales have 8 bits each, as bitsandbytes' `compress_statistics`.
        exclude: names or suffixes of layers to leave alone, or a regular expression that matches whole names.
        experts: whether the stacks of mixtures of experts that are known are packed too.

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
    plain = unwrapped(model)
    head = output_layer(plain)
    found = {
        name: module
        for name, module in plain_modules(plain)
        if isinstance(module, nn.Linear) and module is not head and not (exclude and matches(name, exclude))
    }
    own = {module for module in found.values() if type(module) is nn.Linear and not kind_of(module)}
    held.refuse_tied(plain, [module.weight for module in own], f"quantize to {kind}")
    made: dict[nn.Module, nn.Module] = {}
    for name, module in tqdm(found.items(), desc=f"packing to {kind}", unit="layer", disable=len(found) < 64):
        try:
            packed = _packed(module, kind, block, double_quant) if module in own else read_on_request(module, kind)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        if packed is not None:
            made[module] = QuantizedLinear(packed, module.bias).train(module.training)
    mixtures = [(name, m) for name, m in plain_modules(plain) if experts and is_mixture(m)]
    for name, module in mixtures:
        if exclude and matches(name, exclude):
            continue
        try:
            made[module] = made.get(module) or quantized_experts(module, kind, block, double_quant)
        except ValueError as error:
            raise ValueError(f"experts {name!r}: {error}") from error
    if not made:
        raise ValueError(f"{type(plain).__name__} has no torch.nn.Linear to pack, or exclude={exclude!r} leaves none")
    replace_modules(plain, made)
    return model


def _packed(layer: nn.Linear, kind: str, block: int | None, double_quant: bool) -> PackedWeight:
    if layer.weight.is_meta or not torch.isfinite(layer.weight).all():
        raise ValueError("its weight has no values, or numbers that are not finite")
    return pack(layer.weight.detach(), kind, block, double_quant)
