"""What the host does for a call on a GPU, up to the driver: measured where there is no GPU.

python bench/launch_host.py

Triton is given a driver that starts nothing, and kernels that are never compiled. All else runs as it would: checks,
the choice of a config, buffers, arguments, Triton's own look-up of the compiled kernel. The tensors are a CPU's, whose
own product takes its time (the first row) and the driver's few µs are missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lorakernels.kernels import lora_linear, multi_lora
from lorakernels.member import Member
from lorakernels.plan import BatchPlan
from lorakernels.tools.bench.timing import interleaved_seconds, p20_50_80, spread

_CALLS = 200  # in a row, of some 50 µs each
_WIDTH, _R, _SLOTS = 64, 8, 4


class _Driver:
    """An H100's, as far as a launch asks it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class _Kernel:
    """A compiled kernel, as far as a launch asks it."""

    function, packed_metadata = 0, ()

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        return None


def _compiled(self: Any, key: Any, signature: Any, device: int, *_: Any) -> _Kernel:
    kernel = self.device_caches[device][0][key] = _Kernel()
    return kernel


def calls() -> dict[str, Callable[[], object]]:
    """The forwards of a tiny layer by name; first torch's own, to compare with."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    few, many, weight = tensor(16, _WIDTH), tensor(1024, _WIDTH), tensor(_WIDTH, _WIDTH)
    A, B = tensor(_R, _WIDTH), tensor(_WIDTH, _R)
    As, Bs = tensor(_SLOTS, _R, _WIDTH), tensor(_SLOTS, _WIDTH, _R)
    plan = BatchPlan(_SLOTS, 16, max_rank=_R)
    plan.update([token % _SLOTS for token in range(16)], [_R] * _SLOTS, [1.0] * _SLOTS)
    slices = [weight] * 3

    def layer(x: torch.Tensor) -> object:
        return lora_linear.forward(x, [Member(weight, A, B, scaling=2.0)], None, 0)

    def multi(weights: list[torch.Tensor]) -> object:
        n = len(weights)
        options: dict[str, Any] = {"keep_s": False, "seed": None, "thresholds": None}
        return multi_lora.forward(few, weights, [None] * n, [As] * n, [Bs] * n, plan.tensors, **options)

    return {
        "torch's matrix product": lambda: torch.mm(few, weight),
        "one adapter, few tokens: 1 kernel": lambda: layer(few),
        "one adapter: 2 kernels": lambda: layer(many),
        "many adapters: 1 product, 2 kernels": lambda: multi([weight]),
        "many adapters, q k v: 3 products, 2 kernels": lambda: multi(slices),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    driver.set_active(_Driver())
    JITFunction._do_compile = _compiled  # type: ignore[method-assign]
    torch.set_num_threads(1)
    tried = calls()

    def many(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(_CALLS):
                call()

        return run

    seconds = interleaved_seconds([many(call) for call in tried.values()], rounds, warm_up=2) / _CALLS
    table = Table(
        "forward", "µs a call: median (p20 … p80)", title=f"The host's part of a launch, triton {triton.__version__}"
    )
    for name, times in zip(tried, seconds, strict=True):
        table.add_row(name, spread(p20_50_80(times * 1e6)))
    Console().print(table)


if __name__ == "__main__":
    main()
