"""Triton's interpreter, mended where it differs from a GPU, and made to show what it hides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widen(data: Any) -> Any:
    """bf16, which the interpreter holds as uint16, as float32."""
    return (data.astype(np.uint32) << 16).view(np.float32)


def _round_to_bf16(data: Any) -> Any:
    """float32 to the nearest bf16, ties to even, as a GPU rounds; NaN stays NaN."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


def mend_bf16() -> None:
    """Make bf16 right: unmended, `tl.dot` multiplies the bits as integers and casts to bf16 truncate."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "_lorakernels_mended", False):
        return
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        def widened(operand: Any) -> Any:
            if operand.dtype.scalar != tl.bfloat16:
                return operand
            return interpreter.TensorHandle(_widen(operand.data), tl.float32)

        return dot(self, widened(a), widened(b), d, *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_round_to_bf16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    # Bound at class creation to the unmended function.
    builder.create_fp_trunc = lambda self, src, dst_type: self.cast_impl(src, dst_type)
    builder._lorakernels_mended = True


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
