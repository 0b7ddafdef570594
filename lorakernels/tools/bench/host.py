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
    t, many = make_tensors(_CASE, device, 0), make_multi_tensors(_MULTI_CASE, device, 0)
    plan = many.plan(paged=True)

    def training(layer: Callable[[], torch.Tensor]) -> None:
        t.x.grad = t.lora_A.grad = t.lora_B.grad = None
        layer().backward(t.dy)

    inference = torch.no_grad()(lambda layer: layer())
    single = partial(lora_linear, t.x, t.weight, t.lora_A, t.lora_B, scaling=SCALING)
    frozen, many_frozen = (partial(torch.nn.functional.linear, each.x, each.weight) for each in (t, many))
    batch = partial(multi_lora_linear, many.x, many.weight, many.pages_A, many.pages_B, plan)
    return [
        _row("inference", _CASE, device, rounds, partial(inference, single), partial(inference, frozen)),
        _row("training", _CASE, device, rounds, partial(training, single), partial(training, frozen)),
        _row("many adapters", _MULTI_CASE, device, rounds, partial(inference, batch), partial(inference, many_frozen)),
    ]


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
