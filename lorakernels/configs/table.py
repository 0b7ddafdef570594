"""Which KernelConfig a launch takes: what a caller forces, else what was tuned for the device, else a heuristic.

A device's tuned launches are in the user's table, which wins, and in the one that ships with the package. Both are
read at the first launch on a GPU. What is wrong with a table is a warning, once; nothing is ever tuned at a launch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from lorakernels.configs import table_file
from lorakernels.configs.config import KernelConfig
from lorakernels.configs.data_sheet import speed_of
from lorakernels.configs.device import UNKNOWN, Device, device_of, is_here
from lorakernels.configs.heuristic import FORMS, TMA_ARCHS, Batch, heuristic
from lorakernels.configs.table_file import Table, key_of, read_table

# The few-token form reads A once for every block of output columns, so it stops paying when
# a block of columns is no longer much wider than the rank.
FEW_TOKENS = 256
FEW_TOKENS_MAX_RANK = 64

_forced: Mapping[str, KernelConfig] | None = None
_loaded: dict[str, Table] = {}  # by device name
_struck_out: dict[tuple[str, KernelConfig, Device], str] = {}  # what a launch has found not to fit, and why
_warned: set[str] = set()
generation = 0  # goes up where `choose` may give another config than before


class Choice(NamedTuple):
    """A config and where it comes from."""

    config: KernelConfig
    source: str


class Asked(NamedTuple):
    """What a launcher asked `choose` for, and what it got."""

    operation: str
    M: int
    N: int
    K: int
    r: int
    itemsize: int
    tma: bool
    batch: Batch | None
    choice: Choice


_asked: ContextVar[list[Asked] | None] = ContextVar("asked", default=None)  # a thread its own


def takes_few_tokens_form(M: int, r: int, itemsize: int) -> bool:
    """Whether the layer is one kernel, which makes x Aᵀ again for each block of output columns."""
    return M <= FEW_TOKENS and r <= (FEW_TOKENS_MAX_RANK if itemsize <= 2 else FEW_TOKENS_MAX_RANK // 2)


def takes_one_pass(N: int, r: int, itemsize: int, block_n: int) -> bool:
    """Whether one read of dy for G and dB costs less than two.

    In one, each block of columns writes a float32 plane of G that is read again: 8 r / block_n bytes an element of
    dy, where reading it a second time takes `itemsize`.
    """
    return block_n >= N or 8 * r < itemsize * block_n


def choose(
    operation: str,
    M: int,
    N: int,
    K: int,
    r: int,
    itemsize: int,
    device: torch.device,
    tma: bool = False,
    batch: Batch | None = None,
) -> KernelConfig:
    """The config of `operation` for M tokens, N output and K summed features and rank r.

    `itemsize` is that of x in bytes: float32 products run without tensor cores unless TF32 is
    allowed, and take smaller tiles. `tma` says that the operands fit tensor descriptors. The operations for many
    adapters have a `batch`, in N and K their one number of columns, and in r the widest rank.
    """
    choice = choose_with_source(operation, M, N, K, r, itemsize, device, tma, batch)
    if (asked := _asked.get()) is not None:
        asked.append(Asked(operation, M, N, K, r, itemsize, tma, batch, choice))
    return choice.config


def choose_with_source(
    operation: str,
    M: int,
    N: int,
    K: int,
    r: int,
    itemsize: int,
    device: torch.device,
    tma: bool = False,
    batch: Batch | None = None,
) -> Choice:
    """As `choose`, with the table's entry, or the heuristic, that the config comes from."""
    if _forced is not None and operation in _forced:
        return Choice(_forced[operation], "forced")
    gpu, is_gpu = device_of(device), device.type == "cuda" or is_here()
    return _choice(operation, M, N, K, r, itemsize, tma, batch, gpu, is_gpu, len(_struck_out))


@contextmanager
def forced_configs(configs: Mapping[str, KernelConfig]) -> Iterator[None]:
    """Use these configs, by operation, inside the block, in all threads: for tests and the tuner."""
    global _forced
    outer, _forced = _forced, configs
    _next_generation()
    try:
        yield
    finally:
        _forced = outer
        _next_generation()


def is_recorded() -> bool:
    """Whether this thread's choices are recorded."""
    return _asked.get() is not None


@contextmanager
def record_choices() -> Iterator[list[Asked]]:
    """Collect what this thread's launchers ask `choose` for inside the block, in order."""
    asked: list[Asked] = []
    outer = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(outer)


