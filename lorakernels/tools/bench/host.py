"""The host's own time: a call on a layer so small that nothing else is left of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lorakernels.functional import lora_linear, multi_lora_linear
from lorakernels.tools.bench.multi import make_multi_tensors
from lorakernels.tools.bench.orders import SCALING
from lorakernels.tools.bench.peers import make_tensors
from lorakernels.tools.bench.registry import AnyCase, Case, MultiCase
from lorakernels.tools.bench.timing import interleaved_seconds, p20_50_80

_CASE = Case(1, 64, 64, 4, 0.0, "float32")
_MULTI_CASE = MultiCase(8, 64, 64, adapters=4, r=4, dtype="float32")
_CALLS = 50  # a time of a few µs is that of so many calls in a row
_LEAST_ROUNDS = 10


def host_rows(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Seconds a call, and beyond torch's own linear: without gradients, and with a backward; of many adapters, too."""
    return [*_layer_rows(device, rounds), _multi_row(device, rounds)]


def _layer_rows(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    t = make_tensors(_CASE, device, 0)

    def ours() -> torch.Tensor:
        return lora_linear(t.x, t.weight, t.lora_A, t.lora_B, scaling=SCALING)

    def theirs() -> torch.Tensor:
        return torch.nn.functional.linear(t.x, t.weight)

    def inference(layer: Callable[[], torch.Tensor]) -> None:
        with torch.no_grad():
            layer()

    def training(layer: Callable[[], torch.Tensor]) -> None:
        t.x.grad = t.lora_A.grad = t.lora_B.grad = None
        layer().backward(t.dy)

    return [
        _row(name, _CASE, device, rounds, partial(mode, ours), partial(mode, theirs))
        for name, mode in (("inference", inference), ("training", training))
    ]


def _multi_row(device: torch.device, rounds: int) -> dict[str, Any]:
    t = make_multi_tensors(_MULTI_CASE, device, 0)
    plan = t.plan(paged=True)

    def ours() -> None:
        with torch.no_grad():
            multi_lora_linear(t.x, t.weight, t.pages_A, t.pages_B, plan)

    def theirs() -> None:
        with torch.no_grad():
            torch.nn.functional.linear(t.x, t.weight)

    return _row("many adapters", _MULTI_CASE, device, rounds, ours, theirs)


def _row(
    name: str,
    case: AnyCase,
    device: torch.device,
    rounds: int,
    ours: Callable[[], object],
    theirs: Callable[[], object],
) -> dict[str, Any]:
    def many(call: Callable[[], object]) -> None:
        for _ in range(_CALLS):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    functions = [lambda: many(ours), lambda: many(theirs)]
    own, linear = interleaved_seconds(functions, max(rounds, _LEAST_ROUNDS)) / _CALLS
    return {
        "operation": f"host, {name}",
        "peer": "ours-auto",
        "label": "ours",
        **case.as_dict(),
        "status": "ok",
        "reason": None,
        "seconds": p20_50_80(own),
        "beyond_linear_s": p20_50_80(own - linear),
        "ratio": p20_50_80(own / linear),
        "timing": "perf_counter",
    }
