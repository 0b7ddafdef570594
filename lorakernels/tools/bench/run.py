"""Measuring: correctness first, then every peer in turns, in one process, on rotated buffers. Rows of JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorakernels.configs.data_sheet import data_sheet
from lorakernels.configs.device import device_of
from lorakernels.configs.table import record_choices
from lorakernels.quant.packed import PackedWeight
from lorakernels.tools.bench import timing
from lorakernels.tools.bench.counting import count
from lorakernels.tools.bench.environment import describe
from lorakernels.tools.bench.peer import Peer, Step, Tensors, checker, make_tensors
from lorakernels.tools.bench.peers import choose_peers
from lorakernels.tools.bench.registry import Case, case_of

SCHEMA = 1
_MOST_BUFFERS = 16
_CPU_CACHE = 32 << 20
# Layers so small that nothing but the host's own time is left of them.
_HOST = {
    "inference": Case(1, 64, 64, 4, dtype="float32"),
    "training": Case(1, 64, 64, 4, dtype="float32"),
    "training, 1024 tokens": Case(1024, 64, 64, 4, dtype="float32"),
    "many adapters": Case(8, 64, 64, 4, dtype="float32", adapters=4),
}
_HOST_CALLS, _HOST_ROUNDS = 50, 10  # a time of a few µs is that of so many calls in a row; at least so many rounds

Row = dict[str, Any]


def default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def run(
    cases: Sequence[Case],
    impl: str | None = None,
    device: torch.device | None = None,
    rounds: int = 30,
    limit_s: float | None = None,
    out: str | Path | None = None,
    on_row: Callable[[Row], object] = lambda row: None,
) -> list[Row]:
    """Rows of every case and peer, and of the host's own time; after `limit_s` seconds no further case is started.

    The file `out` is written anew after every case, so that a run that is cut short leaves what it has; `on_row` is
    called with each row of a case at its end.

    Raises:
        ValueError: `impl` names no peer, or `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; expected at least 1")
    device = device or default_device()
    one, many = (choose_peers(impl, many, device) for many in (False, True))
    origin = {"schema": SCHEMA, "environment": describe(device)}
    start = time.monotonic()
    rows: list[Row] = []

    def keep(more: Sequence[Row]) -> None:
        for row in more:
            rows.append(row | origin)
            on_row(rows[-1])
        if out is not None:
            write_rows(rows, out)

    for case in cases:
        late = limit_s is not None and time.monotonic() - start > limit_s
        skip = f"the time limit of {limit_s:g} s was reached" if late else None
        keep(_case_rows(case, one if case.adapters is None else many, device, rounds, skip))
    keep(_host_rows(device, rounds))
    return rows


def _case_rows(case: Case, peers: Sequence[Peer], device: torch.device, rounds: int, skip: str | None) -> list[Row]:
    heads = {peer.name: _head(case, peer, device) for peer in peers}
    for peer in peers:
        packed = None if case.base == "dense" or peer.packed else "it takes no packed weight"
        heads[peer.name]["reason"] = skip or packed or peer.why_not(case, device)
    runnable = [peer for peer in peers if heads[peer.name]["reason"] is None]
    try:
        timers = _checked(case, runnable, device, heads) if runnable else {}
    except torch.OutOfMemoryError as error:
        timers = {}
        for peer in runnable:
            heads[peer.name]["reason"] = f"no room for the tensors: {timing.one_line(error)}"
    _time(heads, timers, rounds)
    return list(heads.values())


def _checked(case: Case, peers: Sequence[Peer], device: torch.device, heads: dict[str, Row]) -> dict[str, timing.Timer]:
    """Timers of the peers whose results are right; what each one's step costs, or what is wrong, is in its row."""
    sets, timers = _tensor_sets(case, device), {}
    check = checker(sets[0])
    for peer in peers:
        row = heads[peer.name]
        try:
            row["error_over_budget"], row["reason"] = check(peer)
            row["status"] = "ok" if row["reason"] is None else "wrong"
            if row["status"] == "ok":
                steps = [peer.make(tensors) for tensors in sets]
                for step in steps:  # what is made once for a batch or a tensor is no part of a step
                    step()
                row |= _figures(peer, steps[0], sets[0])
                timers[peer.name] = timing.timer(device, steps)
        except Exception as error:  # a peer that breaks must not take the others along
            row |= {"status": "error", "reason": timing.one_line(error)}
    return timers


def _head(case: Case, peer: Peer, device: torch.device) -> Row:
    row = {"operation": "lora_linear", "peer": peer.name, "label": peer.label, **case.as_dict(), "status": "skipped"}
    row["flops"] = case.frozen_flops + (case.low_rank_flops if peer.adapted else 0)
    row["floor"] = case.floor(data_sheet(device_of(device).name)) if peer.adapted else 1.0
    if case.adapters is not None:
        row["operation"] = "multi_lora_linear"
        row["memory_floor"] = case.memory_floor if peer.adapted else 1.0
        row["adapter_bytes"] = peer.adapter_bytes(case)
    return row


def _tensor_sets(case: Case, device: torch.device) -> list[Tensors]:
    """As many sets of tensors as the last-level cache cannot hold twice over, and at least two."""
    first, cache = make_tensors(case, device, 0), _CPU_CACHE
    if device.type == "cuda":
        sheet = data_sheet(device_of(device).name)
        cache = sheet.l2_bytes if sheet else torch.cuda.get_device_properties(device).L2_cache_size
    sets = min(max(2, 1 + -(-2 * cache // first.numbytes)), _MOST_BUFFERS)
    return [first, *(make_tensors(case, device, seed) for seed in range(1, sets))]


def _figures(peer: Peer, step: Step, t: Tensors) -> Row:
    """What a step keeps for the backward without weights and adapters, its peak on a GPU, and what it asks for."""
    base = t.base[1:] if isinstance(t.base, PackedWeight) else (t.base,)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*base, *t.adapters[0]) if tensor is not None}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    if on_gpu := t.x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(t.x.device)
        before = torch.cuda.memory_allocated(t.x.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    row: Row = dict.fromkeys(("peak_bytes", "launches", "bytes", "extra_bytes", "configs"))
    row["kept_bytes"] = sum(kept.values())
    if on_gpu:
        torch.cuda.synchronize()
        row["peak_bytes"] = torch.cuda.max_memory_allocated(t.x.device) - before
    if peer.counted:
        with record_choices() as asked, count() as counted:
            step()
        moved = sum(each.bytes for each in counted)
        row |= {"launches": len(counted), "bytes": moved, "extra_bytes": moved - t.case.frozen_bytes}
        row["configs"] = {each.operation: each.choice.source for each in reversed(asked)} or None
    return row


def _time(heads: dict[str, Row], timers: dict[str, timing.Timer], rounds: int) -> None:
    """Seconds and ratios of the rows. A graph leaves out the host's time, and events need not, so what is timed by
    events is held against the frozen layer by events; where that cannot be, there is no ratio."""
    measured = list(timers.values())
    clocks = [timing.clock(own.how) for own in measured]
    bases = {clocks[0]: 0} if "frozen" in timers else {}  # which comes first
    if bases and timing.EVENTS in clocks and timing.EVENTS not in bases:
        bases[timing.EVENTS] = len(measured)
        measured.append(timing.GpuEvents(measured[0].steps, capture=False))
    try:
        times = timing.interleaved(measured, rounds)
    except Exception as error:
        for name in timers:
            heads[name] |= {"status": "error", "reason": f"while timing: {timing.one_line(error)}"}
        return
    for (name, own), at, seconds in zip(timers.items(), clocks, times, strict=False):
        row = heads[name]
        row |= {"timing": own.how, "rounds": rounds, "seconds": timing.p20_50_80(seconds)}
        if at in bases:
            base = times[bases[at]]
            row |= {"ratio": timing.p20_50_80(seconds / base), "frozen_seconds": timing.p20_50_80(base)}
            for floor in row.keys() & {"floor", "memory_floor"}:
                row[f"share_of_{floor}"] = row[floor] / row["ratio"][1]


def _host_rows(device: torch.device, rounds: int) -> list[Row]:
    """Seconds a call, and beyond torch's own linear: without gradients, and with a backward; of many adapters, too.

    And those of PEFT, and of the formula by torch's operators: on a GPU a small layer waits for the host.
    """

    def often(step: Step) -> None:
        for _ in range(_HOST_CALLS):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    rows = []
    for name, case in _HOST.items():
        if case.M > 64 and device.type != "cuda":
            continue  # where the products would take the time
        t = make_tensors(case, device, 0)
        for tensor in (t.x, *t.adapters[0]) if name == "inference" else ():
            tensor.requires_grad_(False)
        peers = choose_peers("auto" if case.adapters else "auto,eager,peft", case.adapters is not None, device)
        steps: dict[Peer, Callable[[], None]] = {}
        for peer in peers:
            try:
                (step := peer.make(t))()
                steps[peer] = partial(often, step)
            except Exception:  # the rows of the cases say why
                continue
        linear, *times = timing.interleaved_seconds(list(steps.values()), max(rounds, _HOST_ROUNDS)) / _HOST_CALLS
        for peer, own in zip(list(steps)[1:], times, strict=True):
            row = {"operation": f"host, {name}", "peer": peer.name, "label": peer.label, **case.as_dict()}
            row |= {"status": "ok", "reason": None, "timing": "perf_counter", "seconds": timing.p20_50_80(own)}
            row |= {"ratio": timing.p20_50_80(own / linear), "beyond_linear_s": timing.p20_50_80(own - linear)}
            rows.append(row)
    return rows


def line_of(row: Row) -> str:
    """A row as a line of text."""
    what = f"{row['operation']} {case_of(row)}"
    head = f"{what:<56} {row['label']:<28}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason']}"
    text = f"{head} {row['seconds'][1] * 1e6:12.1f} µs"
    if timing.clock(row["timing"]) == timing.EVENTS:
        text += " (events)"
    if "beyond_linear_s" in row:
        return f"{text}   {row['beyond_linear_s'][1] * 1e6:6.1f} µs beyond torch's own linear"
    if "ratio" not in row:
        return f"{text}   no ratio: the frozen layer has no time by the same clock"
    text += f"   {timing.spread(row['ratio'])} of frozen"
    if "share_of_memory_floor" in row and row["peer"] != "frozen":
        text += f"   memory floor {row['memory_floor']:.3f}, {row['share_of_memory_floor']:.0%} of it"
    return text


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
