"""What is measured: shapes, as data, in named sets; and what a shape costs at least."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lorakernels.configs.data_sheet import DataSheet

TOKENS = (1, 16, 64, 256, 1024, 2048, 4096, 8192, 16384)
HEADLINE = (8192, 4096, 4096)


@dataclass(frozen=True)
class Case:
    """x [M, K] through weight [N, K]: a training step with one adapter of rank r, or the forward of a batch.

    Of a batch the tokens share `adapters` adapters, as many tokens each as can be; each has rank r, or, `mixed`, 8, 16,
    32 … r in turn. `dtype` names torch's. Over a packed weight the frozen layer has the same one.
    """

    M: int
    N: int
    K: int
    r: int = 16
    dropout: float = 0.0
    dtype: str = "bfloat16"
    adapters: int | None = None
    mixed: bool = False
    base: str = "dense"  # or the format of a packed weight

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Of each adapter."""
        steps = [8] if self.mixed else [self.r]
        while steps[-1] < self.r:
            steps.append(min(2 * steps[-1], self.r))
        return tuple(steps[i % len(steps)] for i in range(self.adapters or 1))

    @property
    def together(self) -> bool:
        """Whether an adapter's tokens lie one after the other, as in prefill; in decode they lie anywhere."""
        return self.M >= 1024

    def slots(self, seed: int = 0) -> torch.Tensor:
        """[M] int64 on the CPU: the adapter of each token; every adapter has one at least."""
        slots = torch.arange(self.M) % len(self.ranks)
        if self.together:
            return slots.sort().values
        return slots[torch.randperm(self.M, generator=torch.Generator().manual_seed(seed))]

    def as_dict(self) -> dict[str, Any]:
        other = ("adapters", "mixed") if self.adapters is None else ("dropout",)
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in other}

    def __str__(self) -> str:
        rank = f"8…{self.r}" if self.mixed else str(self.r)
        more = f"p={self.dropout:g}" if self.adapters is None else f"adapters={self.adapters}"
        base = "" if self.base == "dense" else f" {self.base}"
        return f"{self.M}x{self.N}x{self.K} r={rank} {more} {self.dtype}{base}"

    # A training step has two products with W for the forward's one, and three times the forward's of the adapter's.

    @property
    def frozen_bytes(self) -> int:
        """A product reads x and W and writes y; or reads dy and W and writes dx."""
        products = 2 if self.adapters is None else 1
        return round(products * (self.M * (self.K + self.N) * self.itemsize + self.N * self.K * self.weight_itemsize))

    @property
    def weight_itemsize(self) -> float:
        """Bytes a number of W with its scales, a float32 for each 64 numbers or each row; int4 has as many zeros."""
        packed = {"nf4": 0.5 + 4 / 64, "int4": 0.5 + 8 / 64, "int8": 1 + 4 / self.K, "fp8": 1 + 4 / self.K}
        return packed.get(self.base, self.itemsize)

    @property
    def frozen_flops(self) -> int:
        return (4 if self.adapters is None else 2) * self.M * self.N * self.K

    @property
    def low_rank_flops(self) -> int:
        """The six products of rank r: S, S Bᵀ, G, dB, dA, G A; the forward has two of them."""
        ranks = sum(self.ranks[token % len(self.ranks)] for token in range(self.M))
        return (6 if self.adapters is None else 2) * ranks * (self.K + self.N)

    def adapter_bytes(self) -> int:
        """Of adapters that are held each for itself, which is also what a batch of all must read."""
        return sum(self.ranks) * (self.K + self.N) * self.itemsize

    def paged_bytes(self) -> int:
        """Of adapters that are held as pages, a page a row of rank, and of their int32 table, which has a row more."""
        return self.adapter_bytes() + (len(self.ranks) + 1) * self.r * 4

    def padded_bytes(self) -> int:
        """Of adapters that are held as stacks, every one as large as the largest."""
        return len(self.ranks) * self.r * (self.K + self.N) * self.itemsize

    @property
    def memory_floor(self) -> float:
        """The least that can be read and written, over the frozen layer's: A and B too, or with their gradients."""
        return 1 + (3 if self.adapters is None else 1) * self.adapter_bytes() / self.frozen_bytes

    def floor(self, sheet: DataSheet | None = None) -> float:
        """The least (adapted layer) / (frozen layer): operations alone, or on a device that is known, its roofline.

        Of orders that keep W and B A apart; what is more than A, B and their gradients could be hidden.
        """
        flops, moved = self.frozen_flops, self.frozen_bytes
        most = flops + self.low_rank_flops
        if sheet is None:
            return most / flops
        return sheet.seconds(most, moved * self.memory_floor, self.dtype) / sheet.seconds(flops, moved, self.dtype)


