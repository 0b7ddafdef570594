"""What every kernel shares: matrices as values and their tiles, dropout's bits, and the sum of what programs split."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import device_of
from lorakernels.configs.heuristic import TMA_ARCHS
from lorakernels.kernels.launch import cdiv, input_precision, launch

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): seven rounds of
# Philox4x32 are the fewest that pass BigCrush; the customary ten cost 40 % more.
PHILOX_ROUNDS = tl.constexpr(7)
_TMA_BYTES = 16  # what TMA asks of addresses and of the distance between rows
_SUM_BLOCK = 256
PLANES_AT_ONCE = tl.constexpr(8)
_SUM_CONFIG = KernelConfig(num_warps=4)


class Matrix(NamedTuple):
    """A strided matrix as it goes into a kernel, whole: Triton specialises each number in it by itself.

    Where rows are tokens their number is an argument of the kernel that is not specialised, and `rows` is None. Where
    there is no matrix, `ptr` is None: Triton 3.6 cannot compare a tuple with it. A kernel calls `sized` before its
    loops, inside which Triton 3.6 forgets the constants, such as a stride of 1, in tuples of tuples.
    """

    ptr: Any
    rows: Any
    cols: Any
    strides: Any


NO_MATRIX = Matrix(None, None, None, None)


def matrix(tensor: torch.Tensor) -> Matrix:
    """A tensor [rows, cols] of any strides."""
    rows, cols = tensor.shape
    return Matrix(tensor, rows, cols, tensor.stride())


def transposed(tensor: torch.Tensor) -> Matrix:
    """A tensor [cols, rows] as a matrix [rows, cols]."""
    rows, cols = tensor.shape
    return Matrix(tensor, cols, rows, tensor.stride()[::-1])


def tall(tensor: torch.Tensor) -> Matrix:
    """A tensor [tokens, cols], without the number of tokens."""
    return Matrix(tensor, None, tensor.shape[1], tensor.stride())


@triton.jit
def sized(matrix, num_rows, num_cols):
    """A matrix of sizes that the kernel has already: of two numbers that are equal it makes two masks."""
    return Matrix(matrix.ptr, num_rows, num_cols, matrix.strides)


@triton.jit
def plane(ptr, which, num_rows, num_cols):
    """The contiguous matrix number `which` of those that lie one behind the other."""
    return Matrix(ptr + tl.cast(which, tl.int64) * num_rows * num_cols, num_rows, num_cols, (num_cols, 1))


@triton.jit
def _inside(matrix, rows, cols):
    return (rows[:, None] < matrix.rows) & (cols[None, :] < matrix.cols)


@triton.jit
def load_tile(matrix, rows, cols):
    """The [rows, cols] tile of a matrix, zero outside it. Offsets are 64-bit."""
    offsets = rows.to(tl.int64)[:, None] * matrix.strides[0] + cols.to(tl.int64)[None, :] * matrix.strides[1]
    return tl.load(matrix.ptr + offsets, mask=_inside(matrix, rows, cols), other=0.0)


@triton.jit
def store_tile(matrix, tile, rows, cols):
    """Store a tile into a matrix, in that matrix's dtype; what lies outside is not written."""
    offsets = rows.to(tl.int64)[:, None] * matrix.strides[0] + cols.to(tl.int64)[None, :] * matrix.strides[1]
    tl.store(matrix.ptr + offsets, tile.to(matrix.ptr.dtype.element_ty), mask=_inside(matrix, rows, cols))


@triton.jit
def tile_of(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    # Programs that run together share rows of x and of W in L2: GROUP_M blocks of rows at a time.
    num_pid_m = tl.cdiv(M, BLOCK_M)
    num_pid_n = tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * num_pid_n)
    rows_in_group = min(num_pid_m - group * GROUP_M, GROUP_M)
    tile_in_group = tile % (GROUP_M * num_pid_n)
    return group * GROUP_M + tile_in_group % rows_in_group, tile_in_group // rows_in_group


@triton.jit
def cast_factor(factor, dtype: tl.constexpr):
    """A tile of A, B or S in the dtype that multiplies it: the tokens' own.

    But beside float16 float32 stays (tf32 products): a factor's 1e-6 would vanish, and S overflow.
    """
    if dtype == tl.float16 and factor.dtype == tl.float32:
        return factor
    else:
        return factor.to(dtype)


