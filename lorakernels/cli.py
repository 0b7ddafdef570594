"""The command line. A command is a function with its arguments above it.

Everything heavy is imported inside the functions that run, so that `lorakernels --help` starts no torch.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from subprocess import CalledProcessError
from typing import Any, NamedTuple

from lorakernels import __version__
from lorakernels.printable import printable

FAILED = 1  # the command ran, and what it checks does not hold
MISTAKE = 2  # the command could not do what was asked: argparse's own status
INTERRUPTED = 130


Argument = tuple[tuple[str, ...], dict[str, Any]]  # of argparse's add_argument
Run = Callable[[argparse.Namespace], int]


class Command(NamedTuple):
    """A sub-command. `run` returns the exit status; the first line of its docstring is the help."""

    name: str
    arguments: tuple[Argument, ...]
    run: Run


COMMANDS: list[Command] = []


def argument(*names: str, **options: Any) -> Argument:
    return names, options


def command(*arguments: Argument) -> Callable[[Run], Run]:
    """The function below is the command of its name."""

    def add(run: Run) -> Run:
        COMMANDS.append(Command(run.__name__.replace("_", "-"), arguments, run))
        return run

    return add


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(","))


def _after_dashes(rest: list[str]) -> list[str]:
    return rest[rest[:1] == ["--"] :]


@command(
    argument("--out", default="lorakernels-demo", metavar="FOLDER", help="for adapters and picture (%(default)s)"),
    argument("--seed", type=int, default=0, metavar="N", help="same seed, same numbers (%(default)s)"),
    argument(
        "--impl", choices=("auto", "torch", "triton"), help="what every layer runs (as LORAKERNELS_IMPL says, or auto)"
    ),
    argument("--steps", type=int, metavar="N", help="train each adapter for N steps only, to try it out"),
)
def demo(arguments: argparse.Namespace) -> int:
    """train adapters on real handwritten digits, and check what the package promises"""
    from lorakernels.tools.demo import run_demo
    from lorakernels.tools.demo.report import print_report

    result = run_demo(arguments.out, seed=arguments.seed, impl=arguments.impl, steps=arguments.steps)
    print_report(result)
    return FAILED if result.failures else 0


@command(
    argument("--json", action="store_true", help="print JSON, for a bug report or a script"),
)
def doctor(arguments: argparse.Namespace) -> int:
    """say what this machine can run and why, what is missing, and check the results"""
    import json

    from lorakernels.tools.doctor import examine, print_diagnosis

    found = examine()
    if arguments.json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        print_diagnosis(found)
    return 0 if found["ok"] else FAILED


@command(
    argument(
        "action",
        nargs="?",
        choices=("run", "plot", "compare", "report", "list"),
        default="run",
        help="run (the default), draw results, compare two, make a report, or list sets and implementations",
    ),
    argument(
        "files",
        nargs="*",
        metavar="FILE.json",
        help="results: to plot any number, to compare two, to report one or a former and a new one",
    ),
    argument("--set", default="small", metavar="NAMES", help="sets of shapes, with commas (%(default)s)"),
    argument("--impl", metavar="NAMES", help="what is measured beside the frozen layer (all that can run)"),
    argument("--out", metavar="PATH", help="run's JSON, plot's folder (.), or the report (report.html)"),
    argument("--device", choices=("cpu", "cuda"), help="where run measures (a GPU, if there is one)"),
    argument("--rounds", type=int, default=30, metavar="N", help="times each is measured (%(default)s)"),
    argument("--limit", type=float, metavar="SECONDS", help="start no further shape after so long"),
)
def bench(arguments: argparse.Namespace) -> int:
    """measure a training step beside the frozen layer, PEFT and others; draw and compare results"""
    from lorakernels.tools.bench import command

    return command.main(arguments)


@command(
    argument("adapter", metavar="ADAPTER", help="folder (PEFT, mlx-lm) or .safetensors file (kohya, diffusers)"),
    argument("--plot", metavar="FILE.png", help="draw the singular values of every update"),
    argument("--json", action="store_true", help="print JSON, with every module and singular value"),
)
def inspect(arguments: argparse.Namespace) -> int:
    """say what an adapter's files hold: kind, ranks, and how large each update is"""
    from lorakernels.files.inspect import as_json, inspect_adapter, plot_spectra, print_report

    report = inspect_adapter(arguments.adapter)
    if arguments.plot is not None:
        plot_spectra(report, arguments.plot)
    if arguments.json:
        print(as_json(report))
    else:
        print_report(report)
    return 0


