"""A failure at a point of one's choice."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class FailAt(TorchDispatchMode):
    """Raises `error` once, in the place of the torch operator of this number (from 0) that runs in the block."""

    def __init__(self, number: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = number, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == -1:
            raise self.error
        return func(*args, **(kwargs or {}))
