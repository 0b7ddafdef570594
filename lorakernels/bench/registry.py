"""What is measured: operations and shapes, as data, in named sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

TOKENS = (1, 16, 64, 256, 1024, 2048, 4096, 8192, 16384)
RANKS = (4, 8, 16, 32, 64, 128, 256)
HEADLINE = (8192, 4096, 4096)


@dataclass(frozen=True, order=True)
class Case:
    """One training step of one layer: x [M, K], weight [N, K], rank r."""

    M: int
    N: int
    K: int
    r: int = 16
    dropout: float = 0.0
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def aligned(self) -> bool:
        """Whether every row starts at a multiple of 16 bytes, as tensor descriptors ask."""
        return self.K * self.itemsize % 16 == 0 and self.N * self.itemsize % 16 == 0

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return f"{self.M}x{self.N}x{self.K} r={self.r} p={self.dropout:g} {self.dtype}"


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


def _sets() -> dict[str, tuple[Case, ...]]:
    M, N, K = HEADLINE
    sets = {
        "small": (
            *(Case(tokens, 256, 256, 8, p, "float32") for tokens in (1, 64, 320) for p in (0.0, 0.1)),
            Case(320, 704, 256, 16, 0.0, "float32"),
            Case(320, 256, 256, 16, 0.0, "bfloat16"),
        ),
        "headline": tuple(Case(M, N, K, dropout=p) for p in (0.0, 0.1)),
        "tokens": tuple(Case(tokens, N, K) for tokens in TOKENS),
        "ranks": tuple(Case(M, N, K, r) for r in RANKS),
        "dtypes": tuple(Case(M, N, K, dtype=dtype) for dtype in ("bfloat16", "float16", "float32")),
        # The layer sizes, tokens, rank and dropout that LoRAFusion (arXiv 2510.00206) reports its kernels on.
        "lorafusion": tuple(
            Case(tokens, size, size, 16, 0.1) for size in (4096, 5120, 8192) for tokens in (2048, 4096, 8192)
        ),
    } | {model.name: model_cases(model) for model in MODELS}
    every = (case for name, cases in sets.items() if name != "small" for case in cases)
    return sets | {"all": tuple(dict.fromkeys(every))}


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


def tuning_shapes(name: str = "all") -> list[tuple[int, int, int, int, str, float]]:
    """(M, N, K, r, dtype, dropout) of every case of a set, for the tuner."""
    return [(case.M, case.N, case.K, case.r, case.dtype, case.dropout) for case in cases_of(name)]
