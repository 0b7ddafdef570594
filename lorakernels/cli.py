"""The command line. A command is a row of COMMANDS: a function that names its arguments, and one that runs it.

Everything heavy is imported inside the functions that run, so that `lorakernels --help` starts no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorakernels import __version__

FAILED = 1  # the command ran, and what it checks does not hold
MISTAKE = 2  # the command could not do what was asked: argparse's own status
INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """A sub-command. `run` returns the exit status; the first line of its docstring is the help."""

    name: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default="lorakernels-demo", metavar="FOLDER", help="for adapters and picture (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same numbers (%(default)s)")
    parser.add_argument(
        "--impl", choices=("auto", "torch", "triton"), help="what every layer runs (as LORAKERNELS_IMPL says, or auto)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="train each adapter for N steps only, to try it out")


def demo(arguments: argparse.Namespace) -> int:
    """train adapters on real handwritten digits, and check what the package promises"""
    from lorakernels.demo import run_demo
    from lorakernels.demo.report import print_report

    result = run_demo(arguments.out, seed=arguments.seed, impl=arguments.impl, steps=arguments.steps)
    print_report(result)
    return FAILED if result.failures else 0


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for a bug report or a script")


def doctor(arguments: argparse.Namespace) -> int:
    """say what this machine can run and why, what is missing, and check the results"""
    from lorakernels.doctor import as_json, examine, print_diagnosis

    diagnosis = examine()
    if arguments.json:
        print(as_json(diagnosis))
    else:
        print_diagnosis(diagnosis)
    return 0 if diagnosis.ok else FAILED


def inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder (PEFT, mlx-lm) or .safetensors file (kohya)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the singular values of every update")
    parser.add_argument("--json", action="store_true", help="print JSON, with every module and singular value")


def inspect(arguments: argparse.Namespace) -> int:
    """say what an adapter's files hold: kind, ranks, and how large each update is"""
    from lorakernels.adapters.inspect import as_json, inspect_adapter, plot_spectra, print_report

    report = inspect_adapter(arguments.adapter)
    if arguments.plot is not None:
        plot_spectra(report, arguments.plot)
    if arguments.json:
        print(as_json(report))
    else:
        print_report(report)
    return 0


def convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a kohya .safetensors file, or an mlx-lm folder")
    parser.add_argument("--to", required=True, metavar="OUT", help="new folder for PEFT's files")
    parser.add_argument("--model", metavar="DIR", help="the model's folder, which tells a kohya file's module names")
    parser.add_argument("--prefix", metavar="NAME", help="part of a kohya file to take, such as lora_unet")


def convert(arguments: argparse.Namespace) -> int:
    """write a kohya or mlx-lm adapter as PEFT's folder, number for number"""
    from lorakernels.adapters.convert import convert as convert_files

    print(convert_files(arguments.source, arguments.to, model=arguments.model, prefix=arguments.prefix))
    return 0


def merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="folder with config.json and safetensors")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the adapter's folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the merged model")
    parser.add_argument(
        "--dtype", choices=("float64", "float32", "bfloat16", "float16"), help="of every weight (as they are)"
    )


def merge(arguments: argparse.Namespace) -> int:
    """merge an adapter into a model's files, one tensor at a time"""
    import torch

    from lorakernels.adapters.merge_files import merge_files

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    print(merge_files(arguments.model, arguments.adapter, arguments.out, dtype=dtype, progress=True))
    return 0


COMMANDS = (
    Command("demo", demo_arguments, demo),
    Command("doctor", doctor_arguments, doctor),
    Command("inspect", inspect_arguments, inspect),
    Command("convert", convert_arguments, convert),
    Command("merge", merge_arguments, merge),
)


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="lorakernels", description="Fast low-rank adapters for PyTorch models.")
    root.add_argument("--version", action="version", version=f"lorakernels {__version__}")
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        summary = (command.run.__doc__ or "").partition("\n")[0]
        sub = commands.add_parser(command.name, help=summary, description=f"{summary[:1].upper()}{summary[1:]}.")
        command.arguments(sub)
        sub.set_defaults(run=command.run)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; a mistake of the user's is one line on stderr."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("lorakernels: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not _is_mistake(error):
            raise
        # str() of a KeyError is its message in quotes.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print("lorakernels:", " ".join(str(message).split()), file=sys.stderr)
        return MISTAKE


def _is_mistake(error: Exception) -> bool:
    """Whether the user can mend it: a wrong value, name or file, or something that is not installed or not here."""
    if isinstance(error, (ValueError, KeyError, OSError, ModuleNotFoundError)):
        return True
    from lorakernels.backend import BackendError

    return isinstance(error, BackendError)
