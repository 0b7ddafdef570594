"""Memory that shows a read or a write past the end of a tensor, and an element nobody wrote."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

_MARGIN = 256
_PATTERN = 0xA5
# Two such strides pass 2³¹ elements. The memory is only touched where the elements lie.
_HUGE = 1 << 30


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


def laid_out(plain: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in this layout, where it can be, in memory that is NaN everywhere else."""
    if plain.dim() == 0 or plain.numel() == 0:
        return plain
    if layout == "transposed":
        return guarded(plain.mT.contiguous().mT if plain.dim() > 1 else plain)
    if layout == "every_second":
        wide = plain.new_full((*plain.shape[:-1], 2 * plain.shape[-1]), float("nan"))
        wide[..., ::2] = plain
        return wide[..., ::2]
    if layout == "expanded" and plain.dim() == 3:
        return guarded(plain[:1].expand_as(plain))
    if layout == "layered" and plain.dim() == 3:
        # Stacks as engines hold them: a dimension of 1, and rows longer than this layer's.
        stack = plain.new_full((plain.shape[0], 1, plain.shape[1] + 2, plain.shape[2] + 8), float("nan"))
        stack[:, 0, : plain.shape[1], : plain.shape[2]] = plain
        return stack[:, :, : plain.shape[1], : plain.shape[2]]
    if layout == "huge_strides" and plain.dim() > 1 and plain.dtype is torch.float16:
        # Sparse in memory: the pages between rows, or stacks, are reserved and never touched; on a GPU they are there.
        count = _HUGE * (len(plain) - 1) + plain[0].numel()
        storage = torch.UntypedStorage(plain.element_size() * count, device=plain.device)
        spread = torch.empty(0, dtype=plain.dtype, device=plain.device)
        return spread.set_(storage, 0, plain.shape, (_HUGE, *plain.stride()[1:])).copy_(plain)
    return guarded(plain)


@contextmanager
def watch_allocations() -> Iterator[list[int]]:
    """After the block the list has the bytes that each of torch's own operators on a CPU allocated in it."""
    found: list[int] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield found
    found += [event.self_cpu_memory_usage for event in profile.events() or ()]


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory on a CPU that a call has at once, beside what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(number for _, number in changes), default=0)


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

    with patch.object(torch.Tensor, "new_empty", guarded_empty):
        yield
    for buffer, numbytes in buffers:
        margins = torch.cat([buffer[:_MARGIN], buffer[_MARGIN + numbytes :]])
        assert (margins == _PATTERN).all(), f"a write outside a tensor of {numbytes} bytes"
