"""Which configs are worth measuring: all of a grid, less what does not fit, in the order of their predicted time."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import Device
from lorakernels.configs.heuristic import FORMS, cdiv, heuristic, next_power_of_two
from lorakernels.configs.table import misfit
from lorakernels.tools.tune.cost import seconds, work
from lorakernels.tools.tune.problem import Problem


@dataclass(frozen=True)
class Candidate:
    """A config, its predicted time in seconds, and why it will not be measured (empty if it will be)."""

    config: KernelConfig
    predicted: float
    pruned: str = ""


_UNSEEN: dict[str, Any] = {"num_warps": 4, "num_stages": 2, "GROUP_M": 8}
_ALIKE = 2

# The values that each kernel reads, the likeliest first: they decide which of the alike are kept. BLOCK_R follows from
# the rank; a SPLIT is at most the number of tiles to share.
_TMA_BLOCKS = ((128, 256, 64), (256, 128, 64), (128, 128, 64), (128, 128, 128), (64, 256, 64), (128, 64, 64))
_TMA = {"GROUP_M": (8, 16), "num_stages": (3, 4, 5), "num_warps": (8, 4), "PROGRAMS_PER_SM": (1, 2)}
_POINTER_BLOCKS = (
    *((128, 256, 32), (256, 128, 32), (128, 128, 32), (128, 128, 64), (128, 64, 32), (64, 128, 32)),
    *((64, 64, 32), (64, 64, 64), (64, 32, 32)),
)
_POINTERS = {"GROUP_M": (8, 16), "num_stages": (3, 2, 4), "num_warps": (8, 4)}
_CUBLAS_BLOCKS = ((128, 128, 16), (64, 128, 16), (64, 64, 16))
_CUBLAS = {"num_warps": (8, 4)}
_LOOP = {"num_stages": (3, 2, 4), "num_warps": (8, 4), "SPLIT": (1, 2, 4, 8, 16)}
_SHRINK = {"BLOCK_M": (16, 32, 64, 128), "BLOCK_K": (32, 64, 128), **_LOOP}
_FEW_TOKENS = {"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (32, 64, 128), "BLOCK_K": (32, 64, 128), **_LOOP}
_OUTER = {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128, 256), **_LOOP}
_MULTI_SHRINK = {"BLOCK_M": FORMS, "BLOCK_K": (32, 64, 128, 256), **_LOOP}
_MULTI_EXPAND = {"BLOCK_M": FORMS, "BLOCK_N": (32, 64, 128, 256), "num_warps": (4, 8, 2)}
_MULTI_OUTER = {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128), **_LOOP}

# The likeliest of each kernel, in this order: what is measured where time is short. For the passes more stages than the
# heuristic's two, whose loop drains every load before it starts the next, and more programs (not measured yet).
_OVER_K = ("BLOCK_M", "BLOCK_K", "SPLIT", "num_warps", "num_stages")
_OVER_TOKENS = ("BLOCK_M", "BLOCK_N", "SPLIT", "num_warps", "num_stages")
_TILES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "GROUP_M", "PROGRAMS_PER_SM", "tma", "cublas")
_OUTERS = (
    *((64, 128, 8, 8, 3), (64, 64, 8, 4, 4), (64, 128, 16, 8, 3), (128, 64, 8, 8, 3), (64, 64, 4, 4, 4)),
    *((32, 128, 16, 4, 4), (64, 128, 4, 8, 4), (128, 128, 8, 8, 3), (32, 64, 16, 4, 4), (64, 256, 16, 8, 2)),
)
_FIRST: dict[str, tuple[tuple[str, ...], tuple[tuple[int | bool, ...], ...]]] = {
    "shrink": (
        _OVER_K,
        (
            *((64, 64, 2, 4, 4), (64, 64, 4, 4, 4), (32, 128, 2, 4, 4), (128, 64, 2, 8, 4), (64, 128, 2, 8, 3)),
            *((32, 64, 4, 4, 4), (64, 64, 1, 4, 4), (16, 128, 4, 4, 4), (64, 128, 4, 4, 3), (128, 64, 4, 4, 3)),
        ),
    ),
    "outer": (_OVER_TOKENS, _OUTERS),
    "linear_expand": (
        _TILES,
        (
            *((128, 256, 64, 8, 3, group, 1, True, False) for group in (8, 16, 4)),
            *((128, 128, 64, 4, 3, 8, 2, True, False), (256, 128, 64, 8, 3, 8, 1, True, False)),
            *((128, 128, 64, 8, 4, 8, 1, True, False), (128, 128, 64, 4, 4, 8, 1, True, False)),
            *((128, 128, 128, 8, 3, 8, 1, True, False), (64, 256, 64, 8, 4, 8, 1, True, False)),
            *((128, 128, 16, 8, 2, 8, 1, False, True), (64, 128, 16, 4, 2, 8, 1, False, True)),
            (64, 64, 16, 4, 2, 8, 1, False, True),
        ),
    ),
    "few_tokens": (
        ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT", "num_warps", "num_stages"),
        (
            *((64, 64, 128, 4, 4, 4), (64, 64, 64, 4, 4, 4), (64, 128, 64, 8, 8, 4), (64, 32, 128, 4, 4, 4)),
            *((16, 64, 128, 8, 4, 4), (128, 64, 64, 4, 8, 4), (64, 64, 128, 2, 8, 3), (16, 128, 128, 16, 4, 4)),
        ),
    ),
    "multi_shrink": (
        _OVER_K,
        (
            *((1, 256, 16, 4, 2), (1, 256, 8, 4, 2), (1, 512, 8, 4, 2), (1, 128, 16, 2, 3), (1, 128, 8, 4, 4)),
            *((16, 128, 16, 4, 4), (16, 256, 8, 4, 3), (16, 64, 16, 2, 4), (64, 64, 4, 4, 4), (64, 128, 2, 8, 3)),
        ),
    ),
    "multi_expand": (
        ("BLOCK_M", "BLOCK_N", "num_warps"),
        (
            *((1, 128, 2), (1, 256, 4), (1, 128, 4), (1, 64, 2), (1, 512, 4)),
            *((16, 128, 4), (16, 64, 2), (16, 256, 4), (64, 128, 4), (64, 64, 4)),
        ),
    ),
    "multi_outer": (_OVER_TOKENS, _OUTERS),
}


def first_candidates(problem: Problem, device: Device) -> list[KernelConfig]:
    """The heuristic's config, then a short fixed list of the likeliest: a dozen to compile and measure."""
    names, rows = _FIRST[problem.operation]
    fields: list[dict[str, Any]] = [dict(zip(names, row, strict=True)) for row in rows]
    if "SPLIT" in names:
        summed, block = (problem.K, "BLOCK_K") if "BLOCK_K" in names else (problem.M, "BLOCK_M")
        fields = [chosen for chosen in fields if chosen["SPLIT"] <= cdiv(summed, chosen[block])]
    return _fitting(problem, device, (KernelConfig(**chosen) for chosen in fields))


