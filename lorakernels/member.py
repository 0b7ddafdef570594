"""One linear of those that are computed together from one x, as both implementations take it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch


class Member(NamedTuple):
    """y = row_scale ∘ (x Wᵀ + scaling · (D(x) Aᵀ) Bᵀ) + bias, of weight [N, K], lora_A [r, K] and lora_B [N, r]."""

    weight: Any  # a tensor, or packed
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    bias: torch.Tensor | None = None  # [N]
    row_scale: torch.Tensor | None = None  # [N]
    scaling: float = 1.0


def columns(matrix: torch.Tensor, members: Sequence[Member], dim: int = 1) -> Sequence[torch.Tensor]:
    """[M, r] of each member, views of [M, Σ r]; or its rows."""
    if len(members) == 1:
        return (matrix,)
    return matrix.split([member.lora_A.shape[0] for member in members], dim)


def grad_dtype(members: Sequence[Member]) -> torch.dtype:
    """The dtype that holds every member's dA."""
    dtype = members[0].lora_A.dtype
    for member in members[1:]:
        if member.lora_A.dtype is not dtype:
            dtype = torch.promote_types(dtype, member.lora_A.dtype)
    return dtype


def stacked(members: Sequence[Member], dtype: torch.dtype | None = None) -> torch.Tensor:
    """The A's one below the other, [Σ r, K], in `dtype` where it is given: of several members a small copy."""
    if len(members) == 1:
        A = members[0].lora_A
        return A if dtype is None or A.dtype is dtype else A.to(dtype)
    return torch.cat([member.lora_A if dtype is None else member.lora_A.to(dtype) for member in members])


def training_step(
    implementation: ModuleType,
    x: torch.Tensor,
    dys: Sequence[torch.Tensor],
    members: Sequence[Member],
    threshold: int = 0,
    need_dbias: bool = False,
    ran: Callable[[str], object] = str,
) -> None:
    """Forward and backward past the operators, with every gradient but the weights', for whoever counts what is asked
    for; meta tensors will do. `ran` is told the name of each part when it has run.
    """
    scaled = members[0].row_scale is not None
    if scaled:
        for member in members:
            implementation.project(member.weight, member.lora_A)
        ran("the norm of W + s B A")
    seed = x.new_empty((1,), dtype=torch.int64) if threshold else None
    _, s, mask = implementation.forward(x, members, seed, threshold)
    ran("forward")
    each, ss = [True] * len(members), columns(s, members)
    for dy, member, s_i in zip(dys, members, ss, strict=True) if scaled else ():
        implementation.grad_row_scale(dy, x, member.weight, (s_i, member.lora_B), member.scaling)
    implementation.backward(
        dys, x, members, ss, mask, threshold,
        need_dx=True, need_dA=True, need_dB=each, need_dbias=each if need_dbias else [False] * len(members),
    )  # fmt: skip
    ran("backward")


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`, which takes 1 µs to find that there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def sum_rows(y: torch.Tensor) -> torch.Tensor:
    """Σ over the rows of y [M, N], in float32 where y is 16-bit."""
    return y.sum(0, dtype=torch.float32 if y.dtype.itemsize < 4 else None)
