"""Finds the fastest right config of every launch on the device at hand, and writes the device's table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import triton
from tqdm import tqdm

from lorakernels.backend import BackendError, interpreter_on
from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import Device, assume, device_of
from lorakernels.configs.table import clear
from lorakernels.configs.table_file import Entry, Table, read_table, write_table
from lorakernels.kernels.launch import record_launches
from lorakernels.tools.arch import ARCHS
from lorakernels.tools.compile_report import CompileRow, compile_report
from lorakernels.tools.tune.candidates import candidates
from lorakernels.tools.tune.problem import Problem, Shape, problems_of
from lorakernels.tools.tune.trial import Check, Inputs, make_inputs, run

# Buffers are rotated, so that no launch finds its operands in L2: they take twice its size together, within reason.
_MOST_ROTATED = 16

Step = Callable[[], object]
# Times of several rounds, [configs, rounds] in seconds. Each config has a list of steps: one for each rotated buffer.
Timer = Callable[[Sequence[Sequence[Step]]], np.ndarray]
Listed = Mapping[str, Sequence[KernelConfig]]  # candidates by operation


@dataclass
class Result:
    """What a run of the tuner did. `dropped` are configs that do not run, or whose results are wrong."""

    table: Table
    tuned: list[Entry] = field(default_factory=list)
    skipped: int = 0
    dropped: list[tuple[Problem, KernelConfig, str]] = field(default_factory=list)
    left: list[Problem] = field(default_factory=list)  # no config is right
    postponed: list[Problem] = field(default_factory=list)  # the time was over

    @property
    def ok(self) -> bool:
        """Every launch has its entry, and no config gave a wrong result. That some do not run is to be expected."""
        return not self.left and not any(why.startswith("wrong") for _, _, why in self.dropped)


def current_gpu() -> torch.device:
    """Raises BackendError where there is none."""
    if not torch.cuda.is_available():
        raise BackendError("tuning times kernels, and there is no GPU here: run it where one is, or with --dry-run")
    return torch.device("cuda", torch.cuda.current_device())


def tune(
    shapes: Iterable[Shape],
    out: Path,
    device: torch.device,
    timer: Timer,
    *,
    timed_by: str,
    slots: int | None = None,
    resume: bool = False,
    jobs: int = 2,
    short: bool = False,
    limit: float | None = None,
    listed: Listed | None = None,
) -> Result:
    """Measure the candidates of every launch of these layers (M, N, K, r, dtype, dropout), and write the table `out`.

    An N that is a tuple is a group's, of several layers of one input. With `slots` the launches are those for many
    adapters, so many in a batch.

    The file is written after each entry. One that is there already keeps its other entries; with `resume` launches
    that it holds are not measured again. `timed_by` says in the table what the timer is. With `short` there are no
    neighbours among the candidates, and none is compiled for the compile report first. After `limit` seconds no further
    launch is begun. `listed` are candidates to be measured before all others.

    Raises:
        ValueError: `out` is not a table, or is another device's; a shape cannot be.
    """
    gpu = device_of(device)
    problems = problems_of(shapes, slots)
    result = Result(_table_at(out, gpu))
    done = {(entry.key, entry.M, entry.slots) for entry in result.table.entries} if resume else set()
    end = None if limit is None else time.monotonic() + limit
    progress = tqdm(problems, desc="tune", unit="launch", disable=None)
    for problem in progress:
        if (problem.key, problem.M, problem.slots) in done:
            result.skipped += 1
            continue
        if end is not None and time.monotonic() > end:
            result.postponed.append(problem)
            continue
        progress.set_postfix_str(str(problem))
        if short:
            configs = candidates(problem, gpu, neighbours=False, listed=listed)
        else:
            configs, faults = shortlist(problem, gpu, jobs, listed)
            result.dropped += [(problem, config, why) for config, why in faults.items()]
        entry = _measure(problem, configs, device, timer, timed_by, result)
        if entry is None:
            result.left.append(problem)
            continue
        result.tuned.append(entry)
        result.table.put(entry)
        write_table(out, result.table)
    clear()  # so that this process takes what was found
    return result


def shortlist(
    problem: Problem, gpu: Device, jobs: int = 2, listed: Listed | None = None
) -> tuple[list[KernelConfig], dict[KernelConfig, str]]:
    """The candidates that will be measured, and of the others what the compiler finds wrong: spills, or no room.

    An architecture that the compile report does not know, and the interpreter, compile nothing.
    """
    configs = candidates(problem, gpu, listed=listed)
    if gpu.arch not in ARCHS or interpreter_on():
        return configs, {}
    with assume(gpu), record_launches() as launches:
        inputs = make_inputs(problem, torch.device("meta"))
        for config in configs:
            run(problem, config, inputs)
    rows = compile_report(launches, [gpu.arch], jobs, progress=False)
    faults = {row.config: fault for row in rows if row.config in configs and (fault := _fault(row))}
    return [config for config in configs if config not in faults], faults


def _fault(row: CompileRow) -> str:
    """The compile report's other rules are for what ships; a candidate that breaks one may still be the fastest."""
    if row.registers is None or row.spill_bytes or not row.ctas_per_sm:
        return row.why or "does not fit a multiprocessor"
    if row.tma and row.ctas_per_sm < row.config.PROGRAMS_PER_SM:
        return f"{row.config.PROGRAMS_PER_SM} programs a multiprocessor, where {row.ctas_per_sm} fits"
    return ""


