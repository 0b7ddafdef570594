"""What bench/gpu.sh runs: steps in one process, each with its seconds; a line of JSON a result, written at once.

python bench/gpu.py A|B --out FOLDER [--limit SECONDS] [--cpu | --stub] [--only STEPS]
python bench/gpu.py summary --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_steps import PARTS, ROOT, Late, Run, Skip, make_steps
from rich.console import Console
from rich.table import Table

SKIPPED = "skipped: "


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("A", "B", "steps", "summary"))
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--limit", type=float, default=310, metavar="SECONDS")
    parser.add_argument("--cpu", dest="mode", action="store_const", const="cpu", default="gpu")
    parser.add_argument("--stub", dest="mode", action="store_const", const="stub")
    parser.add_argument("--only", metavar="STEPS")
    arguments = parser.parse_args()
    if arguments.part == "summary":
        return summary(arguments.out)
    run = Run(arguments.part, arguments.mode, arguments.out)
    os.environ.setdefault("TRITON_CACHE_DIR", str(run.work / "triton"))
    os.environ.setdefault("LORAKERNELS_COMPILED", str(run.out / "compiled.log"))
    if run.mode == "stub":
        os.environ |= {"LORAKERNELS_STUB": "sm_90", "LORAKERNELS_IMPL": "triton"}
    if run.mode == "cpu" and arguments.part != "steps":
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(ROOT))
    checked: Any = None
    if run.mode != "cpu":
        from lorakernels.testing import driver

        if run.mode == "stub":
            checked = driver.install("sm_90")
        else:
            driver.log_compilations()
    if arguments.part == "steps":
        for step in make_steps(run.mode).values():
            step()
        return 0
    steps = [step for step in PARTS[run.part] if not arguments.only or step[0] in arguments.only.split(",")]
    if not steps:
        parser.error(f"--only {arguments.only}: the steps of {run.part} are {', '.join(s[0] for s in PARTS[run.part])}")
    # Each has its share of the whole: with more time than the 310 seconds they are made for, all have more. What a step
    # leaves of its time is the next ones'.
    unit = max(1.0, arguments.limit / sum(seconds for _, seconds, _ in PARTS[run.part]))
    begin, share, states = time.monotonic(), 0.0, []
    for name, seconds, act in steps:
        share += seconds * unit
        left = begin + min(share, arguments.limit) - time.monotonic()
        states.append(carry_out(run, name, left, act, checked))
    return int(any(state not in ("ok", "") and not state.startswith(SKIPPED) for state in states))


def carry_out(run: Run, name: str, seconds: float, act: Callable[[Run, float], None], checked: Any) -> str:
    """One step: how it ended, which is also a line of the results."""
    start = time.monotonic()
    print(f"\n== {name} (at most {seconds:.0f} s)", flush=True)
    state, before = "ok", len(checked.refusals) if checked else 0

    def late(*_: object) -> None:
        raise Late

    signal.signal(signal.SIGALRM, late)
    if seconds < 3:
        state = "no time left"
    else:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            act(run, seconds - 2)
        except Late:
            state = "time limit"
        except Skip as why:
            state = f"{SKIPPED}{why}"
        except Exception as error:  # one step must not take the others along
            state = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    if checked and len(checked.refusals) > before:
        state = f"FAILED: refused: {checked.refusals[before]}"
    took = time.monotonic() - start
    run.row(kind="step", step=name, seconds=round(took, 1), state=state)
    print(f"-- {name}: {state}, {took:.0f} s", flush=True)
    return state


def summary(out: Path) -> int:
    """Print and keep how the steps of all parts ended, and the times so far. 1 where a step failed."""
    console = Console(width=160)
    ended = True
    with (out / "summary.txt").open("w", encoding="utf-8") as file:
        for printer in (console, Console(file=file, width=160)):
            for path in sorted(out.glob("?.jsonl")):
                rows = [
                    json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")
                ]
                table = Table("step", "seconds", "state", title=f"Part {path.stem}")
                done = {row["step"]: row for row in rows if row["kind"] == "step"}
                for name in dict.fromkeys([*done, *(step for step, *_ in PARTS[path.stem])]):
                    row = done.get(name, {"seconds": 0.0, "state": "did not end, or was not asked for"})
                    table.add_row(name, f"{row['seconds']:.0f}", row["state"])
                    ended &= row["state"] == "ok" or row["state"].startswith((SKIPPED, "did not"))
                printer.print(table)
                outcomes = [row["outcome"] for row in rows if row["kind"] == "test"]
                printer.print(
                    f"tests: {', '.join(f'{outcomes.count(o)} {o}' for o in dict.fromkeys(outcomes)) or 'none'}"
                )
                for row in rows:
                    if row["kind"] == "test" and row["outcome"] == "failed":
                        printer.print(f"failed: {row['test']}", markup=False)
                    elif row["kind"] == "time" and row.get("ratio"):
                        what = " ".join(
                            str(row[k]) for k in ("M", "N", "K", "r", "dropout", "adapters", "dtype") if k in row
                        )
                        low, middle, high = row["ratio"]
                        printer.print(
                            f"{what:44} {row['label']:28} {middle:.3f} of frozen ({low:.3f} … {high:.3f})", markup=False
                        )
            log = out / "compiled.log"
            if log.exists():
                hits = [line.startswith("hit") for line in log.read_text(encoding="utf-8").splitlines()]
                printer.print(f"kernels: {sum(hits)} found compiled, {len(hits) - sum(hits)} compiled here")
    return int(not ended)


if __name__ == "__main__":
    sys.exit(main())
