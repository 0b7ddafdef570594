"""The host's own time: a call on a layer so small that nothing else is left of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorakernels.bench.orders import SCALING
from lorakernels.bench.peers import make_tensors
from lorakernels.bench.registry import Case
from lorakernels.bench.timing import interleaved_seconds, p20_50_80
from lorakernels.functional import lora_linear

_CASE = Case(1, 64, 64, 4, 0.0, "float32")
_CALLS = 50  # a time of a few µs is that of so many calls in a row
_LEAST_ROUNDS = 10


def host_rows(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Seconds a call, and beyond torch's own linear: without gradients, and with a backward."""
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

    def many(mode: Callable[[Callable[[], torch.Tensor]], None], layer: Callable[[], torch.Tensor]) -> None:
        for _ in range(_CALLS):
            mode(layer)
        if device.type == "cuda":
            torch.cuda.synchronize()

    rows = []
    for name, mode in (("inference", inference), ("training", training)):
        functions = [lambda mode=mode, layer=layer: many(mode, layer) for layer in (ours, theirs)]  # type: ignore[misc]
        own, linear = interleaved_seconds(functions, max(rounds, _LEAST_ROUNDS)) / _CALLS
        rows.append(
            {
                "operation": f"host, {name}",
                "peer": "ours-auto",
                "label": "ours",
                **_CASE.as_dict(),
                "status": "ok",
                "reason": None,
                "seconds": p20_50_80(own),
                "beyond_linear_s": p20_50_80(own - linear),
                "ratio": p20_50_80(own / linear),
                "timing": "perf_counter",
            }
        )
    return rows
