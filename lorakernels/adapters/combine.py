"""One adapter out of several, each with a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lorakernels.adapters import held
from lorakernels.adapters.inject import adding, check_new_name
from lorakernels.adapters.rank_slices import by_group, smaller
from lorakernels.config import LoRAConfig, check_alpha, check_rank
from lorakernels.files.peft import with_ranks
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.modules import unwrapped

Pair = tuple[torch.Tensor, torch.Tensor]
Weighted = list[tuple[str, float]]


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
) -> nn.Module:
    """Add an adapter that does what `adapters` do together, each update times its weight; PEFT's, of the same name.

    "cat" is their exact sum: A' = [w₁ s₁ A₁; w₂ s₂ A₂ ...], B' = [B₁ B₂ ...], of the sum of their ranks.
    "svd" is the best approximation of the sum by `svd_rank` (by default the highest of the ranks): B' = U S, A' = Vᵀ.
    "linear" sums the factors, A' = Σ ± √|w s| A and B' = Σ √|w s| B, the sign being that of w s: cheap, and not the sum
    of the updates, since every A meets every B.

    s is the scaling that the adapter has now, so `set_scale` counts. The new adapter has scaling 1 (also after rsLoRA,
    where PEFT's comes out √r times too great); it is frozen and not active until `set_adapter`. A layer that only some
    of the adapters have gets their sum alone.

    Args:
        model: has `adapters` from `inject` or `load_adapter`.
        weights: a finite number for each, of either sign.
        adapter_name: a new name.
        svd_rank: at most, where a layer's weight has smaller sides; only with "svd".

    Returns:
        `model` itself.

    Raises:
        KeyError: the model lacks one of `adapters`, or was not given it as a whole.
        ValueError, TypeError: naming the argument; with "linear", adapters of different ranks; adapters with DoRA, a
            trained bias or modules_to_save, which have no weighted sum.
        RuntimeError: adapters are merged, one has changed the base weights, or ranks past those of a hot swap have
            trained.
    """
    combine = _COMBINATIONS.get(combination_type)
    if combine is None:
        raise ValueError(f"combination_type is {combination_type!r}; expected one of {list(_COMBINATIONS)}")
    if len(adapters) != len(weights) or not adapters or isinstance(adapters, str):
        raise ValueError(f"adapters={adapters!r} and weights={weights!r}; expected a weight for each of one or more")
    for weight in weights:
        check_alpha(weight, "a weight")
    if svd_rank is not None:
        check_rank(svd_rank, "svd_rank")
        if combination_type != "svd":
            raise ValueError(f'svd_rank={svd_rank} goes with combination_type="svd"; got {combination_type!r}')
    compiled, model = model, unwrapped(model)
    layers = held.layers(model)
    check_new_name(adapter_name, held.names(model))
    plain = LoRAConfig()
    for name in adapters:
        config = held.config_of(model, name)
        for field in ("use_dora", "lora_bias", "use_qalora", "bias", "modules_to_save"):
            value = getattr(config, field)
            if value and value != getattr(plain, field):
                raise ValueError(f"adapter {name!r} has {field}={value!r}, of which there is no weighted sum")
    held.refuse_merged(model)
    held.refuse_changed_base(model)

    pairs: dict[nn.Module, Pair] = {}
    having = {name: held.layers_of(model, name) for name in adapters}
    for path, layer in layers.items():
        own = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if path in having[name]]
        if own:
            try:
                pairs[layer] = combine(layer, own, svd_rank)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    ranks = {path: pairs[layer][0].shape[0] for path, layer in layers.items() if layer in pairs}
    most = max(ranks.values())
    config = with_ranks(LoRAConfig(r=most, lora_alpha=most, target_modules=sorted(ranks)), ranks, ranks)
    configs = {layer: LoRAConfig(r=A.shape[0], lora_alpha=A.shape[0]) for layer, (A, _) in pairs.items()}
    with adding(model, adapter_name, configs, tensors=pairs):
        held.remember(model, adapter_name, config)
    return compiled


def _factors(layer: LoRALayer, name: str) -> Pair:
    """A and B of an adapter without the ranks that a slot for hot swaps has beyond it."""
    A, B = (
        smaller(suffix, tensor.detach(), layer.adapters[name].r, layer.base_layer)
        for suffix, tensor in list(layer.adapter_tensors(name).items())[:2]
    )
    return A, B


def _linear(layer: LoRALayer, own: Weighted, svd_rank: int | None) -> Pair:
    ranks = {name: layer.adapters[name].r for name, _ in own}
    if len(set(ranks.values())) > 1:
        raise ValueError(f'the ranks are {ranks}; combination_type="linear" expects one rank, "cat" and "svd" do not')
    A_sum, B_sum = (torch.zeros_like(factor) for factor in _factors(layer, own[0][0]))
    for name, weight in own:
        scaled = weight * float(layer.adapters[name].scaling)
        A, B = _factors(layer, name)
        A_sum = A_sum + A * math.copysign(math.sqrt(abs(scaled)), scaled)
        B_sum = B_sum + B * math.sqrt(abs(scaled))
    return A_sum, B_sum


def _cat(layer: LoRALayer, own: Weighted, svd_rank: int | None) -> Pair:
    As, Bs = [], []
    for name, weight in own:
        A, B = _factors(layer, name)
        As.append(by_group(A * (weight * float(layer.adapters[name].scaling)), layer.base_layer))
        Bs.append(B)
    return torch.cat(As, dim=1).flatten(0, 1), torch.cat(Bs, dim=1)


def _svd(layer: LoRALayer, own: Weighted, svd_rank: int | None) -> Pair:
    A, B = _factors(layer, own[0][0])
    delta = sum(layer._matrix(layer.delta_weight(name)) * weight for name, weight in own)
    assert isinstance(delta, torch.Tensor)
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    r = min(svd_rank or max(layer.adapters[name].r for name, _ in own), len(S))
    shapes = list(type(layer).adapter_shapes(layer.base_layer, r).values())
    return Vh[:r].reshape(shapes[0]).to(A.dtype), (U[:, :r] * S[:r]).reshape(shapes[1]).to(B.dtype)


_COMBINATIONS: dict[str, Callable[[LoRALayer, Weighted, int | None], Pair]] = {
    "svd": _svd,
    "linear": _linear,
    "cat": _cat,
}
