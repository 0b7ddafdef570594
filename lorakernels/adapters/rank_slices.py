"""The part of a padded factor that an adapter of smaller rank uses."""

from __future__ import annotations

from typing import Any

import torch

from lorakernels.nn.expert_layer import Stack


def used_part(suffix: str, tensor: torch.Tensor, r: int, target: Any) -> torch.Tensor:
    """A view of the first r ranks of a parameter, by its name in `LoRALayer.adapter_shapes`.

    A has the ranks first, in a grouped convolution those of each group together, and of a stack those of each expert:
    the view is then [groups, r / groups, ...] or [E, r, ...], otherwise [1, r, ...]. B has them second, r / groups of
    them, or of a stack E of the first rank, E of the second. What has no rank is whole.
    """
    share = r // getattr(target, "groups", 1)
    if suffix in ("lora_A.weight", "lora_embedding_A"):
        return by_group(tensor, target)[:, :share]
    if suffix in ("lora_B.weight", "lora_embedding_B"):
        return tensor[:, : share * num_experts(target)]
    return tensor


def by_group(A: torch.Tensor, target: Any) -> torch.Tensor:
    """A [r, ...] as [groups, r / groups, ...], a stack's [r · E, ...] as [E, r, ...]."""
    groups = getattr(target, "groups", 1) * num_experts(target)
    return A.unflatten(0, (groups, A.shape[0] // groups))


def num_experts(target: Any) -> int:
    return target.num_experts if isinstance(target, Stack) else 1


def smaller(suffix: str, tensor: torch.Tensor, r: int, target: Any) -> torch.Tensor:
    """The first r ranks of a parameter in the shape that an adapter of that rank has.

    Raises RuntimeError where the others, which the adapter would lose, are not zero.
    """
    part = used_part(suffix, tensor, r, target)
    if part.numel() < tensor.numel() and tensor.count_nonzero() > part.count_nonzero():
        raise RuntimeError(
            f"{suffix} has trained past rank {r}, that of the adapter that was swapped in: the optimizer still had the "
            "moments of the one before; make a new optimizer after a hot swap"
        )
    return part.flatten(0, 1) if part.dim() > tensor.dim() else part