@command(
    argument("source", metavar="SOURCE", help="a .safetensors file (kohya, diffusers), or an mlx-lm folder"),
    argument("--to", required=True, metavar="OUT", help="new folder for PEFT's files"),
    argument("--model", metavar="DIR", help="the model's folder, which tells a kohya file's module names"),
    argument("--prefix", metavar="NAME", help="part of a file to take, such as lora_unet or transformer"),
)
def convert(arguments: argparse.Namespace) -> int:
    """write a kohya, diffusers or mlx-lm adapter as PEFT's folder, number for number"""
    from lorakernels.files.convert import convert as convert_files
    from lorakernels.integrations.transformers_names import import_transformers

    if arguments.model is not None:
        import_transformers()
    print(convert_files(arguments.source, arguments.to, model=arguments.model, prefix=arguments.prefix))
    return 0


@command(
    argument("--model", required=True, metavar="DIR", help="folder with config.json and safetensors"),
    argument("--adapter", required=True, metavar="ADAPTER", help="the adapter's folder or .safetensors file"),
    argument("--out", required=True, metavar="DIR", help="new folder for the merged model"),
    argument("--prefix", metavar="NAME", help="part of a file that the model is, such as lora_unet or transformer"),
    argument("--dtype", choices=("float64", "float32", "bfloat16", "float16"), help="of every weight (as they are)"),
)
def merge(arguments: argparse.Namespace) -> int:
    """merge an adapter into a model's files, one tensor at a time"""
    import torch

    from lorakernels.files.merge import merge_files
    from lorakernels.integrations.transformers_names import import_transformers

    import_transformers()
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    prefix = arguments.prefix
    print(merge_files(arguments.model, arguments.adapter, arguments.out, dtype=dtype, prefix=prefix, progress=True))
    return 0


@command(
    argument("--model", required=True, metavar="DIR", help="the model's folder"),
    argument("--adapter", action="append", default=[], metavar="NAME=DIR", help="an adapter's folder; repeatable"),
    argument("--adapter-root", metavar="DIR", help="load and reload adapters at run time, from under this folder only"),
    argument("--max-adapters", type=int, metavar="N", help="adapters in one batch (as there are, up to 8)"),
    argument("--max-rank", type=int, metavar="R", help="the largest rank (the adapters' largest)"),
    argument("--host", help="the address to listen at (vLLM's)"),
    argument("--port", type=int, help="the port to listen at (vLLM's)"),
    argument("--dtype", help="what is computed in (the model's)"),
    argument("own", nargs=argparse.REMAINDER, metavar="-- OPTIONS", help="vLLM's own options, after --"),
)
def serve(arguments: argparse.Namespace) -> int:
    """start vLLM's OpenAI server, its LoRA by these kernels"""
    from lorakernels.tools import serve as launcher

    server = launcher.server(
        arguments.model,
        arguments.adapter,
        root=arguments.adapter_root,
        max_adapters=arguments.max_adapters,
        max_rank=arguments.max_rank,
        options={name: getattr(arguments, name) for name in ("host", "port", "dtype")},
        own=_after_dashes(arguments.own),
    )
    launcher.serve(server)
    return 0


