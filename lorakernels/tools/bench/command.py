"""`lorakernels bench`: run, plot, compare, list."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

from lorakernels.tools.bench.operations import OPERATIONS
from lorakernels.tools.bench.registry import SETS, cases_of

FAILED = 1


def main(arguments: argparse.Namespace) -> int:
    """Do what `arguments.action` says; 1 when a result is wrong or a peer broke.

    Raises:
        ValueError: the files do not fit the action, or a name is not known.
    """
    files = list(arguments.files)
    if arguments.action in ("run", "list") and files:
        raise ValueError(f"bench {arguments.action} takes no files; got {', '.join(files)}")
    if arguments.action == "plot" and not files:
        raise ValueError("bench plot needs at least one file that lorakernels bench --out wrote")
    if arguments.action == "compare" and len(files) != 2:
        raise ValueError(f"bench compare needs two files, before and after; got {len(files)}")
    if arguments.action == "list":
        return _list()
    if arguments.action == "plot":
        return _plot(files, arguments.out or ".")
    if arguments.action == "compare":
        return _compare(*files)
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from lorakernels.tools.bench.run import default_device, run

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that torch can use; leave --device out to measure on the CPU")
    device = torch.device("cpu") if arguments.device == "cpu" else default_device()
    rows = run(
        cases_of(arguments.set),
        impl=arguments.impl,
        device=device,
        rounds=arguments.rounds,
        limit_s=arguments.limit,
        progress=lambda line: print(line, flush=True),
        out=arguments.out,
    )
    if arguments.out is not None:
        print(arguments.out)
    failed = [row for row in rows if row["status"] in ("wrong", "error") and row["peer"].startswith(("ours", "frozen"))]
    return FAILED if failed else 0


def _plot(files: list[str], folder: str) -> int:
    from lorakernels.tools.bench.plot import plot
    from lorakernels.tools.bench.run import read_rows

    for path in plot([row for file in files for row in read_rows(file)], folder):
        print(path)
    return 0


def _compare(before: str, after: str) -> int:
    from lorakernels.tools.bench.compare import compare, print_comparison
    from lorakernels.tools.bench.run import read_rows

    print_comparison(compare(read_rows(before), read_rows(after)), Console())
    return 0


def _list() -> int:
    console = Console()
    table = Table("set", "cases", "first", "last", title="Sets of shapes: tokens x N x K")
    for name, cases in SETS.items():
        table.add_row(name, str(len(cases)), str(cases[0]), str(cases[-1]))
    console.print(table)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for operation, case in ((OPERATIONS[type(case)], case) for case in (SETS["headline"][0], SETS["multi"][0])):
        table = Table("implementation", "what", f"on {device}", title=f"Implementations: {operation.name}")
        for peer in operation.peers.values():
            table.add_row(peer.name, peer.label, peer.why_not(case, device) or "runs")
        console.print(table)
    return 0