def candidates(problem: Problem, device: Device) -> list[KernelConfig]:
    """Every config of the grid that a launch may take; the heuristic's is the first, so that it is always measured."""
    return _fitting(problem, device, _GRIDS[problem.operation](problem))


def _fitting(problem: Problem, device: Device, configs: Iterable[KernelConfig]) -> list[KernelConfig]:
    """Of the heuristic's config and these, with the rank's block, those that a launch may take."""
    p = problem
    first = heuristic(p.operation, p.M, p.N, p.K, p.r, p.itemsize, device.arch, p.tma, p.batch)
    found = [first, *(replace(config, BLOCK_R=_rank_block(p)) for config in configs)]
    tiles = p.batch is not None and p.batch.tiles

    def fits(config: KernelConfig) -> bool:
        return misfit(p.operation, config, p.r, p.itemsize, p.tma, device.arch, tiles) is None

    return [config for config in dict.fromkeys(found) if fits(config)]


def ranked(
    problem: Problem, device: Device, configs: list[KernelConfig], keep: int, programs_per_sm: dict[KernelConfig, int]
) -> list[Candidate]:
    """The candidates, the fastest first by the model; all but about `keep` are pruned.

    The model does not see warps, stages and the order of tiles, so of configs that differ in nothing else a few are
    kept, not all. The first of `configs`, the heuristic's, and the best of each form (descriptors, pointers, cuBLAS; a
    program a token) are kept whatever the model says. `programs_per_sm` is what the compiler found for a config; where
    it has not been asked, one.
    """
    p = problem

    def predicted(config: KernelConfig) -> float:
        resident = config.PROGRAMS_PER_SM if config.tma else programs_per_sm.get(config, 1)
        needed = work(p.operation, p.M, p.N, p.K, p.r, p.itemsize, config, p.slots)
        return seconds(needed, device, p.itemsize, resident)

    order = sorted(configs, key=predicted)
    alike: Counter[KernelConfig] = Counter()
    forms: set[tuple[bool, bool, bool]] = set()
    rows, kept = [], 0
    for config in order:
        same, form = replace(config, **_UNSEEN), (config.tma, config.cublas, config.BLOCK_M == 1)
        why = ""
        if config != configs[0] and form in forms:
            if kept >= keep:
                why = f"predicted {predicted(config) / predicted(order[0]):.2f} times the best"
            elif alike[same] >= _ALIKE:
                why = f"like {_ALIKE} others, but for warps, stages or the order of tiles"
        if not why:
            kept += 1
            alike[same] += 1
            forms.add(form)
        rows.append(Candidate(config, predicted(config), why))
    return rows


