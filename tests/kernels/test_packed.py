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


def on(weight: PackedWeight, device: str) -> PackedWeight:
    return PackedWeight(weight.text, *(None if tensor is None else tensor.to(device) for tensor in weight[1:]))


WEIGHTS = {
    **{kind: lambda kind=kind: pack(torch.randn(70, 192), kind, 32) for kind in FORMATS},
    "mxfp4_extremes": lambda: pack(
        torch.randn(6, 64) * 2.0 ** torch.tensor([[-149], [-126], [0], [3], [100], [125]]), "mxfp4"
    ),
    "nf4_wide_blocks": lambda: pack(torch.randn(5, 512), "nf4", 512),
    "nf4_nested": lambda: pack(torch.randn(40, 1024), "nf4", 64, True),
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


def run_assembly(text: str, word: torch.Tensor) -> list[torch.Tensor]:
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

    def numbers(pairs: torch.Tensor) -> torch.Tensor:
        """Both half-words of a register as bfloat16."""
        return (pairs[:, None] >> torch.tensor([0, 16])).to(torch.int16).view(torch.bfloat16)

    for line in filter(None, (line.strip() for line in text.strip("{ }").split(";"))):
        name, _, rest = line.partition(" ")
        if name == ".reg":
            continue
        if name.startswith("mov") and not rest.startswith("{"):
            target, source = rest.split(", ")
            registers[target] = value(source)
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
        elif name == "fma.rn.bf16x2":
            exact = numbers(a).double() * numbers(b).double() + numbers(c[0]).double()
            halves_of = exact.bfloat16().view(torch.int16).long() & 0xFFFF
            registers[target] = halves_of[:, 0] | halves_of[:, 1] << 16
        else:
            # Of a, b, c: b where c, else a; or a and b, or c.
            assert name == "lop3.b32" and sources[3] in ("0xd8", "0xea")
            registers[target] = (a & ~c[0]) | (b & c[0]) if sources[3] == "0xd8" else (a & b) | c[0]
    return [halves[f"${i}"] for i in range(8)]


@pytest.mark.parametrize("kind", packed.WORDS)
def test_the_instructions_are_the_table(kind: str) -> None:
    """For all half-words, in the lower and in the upper half of a word."""
    half = torch.arange(1 << 16)
    table = torch.tensor(CODES[kind]).bfloat16().view(torch.int16).long() & 0xFFFF
    words = torch.cat([half, half << 16, half << 16 | (half * 40503 & 0xFFFF)])
    for i, found in enumerate(run_assembly(packed.assembly(kind), words)):
        byte = words >> 8 * (i // 2) & 255
        code = byte & 15 if i % 2 else byte >> 4
        assert torch.equal(found, table[code])
