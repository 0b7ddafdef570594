"""What is measured: operations and shapes, as data, in named sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

TOKENS = (1, 16, 64, 256, 1024, 2048, 4096, 8192, 16384)
RANKS = (4, 8, 16, 32, 64, 128, 256)
HEADLINE = (8192, 4096, 4096)
MULTI_TOKENS = (1, 16, 64, 256, 1024, 8192)
_PREFILL = 1024


class _Typed:
    """What both kinds of case have: `dtype` names torch's."""

    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True, order=True)
class Case(_Typed):
    """One training step of one layer: x [M, K], weight [N, K], rank r."""

    operation: ClassVar[str] = "lora_linear"

    M: int
    N: int
    K: int
    r: int = 16
    dropout: float = 0.0
    dtype: str = "bfloat16"

    @property
    def aligned(self) -> bool:
        """Whether every row starts at a multiple of 16 bytes, as tensor descriptors ask."""
        return self.K * self.itemsize % 16 == 0 and self.N * self.itemsize % 16 == 0

    def __str__(self) -> str:
        return f"{self.M}x{self.N}x{self.K} r={self.r} p={self.dropout:g} {self.dtype}"


@dataclass(frozen=True, order=True)
class MultiCase(_Typed):
    """The forward of one layer for a batch whose M tokens share `adapters` adapters, as many tokens each as can be.

    Every adapter has rank r; or, `mixed`, 8, 16, 32 … r in turn.
    """

    operation: ClassVar[str] = "multi_lora_linear"

    M: int
    N: int
    K: int
    adapters: int
    r: int = 16
    mixed: bool = False
    dtype: str = "bfloat16"

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of each adapter."""
        if not self.mixed:
            return (self.r,) * self.adapters
        steps = [8]
        while steps[-1] < self.r:
            steps.append(min(2 * steps[-1], self.r))
        return tuple(steps[i % len(steps)] for i in range(self.adapters))

    @property
    def together(self) -> bool:
        """Whether an adapter's tokens lie one after the other, as in prefill; in decode they lie anywhere."""
        return self.M >= _PREFILL

    def slots(self, seed: int = 0) -> torch.Tensor:
        """[M] int64 on the CPU: the adapter of each token; every adapter has one at least."""
        slots = torch.arange(self.M) % self.adapters
        if self.together:
            return slots.sort().values
        return slots[torch.randperm(self.M, generator=torch.Generator().manual_seed(seed))]

    def __str__(self) -> str:
        rank = f"8…{self.r}" if self.mixed else str(self.r)
        return f"{self.M}x{self.N}x{self.K} r={rank} adapters={self.adapters} {self.dtype}"


AnyCase = Case | MultiCase


def case_of(row: dict[str, Any]) -> AnyCase:
    """The case of a row of results; the host's own rows have one too."""
    kind = MultiCase if "adapters" in row else Case
    return kind(**{field.name: row[field.name] for field in dataclasses.fields(kind)})


@dataclass(frozen=True)
class Model:
    """The sizes of a transformer's linear layers. Source: the `config.json` of its checkpoint."""

    name: str
    hidden: int
    intermediate: int
    key_value: int

    def layers(self) -> dict[str, tuple[int, int]]:
        """(K, N) of each projection."""
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (self.hidden, self.key_value),
            "v_proj": (self.hidden, self.key_value),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }


MODELS = (
    Model("llama3-8b", hidden=4096, intermediate=14336, key_value=1024),
    Model("llama3-70b", hidden=8192, intermediate=28672, key_value=1024),
    Model("qwen2.5-32b", hidden=5120, intermediate=27648, key_value=1024),
)


def model_cases(model: Model, tokens: Iterable[int] = TOKENS) -> tuple[Case, ...]:
    """Each size of layer that the model has, once, at every number of tokens."""
    sizes = dict.fromkeys(model.layers().values())
    return tuple(Case(M, N, K) for K, N in sizes for M in tokens)


