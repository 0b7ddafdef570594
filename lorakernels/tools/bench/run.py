"""Measuring: correctness first, then every peer in turns, in one process, on rotated buffers. Rows of JSON."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lorakernels.configs.data_sheet import data_sheet
from lorakernels.configs.device import assume, device_of
from lorakernels.tools.bench.environment import describe
from lorakernels.tools.bench.host import host_rows
from lorakernels.tools.bench.operations import OPERATIONS, AnyPeer, Operation, choose_peers, operation_of
from lorakernels.tools.bench.registry import AnyCase, case_of
from lorakernels.tools.bench.timing import EVENTS, Timer, by_events, clock, interleaved, p20_50_80, timer

SCHEMA = 1
_MOST_BUFFERS = 16
_CPU_CACHE = 32 << 20

Row = dict[str, Any]
Progress = Callable[[str], None]


def default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def run(
    cases: Sequence[AnyCase],
    impl: str | None = None,
    device: torch.device | None = None,
    rounds: int = 30,
    limit_s: float | None = None,
    progress: Progress = lambda line: None,
    out: str | Path | None = None,
    keep_row: Callable[[Row], None] = lambda row: None,
    launch_only: bool = False,
) -> list[Row]:
    """Rows of every case and peer, and of the host's own time; after `limit_s` seconds no further case is started.

    The file `out` is written anew after every case, so that a run that is cut short leaves what it has; `keep_row` is
    called with each row at once. With `launch_only` every peer makes one step, which is neither checked nor timed: for
    a driver that runs nothing.

    Raises:
        ValueError: `impl` names no peer, or `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; expected at least 1")
    device = device or default_device()
    peers = {operation.name: choose_peers(impl, operation, device) for operation in OPERATIONS.values()}
    origin = {"schema": SCHEMA, "environment": describe(device)}
    start = time.monotonic()
    rows: list[Row] = []

    def keep(more: Iterable[Row]) -> None:
        for row in more:
            rows.append(row | origin)
            keep_row(row)
            progress(line_of(row))
        if out is not None:
            write_rows(rows, out)

    with assume(device_of(device), here=True) if device.type == "cuda" else contextlib.nullcontext():
        for case in cases:
            late = limit_s is not None and time.monotonic() - start > limit_s
            skip = f"the time limit of {limit_s:g} s was reached" if late else None
            own = peers[case.operation]
            if launch_only and skip is None:
                keep(_launched(case, own, device))
            else:
                keep(_case_rows(case, own, device, rounds, skip))
        if not launch_only:
            keep(host_rows(device, rounds))
    return rows


def _launched(case: AnyCase, peers: Sequence[AnyPeer], device: torch.device) -> Iterable[Row]:
    tensors = operation_of(case).make_tensors(case, device, 0)
    for peer in peers:
        row = _head(case, peer) | {"reason": peer.why_not(case, device)}
        if row["reason"] is None:
            try:
                peer.make(case, tensors)()
                row["status"] = "ok"
            except Exception as error:  # what one peer is refused must not hide the others' launches
                row |= {"status": "error", "reason": _one_line(error)}
        yield row


def _case_rows(
    case: AnyCase, peers: Sequence[AnyPeer], device: torch.device, rounds: int, skip: str | None
) -> Iterable[Row]:
    operation = operation_of(case)
    heads = {peer.name: _head(case, peer) | operation.facts(case, peer, device) for peer in peers}
    reasons = {peer.name: skip or peer.why_not(case, device) for peer in peers}
    runnable = [peer for peer in peers if reasons[peer.name] is None]
    if runnable:
        try:
            sets = _tensor_sets(operation, case, device)
            check = operation.checker(case, sets[0])
        except torch.OutOfMemoryError as error:
            runnable = []
            reasons = dict.fromkeys(reasons, f"no room for the tensors: {_one_line(error)}")
    timers: dict[str, Timer] = {}
    for peer in runnable:
        row = heads[peer.name]
        try:
            worst, wrong = check(peer)
            row |= {"error_over_budget": worst, "status": "wrong" if wrong else "ok", "reason": wrong}
            if wrong is None:
                steps = [peer.make(case, tensors) for tensors in sets]
                for step in steps:  # what is made once for a batch or a tensor is no part of a step
                    step()
                row |= operation.measured(case, peer, steps[0], sets[0], device, row)
                timers[peer.name] = timer(device, steps)
        except Exception as error:  # a peer that breaks must not take the others along
            row |= {"status": "error", "reason": _one_line(error)}
    if runnable:
        del check  # it holds float64 matrices, in the way of the measurements
    for name, reason in reasons.items():
        if reason is not None:
            heads[name] |= {"status": "skipped", "reason": reason}
    _time(heads, timers, rounds)
    return list(heads.values())


def _head(case: AnyCase, peer: AnyPeer) -> Row:
    return {
        "operation": case.operation,
        "peer": peer.name,
        "label": peer.label,
        **case.as_dict(),
        "status": "skipped",
        "reason": None,
    }


def _tensor_sets(operation: Operation, case: AnyCase, device: torch.device) -> list[Any]:
    """As many sets of tensors as the last-level cache cannot hold twice over, and at least two."""
    first = operation.make_tensors(case, device, 0)
    if device.type == "cuda":
        sheet = data_sheet(device_of(device).name)
        cache = sheet.l2_bytes if sheet else torch.cuda.get_device_properties(device).L2_cache_size
    else:
        cache = _CPU_CACHE
    sets = min(max(2, 1 + -(-2 * cache // first.numbytes)), _MOST_BUFFERS)
    return [first, *(operation.make_tensors(case, device, seed) for seed in range(1, sets))]


def _time(heads: dict[str, Row], timers: dict[str, Timer], rounds: int) -> None:
    """Seconds and ratios of the rows. A graph leaves out the host's time, and events need not, so what is timed by
    events is held against the frozen layer by events; where that cannot be, there is no ratio."""
    if not timers:
        return
    clocks = {name: clock(own.how) for name, own in timers.items()}
    bases = {clocks["frozen"]: timers["frozen"]} if "frozen" in timers else {}
    if bases and EVENTS in clocks.values() and EVENTS not in bases:
        again = by_events(timers["frozen"])
        if again is not None:
            bases[EVENTS] = again
    measured = list({id(own): own for own in (*timers.values(), *bases.values())}.values())
    try:
        times = interleaved(measured, rounds)
    except Exception as error:
        for name in timers:
            heads[name] |= {"status": "error", "reason": f"while timing: {_one_line(error)}"}
        return
    seconds_of = {id(own): seconds for own, seconds in zip(measured, times, strict=True)}
    for name, own in timers.items():
        row, seconds = heads[name], seconds_of[id(own)]
        row |= {"timing": own.how, "rounds": rounds, "seconds": p20_50_80(seconds)}
        if clocks[name] in bases:
            base = seconds_of[id(bases[clocks[name]])]
            row |= {"ratio": p20_50_80(seconds / base), "frozen_seconds": p20_50_80(base)}
            row["share_of_floor"] = row["floor"] / row["ratio"][1]
            if "memory_floor" in row:
                row["share_of_memory_floor"] = row["memory_floor"] / row["ratio"][1]
        row["tflops"] = row["flops"] / row["seconds"][1] / 1e12 if row.get("flops") else None


def line_of(row: Row) -> str:
    """A row as a line of text."""
    what = f"{row['operation']} {case_of(row)}"
    head = f"{what:<56} {row['label']:<28}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason']}"
    if "seconds" not in row:
        return f"{head} {'right' if 'error_over_budget' in row else 'launched'}"
    text = f"{head} {row['seconds'][1] * 1e6:12.1f} µs"
    if clock(row["timing"]) == EVENTS:
        text += " (events)"
    if "beyond_linear_s" in row:
        text += f"   {row['beyond_linear_s'][1] * 1e6:6.1f} µs beyond torch's own linear"
    elif "ratio" in row:
        low, middle, high = row["ratio"]
        text += f"   {middle:6.3f} of frozen ({low:.3f} … {high:.3f})"
        if "share_of_memory_floor" in row and row["peer"] != "frozen":
            text += f"   memory floor {row['memory_floor']:.3f}, {row['share_of_memory_floor']:.0%} of it"
    else:
        text += "   no ratio: the frozen layer has no time by the same clock"
    return text


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def write_rows(rows: Sequence[Row], path: str | Path) -> Path:
    """Save rows as JSON, a row a line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    return path


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a file that `write_rows` made.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected a file from lorakernels bench --out") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.get("schema") == SCHEMA for row in rows):
        raise ValueError(f"{path} holds no rows of schema {SCHEMA}; expected a file from lorakernels bench --out")
    return rows
