"""What an adapted linear layer does with an x, as values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn


class RowScale(Protocol):
    """DoRA's part of a term."""

    def row_scale(self, base: Any, matrix: Any, A: torch.Tensor, B: torch.Tensor, scaling: Any) -> torch.Tensor:
        """The factor of each row [N], of a weight and of the same as [N, K]."""
        ...


class Term(NamedTuple):
    """One adapter: it adds c ∘ (scaling · (dropout(x) Aᵀ) Bᵀ) + scaling · bias, and with DoRA's factors c
    (c - 1) ∘ x Wᵀ."""

    A: torch.Tensor  # [r, K]
    B: torch.Tensor  # [N, r]
    bias: torch.Tensor | None  # [N], of B
    scaling: float | torch.Tensor
    p: float  # dropout's; 0 where it is off
    magnitude: RowScale | None


# What a layer does with an x: its weight [N, K], its bias [N], one or more terms, and its base layer where somebody
# watches or changes what goes through that, so that it must run as a module. No NamedTuple, which takes 0.3 µs to make.
Call = tuple[Any, torch.Tensor | None, Sequence[Term], nn.Module | None]
