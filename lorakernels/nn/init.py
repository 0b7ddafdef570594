"""Where an adapter starts, from the base weight where that is asked: A [r, K], B [N, r] and the weight [N, K]."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakernels.config import check_init
from lorakernels.nn.merging import product, unmerged_weight, wide
from lorakernels.nn.modules import check_can_change, check_weight_type

if TYPE_CHECKING:
    from lorakernels.nn.layer import LoRALayer


class Initial(nn.Module):
    """What PiSSA or OLoRA took out of the base weight: B A, with the scaling of that moment in B."""

    A: torch.Tensor
    B: torch.Tensor

    def __init__(self, A: torch.Tensor, B: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A)
        self.register_buffer("B", B)


def changes_base(init_lora_weights: bool | str) -> bool:
    """Whether a start takes its B A, which is not zero, out of the base weight: PiSSA and OLoRA."""
    return isinstance(init_lora_weights, str) and init_lora_weights.startswith(("pissa", "olora"))


def check_base(base_layer: nn.Module, init_lora_weights: bool | str) -> None:
    """Raise TypeError for a weight in another form, ValueError where a start needs and changes one that it cannot."""
    weight: Any = base_layer.weight
    check_weight_type(weight)
    if changes_base(init_lora_weights):
        check_can_change(base_layer)
        if weight.device.type == "meta":
            raise ValueError(
                f"init_lora_weights={init_lora_weights!r} starts from the base weight, which is on the meta device and "
                "has no values; put them into the model first"
            )


def check_start(init_lora_weights: bool | str, N: int, K: int, r: int, scaling: float) -> None:
    """Raise ValueError where a start cannot be made for a weight [N, K]."""
    if init_lora_weights == "orthogonal" and r % 2:
        raise ValueError(f'init_lora_weights="orthogonal" needs an even rank; got r={r}')
    if not changes_base(init_lora_weights):
        return
    if r > min(N, K):
        raise ValueError(f"init_lora_weights={init_lora_weights!r} needs r of at most {min(N, K)} here; got r={r}")
    if scaling <= 0:
        raise ValueError(f"init_lora_weights={init_lora_weights!r} divides by the scaling; got {scaling:g}")


@torch.no_grad()
def start_random(A: torch.Tensor, B: torch.Tensor, init_lora_weights: bool | str) -> None:
    """Fill A and B: with True, "kaiming" and "gaussian" B is zero, with "orthogonal" B A is, with False neither."""
    r = A.shape[0]
    if init_lora_weights == "orthogonal":
        # A takes one half of an orthogonal basis of the rank's space and B the other, so B A = 0
        # (https://datta0.github.io/posts/rethink-lora-init, and its 1/10).
        basis = torch.linalg.qr(torch.randn(r, r, dtype=torch.promote_types(A.dtype, torch.float32)))[0].to(A.device)
        to_A, to_B = basis[0::2], basis[1::2]
        A.copy_(product(to_A.t(), torch.randn(r // 2, A.shape[1], dtype=basis.dtype, device=A.device)) / 10)
        B.copy_(product(torch.randn(B.shape[0], r // 2, dtype=basis.dtype, device=B.device), to_B) / 10)
        return
    if init_lora_weights == "gaussian":
        nn.init.normal_(A, std=1 / r)
    else:
        # a = √5 as nn.Linear and PEFT have it: uniform within ± 1 / √K.
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    if init_lora_weights is False:
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    else:
        nn.init.zeros_(B)


def start_from(
    weight: torch.Tensor, r: int, scaling: float, init_lora_weights: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, in weight's dtype, out of a weight [N, K].

    "pissa": the r greatest singular triples, halved between A and B, with scaling · B A = U S Vᵀ (Meng et al.,
    arXiv 2404.02948, equations 2 and 3); "pissa_niter_n" finds them by n steps of a randomised SVD.
    "olora": the first r columns of Q and rows of R of W = Q R (Büyükakyüz, arXiv 2406.01775, section 3).
    """
    if init_lora_weights == "olora":
        Q, R = torch.linalg.qr(weight)
        return R[:r], Q[:, :r]
    if init_lora_weights == "pissa":
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        U, S, Vh = U[:, :r], S[:r], Vh[:r]
    else:
        U, S, V = torch.svd_lowrank(weight, r, niter=int(init_lora_weights.removeprefix("pissa_niter_")))
        Vh = V.t()
    root = (S / scaling).sqrt()
    return root[:, None] * Vh, U * root


