"""The steps of bench/gpu.py: each takes the run and its seconds, writes rows, and raises where something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINEAR, GROUP, MULTI, NORM, ON_GPU = (
    f"tests/kernels/test_{name}.py"
    for name in ("lora_linear", "lora_linear_group", "multi_lora", "weight_norm", "on_gpu")
)


class Late(KeyboardInterrupt):
    """A step has had its seconds. A KeyboardInterrupt, which nothing on the way takes for a result, pytest neither."""


class Skip(Exception):
    """A step cannot run here."""


@dataclass
class Run:
    """One part: where it runs, how, and what has come of it."""

    part: str
    mode: str  # gpu, cpu or stub
    out: Path
    rows_path: Path = field(init=False)
    work: Path = field(init=False)

    def __post_init__(self) -> None:
        self.rows_path = self.out / f"{self.part}.jsonl"
        # What part B finds of part A on the same machine: compiled kernels and the table.
        self.work = Path(os.environ.get("TMPDIR", "/tmp")) / f"lorakernels-{os.getuid()}-{self.mode}"
        self.work.mkdir(parents=True, exist_ok=True)

    def row(self, **fields: Any) -> None:
        with self.rows_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    def command(self, *command: str, seconds: float, **environment: str) -> None:
        """Raises CalledProcessError where it fails; it and all it has started end with its seconds."""
        print("$", *command, flush=True)
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, start_new_session=True)
        try:
            status = process.wait(timeout=max(seconds, 1))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise Late from None
        if status:
            raise subprocess.CalledProcessError(status, command[0])

    def pytest(self, *arguments: str, seconds: float, before: tuple[str, ...] = (), **environment: str) -> None:
        command = (*before, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
        self.command(*command, seconds=seconds, LORAKERNELS_RESULTS=str(self.rows_path), **environment)


def environment(run: Run, seconds: float) -> None:
    """What this is, and whether the kernels compiled elsewhere will be found here."""
    from lorakernels.tools.bench.environment import describe
    from lorakernels.tools.bench.run import default_device

    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    run.row(kind="environment", **describe(default_device()))
    archive = os.environ.get("CACHE")
    if archive:
        from lorakernels.tools.precompile import unpack

        fits = unpack(Path(archive), Path(os.environ["TRITON_CACHE_DIR"]))
        run.row(kind="cache", archive=archive, fits=fits or "yes")
        print(f"compiled kernels of {archive}: {fits or 'they fit this Triton and Python'}")


def ceilings(run: Run, seconds: float) -> None:
    """Bandwidth of a copy, and cuBLAS at the headline and for 64 tokens, of this device now."""
    import torch

    from lorakernels.tools.bench.run import default_device
    from lorakernels.tools.bench.timing import interleaved, p20_50_80, timer

    device, large = default_device(), run.mode == "gpu"
    dtype, unit = torch.bfloat16, 1 if large else 8
    size = (1 << 30) // unit
    source = torch.randn(size, device=device, dtype=dtype)
    target = torch.empty_like(source)
    steps: dict[str, tuple[Callable[[], object], float, str]] = {
        "copy": (lambda: target.copy_(source), 2 * size * dtype.itemsize, "bytes"),
    }
    for M in (8192, 64):
        x = torch.randn(M // unit, 4096 // unit, device=device, dtype=dtype)
        weight = torch.randn(4096 // unit, 4096 // unit, device=device, dtype=dtype)
        flops = 2 * x.numel() * weight.shape[0]
        steps[f"mm {M}"] = (lambda x=x, weight=weight: torch.mm(x, weight.t()), flops, "flops")
    times = interleaved([timer(device, [step]) for step, _, _ in steps.values()], 20 if large else 3)
    for (name, (_, amount, what)), own in zip(steps.items(), times, strict=True):
        low, middle, high = p20_50_80(own)
        run.row(kind="ceiling", name=name, seconds=[low, middle, high], **{what: amount})
        print(
            f"{name}: {amount / middle / 1e12:.3f} T{what}/s ({amount / high / 1e12:.3f} … {amount / low / 1e12:.3f})"
        )


def large(run: Run, seconds: float) -> None:
    """Correctness at real sizes against float64 in this process, whose kernels the benchmarks then find ready."""
    import pytest

    os.environ["LORAKERNELS_RESULTS"] = str(run.rows_path)
    small = {"cpu": "odd_sizes and triton-few and float32"}.get(run.mode, "large")
    files = (LINEAR, GROUP, MULTI, ON_GPU)
    # pytest-timeout would take the alarm that ends this step.
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "timeout=0"]
    arguments = [*options, *files, "-k", f"({small}) or on_gpu"]
    status = pytest.main([*arguments, f"--rootdir={ROOT}"])
    if status == pytest.ExitCode.INTERRUPTED:
        raise Late  # pytest has caught it
    if status:
        raise RuntimeError(f"pytest ended with {status!r}")


# 428 cases: one linear in both forms and three dtypes; of groups and many adapters each form in one dtype.
_TABLES = (
    "(against_float64 and not group and (triton-few or triton-general) and not tiny)"
    " or (against_float64 and group and triton-general-bfloat16)"
    " or (against_a_loop and (triton-bfloat16 or triton-token-float16 or triton-tiles-bfloat16))"
    " or (against_a_loop and triton-high_tiles-float32)"
)
_ODD = "odd_sizes or primes or transposed or dropout_half_odd or row_scale_all"


def tests(run: Run, seconds: float) -> None:
    """The tables of cases, small and odd, in three dtypes, in a process a core: a broken one takes no other along."""
    if run.mode == "cpu":
        return run.pytest(LINEAR, "-n0", "-k", "odd_sizes and triton-general and float32", seconds=seconds)
    workers = max(1, min(14, (os.cpu_count() or 1) - 2) if run.mode == "gpu" else os.cpu_count() or 1)
    run.pytest(LINEAR, GROUP, MULTI, "-n", str(workers), "-k", _TABLES, seconds=seconds)
    return None


def more_tests(run: Run, seconds: float) -> None:
    """The smallest blocks, where every loop has several turns; DoRA's norm; what PyTorch asks of an operator."""
    if run.mode == "cpu":
        return run.pytest(LINEAR, "-n0", "-k", "rank_17 and triton-few and float32", seconds=seconds)
    workers = max(1, min(14, (os.cpu_count() or 1) - 2) if run.mode == "gpu" else os.cpu_count() or 1)
    files = (LINEAR, NORM) if run.mode == "stub" else (LINEAR, GROUP, NORM)
    chosen = f"against_float64 and tiny and ({_ODD})"
    if run.mode == "gpu":
        chosen += " or test_weight_norm or bitwise or nan"
    run.pytest(*files, "-n", str(workers), "-k", chosen, seconds=seconds)
    return None


