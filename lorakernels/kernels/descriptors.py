"""Tensor descriptors: tiles that the hardware's own unit (TMA, from sm_90) copies, with no address arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

_BYTES = 16  # what TMA asks of addresses and of the distance between rows


def fits_descriptor(x: torch.Tensor) -> bool:
    """Whether a descriptor can hold x [rows, cols]: contiguous rows that start at multiples of 16 bytes."""
    if x.numel() == 0 or x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        return False
    row_bytes = x.stride(0) * x.element_size()
    start = x.storage_offset() * x.element_size() if x.is_meta else x.data_ptr()
    return row_bytes % _BYTES == 0 and start % _BYTES == 0


def descriptor(x: torch.Tensor, block: tuple[int, int]) -> Any:
    """x [rows, cols] to be loaded and stored in tiles of `block`; what lies outside is zero, and not written."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))
