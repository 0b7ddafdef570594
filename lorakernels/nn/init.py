"""Where an adapter starts, from the base weight where that is asked: A [r, K], B [N, r] and the weight [N, K]."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lorakernels.config import check_init
from lorakernels.nn.base import DEFAULT
from lorakernels.nn.merging import Mergeable, product, wide
from lorakernels.nn.modules import check_can_change, check_weight_type
from lorakernels.nn.whole import waits, whole, write
from lorakernels.quant.layers import weight_of


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
    weight = weight_of(base_layer)
    if isinstance(weight, torch.Tensor):
        check_weight_type(weight)
    elif changes_base(init_lora_weights):
        raise ValueError(
            f"init_lora_weights={init_lora_weights!r} changes the base weight, which is packed ({weight.form}); "
            "expected another start, or a base layer that is not quantised"
        )
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


class Startable(Mergeable):
    """An adapted layer whose adapters start, and start anew."""

    @whole
    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str = DEFAULT, init_lora_weights: bool | str = True) -> None:
        """Start an adapter anew, as `LoRAConfig.init_lora_weights` says; DoRA's magnitude is then the weight's norm.

        "pissa" and "olora" take scaling · B A out of the base weight, in float32 and rounded once, so that the
        layer's function stays: see `base_changed_by`, `delete_adapter` and `as_plain_lora`.
        """
        adapter = self._adapter(adapter_name)
        check_init(init_lora_weights)
        self._refuse_while_merged()
        tensors = self.adapter_tensors(adapter_name)
        kept = waits(next(iter(tensors.values())))
        A, B = (torch.empty_like(factor) if kept else factor for factor in self._factors(adapter_name))
        r, scaling = adapter.r, adapter.own_scaling
        check_start(init_lora_weights, B.shape[0], A.shape[1], r, scaling)
        if changes_base(init_lora_weights):
            assert isinstance(init_lora_weights, str)
            check_base(self.base_layer, init_lora_weights)
            self._refuse_a_second_change(adapter_name)
            original = wide(self._matrix(self.original_weight()))
            for factor, start in zip((A, B), start_from(original, r, scaling, init_lora_weights), strict=True):
                factor.copy_(start)
            initial = Initial(wide(A).clone(), wide(B) * scaling)
            weight = self._from_matrix(original - product(initial.B, initial.A)).to(self.weight.dtype)
            write(self.weight, weight)
            self.lora_initial[adapter_name] = initial
        else:
            weight = self._give_back(adapter_name)
            self._start(A, B, init_lora_weights)
        for parameter, factor in zip(tensors.values(), (A, B), strict=False):
            if factor is not parameter:
                write(parameter, factor.view_as(parameter))
        if adapter.lora_bias:
            bound = r**-0.5 if init_lora_weights is False else 0.0  # as nn.Linear starts its bias
            write(tensors["lora_B.bias"], nn.init.uniform_(torch.empty_like(tensors["lora_B.bias"]), -bound, bound))
        if adapter.use_dora:
            magnitude: Any = self.lora_magnitude_vector[adapter_name]
            norm = magnitude.norm(weight, self._matrix(weight), A, B, scaling)
            write(magnitude.weight, norm.view_as(magnitude.weight))

    def _start(self, A: torch.Tensor, B: torch.Tensor, init_lora_weights: bool | str) -> None:
        """Fill A and B without a look at the base weight."""
        start_random(A, B, init_lora_weights)

    @torch.no_grad()
    def original_weight(self) -> torch.Tensor:
        """The base weight as it was before PiSSA or OLoRA changed it, to within rounding, and without what is merged.

        In float32 (float64 for a float64 base) where there is something to undo; otherwise the weight itself.
        """
        weight = self.unmerged_weight()
        for initial in self.lora_initial.values():
            assert isinstance(initial, Initial)
            weight = wide(weight) + self._from_matrix(product(initial.B, initial.A))
        return weight

    @torch.no_grad()
    def as_plain_lora(self, adapter_name: str = DEFAULT) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, in the shapes of `adapter_shapes`, of the adapter that does the same beside the original weight.

        For one that changed the base they have rank 2 r: B' A' = B A - B0 A0, with the scaling that the adapter was
        made with (what PEFT's path_initial_model_for_weight_conversion saves). For any other they are its own.
        DoRA's magnitude is right beside both.
        """
        adapter = self._adapter(adapter_name)
        A, B = list(self.adapter_tensors(adapter_name).values())[:2]
        if adapter_name not in self.lora_initial:
            return A.detach(), B.detach()
        initial = self.lora_initial[adapter_name]
        assert isinstance(initial, Initial)
        A0, B0 = initial.A.view_as(A), (initial.B / -adapter.own_scaling).view_as(B)
        return torch.cat([A, A0.to(A)]), torch.cat([B, B0.to(B)], dim=1)

    @torch.no_grad()
    def _give_back(self, name: str) -> Any:
        """Undo what an adapter's start did to the base weight; returns that as it then is."""
        if name not in self.lora_initial:
            return self.weight
        weight = self.original_weight().to(self.weight.dtype)
        write(self.weight, weight)
        del self.lora_initial[name]
        return weight

    def _refuse_a_second_change(self, name: str) -> None:
        others = [other for other in self.base_changed_by if other != name]
        if others:
            raise ValueError(
                f"adapter {others[0]!r} has changed this layer's base weight; a second one would start from what is "
                "left of it, and neither could be used alone: delete_adapter first, or start this one otherwise"
            )