def _rank_block(problem: Problem) -> int:
    """BLOCK_R: the whole rank where a kernel holds it at once, and no more than its accumulators have room for."""
    if problem.operation == "linear_expand":
        return 16
    whole = max(next_power_of_two(problem.r), 16)
    return whole if problem.operation == "few_tokens" else min(whole, 64 if problem.itemsize <= 2 else 32)


def _grid(values: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, Any]]:
    for chosen in itertools.product(*values.values()):
        yield dict(zip(values, chosen, strict=True))


def _linear_expand(p: Problem) -> Iterator[KernelConfig]:
    tma, pointers, cublas = (_TMA_BLOCKS, _TMA), (_POINTER_BLOCKS, _POINTERS), (_CUBLAS_BLOCKS, _CUBLAS)
    for (blocks, values), form in ((tma, {"tma": True}), (pointers, {}), (cublas, {"cublas": True})):
        for (m, n, k), chosen in itertools.product(blocks, _grid(values)):
            yield KernelConfig(m, n, k, **chosen, **form)


def _passes(p: Problem, values: Mapping[str, tuple[int, ...]], summed: int, block: str) -> Iterator[KernelConfig]:
    """Of kernels that split the sum over `summed`, which they take in tiles of `block`. No mostly empty rows."""
    rows = max(next_power_of_two(p.M), 32)
    for chosen in _grid(values):
        if chosen["SPLIT"] <= cdiv(summed, chosen[block]) and chosen["BLOCK_M"] <= rows:
            yield KernelConfig(**chosen)


_GRIDS: dict[str, Callable[[Problem], Iterator[KernelConfig]]] = {
    "shrink": lambda p: _passes(p, _SHRINK, p.K, "BLOCK_K"),
    "few_tokens": lambda p: _passes(p, _FEW_TOKENS, p.K, "BLOCK_K"),
    "linear_expand": _linear_expand,
    "outer": lambda p: _passes(p, _OUTER, p.M, "BLOCK_M"),
    "multi_shrink": lambda p: _passes(p, _MULTI_SHRINK, p.K, "BLOCK_K"),
    "multi_expand": lambda p: (KernelConfig(**chosen) for chosen in _grid(_MULTI_EXPAND)),
    "multi_outer": lambda p: _passes(p, _MULTI_OUTER, p.M, "BLOCK_M"),
}