def _multi_sets() -> dict[str, tuple[MultiCase, ...]]:
    """Around 64 tokens of 64 adapters, the decode step whose adapters weigh half as much as the weight."""
    size, both = 4096, (False, True)
    sets = {
        "multi-adapters": (
            *(MultiCase(64, size, size, adapters) for adapters in (1, 4, 8, 16, 32, 64)),
            *(MultiCase(256, size, size, adapters) for adapters in (1, 8, 32, 64, 128, 256)),
        ),
        "multi-tokens": tuple(MultiCase(tokens, size, size, min(tokens, 64)) for tokens in MULTI_TOKENS),
        "multi-ranks": (
            *(MultiCase(64, size, size, 64, r) for r in (8, 16, 32, 64, 128)),
            *(MultiCase(tokens, size, size, 64, 128, True) for tokens in (64, 1024)),
        ),
        "multi-hidden": tuple(
            MultiCase(64, hidden, hidden, 64, 128 if mixed else 16, mixed)
            for hidden in (2048, 4096, 8192)
            for mixed in both
        ),
    }
    every = (case for cases in sets.values() for case in cases)
    return sets | {"multi": tuple(dict.fromkeys(every))}


def _sets() -> dict[str, tuple[AnyCase, ...]]:
    M, N, K = HEADLINE
    small: dict[str, tuple[AnyCase, ...]] = {
        "small-layer": (
            *(Case(tokens, 256, 256, 8, p, "float32") for tokens in (1, 64, 320) for p in (0.0, 0.1)),
            Case(320, 704, 256, 16, 0.0, "float32"),
            Case(320, 256, 256, 16, 0.0, "bfloat16"),
        ),
        "small-multi": (
            *(MultiCase(64, 256, 256, adapters, 8, dtype="float32") for adapters in (1, 8, 64)),
            MultiCase(1, 256, 256, 1, 8, dtype="float32"),
            MultiCase(64, 256, 256, 16, 64, True, "float32"),
            MultiCase(1024, 256, 256, 8, 16),
        ),
    }
    sets = {
        "headline": tuple(Case(M, N, K, dropout=p) for p in (0.0, 0.1)),
        "tokens": tuple(Case(tokens, N, K) for tokens in TOKENS),
        "ranks": tuple(Case(M, N, K, r) for r in RANKS),
        "dtypes": tuple(Case(M, N, K, dtype=dtype) for dtype in ("bfloat16", "float16", "float32")),
        # The layer sizes, tokens, rank and dropout that LoRAFusion (arXiv 2510.00206) reports its kernels on.
        "lorafusion": tuple(
            Case(tokens, size, size, 16, 0.1) for size in (4096, 5120, 8192) for tokens in (2048, 4096, 8192)
        ),
    } | {model.name: model_cases(model) for model in MODELS}
    large: dict[str, tuple[AnyCase, ...]] = {**sets, **_multi_sets()}
    every = tuple(dict.fromkeys(case for cases in large.values() for case in cases))
    return {"small": small["small-layer"] + small["small-multi"], **small, **large, "all": every}


SETS = _sets()


def cases_of(name: str) -> tuple[AnyCase, ...]:
    """The cases of a named set; several names may be joined by commas.

    Raises:
        ValueError: there is no such set.
    """
    cases: dict[AnyCase, None] = {}
    for part in name.split(","):
        if part not in SETS:
            raise ValueError(f"there is no set {part!r}; sets: {', '.join(SETS)}")
        cases |= dict.fromkeys(SETS[part])
    return tuple(cases)


def tuning_shapes(name: str = "all") -> list[tuple[int, int, int, int, str, float]]:
    """(M, N, K, r, dtype, dropout) of every training step in a set, for the tuner."""
    layers = (case for case in cases_of(name) if isinstance(case, Case))
    return [(case.M, case.N, case.K, case.r, case.dtype, case.dropout) for case in layers]