_WATCHED = (
    "large and bfloat16 and (edges_dora_dropout or edges_transposed or few_tokens_dropout or qkv_dropout or train)"
)


def sanitizer(run: Run, seconds: float) -> None:
    """Each access watched, in bf16 cases that reach TMA and wgmma. Numbers are not compared: that takes minutes so."""
    found = shutil.which("compute-sanitizer")
    if run.mode == "cpu" or (run.mode == "gpu" and not found):
        raise Skip("it watches a GPU" if run.mode == "cpu" else "compute-sanitizer is not installed")
    before = (str(found), "--tool", "memcheck", "--error-exitcode", "99") if run.mode == "gpu" else ()
    # A tensor has memory of its own, so that an access past its end lies in nothing.
    own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "LORAKERNELS_NUMBERS": "0"}
    run.pytest(LINEAR, GROUP, MULTI, "-n0", "-k", _WATCHED, seconds=seconds, before=before, **own)


def _bench(run: Run, seconds: float, sets: str, impl: str, rounds: int) -> None:
    from lorakernels.tools.bench import run as bench
    from lorakernels.tools.bench.registry import Case, cases_of

    headline = {"headline": cases_of("headline")}
    decode = (Case(64, 4096, 4096, adapters=adapters) for adapters in (64, 8, 1))
    mixed = (Case(64, 4096, 4096, 64, adapters=64, mixed=True), Case(256, 4096, 4096, adapters=64))
    named = headline | {
        "decode": (*decode, *mixed),
        "tokens": tuple(Case(M, 4096, 4096) for M in (64, 256, 2048, 1)),
    }
    cases = [case for name in sets.split(",") for case in named[name]]
    if run.mode == "cpu":
        cases = list(cases_of("small-layer")[:2] + cases_of("small-multi")[:1])
    if run.mode == "stub":
        return _launch(run, cases, "triton,split,fused,in-order,stacks")
    wrong: list[str] = []

    def keep_row(row: bench.Row) -> None:
        run.row(kind="time", **row)
        print(bench.line_of(row), flush=True)
        if row["status"] in ("wrong", "error") and row["peer"].startswith(("ours", "frozen")):
            wrong.append(f"{row['peer']}: {row['status']}: {row['reason']}")

    bench.run(
        cases,
        impl=impl if run.mode == "gpu" else "torch,peft",
        rounds=rounds if run.mode == "gpu" else 2,
        limit_s=seconds - 10,
        on_row=keep_row,
    )
    if wrong:
        raise RuntimeError(f"{len(wrong)} rows are not right; the first: {wrong[0]}")
    return None


