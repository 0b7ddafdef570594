"""Kernels that unpack a weight: bit for bit as torch does, and the byte permutations for every word there is."""

from __future__ import annotations

import re

import pytest
import torch

from lorakernels.kernels import packed
from lorakernels.nn.quantized import FORMATS, pack
from lorakernels.quant.packed import CODES, Form, PackedWeight
from lorakernels.testing.device import COMPILED, NUMBERS
from lorakernels.testing.guards import canaries


def nested(weight: PackedWeight) -> PackedWeight:
    """The same with scales of 8 bits, as bitsandbytes' `compress_statistics` has them."""
    table = torch.linspace(-1, 1, 256)
    offset = weight.scale.mean()
    absmax = (weight.scale - offset).abs().amax().expand(-(-weight.scale.numel() // 256)).contiguous()
    codes = torch.bucketize((weight.scale - offset) / absmax[0], (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return weight._replace(scale=codes, table=table, absmax=absmax, offset=offset)


def on(weight: PackedWeight, device: str) -> PackedWeight:
    return PackedWeight(weight.text, *(None if tensor is None else tensor.to(device) for tensor in weight[1:]))


WEIGHTS = {
    **{kind: lambda kind=kind: pack(torch.randn(70, 192), kind, 32) for kind in FORMATS},
    "nf4_wide_blocks": lambda: pack(torch.randn(5, 512), "nf4", 512),
    "nf4_nested": lambda: nested(pack(torch.randn(40, 1024), "nf4", 64)),
    "fp8_blocks": lambda: PackedWeight(
        str(Form("fp8", 200, 256, 128, 128, torch.bfloat16)),
        torch.randn(200, 256).to(torch.float8_e4m3fn),
        torch.rand(2, 2),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_kernel_unpacks_as_torch(name: str, dtype: torch.dtype, device: str) -> None:
    weight = on(WEIGHTS[name](), device)
    N, K = weight.shape
    for rows, cols in ((slice(0, N), slice(0, K)), (slice(1, N - 1), slice(K // 2, K))):
        out = torch.full((rows.stop - rows.start, cols.stop - cols.start), torch.nan, dtype=dtype, device=device)
        expected = torch.empty_like(out)
        with canaries():
            packed.unpack(weight, rows.start, rows.stop, cols.start, cols.stop, out)
        weight.unpack(rows.start, rows.stop, cols.start, cols.stop, expected)
        if not NUMBERS:
            continue
        if COMPILED and dtype is torch.bfloat16:  # of code, scale and product half an eps each, and torch's own
            torch.testing.assert_close(out, expected, rtol=2.1 * torch.finfo(dtype).eps, atol=0)
        else:
            assert torch.equal(out, expected)


def test_what_no_kernel_takes_is_unpacked_by_torch(device: str) -> None:
    for weight in (pack(torch.randn(7, 70), "nf4", 64), pack(torch.randn(6, 96), "int4", 6)):
        weight = on(weight, device)
        assert not packed.fits_kernel(weight)
        out, (N, K) = torch.empty(weight.shape, device=device), weight.shape
        packed.unpack(weight, 0, N, 0, K, out)
        assert torch.equal(out, weight.dense(torch.float32))


def run_assembly(word: torch.Tensor) -> list[torch.Tensor]:
    """The eight half-words that the text of the instructions makes of each word, one instruction after the other."""
    registers: dict[str, torch.Tensor] = {"$8": word}
    halves: dict[str, torch.Tensor] = {}

    def value(name: str) -> torch.Tensor:
        return registers[name] if name in registers else torch.full_like(word, int(name, 0))

    def prmt(a: torch.Tensor, b: torch.Tensor, selector: torch.Tensor) -> torch.Tensor:
        both = [(source >> 8 * i) & 255 for source in (a, b) for i in range(4)]
        result = torch.zeros_like(word)
        for i in range(4):
            select = (selector >> 4 * i) & 15
            byte = torch.stack(both).gather(0, (select & 7)[None])[0]
            signs = torch.where(byte > 127, 255, 0)
            result |= torch.where(select > 7, signs, byte) << 8 * i
        return result

    text = packed._assembly().strip("{ }").replace("\n", " ")
    for line in filter(None, (line.strip() for line in text.split(";"))):
        name, _, rest = line.partition(" ")
        if name == ".reg":
            continue
        if name.startswith("mov"):
            low, high, source = re.match(r"\{(\$\d), (\$\d)\}, (\w+)", rest).groups()  # type: ignore[union-attr]
            halves[low], halves[high] = registers[source] & 0xFFFF, registers[source] >> 16
            continue
        target, *sources = rest.split(", ")
        a, b, *c = map(value, sources)
        if name == "and.b32":
            registers[target] = a & b
        elif name == "shr.b32":
            registers[target] = a >> b
        elif name == "prmt.b32":
            registers[target] = prmt(a, b, c[0])
        else:
            assert name == "lop3.b32" and sources[3] == "0xd8"  # of a, b, c: b where c, else a
            registers[target] = (a & ~c[0]) | (b & c[0])
    return [halves[f"${i}"] for i in range(8)]


def test_the_permutations_are_the_table() -> None:
    """For all half-words, in the lower and in the upper half of a word."""
    half = torch.arange(1 << 16)
    table = torch.tensor(CODES["nf4"]).bfloat16().view(torch.int16).long() & 0xFFFF
    words = torch.cat([half, half << 16, half << 16 | (half * 40503 & 0xFFFF)])
    for i, found in enumerate(run_assembly(words)):
        byte = words >> 8 * (i // 2) & 255
        code = byte & 15 if i % 2 else byte >> 4
        assert torch.equal(found, table[code])
