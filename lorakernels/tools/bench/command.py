"""`lorakernels bench`: run, plot, compare, report, list."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

from lorakernels.tools.bench import run as runs
from lorakernels.tools.bench.compare import compare, print_comparison
from lorakernels.tools.bench.peers import PEERS
from lorakernels.tools.bench.plot import plot
from lorakernels.tools.bench.registry import SETS, cases_of
from lorakernels.tools.bench.report import write_report


def main(arguments: argparse.Namespace) -> int:
    """Do what `arguments.action` says; 1 when a result is wrong or a peer broke.

    Raises:
        ValueError: the files do not fit the action, or a name is not known.
    """
    action, files = arguments.action, list(arguments.files)
    if action in ("run", "list") and files:
        raise ValueError(f"bench {action} takes no files; got {', '.join(files)}")
    if action == "plot" and not files:
        raise ValueError("bench plot needs at least one file that lorakernels bench --out wrote")
    if action == "compare" and len(files) != 2:
        raise ValueError(f"bench compare needs two files, before and after; got {len(files)}")
    if action == "report" and len(files) not in (1, 2):
        raise ValueError(f"bench report needs a file, or two, a former run first; got {len(files)}")
    if action == "plot":
        print(*plot([row for file in files for row in runs.read_rows(file)], arguments.out or "."), sep="\n")
    elif action == "compare":
        print_comparison(compare(*map(runs.read_rows, files)), Console())
    elif action == "report":
        *former, rows = map(runs.read_rows, files)
        print(write_report(rows, arguments.out or "report.html", *former))
    elif action == "list":
        _list(Console())
    else:
        return _run(arguments)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that torch can use; leave --device out to measure on the CPU")
    rows = runs.run(
        cases_of(arguments.set),
        impl=arguments.impl,
        device=torch.device("cpu") if arguments.device == "cpu" else runs.default_device(),
        rounds=arguments.rounds,
        limit_s=arguments.limit,
        out=arguments.out,
        on_row=lambda row: print(runs.line_of(row), flush=True),
    )
    if arguments.out is not None:
        print(arguments.out)
    return int(any(row["status"] in ("wrong", "error") and row["peer"].startswith(("ours", "frozen")) for row in rows))


def _list(console: Console) -> None:
    table = Table("set", "cases", "first", "last", title="Sets of shapes: tokens x N x K")
    for name, cases in SETS.items():
        table.add_row(name, str(len(cases)), str(cases[0]), str(cases[-1]))
    console.print(table)
    device = runs.default_device()
    for name, case in (("one adapter", SETS["headline"][0]), ("many adapters", SETS["multi"][0])):
        table = Table("implementation", "what", f"on {device}", title=f"Implementations: {name}")
        for peer in PEERS.values():
            if peer.many in (None, case.adapters is not None):
                table.add_row(peer.name, peer.label, peer.why_not(case, device) or "runs")
        console.print(table)