@torch.no_grad()
def restart(layer: LoRALayer, name: str, init_lora_weights: bool | str) -> None:
    """Start an adapter of a layer anew."""
    check_init(init_lora_weights)
    layer._refuse_while_merged()
    A, B = layer._factors(name)
    r, scaling = layer.r[name], layer.own_scaling(name)
    check_start(init_lora_weights, B.shape[0], A.shape[1], r, scaling)
    if changes_base(init_lora_weights):
        assert isinstance(init_lora_weights, str)
        check_base(layer.base_layer, init_lora_weights)
        refuse_a_second_change(layer, name)
        original = wide(layer._matrix(original_weight(layer)))
        for factor, start in zip((A, B), start_from(original, r, scaling, init_lora_weights), strict=True):
            factor.copy_(start)
        initial = Initial(wide(A).clone(), wide(B) * scaling)
        layer.weight.copy_(layer._from_matrix(original - product(initial.B, initial.A)))
        layer.lora_initial[name] = initial
    else:
        give_back(layer, name)
        layer._start(A, B, init_lora_weights)
    for parameter, factor in zip(layer.adapter_tensors(name).values(), (A, B), strict=False):
        if factor is not parameter:  # a matrix of it: a view that overlaps it, or a copy where it is channels_last
            parameter.copy_(factor.clone().view_as(parameter))
    if layer.lora_bias[name]:
        bias = layer.adapter_tensors(name)["lora_B.bias"]
        bound = r**-0.5 if init_lora_weights is False else 0.0  # as nn.Linear starts its bias
        nn.init.uniform_(bias, -bound, bound)
    if layer.use_dora[name]:
        magnitude: Any = layer.lora_magnitude_vector[name]
        norm = magnitude.norm(layer.weight, layer._matrix(layer.weight), A, B, scaling)
        magnitude.weight.copy_(norm.view_as(magnitude.weight))


@torch.no_grad()
def original_weight(layer: LoRALayer) -> torch.Tensor:
    weight = unmerged_weight(layer)
    for initial in layer.lora_initial.values():
        assert isinstance(initial, Initial)
        weight = wide(weight) + layer._from_matrix(product(initial.B, initial.A))
    return weight


@torch.no_grad()
def as_plain_lora(layer: LoRALayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    A, B = list(layer.adapter_tensors(name).values())[:2]
    if name not in layer.lora_initial:
        return A.detach(), B.detach()
    initial = layer.lora_initial[name]
    assert isinstance(initial, Initial)
    A0, B0 = initial.A.view_as(A), (initial.B / -layer.own_scaling(name)).view_as(B)
    return torch.cat([A, A0.to(A)]), torch.cat([B, B0.to(B)], dim=1)


@torch.no_grad()
def give_back(layer: LoRALayer, name: str) -> None:
    """Undo what an adapter's start did to the base weight."""
    if name in layer.lora_initial:
        layer.weight.copy_(original_weight(layer))
        del layer.lora_initial[name]


def refuse_a_second_change(layer: LoRALayer, name: str) -> None:
    others = [other for other in layer.base_changed_by if other != name]
    if others:
        raise ValueError(
            f"adapter {others[0]!r} has changed this layer's base weight; a second one would start from what is "
            "left of it, and neither could be used alone: delete_adapter first, or start this one otherwise"
        )
