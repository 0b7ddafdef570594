"""Tiles of a packed weight: unpacked in registers inside a product, or into a scratch that torch multiplies.

Of pairs of 4 bits in blocks that do not cross rows, and of 8 bits. In bfloat16 on NVIDIA a word becomes eight numbers
at once: those of a table by byte permutations in 23 operations, those of int4 as the low bits of 128 + code in 11. Of
NF4 that is 4.9 issue slots a weight more than a dense loop takes (16 tokens, sm_90, Triton 3.9, counted in the machine
code), of int4 5.9. Anything else is a load from a table of 16, which stays in a cache.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lorakernels.backend import interpreter_on
from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import device_of
from lorakernels.kernels.launch import cdiv, lasting, launch
from lorakernels.kernels.tiles import Matrix, matrix, plane, store_tile, transposed
from lorakernels.quant.packed import CODES, PackedWeight, Transposed, table_of

# How a kernel reads a weight: a matrix of numbers, codes of 4 bits, codes of 8 bits, or words of eight codes; and what
# is added where the columns of W are those of the product, as in dx = dy W.
DENSE, NIBBLES, BYTES, TURNED = 0, 1, 2, 8
WORDS = {"nf4": 3, "fp4": 4, "mxfp4": 5, "int4": 6}
_FP8_ARCHS = ("sm_89", "sm_90", "sm_100", "sm_103", "sm_120")  # Triton converts float8_e4m3fn there
_UNPACK = KernelConfig(BLOCK_M=32, BLOCK_K=128, num_warps=4)


class PackedMatrix(NamedTuple):
    """A packed weight [rows, cols] as it goes into a kernel."""

    ptr: Any
    rows: Any
    cols: Any
    codes: Any  # [16] float32
    scale: Any  # [rows / block_rows, cols / block]
    zero: Any
    table: Any  # of nested scales, None of others
    absmax: Any
    offset: Any
    block_rows: Any


def fits_kernel(weight: Any) -> bool:
    """Whether a kernel can unpack it: rows that begin with a word and a block, and numbers that the device converts."""
    packed = packed_of(weight)
    form, arch = packed.form, device_of(packed.device).arch
    if form.kind == "fp8" and not (interpreter_on() or arch in _FP8_ARCHS):
        return False
    return not form.halves and form.K % form.block == 0 and (form.bits == 8 or form.block % 8 == 0)


def packed_of(weight: PackedWeight | Transposed) -> PackedWeight:
    return weight.weight if isinstance(weight, Transposed) else weight


def form_of(weight: Any, dtype: torch.dtype, block_cols: int) -> dict[str, int]:
    """How a kernel reads a weight by tiles of so many columns, as constexprs.

    W_FORM; GROUP columns have one scale, and PER of them lie in a tile.
    """
    if isinstance(weight, torch.Tensor):
        return {"W_FORM": DENSE, "PER": 1, "GROUP": 1}
    packed = packed_of(weight)
    kind, block, turned = packed.form.kind, packed.form.block, TURNED if isinstance(weight, Transposed) else 0
    per = min(block_cols, block & -block)  # a power of two
    if packed.form.bits == 8:
        return {"W_FORM": BYTES + turned, "PER": per, "GROUP": block}
    nvidia = device_of(packed.device).arch.startswith("sm_") and not interpreter_on()
    words = nvidia and dtype is torch.bfloat16 and per >= 8
    return {"W_FORM": (WORDS[kind] if words else NIBBLES) + turned, "PER": per, "GROUP": block}


def weight_matrix(weight: Any) -> Matrix | PackedMatrix:
    """A weight [N, K] as [K, N]; packed as it lies."""
    if isinstance(weight, torch.Tensor):
        return transposed(weight)
    packed = packed_of(weight)
    form = packed.form
    codes = lasting(table_of(form.kind, packed.device)) if form.bits == 4 else None
    return PackedMatrix(
        packed.data, form.N, form.K, codes, packed.scale, packed.zero, packed.table, packed.absmax, packed.offset,
        max(1, form.block_rows),
    )  # fmt: skip


@triton.jit
def _scales(w, values, nested, offs_rows, offs_cols, GROUP: tl.constexpr):
    """Of each row and column: scales, or zeros, in float32."""
    # In 32 bits: of blocks there are a 32nd or less of the numbers.
    blocks = (offs_rows // w.block_rows)[:, None] * (w.cols // GROUP) + (offs_cols // GROUP)[None, :]
    inside = (offs_rows < w.rows)[:, None] & (offs_cols < w.cols)[None, :]
    scale = tl.load(values + blocks, mask=inside, other=0)
    if nested:
        scale = tl.load(w.table + scale.to(tl.int32)) * tl.load(w.absmax + blocks // 256, mask=inside, other=0.0)
        return scale + tl.load(w.offset)
    if scale.dtype == tl.uint8:  # exponents of two, E8M0: 255 is no number, and 0 below the normal ones
        bits = tl.where(scale == 255, 0x7FC00000, tl.where(scale == 0, 0x400000, scale.to(tl.int32) << 23))
        return bits.to(tl.float32, bitcast=True)
    return scale.to(tl.float32)


@triton.jit
def _blockwise(w, numbers, offs_rows, first_col, BLOCK: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr):
    """(number - zero) · scale of a tile whose columns have one scale for each PER of them."""
    firsts = first_col + tl.arange(0, BLOCK // PER) * PER
    scale = _scales(w, w.scale, w.table is not None, offs_rows, firsts, GROUP)
    blocks = tl.reshape(numbers, (numbers.shape[0], BLOCK // PER, PER))
    if w.zero is not None:
        blocks -= _scales(w, w.zero, False, offs_rows, firsts, GROUP)[:, :, None]
    return tl.reshape(blocks * scale[:, :, None], numbers.shape)


@triton.jit
def load_packed_kn(w, offs_k, offs_n, k, n, dtype, W_FORM: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr):
    """The tile [K, N] of a packed weight's transpose, or with TURNED of the weight, from row k and column n on."""
    if W_FORM < 8:
        tile = tl.trans(load_packed(w, offs_n, k, dtype, offs_k.shape[0], W_FORM, PER, GROUP))
    else:
        tile = load_packed(w, offs_k, n, dtype, offs_n.shape[0], W_FORM - 8, PER, GROUP)
    return tile