def _launch(run: Run, cases: Sequence[Any], impl: str) -> None:
    """One step each, neither checked nor timed. What one is refused does not hide the others' launches."""
    from lorakernels.tools.bench.peer import make_tensors
    from lorakernels.tools.bench.peers import choose_peers

    wrong = []
    for case in cases:
        tensors = make_tensors(case, "cpu", 0)
        for peer in choose_peers(impl, case.adapters is not None, tensors.x.device):
            reason = peer.why_not(case, tensors.x.device)
            try:
                if reason is None:
                    peer.make(tensors)()
            except Exception as error:
                wrong.append(f"{peer.name}, {case}: {type(error).__name__}: {error}")
            run.row(kind="launch", peer=peer.name, **case.as_dict(), skipped=reason)
            print(f"{case} {peer.name} {reason or 'launched'}", flush=True)
    if wrong:
        raise RuntimeError(f"{len(wrong)} steps are not right; the first: {wrong[0]}")


def first_times(run: Run, seconds: float) -> None:
    """The headline and decode with the heuristic's configs, beside PEFT and others, each checked first."""
    _bench(run, seconds, "headline,decode", "auto,split,fused,in-order,eager,peft,stacks,bmm", 15)


def tuned_times(run: Run, seconds: float) -> None:
    """The same with the table, and other numbers of tokens."""
    from lorakernels.configs.table import load_table

    table = run.work / "table.json"
    if table.exists():
        load_table(table)
    _bench(run, seconds, "headline,decode,tokens", "auto,split,fused,in-order,peft", 15)


def make_steps(mode: str) -> dict[str, Callable[[], object]]:
    """The headline's training step, with and without dropout, and a decode step of 64 adapters."""
    from lorakernels.tools.bench.peer import make_tensors
    from lorakernels.tools.bench.peers import PEERS
    from lorakernels.tools.bench.registry import Case, cases_of
    from lorakernels.tools.bench.run import default_device

    cases = (*cases_of("headline"), Case(64, 4096, 4096, adapters=64))
    if mode == "cpu":
        cases = (cases_of("small-layer")[0], cases_of("small-multi")[0])
    peer = PEERS["ours-torch" if mode == "cpu" else "ours-triton"]
    return {str(case): peer.make(make_tensors(case, default_device(), 0)) for case in cases}