def case_of(row: dict[str, Any]) -> Case:
    """The case of a row of results; the host's own rows have one too."""
    return Case(**{field.name: row[field.name] for field in dataclasses.fields(Case) if field.name in row})


# Hidden and intermediate size and that of keys and values, of each model. Source: the `config.json` of its checkpoint.
MODELS = {
    "llama3-8b": (4096, 14336, 1024),
    "llama3-70b": (8192, 28672, 1024),
    "qwen2.5-32b": (5120, 27648, 1024),
}


def _sets() -> dict[str, tuple[Case, ...]]:
    M, N, K = HEADLINE
    one: dict[str, list[Case]] = {
        "headline": [Case(M, N, K, dropout=p) for p in (0.0, 0.1)],
        "tokens": [Case(tokens, N, K) for tokens in TOKENS],
        "ranks": [Case(M, N, K, r) for r in (4, 8, 16, 32, 64, 128, 256)],
        "dtypes": [Case(M, N, K, dtype=dtype) for dtype in ("bfloat16", "float16", "float32")],
        "quantised": [
            *(Case(tokens, N, K, base="nf4") for tokens in (1, 16, 64, 256, 1024, M)),
            *(Case(tokens, N, K, base=base) for tokens in (16, M) for base in ("int4", "int8", "fp8")),
        ],
        # The layer sizes, tokens, rank and dropout that LoRAFusion (arXiv 2510.00206) reports its kernels on.
        "lorafusion": [Case(tokens, n, n, dropout=0.1) for n in (4096, 5120, 8192) for tokens in (2048, 4096, 8192)],
    }
    for name, (hidden, inner, key_value) in MODELS.items():
        # q and o; k and v; gate and up; down.
        sizes = ((hidden, hidden), (key_value, hidden), (inner, hidden), (hidden, inner))
        one[name] = [Case(tokens, *size) for size in sizes for tokens in TOKENS]
    # Around 64 tokens of 64 adapters, the decode step whose adapters weigh half as much as the weight.
    batches = ((64, (1, 4, 8, 16, 32, 64)), (256, (1, 8, 32, 64, 128, 256)))
    many: dict[str, list[Case]] = {
        "multi-adapters": [Case(tokens, N, K, adapters=n) for tokens, numbers in batches for n in numbers],
        "multi-tokens": [Case(tokens, N, K, adapters=min(tokens, 64)) for tokens in (1, 16, 64, 256, 1024, 8192)],
        "multi-ranks": [
            *(Case(64, N, K, r, adapters=64) for r in (8, 16, 32, 64, 128)),
            *(Case(tokens, N, K, 128, adapters=64, mixed=True) for tokens in (64, 1024)),
        ],
        "multi-hidden": [Case(64, n, n, r, adapters=64, mixed=r > 16) for n in (2048, 4096, 8192) for r in (16, 128)],
    }
    many["multi"] = [case for cases in many.values() for case in cases]
    small = {
        "small-layer": [
            *(Case(tokens, 256, 256, 8, p, "float32") for tokens in (1, 64, 320) for p in (0.0, 0.1)),
            Case(320, 704, 256, dtype="float32"),
            Case(320, 256, 256),
        ],
        "small-quantised": [
            *(Case(320, 256, 256, 8, p, dtype, base="nf4") for dtype, p in (("float32", 0.1), ("bfloat16", 0.0))),
            *(Case(64, 256, 256, 8, dtype="float32", base=base) for base in ("int4", "int8", "fp8")),
            Case(64, 256, 256, 8, dtype="float32", adapters=8, base="nf4"),
        ],
        "small-multi": [
            *(Case(64, 256, 256, 8, dtype="float32", adapters=adapters) for adapters in (1, 8, 64)),
            Case(1, 256, 256, 8, dtype="float32", adapters=1),
            Case(64, 256, 256, 64, dtype="float32", adapters=16, mixed=True),
            Case(1024, 256, 256, adapters=8),
        ],
    }
    every = [case for cases in (one | many).values() for case in cases]
    sets = {"small": small["small-layer"] + small["small-multi"]} | small | one | many | {"all": every}
    return {name: tuple(dict.fromkeys(cases)) for name, cases in sets.items()}


SETS = _sets()


def cases_of(name: str) -> tuple[Case, ...]:
    """The cases of a named set; several names may be joined by commas.

    Raises:
        ValueError: there is no such set.
    """
    cases: dict[Case, None] = {}
    for part in name.split(","):
        if part not in SETS:
            raise ValueError(f"there is no set {part!r}; sets: {', '.join(SETS)}")
        cases |= dict.fromkeys(SETS[part])
    return tuple(cases)