@triton.jit
def load_packed(
    w, offs_rows, first_col, dtype, BLOCK: tl.constexpr, W_FORM: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr
):
    """The tile [rows, BLOCK] of a packed weight in `dtype`, zero outside. `first_col` is a multiple of BLOCK."""
    if W_FORM >= 3 and w.zero is None:
        firsts = first_col + tl.arange(0, BLOCK // PER) * PER
        scale = _scales(w, w.scale, w.table is not None, offs_rows, firsts, GROUP).to(tl.bfloat16)
        numbers = _eight(w, offs_rows, first_col, BLOCK, W_FORM, GROUP)
        blocks = tl.reshape(numbers, (offs_rows.shape[0], BLOCK // PER, PER)) * scale[:, :, None]
        tile = tl.reshape(blocks, (offs_rows.shape[0], BLOCK))
    else:
        if W_FORM == 2:
            offs_cols = first_col + tl.arange(0, BLOCK)
            numbers = _load_packed(w.ptr, offs_rows, offs_cols, w.rows, w.cols).to(tl.float32)
        elif W_FORM >= 3:
            numbers = _eight(w, offs_rows, first_col, BLOCK, W_FORM, GROUP).to(tl.float32)
        else:
            offs = first_col // 2 + tl.arange(0, BLOCK // 2)
            pair = _load_packed(w.ptr, offs_rows, offs, w.rows, w.cols // 2).to(tl.int32)
            numbers = tl.join(tl.load(w.codes + (pair >> 4)), tl.load(w.codes + (pair & 15)))
            numbers = tl.reshape(numbers, (offs_rows.shape[0], BLOCK))
        tile = _blockwise(w, numbers, offs_rows, first_col, BLOCK, PER, GROUP).to(dtype)
    return tile


@triton.jit
def _load_packed(ptr, offs_rows, offs_cols, rows, cols):
    """Bytes or words of rows of so many of them."""
    inside = (offs_rows < rows)[:, None] & (offs_cols < cols)[None, :]
    return tl.load(ptr + offs_rows.to(tl.int64)[:, None] * cols + offs_cols[None, :], mask=inside, other=0.0)


@triton.constexpr_function
def _assembly(form):
    return _ASSEMBLY[form]


@triton.jit
def _eight(w, offs_rows, first_col, BLOCK: tl.constexpr, W_FORM: tl.constexpr, GROUP: tl.constexpr):
    """The codes of words, not scaled, bfloat16: eight of a word."""
    offs, cols = first_col // 8 + tl.arange(0, BLOCK // 8), w.cols // 8
    if GROUP % 32 == 0:  # rows are whole blocks; the compiler knows 16 columns, of which it makes loads of 8 bytes
        cols = tl.multiple_of(cols, 4)
    word = _load_packed(w.ptr.to(tl.pointer_type(tl.uint32)), offs_rows, offs, w.rows, cols)
    n0, n1, n2, n3, n4, n5, n6, n7 = tl.inline_asm_elementwise(
        _assembly(W_FORM), _CONSTRAINTS, [word], dtype=(tl.bfloat16,) * 8, is_pure=True, pack=1
    )
    even = tl.join(tl.join(n0, n4), tl.join(n2, n6))
    odd = tl.join(tl.join(n1, n5), tl.join(n3, n7))
    return tl.reshape(tl.join(even, odd), (offs_rows.shape[0], BLOCK))


@triton.jit(do_not_specialize=["row", "num_rows"])
def unpack_kernel(
    w,
    out,  # [rows, columns], those of w from `row` and `first_col` on
    row,
    num_rows,
    first_col,
    W_FORM: tl.constexpr,
    PER: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_K
    dtype = out.ptr.dtype.element_ty
    rows = tl.where(offs_m < num_rows, row + offs_m, w.rows)
    tile = load_packed(w, rows, first_col + col, dtype, BLOCK_K, W_FORM, PER, GROUP)
    store_tile(plane(out.ptr, 0, num_rows, out.cols), tile, offs_m, col + tl.arange(0, BLOCK_K))


def unpack(weight: PackedWeight, row: int, last_row: int, col: int, last_col: int, out: torch.Tensor) -> None:
    """`PackedWeight.unpack` by a kernel, where one can; `out` is contiguous."""
    constexprs = form_of(weight, out.dtype, _UNPACK.BLOCK_K)
    if not fits_kernel(weight) or col % constexprs["PER"] or col % 8:
        return weight.unpack(row, last_row, col, last_col, out)
    grid = (cdiv(last_row - row, _UNPACK.BLOCK_M), cdiv(last_col - col, _UNPACK.BLOCK_K))
    args = {"w": weight_matrix(weight), "out": matrix(out), "row": row, "num_rows": last_row - row, "first_col": col}
    launch(unpack_kernel, grid, args, constexprs, _UNPACK)


def _bfloat16(value: float) -> int:
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 & 0xFFFF


def assembly(kind: str) -> str:
    """A word of eight codes to eight bfloat16, number 0 in the low byte's high nibble.

    A selector of `prmt` picks a byte of eight by three bits: of the sixteen low bytes, and of the sixteen high ones, by
    two of them, between which the codes' fourth bits choose. One more joins low and high bytes. A code of int4 is put
    into the low bits of the bfloat16 128, where it is 128 + code, and 128 is subtracted, which rounds nothing.
    """
    if kind == "int4":
        lines = ["{ .reg .b32 s, one, less, r0, r1, r2, r3; mov.b32 one, 0x3f803f80; mov.b32 less, 0xc300c300;"]
        # The low nibble of bytes 0 and 2, their high one, and those of bytes 1 and 3.
        for i, source in enumerate(("$8", "s", "s", "s")):
            if i:
                lines.append(f"shr.b32 s, $8, {4 * i};")
            lines.append(f"lop3.b32 r{i}, {source}, 0x000f000f, 0x43004300, 0xea;")  # a and b, or c
            lines.append(f"fma.rn.bf16x2 r{i}, r{i}, one, less;")
        return " ".join([*lines, *(f"mov.b32 {{${n}, ${n + 4}}}, r{i};" for i, n in enumerate((1, 0, 3, 2)))]) + " }"
    codes = [_bfloat16(value) for value in CODES[kind]]
    low, high = (
        [sum((code >> shift & 255) << 8 * i for i, code in enumerate(codes[at : at + 4])) for at in (0, 4, 8, 12)]
        for shift in (0, 8)
    )
    lines = [
        "{ .reg .b32 s, f, m, p, q, l, h, r0, r1, r2, r3;",
        "and.b32 s, $8, 0x77777777; shr.b32 f, $8, 3; and.b32 f, f, 0x11111111;",
    ]
    for half in (0, 1):
        if half:
            lines.append("shr.b32 s, s, 16; shr.b32 f, f, 16;")
        lines.append("prmt.b32 m, 0x0000ff00, 0, f;")
        for name, table in (("l", low), ("h", high)):
            lines.append(f"prmt.b32 p, {table[0]:#x}, {table[1]:#x}, s; prmt.b32 q, {table[2]:#x}, {table[3]:#x}, s;")
            lines.append(f"lop3.b32 {name}, p, q, m, 0xd8;")  # q where m, else p
        # A byte's high nibble is the even number.
        lines.append(f"prmt.b32 r{2 * half}, l, h, 0x4051; prmt.b32 r{2 * half + 1}, l, h, 0x6273;")
    lines += [f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, r{i};" for i in range(4)]
    return " ".join(lines) + " }"


_ASSEMBLY = {form: assembly(kind) for kind, form in WORDS.items()}
_CONSTRAINTS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r")
