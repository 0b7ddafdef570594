"""How a kernel is carried out on a GPU: block sizes, split, warps. Plain data, no Triton."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 512
# What a table may ask for: (least, most, whether only powers of two).
_LIMITS = {
    **{name: (SMALLEST_BLOCK, LARGEST_BLOCK, True) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R")},
    "GROUP_M": (1, 64, False),
    "SPLIT": (1, 64, False),
    "PROGRAMS_PER_SM": (1, 16, False),
    "num_warps": (1, 16, True),
    "num_stages": (1, 8, False),
}


@dataclass(frozen=True)
class KernelConfig:
    """The choices one kernel launch makes. Which of them a kernel reads, its launcher says.

    BLOCK_M, BLOCK_N, BLOCK_K and BLOCK_R tile tokens, output features, input features and rank;
    they are powers of two and at least 16, the smallest operand of a matrix instruction;
    BLOCK_M may be 1 where a kernel has a program for each token, without matrix instructions.
    SPLIT is the number of programs that share one sum: each writes a float32 plane, and the
    planes are added in a fixed order, so that a result is bitwise the same on every run.
    With `tma` tiles are copied through tensor descriptors, and PROGRAMS_PER_SM programs a multiprocessor
    take tile after tile; with `cublas` the base product is torch's own and the kernel adds to it;
    with `late` the low-rank term is added after the loop over K, instead of starting its accumulator;
    with `halves` a tile by TMA is finished and stored in two halves of its columns;
    with `gluon` tiles by TMA are those of the kernel in Gluon, which loads the next tile while one ends;
    with `dependent` a launch may start before the one ahead of it has ended, and waits where it reads its result;
    with `side_stream` the pass runs beside the products that do not wait for it; few_tokens is then, in a CUDA graph,
    torch's own product with x Aᵀ beside it.
    """

    BLOCK_M: int = 64
    BLOCK_N: int = 64
    BLOCK_K: int = 64
    BLOCK_R: int = 16
    GROUP_M: int = 8
    SPLIT: int = 1
    PROGRAMS_PER_SM: int = 1
    num_warps: int = 4
    num_stages: int = 2
    tma: bool = False
    cublas: bool = False
    late: bool = False
    halves: bool = False
    gluon: bool = False
    dependent: bool = False
    side_stream: bool = False

    def to_fields(self) -> dict[str, int | bool]:
        """For JSON: every field, so that a file means the same when a default changes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> KernelConfig:
        """What `to_fields` made. Raises ValueError naming the field that is unknown or wrong."""
        if not isinstance(fields, Mapping):
            raise ValueError(f"a config is {type(fields).__name__}; expected an object with fields of KernelConfig")
        defaults = dataclasses.asdict(cls())
        for name, value in fields.items():
            if name not in defaults:
                raise ValueError(f"config has a field {name!r}; expected only {', '.join(defaults)}")
            kind = type(defaults[name])
            if type(value) is not kind:  # True is an int to isinstance
                raise ValueError(f"config's {name} is {value!r}; expected {kind.__name__}")
            if name in _LIMITS:
                least, most, power_of_two = _LIMITS[name]
                if name == "BLOCK_M" and value == 1:
                    continue
                if not least <= value <= most or (power_of_two and value & (value - 1)):
                    what = "a power of two" if power_of_two else "a number"
                    raise ValueError(f"config's {name} is {value}; expected {what} from {least} to {most}")
        return cls(**fields)
