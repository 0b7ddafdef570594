"""Finds the fastest right config of every launch on the device at hand, and writes the device's table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
from lorakernels.tools.compile_report import ARCHS, CompileRow, compile_report
from lorakernels.tools.tune.candidates import Candidate, candidates, first_candidates, ranked
from lorakernels.tools.tune.problem import Problem, problems_of
from lorakernels.tools.tune.trial import Check, Inputs, MultiInputs, make_inputs, run

KEEP = 12  # candidates that are measured
# Buffers are rotated, so that no launch finds its operands in L2: they take twice its size together, within reason.
_MOST_ROTATED = 16

Step = Callable[[], object]
# Times of several rounds, [configs, rounds] in seconds. Each config has a list of steps: one for each rotated buffer.
Timer = Callable[[Sequence[Sequence[Step]]], np.ndarray]
Shapes = Iterable[tuple[int, int, int, int, torch.dtype, float]]


@dataclass
class Result:
    """What a run of the tuner did. `dropped` are configs that do not run, or whose results are wrong."""

    table: Table
    tuned: list[Entry] = field(default_factory=list)
    skipped: int = 0
    dropped: list[tuple[Problem, KernelConfig, str]] = field(default_factory=list)
    left: list[Problem] = field(default_factory=list)  # no config is right

    @property
    def ok(self) -> bool:
        """Every launch has its entry, and no config gave a wrong result. That some do not run is to be expected."""
        return not self.left and not any(why.startswith("wrong") for _, _, why in self.dropped)


def current_gpu() -> torch.device:
    """Raises BackendError where there is none."""
    if not torch.cuda.is_available():
        raise BackendError(
            "tuning times kernels, and there is no GPU here: run it where there is one, "
            "or see what it would measure with --dry-run"
        )
    return torch.device("cuda", torch.cuda.current_device())


def tune(
    shapes: Shapes,
    out: Path,
    device: torch.device,
    timer: Timer,
    *,
    timed_by: str,
    slots: int | None = None,
    resume: bool = False,
    keep: int = KEEP,
    jobs: int = 2,
    short: bool = False,
) -> Result:
    """Measure the candidates of every launch of these layers (M, N, K, r, dtype, dropout), and write the table `out`.

    With `slots` the launches are those for many adapters, so many in a batch.

    The file is written after each entry. One that is there already keeps its other entries; with `resume` launches
    that it holds are not measured again. `timed_by` says in the table what the timer is. With `short` the candidates
    are the fixed list of `first_candidates`, none of which is compiled for the compile report first.

    Raises:
        ValueError: `out` is not a table, or is another device's; a shape cannot be.
    """
    gpu = device_of(device)
    problems = problems_of(shapes, slots)
    result = Result(_table_at(out, gpu))
    done = {(entry.key, entry.M, entry.slots) for entry in result.table.entries} if resume else set()
    progress = tqdm(problems, desc="tune", unit="launch", disable=None)
    for problem in progress:
        if (problem.key, problem.M, problem.slots) in done:
            result.skipped += 1
            continue
        progress.set_postfix_str(str(problem))
        configs = first_candidates(problem, gpu)
        if not short:
            first = configs[0]
            configs = [row.config for row in shortlist(problem, gpu, keep, jobs) if not row.pruned]
            configs.sort(key=lambda config: config != first)
        entry = _measure(problem, configs, device, timer, timed_by, result)
        if entry is None:
            result.left.append(problem)
            continue
        result.tuned.append(entry)
        result.table.put(entry)
        write_table(out, result.table)
    clear()  # so that this process takes what was found
    return result


def shortlist(problem: Problem, gpu: Device, keep: int = KEEP, jobs: int = 2) -> list[Candidate]:
    """Every candidate, the fastest first by the model, with the reason why it will not be measured.

    The model orders them; twice as many as will be measured are compiled; those that spill or do not fit go, and what
    the compiler says of occupancy orders the rest. An architecture that the compile report does not know, and the
    interpreter, compile nothing.
    """
    configs = candidates(problem, gpu)
    if gpu.arch not in ARCHS or interpreter_on():
        return ranked(problem, gpu, configs, keep, {})
    first = ranked(problem, gpu, configs, 2 * keep, {})
    compiled = [row.config for row in first if not row.pruned]
    faults, programs_per_sm = _compiled(problem, compiled, gpu, jobs)
    right = [config for config in [configs[0], *compiled] if config not in faults]
    rows = ranked(problem, gpu, list(dict.fromkeys(right)), keep, programs_per_sm) if right else []
    failed = [Candidate(row.config, row.predicted, faults[row.config]) for row in first if row.config in faults]
    return rows + failed + [row for row in first if row.pruned]


def _compiled(
    problem: Problem, configs: Sequence[KernelConfig], gpu: Device, jobs: int
) -> tuple[dict[KernelConfig, str], dict[KernelConfig, int]]:
    """What is wrong with configs, and how many programs of the right ones a multiprocessor holds."""
    with assume(gpu):
        inputs = make_inputs(problem, torch.device("meta"))
        with record_launches() as launches:
            for config in configs:
                run(problem, config, inputs)
    faults: dict[KernelConfig, str] = {}
    programs: dict[KernelConfig, int] = {}
    for row in compile_report(launches, [gpu.arch], jobs, progress=False):
        programs[row.config] = min(programs.get(row.config, 1 << 10), row.ctas_per_sm or 0)
        if fault := _fault(row):
            faults[row.config] = fault
    return {config: faults[config] for config in configs if config in faults}, programs


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


def _rotated(inputs: Inputs | MultiInputs, device: torch.device) -> int:
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


def print_shortlists(shapes: Shapes, gpu: Device, keep: int = KEEP, jobs: int = 2, slots: int | None = None) -> None:
    """What `tune` would measure on this device, and how many candidates go for which reason. Times nothing."""
    for problem in problems_of(shapes, slots):
        rows = shortlist(problem, gpu, keep, jobs)
        reasons = Counter(row.pruned.partition(" ")[0] for row in rows if row.pruned)
        print(f"{problem} on {gpu.name}: {len(rows)} candidates, {len(rows) - sum(reasons.values())} to be measured")
        for row in rows:
            if not row.pruned:
                print(f"  {_brief(row.config)}: predicted {1e6 * row.predicted:.1f} µs")
        for row in rows:
            if row.pruned and not row.pruned.startswith(("predicted", "like")):
                print(f"  not {_brief(row.config)}: {row.pruned}")
        print(f"  not {reasons['predicted']} that are predicted to be slower, {reasons['like']} like others")


def _brief(config: KernelConfig) -> str:
    c = config
    form = "cublas" if c.cublas else f"tma, {c.PROGRAMS_PER_SM} programs" if c.tma else "pointers"
    tiles = f"{c.BLOCK_M}×{c.BLOCK_N}×{c.BLOCK_K}×{c.BLOCK_R}"
    return f"{tiles} split {c.SPLIT}, {c.num_warps} warps, {c.num_stages} stages, groups of {c.GROUP_M}, {form}"