def load_table(path: str | os.PathLike[str]) -> Table:
    """Use the table in this file for its device from now on, before the user's and the shipped one.

    Raises OSError or ValueError, and changes nothing, if the file or an entry of it is not right.
    """
    table, problems = read_table(Path(path))
    if problems:
        raise ValueError(f"{path}: {problems[0]}" + (f" (and {len(problems) - 1} more)" if problems[1:] else ""))
    _forget()
    _loaded[table.device] = table
    return table


def clear() -> None:
    """Forget every table and choice: tables are read again at the next launch."""
    _loaded.clear()
    _struck_out.clear()
    _warned.clear()
    _forget()


def strike_out(operation: str, config: KernelConfig, device: torch.device, why: str) -> bool:
    """Take a config, which did not fit when it was launched, out of the tables: the next in line is chosen from now on.

    False if nothing can be done: it was forced, or no table gave it. What is struck out already is no error: several
    threads may be refused it at once. The heuristic, which is last in line, may still give it.
    """
    gpu = device_of(device)
    tuned = (entry for table in _tables(gpu, device.type == "cuda") for entry in table.entries)
    forced = _forced is not None and operation in _forced
    if forced or (operation, config) not in ((e.operation, e.config) for e in tuned):
        return False
    _struck_out.setdefault((operation, config, gpu), " ".join(why.split()))
    _next_generation()
    return True


def misfit(
    operation: str, config: KernelConfig, r: int, itemsize: int, tma: bool, arch: str, tiles: bool = False
) -> str | None:
    """Why a launch may not take this config; None when it may. `tiles` is `Batch.tiles`."""
    if operation in ("multi_shrink", "multi_expand"):
        if config.BLOCK_M not in FORMS:
            heights = ", ".join(map(str, FORMS))
            return f"BLOCK_M is {config.BLOCK_M}; {operation} takes one of {heights}: a token, or a plan's tiles"
        if tiles and config.BLOCK_M == 1:
            return "dropout, or a sum of slices, takes tiles, and BLOCK_M is 1, a program a token"
    elif config.BLOCK_M == 1:
        return f"BLOCK_M of 1, a program a token, is for multi_shrink and multi_expand, not for {operation}"
    if config.tma and (operation != "linear_expand" or arch not in TMA_ARCHS):
        return f"tma is for linear_expand on {' and '.join(TMA_ARCHS)}, not for {operation} on {arch}"
    if config.tma and (not tma or max(config.BLOCK_M, config.BLOCK_N, config.BLOCK_K) > 256):
        return "the operands, or the blocks, do not fit tensor descriptors"
    if config.cublas and operation != "linear_expand":
        return f"cublas is for linear_expand, not for {operation}"
    if config.late and operation != "linear_expand":
        return f"late is for linear_expand, not for {operation}"
    if config.halves and not (config.tma and config.BLOCK_N >= 32):
        return f"halves is for tiles by TMA of at least 32 columns; tma is {config.tma}, BLOCK_N is {config.BLOCK_N}"
    if config.gluon and (operation != "linear_expand" or arch != "sm_90" or itemsize != 2):
        return f"gluon is for linear_expand of 16 bits on sm_90, not for {operation} of {8 * itemsize} bits on {arch}"
    if config.gluon and not (config.tma and config.late):
        return f"gluon is for what is late and by TMA; late is {config.late}, tma is {config.tma}"
    parts = 1 + config.halves
    if config.gluon and (config.num_warps < 4 or config.BLOCK_M % (16 * config.num_warps) or config.num_stages < 2):
        return "gluon asks for 4 warps, 16 rows a warp and 2 stages at least"
    if config.gluon and 2 * config.BLOCK_R * parts > config.BLOCK_M:
        return f"gluon has room for {config.BLOCK_M // (2 * parts)} ranks at a time, and BLOCK_R is {config.BLOCK_R}"
    if config.dependent and (operation not in ("linear_expand", "multi_expand") or arch not in TMA_ARCHS):
        on = " and ".join(TMA_ARCHS)
        return f"dependent is for linear_expand and multi_expand on {on}, not for {operation} on {arch}"
    if config.side_stream and operation not in ("outer", "few_tokens"):
        return f"side_stream is for outer and few_tokens, not for {operation}"
    if operation == "few_tokens" and r > config.BLOCK_R:
        return f"few_tokens holds the whole rank in one block: BLOCK_R is {config.BLOCK_R}, and r is {r}"
    if operation in ("linear_expand", "multi_expand") and config.SPLIT != 1:
        return f"{operation} does not split its sum"
    limit, needed = speed_of(arch).shared_per_block, pipeline_bytes(operation, config, itemsize)
    if needed > limit:
        return f"its pipeline takes {needed} bytes of shared memory, and a block has {limit}"
    return None


