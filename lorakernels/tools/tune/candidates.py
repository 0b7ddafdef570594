"""Which configs are worth measuring: the heuristic's, those of a file, the likeliest of a list, and the neighbours."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import Device
from lorakernels.configs.heuristic import MULTI_OPERATIONS, OPERATIONS, cdiv, heuristic, next_power_of_two
from lorakernels.configs.table import misfit
from lorakernels.tools.tune.problem import Problem

# By hand, the likeliest first (not measured yet). BLOCK_R follows from the rank.
_OVER_K = ("BLOCK_M", "BLOCK_K", "SPLIT", "num_warps", "num_stages")
_OVER_TOKENS = ("BLOCK_M", "BLOCK_N", "SPLIT", "num_warps", "num_stages")
_TILES = (
    *("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "GROUP_M", "PROGRAMS_PER_SM"),
    *("tma", "late", "halves", "dependent", "cublas"),
)
_EARLY, _LATE, _POINTERS = (True, False, True, True, False), (True, True, True, True, False), (False,) * 4
_OUTERS = (
    *((64, 128, 8, 8, 3), (64, 64, 8, 4, 4), (64, 128, 16, 8, 3), (128, 64, 8, 8, 3), (64, 64, 4, 4, 4)),
    *((32, 128, 16, 4, 4), (64, 128, 4, 8, 4), (128, 128, 8, 8, 3), (32, 64, 16, 4, 4), (64, 256, 16, 8, 2)),
)
_LIKELIEST: dict[str, tuple[tuple[str, ...], tuple[tuple[int | bool, ...], ...]]] = {
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
            # A fourth stage in what stores by halves leave; two programs a multiprocessor, whose ends hide behind each
            # other's loops; the low-rank term early, and everything as it was before it could be late.
            *(
                (128, 256, 64, 8, 4, 8, 1, *_LATE),
                (128, 128, 64, 4, 3, 8, 2, *_LATE),
                (128, 256, 64, 8, 3, 16, 1, *_LATE),
            ),
            *((128, 256, 64, 8, 3, 8, 1, *_EARLY), (128, 256, 64, 8, 4, 8, 1, *_EARLY)),
            (128, 256, 64, 8, 3, 8, 1, True, False, False, False, False),
            *(
                (256, 128, 64, 8, 4, 8, 1, *_LATE),
                (128, 128, 64, 8, 4, 8, 1, *_LATE),
                (128, 128, 64, 4, 4, 8, 1, *_LATE),
            ),
            *((128, 128, 128, 8, 3, 8, 1, *_LATE), (64, 256, 64, 8, 4, 8, 1, *_LATE)),
            *((128, 128, 16, 8, 2, 8, 1, *_POINTERS, True), (64, 128, 16, 4, 2, 8, 1, *_POINTERS, True)),
            (64, 64, 16, 4, 2, 8, 1, *_POINTERS, True),
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


def candidates(
    problem: Problem,
    device: Device,
    neighbours: bool = True,
    listed: Mapping[str, Sequence[KernelConfig]] | None = None,
) -> list[KernelConfig]:
    """The heuristic's config, those `listed`, the likeliest, the heuristic's neighbours: what of them may be taken."""
    p, batch = problem, problem.batch
    first = heuristic(p.operation, p.M, p.N, p.K, p.r, p.itemsize, device.arch, p.tma, batch)
    names, rows = _LIKELIEST[p.operation]
    fields: list[dict[str, Any]] = [dict(zip(names, row, strict=True)) for row in rows]
    # What runs beside what is not for a kernel's own time to tell.
    found = [*(listed or {}).get(p.operation, ())]
    found += [KernelConfig(**chosen, BLOCK_R=_rank_block(p), side_stream=first.side_stream) for chosen in fields]
    found += _neighbours(first, names) if neighbours else ()
    summed, block = (p.K, "BLOCK_K") if "BLOCK_K" in names else (p.M, "BLOCK_M")

    def fits(config: KernelConfig) -> bool:
        most = cdiv(summed, getattr(config, block))  # a sum has no more parts than tiles
        tiles, own = batch is not None and batch.tiles, config == first
        return (own or most >= config.SPLIT) and not misfit(
            p.operation, config, p.r, p.itemsize, p.tma, device.arch, tiles
        )

    return [config for config in dict.fromkeys([first, *found]) if fits(config)]


def read_list(path: Path) -> dict[str, list[KernelConfig]]:
    """Candidates by operation, of a JSON object with a list of configs (objects of KernelConfig's fields) for each.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such list; the message says where.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    known = (*OPERATIONS, *MULTI_OPERATIONS)
    if not isinstance(content, dict) or not all(isinstance(each, list) for each in content.values()):
        raise ValueError(f"{path} is no list of candidates; expected a JSON object with a list for each operation")
    if unknown := sorted(content.keys() - known):
        raise ValueError(f"{path} has an operation {unknown[0]!r}; operations: {', '.join(known)}")
    found: dict[str, list[KernelConfig]] = {}
    for operation, each in content.items():
        for index, fields in enumerate(each):
            try:
                found.setdefault(operation, []).append(KernelConfig.from_fields(fields))
            except ValueError as error:
                raise ValueError(f"{path}, {operation}, number {index}: {error}") from error
    return found


def _neighbours(config: KernelConfig, names: Sequence[str]) -> Iterator[KernelConfig]:
    """One step from it: a size doubled or halved, a stage more or less."""
    fields = config.to_fields()
    for name in names:
        value = fields[name]
        for other in (value + 1, value - 1) if name == "num_stages" else (value * 2, value // 2):
            with suppress(ValueError):  # no such size, nor a half of what is on or off
                yield KernelConfig.from_fields(fields | {name: other})


def _rank_block(problem: Problem) -> int:
    """BLOCK_R: the whole rank where a kernel holds it at once, and no more than its accumulators have room for."""
    if problem.operation == "linear_expand":
        return 16
    whole = max(next_power_of_two(problem.r), 16)
    return whole if problem.operation == "few_tokens" else min(whole, 64 if problem.itemsize <= 2 else 32)
