"""The operations that are measured: what each has for a case, a peer, and a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lorakernels.configs.data_sheet import data_sheet
from lorakernels.configs.device import device_of
from lorakernels.tools.bench import costs, multi
from lorakernels.tools.bench.counting import Counted, own_multi, torch_step
from lorakernels.tools.bench.multi import MultiTensors, make_multi_tensors, multi_checker
from lorakernels.tools.bench.multi_peers import MULTI_PEERS, MultiPeer
from lorakernels.tools.bench.peer import Peer, Step
from lorakernels.tools.bench.peers import PEERS, Tensors, make_tensors
from lorakernels.tools.bench.registry import AnyCase, Case, MultiCase
from lorakernels.tools.bench.verify import layer_checker

Row = dict[str, Any]
AnyPeer = Peer[Any, Any]
# A compiler or a package starts its own kernels, which nobody here counts.
_UNCOUNTED = ("compile", "unsloth", "lorafusion", "vllm")


@dataclass(frozen=True)
class Operation:
    """`facts` are a row's figures without running it; `measured` those of a step, before its time is taken."""

    name: str
    peers: Mapping[str, AnyPeer]
    make_tensors: Callable[[Any, torch.device, int], Any]
    checker: Callable[[Any, Any], Callable[[Any], tuple[float, str | None]]]
    facts: Callable[[Any, Any, torch.device], Row]
    measured: Callable[[Any, Any, Step, Any, torch.device, Row], Row]


# ------------------------------------------------------------------------------- one adapter, a training step


def _layer_facts(case: Case, peer: AnyPeer, device: torch.device) -> Row:
    row: Row = {"graph": None, "configs": None}
    try:
        graph = peer.graph(case, device)
        if graph is not None:
            own = costs.cost(graph, case, device)
            row |= {"graph": graph, "bytes": own.bytes, "extra_bytes": own.extra, "flops": own.flops}
            if peer.name.startswith("ours"):
                row |= {"launches": own.launches, "configs": own.configs or None}
    except (ValueError, RuntimeError):  # a graph without dropout, an implementation that cannot run: it will be skipped
        pass
    row["floor"] = costs.floor(case, data_sheet(device_of(device).name)) if peer.adapted else 1.0
    return row


def _layer_measured(case: Case, peer: AnyPeer, step: Step, tensors: Tensors, device: torch.device, row: Row) -> Row:
    counted = peer.name not in _UNCOUNTED and "launches" not in row
    launches = len(torch_step(step)) if counted else row.get("launches")
    return {"kept_bytes": _kept(step, tensors), "peak_bytes": _peak(step, device), "launches": launches}


def _kept(step: Step, tensors: Tensors) -> int:
    """Bytes kept from forward to backward, weights and adapters left out."""
    own = {t.untyped_storage().data_ptr() for t in (tensors.weight, tensors.lora_A, tensors.lora_B)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


# ------------------------------------------------------------------------------- many adapters, a forward


def _multi_facts(case: MultiCase, peer: MultiPeer, device: torch.device) -> Row:
    sheet = data_sheet(device_of(device).name)
    return {
        "flops": multi.frozen_flops(case) + (multi.low_rank_flops(case) if peer.adapted else 0),
        "floor": multi.floor(case, sheet) if peer.adapted else 1.0,
        "memory_floor": multi.memory_floor(case) if peer.adapted else 1.0,
        "adapter_bytes": peer.adapter_bytes(case),
    }


def _multi_measured(
    case: MultiCase, peer: MultiPeer, step: Step, tensors: MultiTensors, device: torch.device, row: Row
) -> Row:
    counted = _multi_counted(case, peer, step, tensors, device)
    found: Row = {"peak_bytes": _peak(step, device), "launches": None, "bytes": None, "extra_bytes": None}
    if counted is not None:
        moved = sum(each.bytes for each in counted)
        found |= {"launches": len(counted), "bytes": moved, "extra_bytes": moved - multi.frozen_bytes(case)}
    return found


def _multi_counted(
    case: MultiCase, peer: MultiPeer, step: Step, tensors: MultiTensors, device: torch.device
) -> list[Counted] | None:
    impl = peer.graph(case, device)
    if impl is not None:
        paged = peer.name != "ours-stacks"
        A, B = (tensors.pages_A, tensors.pages_B) if paged else tensors.stacks
        return own_multi(tensors.x, tensors.weight, A, B, tensors.plan(paged).tensors, impl)
    return None if peer.name in _UNCOUNTED else torch_step(step)


def _peak(step: Step, device: torch.device) -> int | None:
    """The peak of a step beyond what was there before, on a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


# ------------------------------------------------------------------------------- which there are

_LAYER = Operation(Case.operation, PEERS, make_tensors, layer_checker, _layer_facts, _layer_measured)
_MULTI = Operation(MultiCase.operation, MULTI_PEERS, make_multi_tensors, multi_checker, _multi_facts, _multi_measured)
OPERATIONS = {Case: _LAYER, MultiCase: _MULTI}


def operation_of(case: AnyCase) -> Operation:
    return OPERATIONS[type(case)]


def choose_peers(names: str | None, operation: Operation, device: torch.device) -> tuple[AnyPeer, ...]:
    """The operation's peers among those named, joined by commas ("torch" is short for "ours-torch"), after the frozen
    layer; None: the usual.

    Raises:
        ValueError: no operation has such a peer.
    """
    if names is None:
        return tuple(peer for peer in operation.peers.values() if peer.by_default(device))
    every = dict.fromkeys(name for each in OPERATIONS.values() for name in each.peers)
    chosen = {"frozen": operation.peers["frozen"]}
    for name in names.split(","):
        full = name if name in every else f"ours-{name}"
        if full not in every:
            raise ValueError(f"there is no implementation {name!r}; there are: {', '.join(every)}")
        if full in operation.peers:
            chosen[full] = operation.peers[full]
    return tuple(chosen.values())