def pipeline_bytes(operation: str, config: KernelConfig, itemsize: int) -> int:
    """The shared memory that a launch takes at least: its loop's tiles, once for each stage but the last."""
    c = config
    tiles = {
        "shrink": (c.BLOCK_M + c.BLOCK_R) * c.BLOCK_K,
        "linear_expand": 0 if c.cublas else (c.BLOCK_M + c.BLOCK_N) * c.BLOCK_K,
        "few_tokens": (c.BLOCK_M + c.BLOCK_N + c.BLOCK_R) * c.BLOCK_K,
        "outer": (c.BLOCK_N + c.BLOCK_R) * c.BLOCK_M,
        "multi_shrink": 0 if c.BLOCK_M == 1 else (c.BLOCK_M + c.BLOCK_R) * c.BLOCK_K,
        "multi_outer": (c.BLOCK_N + c.BLOCK_R) * c.BLOCK_M,
    }
    pipeline = tiles.get(operation, 0) * itemsize
    if c.gluon:  # all of it: the stages, a tile of y, the barriers
        return (pipeline + 8) * c.num_stages + c.BLOCK_M * c.BLOCK_N // (1 + c.halves) * itemsize
    return pipeline * (c.num_stages - 1)


def _forget() -> None:
    _choice.cache_clear()
    _tables.cache_clear()
    _next_generation()


def _next_generation() -> None:
    global generation
    generation += 1


@lru_cache(maxsize=16384)
def _choice(
    operation: str,
    M: int,
    N: int,
    K: int,
    r: int,
    itemsize: int,
    tma: bool,
    batch: Batch | None,
    device: Device,
    is_gpu: bool,
    num_struck_out: int,
) -> Choice:
    """`num_struck_out` keeps choices apart: one that another thread is making while a config is struck out is past."""
    slots, tiles = (1, False) if batch is None else (batch.slots, batch.tiles)
    if device != UNKNOWN:
        for table in _tables(device, is_gpu):
            for entry in table.nearest(key_of(operation, N, K, r, itemsize), M, slots):
                config = entry.config
                problem = misfit(operation, config, r, itemsize, tma, device.arch, tiles)
                problem = problem or _struck_out.get((operation, config, device))
                if problem is None:
                    return Choice(config, f"{table.name}, {entry}")
                # Rows that no descriptor takes, and dropout, are nobody's mistake.
                if not (config.tma and not tma) and not (config.BLOCK_M == 1 and tiles):
                    _warn(f"{table.name}, {operation}, {entry} is not used: {problem}")
    return Choice(heuristic(operation, M, N, K, r, itemsize, device.arch, tma, batch), "heuristic")


@lru_cache(maxsize=64)
def _tables(device: Device, is_gpu: bool) -> tuple[Table, ...]:
    """The tables of a device, the strongest first. A device that is assumed has no user."""
    tables = [_loaded[device.name]] if device.name in _loaded else []
    paths = {f"shipped table {device.slug}": table_file.shipped_path(device)}
    if is_gpu:
        try:
            path = table_file.user_path(device)
            paths = {f"user table {path}": path, **paths}
        except RuntimeError as error:  # no home directory, as in a container with a user of its own
            _warn(f"there is no user table: {str(error).rstrip('.')}; set LORAKERNELS_CACHE")
    none_found = not tables
    for name, path in paths.items():
        try:
            if not path.exists():
                continue
            none_found = False
            table, problems = read_table(path, name)
        except (OSError, ValueError) as error:
            _warn(f"the tuning table is not used: {error}")
            continue
        if (table.device, table.arch) != (device.name, device.arch):
            _warn(f"{name} is for {table.device} ({table.arch}), not for {device.name} ({device.arch}): it is not used")
            continue
        if problems:
            _warn(f"{name}: {len(problems)} of its entries are not used; {problems[0]}")
        tables.append(table)
    if is_gpu and none_found:
        _warn(f"there is no tuning table of {device.name}, so launches take the heuristic's configs")
    return tuple(tables)


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"lorakernels: {message}; see `lorakernels tune`", RuntimeWarning, stacklevel=4)
