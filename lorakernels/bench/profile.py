"""What the worst row of a run spends its time on: `python -m lorakernels.bench.profile results.json`.

Under a profiler of its own (`ncu python -m lorakernels.bench.profile results.json --plain`) it only runs the steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lorakernels.bench.operations import operation_of
from lorakernels.bench.registry import case_of
from lorakernels.bench.run import default_device, line_of, read_rows

_WARM_UP, _STEPS, _PLAIN_STEPS = 3, 5, 30


def worst(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of our right results the one that is furthest from its floor.

    Raises:
        ValueError: there is none.
    """
    own = [row for row in rows if row["peer"] == "ours-auto" and "share_of_floor" in row]
    if not own:
        raise ValueError("no row of ours-auto has a time; expected results of lorakernels bench")
    return min(own, key=lambda row: row["share_of_floor"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lorakernels.bench.profile", description=__doc__)
    parser.add_argument("results", metavar="FILE.json")
    parser.add_argument("--plain", action="store_true", help="run the steps only, for another profiler to watch")
    arguments = parser.parse_args(argv)
    row = worst(read_rows(arguments.results))
    print(line_of(row))
    device = torch.device("cpu") if row["environment"]["device_type"] == "cpu" else default_device()
    case = case_of(row)
    operation = operation_of(case)
    step = operation.peers[row["peer"]].make(case, operation.make_tensors(case, device, 0))
    for _ in range(_PLAIN_STEPS if arguments.plain else _WARM_UP):
        step()
    if arguments.plain:
        return
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as watched:
        for _ in range(_STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    averages = watched.key_averages()
    print(averages.table(sort_by="self_device_time_total" if on_gpu else "self_cpu_time_total", row_limit=20))


if __name__ == "__main__":
    main()
