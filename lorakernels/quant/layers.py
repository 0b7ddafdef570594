"""Which layers are linear, and their weights: by the names of their types, so that nothing is imported."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn

from lorakernels.quant import int4, nf4, wide
from lorakernels.quant.packed import PackedWeight

# Layers whose own forward rounds the activations too: only `quantize` takes their weights, of its format.
_BY_REQUEST = {
    "bitsandbytes.nn.modules.Linear8bitLt": ("int8", wide.read_bitsandbytes),
    "transformers.integrations.finegrained_fp8.FP8Linear": ("fp8", wide.read_transformers),
}
_ROUNDS = (
    "its forward rounds the activations too, so that an adapter would train beside another layer; "
    'lorakernels.quantize(model, "{}") makes it a layer of the same weight that leaves them as they are'
)
# Whose weight is [K, N]: GPT-2's and its kin's.
_TRANSPOSED = "transformers.pytorch_utils.Conv1D"
# Layers that are known and cannot be taken, and why.
_REFUSED = {
    **{name: _ROUNDS.format(kind) for name, (kind, _) in _BY_REQUEST.items()},
    "auto_gptq": "GPTQ's integer zeros and its order of columns are not read; use a bitsandbytes, HQQ or plain model",
    "gptqmodel": "GPTQ's integer zeros and its order of columns are not read; use a bitsandbytes, HQQ or plain model",
    "awq": "AWQ's packing is not read; use a bitsandbytes, HQQ or plain model",
}


def is_linear(layer: Any) -> bool:
    """Whether a layer is x Wᵀ + bias with a weight that `weight_of` gives: exactly torch's, GPT-2's, or packed."""
    return type(layer) is nn.Linear or is_transposed(layer) or bool(kind_of(layer))


def is_transposed(layer: Any) -> bool:
    """Whether a linear layer holds its weight as [K, N]."""
    kind: Any = type(layer)
    return _is_transposed(kind)


@lru_cache(maxsize=1024)
def _is_transposed(layer: type) -> bool:
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in layer.__mro__)
    # A store's subclass of it is one; another may hold its weight in any form.
    return next((name for name in names if not name.startswith("lorakernels.")), "") == _TRANSPOSED


def kind_of(layer: Any) -> str:
    """Whose packed weight a layer has, "bitsandbytes", "hqq", "torchao" or "own"; nothing where none is known."""
    if type(layer) is nn.Linear:  # torchao keeps it, and has tensors of its own
        return "torchao" if type(layer._parameters.get("weight")).__module__.startswith("torchao.") else ""
    kind: Any = type(layer)
    return _kind_of(kind)


@lru_cache(maxsize=1024)
def _kind_of(layer: type) -> str:
    for kind in layer.__mro__:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name == "bitsandbytes.nn.modules.Linear4bit":
            return "bitsandbytes"
        if name == "hqq.core.quantize.HQQLinear":
            return "hqq"
        if name == "lorakernels.nn.quantized.QuantizedLinear":
            return "own"
    return ""


def read(layer: Any) -> PackedWeight:
    """The packed weight of a layer that has one, of tensors that it shares with it.

    Raises ValueError where it cannot be read, saying why.
    """
    kind = kind_of(layer)
    if kind == "own":
        return layer.packed
    if kind == "hqq":
        return int4.read_hqq(layer)
    if kind not in ("bitsandbytes", "torchao"):
        raise ValueError(f"a {type(layer).__qualname__} has no packed weight that is known")
    return (nf4.read_bitsandbytes if kind == "bitsandbytes" else wide.read_torchao)(layer._parameters["weight"])


def read_on_request(layer: Any, kind: str) -> PackedWeight | None:
    """The weight of a layer that rounds activations too, as it is in the format `kind`; None for any other layer."""
    for name, (known, reader) in _BY_REQUEST.items():
        if known == kind and any(f"{own.__module__}.{own.__qualname__}" == name for own in type(layer).__mro__):
            return reader(layer)
    return None


def weight_of(layer: Any) -> torch.Tensor | PackedWeight:
    """The weight of any layer as a value; a linear one's is [N, K], however it is held."""
    if kind_of(layer):
        return read(layer)
    return layer.weight.t() if is_transposed(layer) else layer.weight


def keep_packing(model: torch.nn.Module) -> None:
    """Let the layers of `model` that run bitsandbytes' own forward keep their weights as they are packed.

    In evaluation on a CPU with AVX512-BF16 it packs them again, after which training loses the gradients before them.
    """
    for module in model.modules():
        if kind_of(module) == "bitsandbytes":
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def why_refused(layer: Any) -> str:
    """Why a quantised layer that is known cannot be adapted; nothing for any other layer."""
    names = [f"{kind.__module__}.{kind.__qualname__}." for kind in type(layer).__mro__]
    return next((why for known, why in _REFUSED.items() if any(n.startswith(f"{known}.") for n in names)), "")
