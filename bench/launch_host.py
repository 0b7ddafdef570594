"""What the host does for a call on a GPU, up to the driver: measured where there is no GPU.

python bench/launch_host.py

Kernels are compiled for an H100 and launched, by Triton's own way, on the driver that only checks; the driver's own few
µs are missing. All else runs as it would. The tensors are a CPU's, whose own product takes its time (the first row).
"With launchers" is the first call of its shapes; from the third on they run from a tape.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from lorakernels.configs.table import record_choices
from lorakernels.kernels import lora_linear, multi_lora
from lorakernels.member import Member, training_step
from lorakernels.plan import BatchPlan
from lorakernels.testing import driver
from lorakernels.tools.bench.timing import interleaved_seconds, p20_50_80

_CALLS = 200  # in a row, of some 50 µs each
_WIDTH, _R, _SLOTS = 64, 8, 4


def calls() -> dict[str, Callable[[], object]]:
    """Calls of a tiny layer by name; first torch's own, to compare with."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    few, many, dys = tensor(16, _WIDTH), tensor(1024, _WIDTH), [tensor(1024, _WIDTH) for _ in range(3)]
    slices = [tensor(_WIDTH, _WIDTH) for _ in range(3)]
    members = [Member(W, tensor(_R, _WIDTH), tensor(_WIDTH, _R), scaling=2.0) for W in slices]
    As, Bs = [tensor(_SLOTS, _R, _WIDTH) for _ in slices], [tensor(_SLOTS, _WIDTH, _R) for _ in slices]
    plan = BatchPlan(_SLOTS, 16, max_rank=_R)
    plan.update([token % _SLOTS for token in range(16)], [_R] * _SLOTS, [1.0] * _SLOTS)

    def layer(x: torch.Tensor) -> object:
        return lora_linear.forward(x, members[:1], None, 0)

    def multi(weights: list[torch.Tensor]) -> object:
        n = len(weights)
        options: dict[str, Any] = {"keep_s": False, "seed": None, "thresholds": None}
        return multi_lora.forward(few, weights, [None] * n, As[:n], Bs[:n], plan.tensors, **options)

    def step(x: torch.Tensor, n: int) -> object:
        return training_step(lora_linear, x, [dy[: len(x)] for dy in dys[:n]], members[:n])

    return {
        "torch's product": lambda: torch.mm(few, slices[0]),
        "few tokens: 1 kernel": lambda: layer(few),
        "many tokens: 2 kernels": lambda: layer(many),
        "adapters: 1 product, 2 kernels": lambda: multi(slices[:1]),
        "adapters, q k v: 3 products, 2 kernels": lambda: multi(slices),
        "step, few tokens: 4 kernels": lambda: step(few, 1),
        "step: 7 kernels": lambda: step(many, 1),
        "step, q k v: 13 kernels": lambda: step(many, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    driver.install("sm_90")
    torch.set_num_threads(1)
    tried = calls()

    def many(call: Callable[[], object], by_launchers: bool) -> Callable[[], None]:
        def run() -> None:
            with record_choices() if by_launchers else nullcontext():
                for _ in range(_CALLS):
                    call()

        return run

    ways = [many(call, by_launchers) for call in tried.values() for by_launchers in (True, False)]
    seconds = interleaved_seconds(ways, rounds, warm_up=2) / _CALLS
    table = Table("", "with launchers", "from a tape", title=f"The host's µs a call (triton {triton.__version__})")
    for i, name in enumerate(tried):
        lows, medians, highs = zip(*(p20_50_80(times * 1e6) for times in seconds[2 * i : 2 * i + 2]), strict=True)
        table.add_row(name, *(f"{m:.0f} ({a:.0f} … {b:.0f})" for a, m, b in zip(lows, medians, highs, strict=True)))
    Console().print(table)


if __name__ == "__main__":
    main()
