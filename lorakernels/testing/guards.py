"""Memory that shows a read or a write past the end of a tensor, and an element nobody wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_MARGIN = 256
_PATTERN = 0xA5


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with its own strides in a buffer whose every other element is NaN."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0:
        return tensor
    buffer = tensor.new_full((span + 2 * _MARGIN,), float("nan"))
    inside = buffer.as_strided(tensor.shape, tensor.stride(), _MARGIN)
    return inside.copy_(tensor) if all(tensor.stride()) else _fill_expanded(inside, tensor)


def _fill_expanded(inside: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Copy through the first index of every stride-0 dimension: `copy_` refuses overlapping memory."""
    index = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    inside[index].copy_(tensor[index])
    return inside


@contextmanager
def canaries() -> Iterator[None]:
    """Inside the block `new_empty` returns poisoned memory between margins, which are checked at the end.

    Floats start as NaN. Raises AssertionError where a margin was written to.
    """
    new_empty = torch.Tensor.new_empty
    buffers: list[tuple[torch.Tensor, int]] = []

    def guarded_empty(self: torch.Tensor, *size: Any, **kwargs: Any) -> torch.Tensor:
        plain = new_empty(self, *size, **kwargs)
        if plain.device.type == "meta":
            return plain
        numbytes = plain.numel() * plain.element_size()
        buffer = torch.full((numbytes + 2 * _MARGIN,), _PATTERN, dtype=torch.uint8, device=plain.device)
        buffers.append((buffer, numbytes))
        inside = buffer[_MARGIN : _MARGIN + numbytes].view(plain.dtype).view(plain.shape)
        return inside.fill_(float("nan")) if plain.is_floating_point() else inside

    torch.Tensor.new_empty = guarded_empty  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.new_empty = new_empty  # type: ignore[method-assign]
    for buffer, numbytes in buffers:
        margins = torch.cat([buffer[:_MARGIN], buffer[_MARGIN + numbytes :]])
        assert (margins == _PATTERN).all(), f"a write outside a tensor of {numbytes} bytes"
