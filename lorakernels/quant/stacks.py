"""Frozen weights of a mixture's experts that hold 4 or 8 bits a number, as one value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lorakernels.quant.packed import PackedWeight, Transposed


class PackedStack(NamedTuple):
    """A stack [E, N, K]: the experts' packed weights one below the other, [E · N, K]; `flipped`, their transposes.

    An expert's are whole blocks of it, which `of_packed` checks: a product unpacks one expert at a time, and no more of
    it than of a packed weight.
    """

    weight: PackedWeight
    num_experts: int
    flipped: bool = False

    @classmethod
    def of_packed(cls, weight: PackedWeight, num_experts: int) -> PackedStack:
        """Raises ValueError where the weight is not of so many experts, or a block of two of them."""
        if weight.shape[0] % num_experts:
            raise ValueError(f"{weight.shape[0]} packed rows of {num_experts} experts; expected as many of each")
        weight.rows(0, weight.shape[0] // num_experts)
        return cls(weight, num_experts)

    @property
    def text(self) -> str:
        """What it is beside its tensors."""
        return f"{self.num_experts} {'flipped' if self.flipped else 'plain'} {self.weight.text}"

    @classmethod
    def read(cls, text: str, data: torch.Tensor, parts: Sequence[Any]) -> PackedStack:
        number, how, form = text.split(" ", 2)
        return cls(PackedWeight(form, data, *parts), int(number), how == "flipped")

    @property
    def shape(self) -> torch.Size:
        rows, K = self.weight.shape
        N = rows // self.num_experts
        return torch.Size((self.num_experts, K, N) if self.flipped else (self.num_experts, N, K))

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def mT(self) -> PackedStack:
        return self._replace(flipped=not self.flipped)

    def dim(self) -> int:
        return 3

    def unbind(self, dim: int = 0) -> list[PackedWeight | Transposed]:
        """Each expert's weight, its tensors views."""
        N = self.weight.shape[0] // self.num_experts
        own = (self.weight.rows(e * N, (e + 1) * N) for e in range(self.num_experts))
        return [weight.t() if self.flipped else weight for weight in own]


def stack_of(weight: torch.Tensor, parts: Sequence[Any], text: str) -> Any:
    """A stack as a value, of what the schemas have: `text` is empty for a tensor."""
    return PackedStack.read(text, weight, parts) if text else weight
