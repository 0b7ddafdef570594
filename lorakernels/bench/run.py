"""Measuring: correctness first, then every peer in turns, in one process, on rotated buffers. Rows of JSON."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lorakernels.bench.counting import own_step, torch_step
from lorakernels.bench.devices import data_sheet
from lorakernels.bench.environment import describe
from lorakernels.bench.formulas import cost, floor
from lorakernels.bench.host import host_rows
from lorakernels.bench.peers import Peer, Step, Tensors, choose_peers, make_tensors
from lorakernels.bench.registry import Case
from lorakernels.bench.timing import Timer, interleaved, p20_50_80, timer
from lorakernels.bench.verify import Exact, verify
from lorakernels.tuning.device import assume, device_of
from lorakernels.tuning.table import choose_with_source, takes_few_tokens_form

SCHEMA = 1
_MOST_BUFFERS = 16
_CPU_CACHE = 32 << 20

Row = dict[str, Any]
Progress = Callable[[str], None]


def default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def run(
    cases: Sequence[Case],
    impl: str | None = None,
    device: torch.device | None = None,
    rounds: int = 30,
    limit_s: float | None = None,
    progress: Progress = lambda line: None,
    out: str | Path | None = None,
) -> list[Row]:
    """Rows of every case and peer, and of the host's own time; after `limit_s` seconds no further case is started.

    The file `out` is written anew after every case, so that a run that is cut short leaves what it has.

    Raises:
        ValueError: `impl` names no peer, or `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; expected at least 1")
    device = device or default_device()
    peers = choose_peers(impl, device)
    origin = {"schema": SCHEMA, "environment": describe(device)}
    start = time.monotonic()
    rows: list[Row] = []

    def keep(more: Iterable[Row]) -> None:
        for row in more:
            rows.append(row | origin)
            progress(line_of(row))
        if out is not None:
            write_rows(rows, out)

    with assume(device_of(device)) if device.type == "cuda" else contextlib.nullcontext():
        for case in cases:
            late = limit_s is not None and time.monotonic() - start > limit_s
            skip = f"the time limit of {limit_s:g} s was reached" if late else None
            keep(_case_rows(case, peers, device, rounds, skip))
        keep(host_rows(device, rounds))
    return rows


def _case_rows(case: Case, peers: Sequence[Peer], device: torch.device, rounds: int, skip: str | None) -> Iterable[Row]:
    heads = {peer.name: _head(case, peer, device) for peer in peers}
    reasons = {peer.name: skip or peer.why_not(case, device) for peer in peers}
    runnable = [peer for peer in peers if reasons[peer.name] is None]
    if runnable:
        try:
            sets = _tensor_sets(case, device)
            exact = Exact(case, sets[0])
        except torch.OutOfMemoryError as error:
            runnable = []
            reasons = dict.fromkeys(reasons, f"no room for the tensors: {_one_line(error)}")
    timers: dict[str, Timer] = {}
    for peer in runnable:
        row = heads[peer.name]
        try:
            worst, wrong = verify(peer, case, sets[0], exact)
            row |= {"error_over_budget": worst, "status": "wrong" if wrong else "ok", "reason": wrong}
            if wrong is None:
                steps = [peer.make(case, tensors) for tensors in sets]
                row |= _memory(steps[0], sets[0], device)
                row["launches"] = _launches(peer, case, device, steps[0], row["graph"])
                timers[peer.name] = timer(device, steps)
        except Exception as error:  # a peer that breaks must not take the others along
            row |= {"status": "error", "reason": _one_line(error)}
    if runnable:
        del exact  # float64 matrices, in the way of the measurements
    for name, reason in reasons.items():
        if reason is not None:
            heads[name] |= {"status": "skipped", "reason": reason}
    _time(heads, timers, rounds, case)
    return list(heads.values())


def _head(case: Case, peer: Peer, device: torch.device) -> Row:
    row: Row = {
        "operation": "lora_linear",
        "peer": peer.name,
        "label": peer.label,
        **case.as_dict(),
        "status": "skipped",
        "reason": None,
    }
    try:
        graph = peer.graph(case, device)
        row["graph"] = graph
        if graph is not None:
            of_graph = cost(graph, case, device)
            row |= {"bytes": of_graph.bytes, "extra_bytes": of_graph.extra, "flops": of_graph.flops}
    except (ValueError, RuntimeError):  # a graph without dropout, an implementation that cannot run: it will be skipped
        row["graph"] = None
    sheet = data_sheet(device_of(device).name)
    row["floor"] = floor(case, sheet) if peer.adapted else 1.0
    row["configs"] = _config_sources(case, peer, device)
    return row


def _config_sources(case: Case, peer: Peer, device: torch.device) -> dict[str, str] | None:
    """Where each kernel's config comes from, for a peer that runs kernels: the tuning table, or the heuristic."""
    if not peer.name.startswith("ours") or peer.why_not(case, device) or peer.graph(case, device) == "addmm":
        return None
    M, N, K, r, itemsize = case.M, case.N, case.K, case.r, case.itemsize
    if takes_few_tokens_form(M, r, itemsize):
        operations = {"few_tokens": (N, K), "outer": (N, N)}
    else:
        operations = {"shrink": (K, K), "linear_expand": (N, K), "outer": (N, N)}
    return {
        operation: choose_with_source(operation, M, *sizes, r, itemsize, device, case.aligned).source
        for operation, sizes in operations.items()
    }


def _tensor_sets(case: Case, device: torch.device) -> list[Tensors]:
    """As many sets of tensors as the last-level cache cannot hold twice over, and at least two."""
    first = make_tensors(case, device, 0)
    if device.type == "cuda":
        sheet = data_sheet(device_of(device).name)
        cache = sheet.l2_bytes if sheet else torch.cuda.get_device_properties(device).L2_cache_size
    else:
        cache = _CPU_CACHE
    sets = min(max(2, 1 + -(-2 * cache // first.numbytes)), _MOST_BUFFERS)
    return [first, *(make_tensors(case, device, seed) for seed in range(1, sets))]


def _memory(step: Step, tensors: Tensors, device: torch.device) -> Row:
    """Bytes kept from forward to backward (weights and adapters left out), and on a GPU the peak of a step."""
    own = {t.untyped_storage().data_ptr() for t in (tensors.weight, tensors.lora_A, tensors.lora_B)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    memory: Row = {"kept_bytes": sum(kept.values()), "peak_bytes": None}
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize()
        memory["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    return memory


def _launches(peer: Peer, case: Case, device: torch.device, step: Step, graph: str | None) -> int | None:
    """Kernels and torch operations of a step; None where a package or compiler starts its own."""
    if peer.name.startswith("ours"):
        if graph == "addmm":
            return len(own_step(case, "torch")) if not case.dropout else None
        return None if graph is None else cost(graph, case, device).launches
    if peer.name in ("compile", "unsloth", "lorafusion"):
        return None
    return len(torch_step(step))


def _time(heads: dict[str, Row], timers: dict[str, Timer], rounds: int, case: Case) -> None:
    if not timers:
        return
    try:
        times = interleaved(list(timers.values()), rounds)
    except Exception as error:
        for name in timers:
            heads[name] |= {"status": "error", "reason": f"while timing: {_one_line(error)}"}
        return
    by_name = dict(zip(timers, times, strict=True))
    base = by_name.get("frozen")
    for name, seconds in by_name.items():
        row = heads[name]
        row |= {"timing": timers[name].how, "rounds": rounds, "seconds": p20_50_80(seconds)}
        if base is not None:
            row["ratio"] = p20_50_80(seconds / base)
            row["share_of_floor"] = row["floor"] / row["ratio"][1]
        row["tflops"] = row["flops"] / row["seconds"][1] / 1e12 if row.get("flops") else None


def line_of(row: Row) -> str:
    """A row as a line of text."""
    what = f"{row['operation']} {row['M']}x{row['N']}x{row['K']} r={row['r']} p={row['dropout']:g} {row['dtype']}"
    head = f"{what:<56} {row['label']:<28}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason']}"
    if "seconds" not in row:
        return f"{head} right"
    text = f"{head} {row['seconds'][1] * 1e6:12.1f} µs"
    if "beyond_linear_s" in row:
        text += f"   {row['beyond_linear_s'][1] * 1e6:6.1f} µs beyond torch's own linear"
    elif "ratio" in row:
        low, middle, high = row["ratio"]
        text += f"   {middle:6.3f} of frozen ({low:.3f} … {high:.3f})"
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
