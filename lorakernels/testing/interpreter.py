"""Triton's interpreter, made to show what it hides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from triton.runtime import interpreter


@contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Run the programs of every grid in a random order: no program may lean on another."""
    builder = interpreter.InterpreterBuilder
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    rng = np.random.default_rng(seed)
    order: list[Any] = [None]

    def set_grid_dim(self: Any, *dim: int) -> None:
        set_dim(self, *dim)
        order[0] = rng.permutation(int(np.prod(dim)))

    def set_grid_idx(self: Any, *idx: int) -> None:
        place = int(np.ravel_multi_index(idx, self.grid_dim))
        set_idx(self, *(int(i) for i in np.unravel_index(order[0][place], self.grid_dim)))

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    try:
        yield
    finally:
        builder.set_grid_dim, builder.set_grid_idx = set_dim, set_idx