def profile(run: Run, seconds: float) -> None:
    """Microseconds a kernel, by torch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity

    if run.mode == "stub":
        raise Skip("nothing runs there")
    on_gpu, count = run.mode == "gpu", 5
    for name, step in make_steps(run.mode).items():
        for _ in range(3):
            step()
        with torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        ) as seen:
            for _ in range(count):
                step()
            if on_gpu:
                torch.cuda.synchronize()
        of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        events = sorted(seen.key_averages(), key=lambda event: -getattr(event, of))
        print(name)
        for event in events[:12]:
            micros = getattr(event, of) / count
            if micros:
                run.row(kind="profile", step=name, kernel=event.key, micros=micros, calls=event.count / count)
                print(f"  {micros:10.1f} µs  {event.count / count:4.1f} calls  {event.key[:80]}")


def sweep(run: Run, seconds: float) -> None:
    """The fixed lists of candidates, the headline's first; the table is written after each launch."""
    import torch

    from lorakernels.configs.device import device_of
    from lorakernels.tools.bench.run import default_device
    from lorakernels.tools.bench.timing import interleaved, timer
    from lorakernels.tools.tune import tuner
    from lorakernels.tools.tune.candidates import candidates
    from lorakernels.tools.tune.problem import problems_of
    from lorakernels.tools.tune.trial import make_inputs
    from lorakernels.tools.tune.trial import run as launch

    if run.mode == "cpu":
        raise Skip("it times kernels, and there is no GPU")
    device, K = default_device(), 4096
    wanted = [((8192, K, K, 16, torch.bfloat16, 0.0), None), ((64, K, K, 16, torch.bfloat16, 0.0), 64)]
    wanted += [((M, K, K, 16, torch.bfloat16, 0.0), None) for M in (64, 256, 2048)]
    wanted += [((64, K, K, 16, torch.bfloat16, 0.0), 8)]
    table = run.work / "table.json"
    table.unlink(missing_ok=True)
    for shape, slots in wanted:
        if run.mode == "stub":
            for problem in problems_of([shape], slots):
                inputs = make_inputs(problem, device)
                for config in candidates(problem, device_of(device), neighbours=False):
                    launch(problem, config, inputs)
                print(problem, flush=True)
            continue
        result = tuner.tune(
            [shape],
            table,
            device,
            lambda steps: interleaved([timer(device, each) for each in steps], 15),
            timed_by="15 rounds, interleaved, buffers rotated",
            slots=slots,
            short=True,
        )
        tuner.print_result(result, table)
        shutil.copy(table, run.out / "table.json")
        for entry in result.tuned:
            run.row(kind="tuned", **entry.to_fields())
        for problem, config, why in result.dropped:
            run.row(kind="dropped", problem=str(problem), config=config.to_fields(), why=why)


def counters(run: Run, seconds: float) -> None:
    """Hardware counters of the headline's and decode's kernels, in ncu.csv. The clocks stay as they are."""
    ncu = shutil.which("ncu")
    if run.mode == "gpu" and not ncu:
        raise Skip("ncu is not installed")
    own = (sys.executable, str(ROOT / "bench" / "gpu.py"), "steps", "--out", str(run.out))
    if run.mode != "gpu":
        return run.command(*own, f"--{run.mode}", seconds=seconds)
    options = (
        "--clock-control",
        "none",
        "--set",
        "detailed",
        "--csv",
        "--page",
        "raw",
        "--log-file",
        str(run.out / "ncu.csv"),
    )
    kernels = "regex:shrink|outer|linear_expand|multi_"
    run.command(str(ncu), *options, "--kernel-name", kernels, "--launch-count", "14", *own, seconds=seconds)
    return None


Step = tuple[str, float, Callable[[Run, float], None]]
PARTS: dict[str, tuple[Step, ...]] = {
    "A": (
        ("environment", 20, environment),
        ("ceilings", 10, ceilings),
        ("large", 40, large),
        ("first-times", 70, first_times),
        ("tests", 85, tests),
        ("profile", 20, profile),
        ("sanitizer", 45, sanitizer),
    ),
    "B": (
        ("environment", 10, environment),
        ("sweep", 115, sweep),
        ("tuned-times", 95, tuned_times),
        ("counters", 40, counters),
        ("more-tests", 45, more_tests),
    ),
}