@triton.jit
def dot_factor(tokens, factor, acc, INPUT_PRECISION: tl.constexpr):
    """acc + tokens · factor, of a tile of tokens and one of A, B, S or G.

    tf32 has float16's eleven bits, but of a float32 factor gradients need all 24: it is multiplied in two parts.
    """
    factor = cast_factor(factor, tokens.dtype)
    if INPUT_PRECISION == "tf32" and tokens.dtype == tl.float16 and factor.dtype == tl.float32:
        tokens = tokens.to(tl.float32)
        # Rounded, not cut: what remains then has twelve bits, of which tf32 drops one.
        high = ((factor.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        acc = tl.dot(tokens, factor - high, acc, input_precision=INPUT_PRECISION)
        factor = high
    return tl.dot(tokens.to(factor.dtype), factor, acc, input_precision=INPUT_PRECISION)


def summed_columns(
    x: torch.Tensor, factor: torch.Tensor, config: KernelConfig, *, tall: bool = False
) -> dict[str, Any]:
    """INPUT_PRECISION and BLOCK_K for `dot_factor`: two parts have half as many columns, or their registers spill.

    But not in a pass over `tall` x on Hopper and Blackwell: their factors lie in shared memory, and half a tile
    has too few bytes on their way.
    """
    precision, block_k = input_precision(x), config.BLOCK_K
    two_parts = precision == "tf32" and x.dtype is torch.float16 and factor.dtype is torch.float32
    if two_parts and not (tall and device_of(x.device).arch in TMA_ARCHS):
        block_k = max(16, block_k // 2)
    return {"INPUT_PRECISION": precision, "BLOCK_K": block_k}


@triton.jit
def draw(x, mask_ptr, seed, threshold, rows, first_col, num_rows, num_cols, STORES):
    """A tile of x with dropout's mask drawn and applied; where STORES the mask is stored, a bit an element.

    `first_col` is a multiple of 8.
    """
    byte_cols = first_col // 8 + tl.arange(0, x.shape[1] // 8)
    mask_bytes = draw_mask_bytes(seed, rows, byte_cols, threshold)
    if STORES:
        store_tile(plane(mask_ptr, 0, num_rows, (num_cols + 7) // 8), mask_bytes, rows, byte_cols)
    return _kept(x, mask_bytes)


@triton.jit
def drop(z, mask_ptr, rows, block, num_rows, num_cols):
    """The tile z of the block of columns number `block`, with dropout's mask as a pass over x has stored it."""
    byte_cols = block * (z.shape[1] // 8) + tl.arange(0, z.shape[1] // 8)
    mask_bytes = load_tile(plane(mask_ptr, 0, num_rows, (num_cols + 7) // 8), rows, byte_cols)
    return _kept(z, mask_bytes.to(tl.int32))


@triton.jit
def _kept(z, mask_bytes):
    bits = (mask_bytes[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.where(tl.reshape(bits, z.shape) != 0, z, 0.0)


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


class Epilogue(NamedTuple):
    """What is made of y [M, N] at the end: row_scale ∘ y + bias, both [N] and contiguous, None where there is none."""

    row_scale: Any
    bias: Any


def epilogue(row_scale: torch.Tensor | None, bias: torch.Tensor | None) -> Epilogue:
    return Epilogue(None if row_scale is None else row_scale.contiguous(), None if bias is None else bias.contiguous())


@triton.jit
def finish(acc, epilogue, offs_n, N, part):
    """The rows of acc scaled, and the bias added, in the first part of a split sum."""
    if epilogue.row_scale is not None:
        acc *= tl.load(epilogue.row_scale + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if epilogue.bias is not None:
        acc += tl.load(
            epilogue.bias + offs_n, mask=offs_n < (N if part is None else tl.where(part == 0, N, 0)), other=0.0
        ).to(tl.float32)[None, :]
    return acc


def fits_descriptor(x: torch.Tensor) -> bool:
    """Whether a descriptor can hold x [rows, cols]: contiguous rows that start at multiples of 16 bytes."""
    if x.numel() == 0 or x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        return False
    row_bytes = x.stride(0) * x.element_size()
    start = x.storage_offset() * x.element_size() if x.is_meta else x.data_ptr()
    return row_bytes % _TMA_BYTES == 0 and start % _TMA_BYTES == 0


def descriptor(x: torch.Tensor, block: tuple[int, int]) -> Any:
    """x [rows, cols] to be loaded and stored in tiles of `block`; what lies outside is zero, and not written."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


@triton.jit(do_not_specialize=["num_planes"])
def sum_planes_kernel(planes_ptr, out_ptr, num_planes, numel, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < numel
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    # In order and in one program: the sum is bitwise the same on every run.
    plane_ptr = planes_ptr
    for first in range(0, num_planes, PLANES_AT_ONCE):
        # Asked for together: few programs, each waiting for plane after plane, would take a load's time for each.
        for i in tl.static_range(PLANES_AT_ONCE):
            there = tl.where(first + i < num_planes, numel, 0)
            total += tl.load(plane_ptr + offs, mask=offs < there, other=0.0)
            plane_ptr += numel
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=inside)


def planes_for(out: torch.Tensor, num_planes: int) -> torch.Tensor:
    """Where `num_planes` programs write their part of `out`: `out` itself when there is one."""
    return out if num_planes == 1 else out.new_empty((num_planes, *out.shape), dtype=torch.float32)


def sum_planes(planes: torch.Tensor, out: torch.Tensor) -> None:
    """Add `planes` [P, *out.shape] float32 into `out`, contiguous and of any float dtype."""
    if planes is out or out.numel() == 0:
        return
    launch(
        sum_planes_kernel,
        (cdiv(out.numel(), _SUM_BLOCK),),
        {"planes_ptr": planes, "out_ptr": out, "num_planes": planes.shape[0], "numel": out.numel()},
        {"BLOCK": _SUM_BLOCK},
        _SUM_CONFIG,
    )
