"""A second stream for a pass that nothing waits for until the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache

import torch


@contextmanager
def side_stream(device: torch.device, enabled: bool) -> Iterator[AbstractContextManager[object]]:
    """Yields the context in which launches go beside those of the current stream; at the end both meet again.

    Captured in a CUDA graph it is a fork and a join. Memory that the side stream allocates may be used and freed on
    the current one: the next fork waits for it, and streams that fork have one each. Off a CUDA device nothing
    happens.
    """
    if not enabled or device.type != "cuda":
        yield nullcontext()
        return
    current = torch.cuda.current_stream(device)
    side = _side(device.index, current.cuda_stream)
    side.wait_stream(current)
    try:
        yield torch.cuda.stream(side)
    finally:
        current.wait_stream(side)


@lru_cache(maxsize=64)
def _side(index: int, current: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)