def _measure(
    problem: Problem,
    configs: Sequence[KernelConfig],
    device: torch.device,
    timer: Timer,
    timed_by: str,
    result: Result,
) -> Entry | None:
    """The entry of the fastest config whose results are right; None if there is none. The heuristic's is the first."""
    sets = [make_inputs(problem, device)]
    sets += [make_inputs(problem, device) for _ in range(_rotated(sets[0], device) - 1)]
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a launch that is dependent may read what is being written ahead of it
    right, check = [], None
    for config in configs:
        try:
            outputs = run(problem, config, sets[0])
            check = check or Check(problem, sets[0], outputs)
            fault = check.fault(outputs)
        except Exception as error:  # a compiler's or a driver's, of any kind: this config is out, the others are not
            fault = f"does not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if fault:
            result.dropped.append((problem, config, fault))
        else:
            right.append(config)
    if not right:
        return None
    check = None  # holds results in float64
    times = timer([[partial(run, problem, config, inputs) for inputs in sets] for config in right])
    medians = np.median(times, axis=1)
    best = int(np.argmin(medians))
    p20, p50, p80 = (round(1e6 * float(t), 3) for t in np.percentile(times[best], [20, 50, 80]))
    measured = {
        "dtype": str(problem.dtype).removeprefix("torch."),
        "dropout": problem.dropout,
        "timed_by": timed_by,
        "microseconds": p50,
        "p20": p20,
        "p80": p80,
        "configs": len(right),
        "slowest_microseconds": round(1e6 * float(medians.max()), 3),
    }
    p = problem
    return Entry(p.operation, p.M, p.N, p.K, p.r, p.itemsize, right[best], measured, p.slots)


def _rotated(inputs: Inputs, device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(_MOST_ROTATED, 1 + 2 * cache // max(inputs.num_bytes, 1)))


def _table_at(out: Path, gpu: Device) -> Table:
    """The table in the file, or a new one."""
    versions = {"triton": triton.__version__, "torch": str(torch.__version__)}
    if not out.exists():
        return Table(f"table {out}", gpu.name, gpu.arch, [], versions)
    table, problems = read_table(out)
    if problems:
        raise ValueError(f"{out}: {problems[0]}; mend it, or write to another file with --out")
    if (table.device, table.arch) != (gpu.name, gpu.arch):
        raise ValueError(f"{out} is the table of {table.device} ({table.arch}), and this is {gpu.name} ({gpu.arch})")
    table.versions = versions
    return table


def print_result(result: Result, out: Path) -> None:
    for problem, config, why in result.dropped:
        print(f"dropped {problem}: {_brief(config)}: {why}")
    for problem in result.left:
        print(f"no config is right: {problem}")
    print(f"{len(result.tuned)} launches tuned, {result.skipped} were in {out} already, {len(result.dropped)} dropped")
    if result.postponed:
        print(f"the time was over before {len(result.postponed)} launches; go on with --resume")


def print_shortlists(
    shapes: Iterable[Shape], gpu: Device, jobs: int = 2, slots: int | None = None, listed: Listed | None = None
) -> None:
    """What `tune` would measure on this device, and which candidates the compiler rules out. Times nothing."""
    for problem in problems_of(shapes, slots):
        configs, faults = shortlist(problem, gpu, jobs, listed)
        print(f"{problem} on {gpu.name}: {len(configs) + len(faults)} candidates, {len(configs)} to be measured")
        for config in configs:
            print(f"  {_brief(config)}")
        for config, why in faults.items():
            print(f"  not {_brief(config)}: {why}")


def _brief(config: KernelConfig) -> str:
    c = config
    form = "cublas" if c.cublas else f"tma, {c.PROGRAMS_PER_SM} programs" if c.tma else "pointers"
    form = ", ".join([form, *(flag for flag in ("late", "halves", "dependent", "side_stream") if getattr(c, flag))])
    tiles = f"{c.BLOCK_M}×{c.BLOCK_N}×{c.BLOCK_K}×{c.BLOCK_R}"
    return f"{tiles} split {c.SPLIT}, {c.num_warps} warps, {c.num_stages} stages, groups of {c.GROUP_M}, {form}"