@command(
    argument("--url", help="a server of this machine that runs, such as http://127.0.0.1:8000"),
    argument("--model", metavar="DIR", help="a model's folder, to start a server with"),
    argument("--adapter", action="append", default=[], metavar="NAME=DIR", help="an adapter's folder; repeatable"),
    argument("--adapters", type=int, default=8, metavar="N", help="without --adapter: random ones (%(default)s)"),
    argument("--ranks", type=_numbers, default=(8, 16, 32, 64), metavar="R,R", help="of those (8,16,32,64)"),
    argument("--max-adapters", type=int, metavar="N", help="adapters in one batch (as there are, up to 8)"),
    argument("--beside", default="", metavar="NAMES", help="the same without LoRA (none) and with vLLM's own (vllm)"),
    argument("--requests", type=int, default=200, metavar="N", help="how many (%(default)s)"),
    argument("--rate", type=float, default=8.0, metavar="R", help="arrivals a second, 0: all at once (%(default)s)"),
    argument("--concurrency", type=int, default=64, metavar="N", help="the most requests at once (%(default)s)"),
    argument("--zipf", type=float, default=1.0, metavar="S", help="adapters are as popular as 1/k^S (%(default)s)"),
    argument("--base-share", type=float, default=0.1, metavar="P", help="requests of the base model (%(default)s)"),
    argument("--prompt-tokens", type=_numbers, default=(64,), metavar="N,N", help="lengths of prompts (64)"),
    argument("--output-tokens", type=_numbers, default=(16,), metavar="N,N", help="lengths of answers (16)"),
    argument("--seed", type=int, default=0, metavar="N", help="same seed, same requests (%(default)s)"),
    argument("--cached", action="store_true", help="let prefixes come from the server's cache"),
    argument("--dtype", help="what is computed in (the model's)"),
    argument("--out", metavar="FILE.json", help="write every answer's times"),
    argument("--plot", metavar="FILE.png", help="draw how long clients wait"),
    argument("own", nargs=argparse.REMAINDER, metavar="-- OPTIONS", help="vLLM's own options, after --"),
)
def load_test(arguments: argparse.Namespace) -> int:
    """measure a server of many adapters under a load, and whether its answers are right"""
    from lorakernels.tools.load_test.command import main as load

    return load(arguments, _after_dashes(arguments.own))


@command(
    argument("--shapes", nargs="+", metavar="MxNxKxr", help="tokens, outputs (N+N+N of a group), inputs, rank"),
    argument("--set", default="all", metavar="NAMES", help="without --shapes: sets of `bench` (%(default)s)"),
    argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of --shapes (bfloat16)"),
    argument("--dropout", type=float, default=0.0, metavar="P", help="of --shapes (%(default)s)"),
    argument("--slots", type=int, metavar="N", help="the kernels for N adapters in a batch, not for one"),
    argument("--out", metavar="FILE.json", help="the table to write (the user's table of this GPU)"),
    argument("--resume", action="store_true", help="skip what the table holds already"),
    argument("--limit", type=float, metavar="SECONDS", help="begin no further launch after so long"),
    argument("--candidates", metavar="FILE.json", help="configs by operation, to be measured first"),
    argument("--rounds", type=int, default=20, metavar="N", help="times each is measured (%(default)s)"),
    argument("--jobs", type=int, default=2, metavar="N", help="processes that compile (%(default)s)"),
    argument("--dry-run", action="store_true", help="print what would be measured; needs no GPU"),
    argument("--arch", metavar="NAME", help="with --dry-run: for a GPU of this architecture, such as sm_90"),
)
def tune(arguments: argparse.Namespace) -> int:
    """find the fastest configuration of each kernel on this GPU, and keep them in a table"""
    from pathlib import Path

    import torch

    from lorakernels.configs.device import device_of, example_of
    from lorakernels.configs.table_file import user_path
    from lorakernels.tools.bench.registry import cases_of
    from lorakernels.tools.bench.timing import interleaved, timer
    from lorakernels.tools.tune import tuner
    from lorakernels.tools.tune.candidates import read_list
    from lorakernels.tools.tune.problem import Shape

    if arguments.shapes is None:
        cases = [case for case in cases_of(arguments.set) if case.adapters is None]
        shapes: list[Shape] = [(case.M, case.N, case.K, case.r, case.torch_dtype, case.dropout) for case in cases]
    else:
        dtype = getattr(torch, arguments.dtype or "bfloat16")
        shapes = [(*_sizes(text), dtype, arguments.dropout) for text in arguments.shapes]
    listed = read_list(Path(arguments.candidates)) if arguments.candidates else None
    if arguments.dry_run:
        arch = arguments.arch or (None if torch.cuda.is_available() else "sm_90")
        gpu = device_of(tuner.current_gpu()) if arch is None else example_of(arch)
        tuner.print_shortlists(shapes, gpu, jobs=arguments.jobs, slots=arguments.slots, listed=listed)
        return 0
    here = tuner.current_gpu()
    out = Path(arguments.out) if arguments.out else user_path(device_of(here))
    result = tuner.tune(
        shapes,
        out,
        here,
        lambda steps: interleaved([timer(here, each) for each in steps], arguments.rounds),
        timed_by=f"{arguments.rounds} rounds, interleaved, buffers rotated",
        slots=arguments.slots,
        resume=arguments.resume,
        jobs=arguments.jobs,
        limit=arguments.limit,
        listed=listed,
    )
    tuner.print_result(result, out)
    return 0 if result.ok else FAILED


