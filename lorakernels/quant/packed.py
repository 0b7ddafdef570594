"""A frozen weight that holds 4 or 8 bits a number, as a value; the formats read it and make it."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, NamedTuple

import torch

_AT_A_TIME = 1 << 18  # numbers that are unpacked together, which stay in a cache of 2 MiB


class Form(NamedTuple):
    """How the numbers of a packed weight [N, K] lie in its tensors. As text, "nf4 4096x4096 1x64 bfloat16"."""

    kind: str  # a key of `CODES`, "int8" or "fp8"
    N: int
    K: int
    block_rows: int  # those and the columns that share a scale; 0: blocks run on over the rows of the flattened weight
    block: int
    dtype: torch.dtype  # of the weight that was packed
    halves: bool = False  # the first half of the rows is in the high nibbles, and not the even columns

    @property
    def bits(self) -> int:
        return 8 if self.kind in ("int8", "fp8") else 4

    def __str__(self) -> str:
        halves = " halves" if self.halves else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind} {self.N}x{self.K} {self.block_rows}x{self.block} {dtype}{halves}"

    @classmethod
    def read(cls, text: str) -> Form:
        return cls._parsed(text) if torch.compiler.is_compiling() else _read(text)

    @classmethod
    def _parsed(cls, text: str) -> Form:
        kind, size, block, dtype, *halves = text.split()
        (N, K), (block_rows, columns) = (map(int, pair.split("x")) for pair in (size, block))
        return cls(kind, N, K, block_rows, columns, getattr(torch, dtype), bool(halves))


@lru_cache(maxsize=4096)
def _read(text: str) -> Form:
    return Form._parsed(text)


# Dettmers et al., "QLoRA" (arXiv 2305.14314), appendix E; FP4 as bitsandbytes has it, a sign and two bits of exponent.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
# E2M1 of the Open Compute Project's "Microscaling Formats (MX) Specification" 1.0: of a sign, two bits and one.
_MXFP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CODES = {
    "nf4": _NF4,
    "fp4": (*_FP4, *(-value for value in _FP4)),
    "mxfp4": (*_MXFP4, *(-value for value in _MXFP4)),
    "int4": tuple(map(float, range(16))),
}


class PackedWeight(NamedTuple):
    """A frozen weight [N, K]: number (n, k) is (code - zero) · scale, with the zero and the scale of its block.

    `data` is uint8 of ⌈N K / 2⌉ pairs of numbers, or [N, K] of int8 or float8_e4m3fn. A scale is a float; of "mxfp4"
    it is a power of two, 2^(scale - 127); or with `table` [256], nested, it is table[scale] · absmax + offset, one
    absmax for 256 scales.
    """

    text: str  # its form; numbers in a tuple would be symbols to torch.compile
    data: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    table: torch.Tensor | None = None
    absmax: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    @property
    def form(self) -> Form:
        return Form.read(self.text)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.form[1:3])

    @property
    def dtype(self) -> torch.dtype:
        return self.form.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def parts(self) -> tuple[torch.Tensor | None, ...]:
        """All its tensors but `data`."""
        return self[2:]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self[1:] if tensor is not None)

    def dim(self) -> int:
        return 2

    def t(self) -> Transposed:
        return Transposed(self)

    def detach(self) -> PackedWeight:
        return self

    def rows(self, first: int, last: int) -> PackedWeight:
        """Rows `first` to `last`, as views; raises ValueError where they are not whole bytes and blocks."""
        N, K, block_rows, block = self.form[1:5]
        per_row = -(-K // block)
        begin, end = first * K, last * K  # of numbers
        if block_rows == 0:
            whole = begin % block == end % block == 0
            scales = slice(begin // block, end // block)
        else:
            whole = first % block_rows == last % block_rows == 0
            scales = slice(first // block_rows * per_row, last // block_rows * per_row)
        nested = self.table is not None
        if nested:
            whole = whole and scales.start % 256 == scales.stop % 256 == 0
        if not whole or self.form.halves or (self.form.bits == 4 and (begin % 2 or end % 2)):
            raise ValueError(f"rows {first} to {last} of {self.text} are not whole blocks; expected rows that are")
        data = self.data.view(N, K)[first:last] if self.form.bits == 8 else self.data.flatten()[begin // 2 : end // 2]
        scale, zero, table, absmax, offset = self.parts
        assert scale is not None
        return PackedWeight(
            str(self.form._replace(N=last - first)),
            data,
            scale.flatten()[scales],
            None if zero is None else zero.flatten()[scales],
            table,
            absmax.flatten()[scales.start // 256 : scales.stop // 256] if nested and absmax is not None else absmax,
            offset,
        )

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """All of it, [N, K]: for merging, and for nothing that runs at a call."""
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        self.unpack(0, self.form.N, 0, self.form.K, out)
        return out

    def unpack(self, row: int, last_row: int, col: int, last_col: int, out: torch.Tensor) -> None:
        """Rows `row` to `last_row` and columns `col` to `last_col` into `out`: computed in float32, rounded once."""
        N, K, block_rows, block = self.form[1:5]
        spread = self.form.bits == 4 and (K % 2 or col % 2 or last_col % 2 or (self.form.halves and N % 2))
        step = max(1, _AT_A_TIME // max(1, last_col - col))
        if spread or (block_rows == 0 and K % block):
            for first in range(row, last_row, step):
                last = min(first + step, last_row)
                out[first - row : last - row] = self._gathered(first, last, col, last_col)
            return
        scale, zero = self._scales(row, last_row, col, last_col)
        width = 1 if scale.shape[1] == last_col - col else block
        for first in range(row, last_row, step):
            last = min(first + step, last_row)
            rows, part = slice(first - row, last - row), out[first - row : last - row]
            in_place = part.dtype is torch.float32 and part.is_contiguous()
            numbers = part if in_place else torch.empty(part.shape, device=self.device)
            self._codes(first, last, col, last_col, numbers)
            blocks = numbers if width == 1 else numbers.view(last - first, -1, width)
            if zero is not None:
                blocks.sub_(zero[rows] if width == 1 else zero[rows, :, None])
            by = scale[rows] if width == 1 else scale[rows, :, None]
            if part.is_contiguous():
                torch.mul(blocks, by, out=part.view(blocks.shape))
            else:
                part.copy_((blocks * by).view(part.shape))

    def unpacks_at_once(self, dtype: torch.dtype) -> bool:
        """Whether `unpack_at_once` can, by bitsandbytes' dequantising for AVX-512: the same to the bit in a third of
        the time (1.0 ms for 3.0, 2048 × 2048). On a CPU where it is imported, as for its own layers, and for rows of
        whole blocks, of which it is right.
        """
        kind, _, K, _, block = self.form[:5]
        if "bitsandbytes" not in sys.modules or not self.data.is_cpu or dtype is torch.float64:
            return False
        return kind in ("nf4", "fp4") and K % block == 0

    def unpack_at_once(self, row: int, last_row: int, col: int, last_col: int, dtype: torch.dtype) -> torch.Tensor:
        """What `unpack` gives, as a new tensor; columns of whole blocks."""
        N, K, _, block = self.form[1:5]
        scale, _ = self._scales(row, last_row, col, last_col)
        data = self.data.view(N, K // 2)[row:last_row, col // 2 : last_col // 2]
        shape = (last_row - row, last_col - col)
        # It does not look at strides, and a column of scales is flat without a copy.
        data, scale = data.contiguous().view(-1), scale.contiguous().view(-1)
        return torch.ops.bitsandbytes.dequantize_4bit(data, scale, block, self.form.kind, shape, dtype)

    def _scales(self, row: int, last_row: int, col: int, last_col: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zeros in float32 for these rows, one a block; one a column where a block is not whole in them."""
        K, block_rows, block = self.form[2:5]
        first, last = col // block, -(-last_col // block)
        per_row, zero = -(-K // block), None
        if self.table is not None:
            blocks: Any = slice(row * per_row, last_row * per_row)
            if (first, last) != (0, per_row):
                blocks = torch.arange(row, last_row, dtype=torch.int32, device=self.device)[:, None] * per_row
                blocks = blocks + torch.arange(first, last, dtype=torch.int32, device=self.device)
            scale = self._at(blocks).view(last_row - row, last - first)
        else:
            part: Any = slice(row, last_row)
            if block_rows > 1:
                part = torch.arange(row, last_row, device=self.device) // block_rows
            scale = self._wide(self.scale.view(-1, per_row)[part, first:last])
            if self.zero is not None:
                zero = self.zero.view(-1, per_row)[part, first:last].float()
        if (col, last_col) == (first * block, last * block):
            return scale, zero
        places = torch.arange(col, last_col, device=self.device) // block - first
        return scale.index_select(1, places), None if zero is None else zero.index_select(1, places)

    def _codes(self, row: int, last_row: int, col: int, last_col: int, out: torch.Tensor) -> None:
        """The numbers before their zeros and scales, into `out` float32, contiguous."""
        N, K = self.form[1:3]
        if self.form.bits == 8:
            out.copy_(self.data[row:last_row, col:last_col])
        elif self.form.halves:
            # A byte has a number of row n in its high nibble, and one of row n + N / 2 in the low one.
            for low, begin, end in ((0, row, min(last_row, N // 2)), (1, max(row, N // 2), last_row)):
                if begin < end:
                    start = begin - low * (N // 2)
                    data = self.data.view(N // 2, K)[start : start + end - begin, col:last_col]
                    table = _nibbles(self.form.kind, self.device)[low]
                    torch.index_select(table, 0, data.flatten().int(), out=out[begin - row : end - row].view(-1))
        else:
            data = self.data.view(N, K // 2)[row:last_row, col // 2 : last_col // 2]
            # A pair of float32 is one number of 64 bits: index_select takes 3 ms for 2048 × 2048, of rows of two 22.
            pairs = _pairs(self.form.kind, self.device)
            torch.index_select(pairs, 0, data.flatten().int(), out=out.view(torch.int64).view(-1))

    def _gathered(self, row: int, last_row: int, col: int, last_col: int) -> torch.Tensor:
        """Where rows begin inside a byte or a block: by each number's place in the flattened weight."""
        N, K, block_rows, block = self.form[1:5]
        rows = torch.arange(row, last_row, device=self.device)[:, None]
        cols = torch.arange(col, last_col, device=self.device)
        places = rows * K + cols
        if self.form.halves:
            half = -(-N * K // (2 * block)) * block
            low, at = places >= half, places % half
        else:
            low, at = places % 2 == 1, places // 2
        data = self.data.flatten()[at]
        numbers = table_of(self.form.kind, self.device)[torch.where(low, data & 15, data >> 4).int()]
        blocks = places // block if block_rows == 0 else rows // block_rows * -(-K // block) + cols // block
        zero = None if self.zero is None else self.zero.flatten()[blocks].float()
        return (numbers if zero is None else numbers - zero) * self._at(blocks)

    def _at(self, blocks: torch.Tensor | slice) -> torch.Tensor:
        """The scales of blocks by their places, in float32."""
        scale = self.scale.flatten()
        if self.table is None:
            return self._wide(scale[blocks])
        assert self.absmax is not None and self.offset is not None
        absmax = self.absmax.flatten()
        # Half the time that an index by a tensor takes (65,536 scales: 0.25 ms for 0.7), and without one 0.1.
        if isinstance(blocks, slice):
            outer, skipped = absmax[blocks.start >> 8 : -(-blocks.stop >> 8)], blocks.start & ~255
            outer = outer.repeat_interleave(256)[blocks.start - skipped : blocks.stop - skipped]
            return self.table.index_select(0, scale[blocks].int()).mul_(outer).add_(self.offset).float()
        places = blocks.flatten()
        table = self.table.index_select(0, scale.index_select(0, places).int())
        return (table * absmax.index_select(0, places >> 8) + self.offset).float().view(blocks.shape)

    def _wide(self, scale: torch.Tensor) -> torch.Tensor:
        """Scales that are not nested, in float32."""
        return (scale.view(torch.float8_e8m0fnu) if self.form.kind == "mxfp4" else scale).float()


class Transposed(NamedTuple):
    """A packed weight as [K, N]."""

    weight: PackedWeight

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.weight.form[2:0:-1])

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def t(self) -> PackedWeight:
        return self.weight


Weight = torch.Tensor | PackedWeight


@lru_cache(maxsize=64)
def table_of(kind: str, device: torch.device) -> torch.Tensor:
    return torch.tensor(CODES[kind], dtype=torch.float32, device=device)


@lru_cache(maxsize=64)
def _pairs(kind: str, device: torch.device) -> torch.Tensor:
    """[256] int64: the two float32 numbers of a byte, the high nibble's first."""
    codes = torch.tensor(CODES[kind], dtype=torch.float32)
    pairs = torch.stack([codes.repeat_interleave(16), codes.repeat(16)], 1)
    return pairs.view(torch.int64).flatten().to(device)


@lru_cache(maxsize=64)
def _nibbles(kind: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """[256] float32 of a byte's high nibble, and of its low one."""
    high, low = _pairs(kind, device).view(torch.float32).view(256, 2).t()
    return high.contiguous(), low.contiguous()
