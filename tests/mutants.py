"""Mistakes planted in a copy of the package, one at a time: of the tests that mutants.toml has for each, one must fail.

    python tests/mutants.py [--sample 6] [--seed 0] [--jobs 2] [-k TEXT]

First all those tests run on the package as it is, and must pass. A test that takes over two minutes counts as failed.
The exit status is 1 if a mistake survives.
"""

from __future__ import annotations

import argparse
import ast
import multiprocessing
import os
import queue
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".toml")
SECONDS = 120
# Each run is a fork of a process that has imported these, which takes longer than most of the tests do.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ["pytest", "torch", "torch._dynamo", "hypothesis", "peft"]


class Mutant(NamedTuple):
    file: str  # in the package
    old: str
    new: str
    tests: tuple[str, ...]  # node ids without "tests/"

    def planted(self, root: Path = ROOT) -> str:
        """The file with the mistake in it; raises ValueError where that is not one place, or no Python."""
        text = (root / "lorakernels" / self.file).read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} has {found} times, and not once: {self.old}")
        mutant = text.replace(self.old, self.new)
        ast.parse(mutant)
        return mutant


def read_list() -> list[Mutant]:
    files = tomllib.loads(LIST.read_text(encoding="utf-8"))
    rows = [(file, row) for file, rows in files.items() for row in rows]
    return [Mutant(file, row["old"], row["new"], tuple(row["tests"].split())) for file, row in rows]


def _run(copy: str, tests: list[str], log: str) -> None:
    with open(log, "w", encoding="utf-8") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = copy
    sys.path.insert(0, copy)
    ids = [f"tests/{test}" for test in tests]
    code = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "", *ids])
    sys.stdout.flush()
    os._exit(code)


def status_of(copy: Path, tests: list[str], seconds: float) -> int:
    """Of pytest on a copy: 0 where they pass, 1 or 2 where one fails or cannot be imported; 1 where time is up."""
    process = PROCESSES.Process(target=_run, args=(str(copy), tests, str(copy / "log")))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return 1
    return process.exitcode


def survives(mutant: Mutant, copies: queue.Queue[Path]) -> bool:
    copy = copies.get()
    path = copy / "lorakernels" / mutant.file
    text = path.read_bytes()
    try:
        path.write_text(mutant.planted(copy), encoding="utf-8")
        return status_of(copy, list(mutant.tests), SECONDS) == 0
    finally:
        path.write_bytes(text)
        copies.put(copy)


def main() -> int:
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many of them, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("-k", default="", metavar="TEXT", help="those of files with this in their path")
    arguments = parser.parse_args()
    mutants = [mutant for mutant in read_list() if arguments.k in mutant.file]
    if arguments.sample is not None:
        mutants = random.Random(arguments.seed).sample(mutants, min(arguments.sample, len(mutants)))
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    PROCESSES.set_forkserver_preload(PRELOADED)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        copies: queue.Queue[Path] = queue.Queue()
        for job in range(arguments.jobs):
            copies.put(shutil.copytree(ROOT, Path(folder, str(job)), ignore=shutil.ignore_patterns(".*")))
        every = sorted({test for mutant in mutants for test in mutant.tests})
        if status_of(copies.queue[0], every, SECONDS + 5 * len(every)):
            print((copies.queue[0] / "log").read_text(encoding="utf-8")[-3000:])
            print("the tests do not pass, or are not there, without a mistake in the package")
            return 1
        runs = {pool.submit(survives, mutant, copies): mutant for mutant in mutants}
        bar = tqdm(as_completed(runs), total=len(runs), unit="mutant", mininterval=5)
        survivors = [runs[run] for run in bar if run.result()]
    table = Table("file", "text", "mistake", "tests that pass", show_lines=True)
    for mutant in survivors:
        table.add_row(mutant.file, mutant.old, mutant.new, "\n".join(mutant.tests))
    if survivors:
        Console().print(table, markup=False)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} killed, {time.perf_counter() - start:.0f} s")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