def _sizes(text: str) -> tuple[int, int | tuple[int, ...], int, int]:
    sizes = re.fullmatch(r"(\d+)x(\d+(?:\+\d+)*)x(\d+)x(\d+)", text.lower())
    if sizes is None:
        raise ValueError(
            f"shape {text!r}; expected four numbers, MxNxKxr, such as 8192x4096x4096x16; N of a group is a sum, N+N"
        )
    M, N, K, r = sizes.groups()
    Ns = tuple(map(int, N.split("+")))
    return int(M), Ns if len(Ns) > 1 else Ns[0], int(K), int(r)


@command(
    argument("--arch", action="append", metavar="NAME", help="sm_80, sm_90, sm_100 or gfx942; repeatable (all)"),
    argument("--kernel", action="append", metavar="NAME", help="such as shrink_kernel; repeatable (all)"),
    argument("--json", action="store_true", help="print every row as JSON"),
    argument("--jobs", type=int, default=2, metavar="N", help="processes that compile (%(default)s)"),
)
def compile_report(arguments: argparse.Namespace) -> int:
    """compile the kernels for GPUs that are not here: registers, spills, memory, instructions"""
    from lorakernels.tools import compile_report as report

    return report.main(arguments.arch or (), arguments.kernel or (), arguments.json, arguments.jobs)


@command(
    argument("--out", required=True, metavar="FILE.tar.xz", help="the archive to write"),
    argument("--arch", default="sm_90", metavar="NAME", help="sm_80, sm_90 or sm_100 (%(default)s)"),
    argument("--python", metavar="TAG", help="CPython over there, such as cp312, or a path (as here)"),
    argument("--triton", metavar="VERSION", help="Triton over there, such as 3.6.0 (as here)"),
    argument("--work", metavar="FOLDER", help="keep what is compiled there, and go on from it"),
    argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="what launches the kernels (all)"),
)
def precompile(arguments: argparse.Namespace) -> int:
    """compile the kernels for a GPU that is elsewhere, into an archive that its machine unpacks"""
    from pathlib import Path

    from lorakernels.tools.precompile import precompile as fill

    command = _after_dashes(arguments.command)
    work = Path(arguments.work).resolve() if arguments.work else None
    found = fill(Path(arguments.out), arguments.arch, arguments.python, arguments.triton, command, work)
    return 0 if found else FAILED


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="lorakernels", description="Fast low-rank adapters for PyTorch models.")
    root.add_argument("--version", action="version", version=f"lorakernels {__version__}")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, arguments, run in COMMANDS:
        summary = (run.__doc__ or "").partition("\n")[0]
        sub = commands.add_parser(name, help=summary, description=f"{summary[:1].upper()}{summary[1:]}.")
        for names, options in arguments:
            sub.add_argument(*names, **options)
        sub.set_defaults(run=run)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; a mistake of the user's is one line on stderr.

    That the reader of stdout has gone, as `head` does, is no mistake.
    """
    arguments = parser().parse_args(argv)
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except SystemExit as error:  # which rich makes of it
        if isinstance(error.__context__, BrokenPipeError):
            return 0
        raise
    except KeyboardInterrupt:
        print("lorakernels: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 0
        if not _is_mistake(error):
            raise
        # str() of a KeyError is its message in quotes.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print("lorakernels:", printable(" ".join(str(message).split())), file=sys.stderr)
        return MISTAKE


def _nobody_reads() -> bool:
    """Whether stdout is what broke; what is left to write then goes nowhere, so that the end of Python is quiet."""
    try:
        print(flush=True)  # what failed before may be gone from its buffer
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _is_mistake(error: Exception) -> bool:
    """Whether the user can mend it: a wrong value, name or file, or something that is not installed or not here."""
    if isinstance(error, (ValueError, KeyError, OSError, ModuleNotFoundError, CalledProcessError)):
        return True
    from lorakernels.backend import BackendError

    return isinstance(error, BackendError)
