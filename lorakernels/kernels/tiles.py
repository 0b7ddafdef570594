"""What every kernel shares: the tile loader, and dropout's bits."""

from __future__ import annotations

import triton
import triton.language as tl

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): seven rounds of
# Philox4x32 are the fewest that pass BigCrush; the customary ten cost 40 % more.
PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def load_tile(ptr, rows, cols, num_rows, num_cols, stride_row, stride_col):
    """The [rows, cols] tile of a strided matrix, zero outside it. Offsets are 64-bit."""
    offsets = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    return tl.load(ptr + offsets, mask=(rows[:, None] < num_rows) & (cols[None, :] < num_cols), other=0.0)


@triton.jit
def store_tile(ptr, tile, rows, cols, num_rows, num_cols, stride_row):
    """Store a tile into a matrix whose columns are contiguous, in that matrix's dtype."""
    offsets = rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
    mask = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def draw_mask_bytes(seed, rows, byte_cols, threshold):
    """Dropout's mask for the tile whose columns are 8 * byte_cols … + 7: bit j is 1 where column j is kept.

    One Philox call gives 128 bits, which are the sixteen bits of each of a byte's eight elements.
    """
    byte_col = byte_cols[None, :] + tl.zeros_like(rows)[:, None]
    row = rows[:, None] + tl.zeros_like(byte_cols)[None, :]
    zero = tl.zeros_like(row)
    w0, w1, w2, w3 = tl.philox(seed, byte_col, row, zero, zero, n_rounds=PHILOX_ROUNDS)
    low = _keep_pair(w0, threshold, 0) | _keep_pair(w1, threshold, 2)
    return low | _keep_pair(w2, threshold, 4) | _keep_pair(w3, threshold, 6)


@triton.jit
def _keep_pair(word, threshold, SHIFT: tl.constexpr):
    low = ((word & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32)
    high = ((word >> 16).to(tl.int32) >= threshold).to(tl.int32)
    return (low << SHIFT) | (high << (SHIFT + 1))


@triton.jit
def load_mask_bytes(mask_ptr, rows, byte_cols, num_rows, num_byte_cols):
    """Dropout's mask as a pass over x has stored it: [num_rows, num_byte_cols] bytes."""
    return load_tile(mask_ptr, rows, byte_cols, num_rows, num_byte_cols, num_byte_cols, 1).to(tl.int32)


@triton.jit
def unpack_mask(mask_bytes, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS / 8] bytes as [ROWS, COLS] booleans, true where an element is kept."""
    bits = (mask_bytes[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLS)) != 0
