"""The part of a padded factor that an adapter of smaller rank uses."""

from __future__ import annotations

import torch
from torch import nn


def used_part(suffix: str, tensor: torch.Tensor, r: int, base_layer: nn.Module) -> torch.Tensor:
    """A view of the first r ranks of a parameter, by its name in `LoRALayer.adapter_shapes`.

    A has the ranks first, in a grouped convolution those of each group together: the view is then
    [groups, r / groups, ...], otherwise [1, r, ...]. B has them second, r / groups of them. What has no rank is whole.
    """
    groups: int = getattr(base_layer, "groups", 1)  # type: ignore[assignment]
    if suffix in ("lora_A.weight", "lora_embedding_A"):
        return by_group(tensor, base_layer)[:, : r // groups]
    if suffix in ("lora_B.weight", "lora_embedding_B"):
        return tensor[:, : r // groups]
    return tensor


def by_group(A: torch.Tensor, base_layer: nn.Module) -> torch.Tensor:
    """A [r, ...] as [groups, r / groups, ...]."""
    groups: int = getattr(base_layer, "groups", 1)  # type: ignore[assignment]
    return A.unflatten(0, (groups, A.shape[0] // groups))


def smaller(suffix: str, tensor: torch.Tensor, r: int, base_layer: nn.Module) -> torch.Tensor:
    """The first r ranks of a parameter in the shape that an adapter of that rank has.

    Raises RuntimeError where the others, which the adapter would lose, are not zero.
    """
    part = used_part(suffix, tensor, r, base_layer)
    if part.numel() < tensor.numel() and tensor.count_nonzero() > part.count_nonzero():
        raise RuntimeError(
            f"{suffix} has trained past rank {r}, that of the adapter that was swapped in: the optimizer still had the "
            "moments of the one before; make a new optimizer after a hot swap"
        )
    return part.flatten(0, 1) if part.dim() > tensor.dim() else part
