"""One adapter out of several, each with a weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from lorakernels.adapters import held
from lorakernels.adapters.inject import add, check_new_name
from lorakernels.adapters.rank_slices import by_group, smaller
from lorakernels.adapters.targets import Target
from lorakernels.config import LoRAConfig, check_alpha, check_rank
from lorakernels.files.peft import with_ranks
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.modules import unwrapped
from lorakernels.nn.whole import whole

Pair = tuple[torch.Tensor, torch.Tensor]
Weighted = list[tuple[str, float]]
# How tensors come together: what is left of each, and whether those of the sign that most have count alone.
_METHODS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_TYPES = ("svd", "cat", *_METHODS, *(f"{method}_svd" for method in _METHODS[1:]))
_SIGNS = ("total", "frequency")


class _How(NamedTuple):
    """A combination type, and what belongs to it."""

    method: str  # of `_METHODS`, or "cat"
    of_updates: bool  # and then an SVD; else of the factors
    svd_rank: int | None
    density: float | None
    signs: str


@whole
@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> nn.Module:
    """Add an adapter that does what `adapters` do together, each update times its weight; PEFT's, of the same name.

    "cat" is their exact sum: A' = [w₁ s₁ A₁; w₂ s₂ A₂ ...], B' = [B₁ B₂ ...], of the sum of their ranks.
    "svd" is the best approximation of the sum by `svd_rank` (by default the highest of the ranks): B' = U S, A' = Vᵀ.
    "linear" sums the factors, A' = Σ ± √|w s| A and B' = Σ √|w s| B, the sign being that of w s: cheap, and not the sum
    of the updates, since every A meets every B. The others leave a part of the numbers out first, the share `density`
    of each tensor stays: "magnitude_prune" the largest; "dare_linear" any, divided by the share (Yu et al., arXiv
    2311.03099); "ties" the largest, and of those the ones of the sign that most have, whose mean it is (Yadav et al.,
    arXiv 2306.01708); "dare_ties" both. They take the factors as "linear" does, and with "_svd" behind their names the
    updates, as "svd" does.

    s is the scaling that the adapter has now, so `set_scale` counts. The new adapter has scaling 1 (also after rsLoRA,
    where PEFT's comes out √r times too great); it is frozen and not active until `set_adapter`. A layer that only some
    of the adapters have gets their sum alone.

    Args:
        model: has `adapters` from `inject` or `load_adapter`.
        weights: a finite number for each, of either sign.
        adapter_name: a new name.
        svd_rank: at most, where a layer's weight has smaller sides; only with types that end in "svd".
        density: in (0, 1], where numbers are left out.
        majority_sign_method: with "ties", "total": the sign of the sum, or "frequency": that of more adapters.

    Returns:
        `model` itself.

    Raises:
        KeyError: the model lacks one of `adapters`, or was not given it as a whole.
        ValueError, TypeError: naming the argument; with "linear", adapters of different ranks; adapters with DoRA, a
            trained bias, modules_to_save or target_parameters, of which there is no weighted sum.
        RuntimeError: adapters are merged, one has changed the base weights, or ranks past those of a hot swap have
            trained.
    """
    how = _how(combination_type, svd_rank, density, majority_sign_method)
    if len(adapters) != len(weights) or not adapters or isinstance(adapters, str):
        raise ValueError(f"adapters={adapters!r} and weights={weights!r}; expected a weight for each of one or more")
    for weight in weights:
        check_alpha(weight, "a weight")
    compiled, model = model, unwrapped(model)
    layers = held.layers(model)
    check_new_name(adapter_name, held.names(model))
    plain = LoRAConfig()
    for name in adapters:
        config = held.config_of(model, name)
        for field in ("use_dora", "lora_bias", "use_qalora", "bias", "modules_to_save", "target_parameters"):
            value = getattr(config, field)
            if value and value != getattr(plain, field):
                raise ValueError(f"adapter {name!r} has {field}={value!r}, of which there is no weighted sum")
    held.refuse_merged(model)
    held.refuse_changed_base(model)

    pairs: dict[Target, Pair] = {}
    having = {name: held.layers_of(model, name) for name in adapters}
    for path, layer in layers.items():
        own = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if path in having[name]]
        if own:
            try:
                pairs[layer] = _combined(layer, own, how)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
    ranks = {path: pairs[layer][0].shape[0] for path, layer in layers.items() if layer in pairs}
    most = max(ranks.values())
    config = with_ranks(LoRAConfig(r=most, lora_alpha=most, target_modules=sorted(ranks)), ranks, ranks)
    configs: dict[Target, LoRAConfig] = {
        layer: LoRAConfig(r=A.shape[0], lora_alpha=A.shape[0]) for layer, (A, _) in pairs.items()
    }
    add(model, adapter_name, configs, tensors=pairs)
    held.remember(model, adapter_name, config)
    return compiled


def _factors(layer: LoRALayer, name: str) -> Pair:
    """A and B of an adapter without the ranks that a slot for hot swaps has beyond it."""
    A, B = (
        smaller(suffix, tensor.detach(), layer.adapters[name].r, layer.base_layer)
        for suffix, tensor in list(layer.adapter_tensors(name).items())[:2]
    )
    return A, B


def _combined(layer: LoRALayer, own: Weighted, how: _How) -> Pair:
    if how.method == "cat":
        return _cat(layer, own)
    if how.of_updates:
        return _svd(layer, own, how)
    ranks = {name: layer.adapters[name].r for name, _ in own}
    if len(set(ranks.values())) > 1:
        raise ValueError(f'the ranks are {ranks}; the factors expect one rank, "cat" and the types with "svd" do not')
    As, Bs = zip(*(_factors(layer, name) for name, _ in own), strict=True)
    scaled = [weight * float(layer.adapters[name].scaling) for name, weight in own]
    roots = [math.sqrt(abs(each)) for each in scaled]
    return _merged(As, list(map(math.copysign, roots, scaled)), how), _merged(Bs, roots, how)


def _merged(tensors: Iterable[torch.Tensor], weights: Sequence[float], how: _How) -> torch.Tensor:
    if not how.method.endswith("ties"):  # one by one: of updates all together are n of [N, K]
        return sum((_left_of(tensor, how) * w for tensor, w in zip(tensors, weights, strict=True)), torch.tensor(0))
    left = torch.stack([_left_of(tensor, how) for tensor in tensors])
    weighted = left * left.new_tensor(weights).view(-1, *[1] * (left.dim() - 1))
    votes = left if how.signs == "total" else left.sign()
    chosen = left.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    return (weighted * chosen).sum(0) / chosen.sum(0).clamp(min=1)


def _left_of(tensor: torch.Tensor, how: _How) -> torch.Tensor:
    if how.density is None or how.density == 1:
        return tensor
    if how.method.startswith("dare"):
        return tensor * torch.bernoulli(torch.full_like(tensor, how.density)) / how.density
    largest = tensor.abs().flatten().topk(int(how.density * tensor.numel())).indices
    return tensor * torch.zeros_like(tensor).flatten().index_fill(0, largest, 1).view_as(tensor)


def _cat(layer: LoRALayer, own: Weighted) -> Pair:
    As, Bs = [], []
    for name, weight in own:
        A, B = _factors(layer, name)
        As.append(by_group(A * (weight * float(layer.adapters[name].scaling)), layer.base_layer))
        Bs.append(B)
    return torch.cat(As, dim=1).flatten(0, 1), torch.cat(Bs, dim=1)


def _svd(layer: LoRALayer, own: Weighted, how: _How) -> Pair:
    A, B = _factors(layer, own[0][0])
    deltas = (layer.delta_weight(name) for name, _ in own)
    delta = _merged(deltas, [weight for _, weight in own], how)
    U, S, Vh = torch.linalg.svd(layer._matrix(delta), full_matrices=False)
    r = min(how.svd_rank or max(layer.adapters[name].r for name, _ in own), len(S))
    shapes = list(type(layer).adapter_shapes(layer.base_layer, r).values())
    return Vh[:r].reshape(shapes[0]).to(A.dtype), (U[:, :r] * S[:r]).reshape(shapes[1]).to(B.dtype)


def _how(kind: str, svd_rank: int | None, density: float | None, signs: str) -> _How:
    """Checked."""
    if kind not in _TYPES:
        raise ValueError(f"combination_type is {kind!r}; expected one of {list(_TYPES)}")
    of_updates = kind.endswith("svd")
    method = "linear" if kind == "svd" else kind.removesuffix("_svd")
    if svd_rank is not None:
        check_rank(svd_rank, "svd_rank")
        if not of_updates:
            raise ValueError(f'svd_rank={svd_rank} goes with a combination_type that ends in "svd"; got {kind!r}')
    if method in ("linear", "cat"):
        if density is not None:
            raise ValueError(f"density={density} goes with a combination_type that leaves numbers out; got {kind!r}")
    elif isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ValueError(f"density is {density!r}; combination_type={kind!r} expects a number in (0, 1]")
    if signs != _SIGNS[0] and not method.endswith("ties"):
        raise ValueError(f"majority_sign_method={signs!r} goes with a combination_type of ties; got {kind!r}")
    if signs not in _SIGNS:
        raise ValueError(f"majority_sign_method is {signs!r}; expected one of {list(_SIGNS)}")
    return _How(method, of_updates, svd_rank, density, signs)
