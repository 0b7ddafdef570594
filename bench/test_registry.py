"""The small set of `lorakernels bench` through pytest-benchmark, which keeps and compares runs: a case and peer a row.

pytest bench/test_registry.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lorakernels.bench.formulas import cost
from lorakernels.bench.peers import PEERS, make_tensors
from lorakernels.bench.registry import SETS, Case
from lorakernels.bench.run import default_device
from lorakernels.bench.timing import interleaved_seconds, percentiles
from lorakernels.bench.verify import Exact, verify

ROUNDS = 20
MEASURED = ("ours-auto", "peft", "eager")


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("case", SETS["small"], ids=str)
def test_small_set(benchmark: Any, record_ratio: Any, case: Case, name: str) -> None:
    device, peer = default_device(), PEERS[name]
    reason = peer.why_not(case, device)
    if reason is not None:
        pytest.skip(reason)
    tensors = make_tensors(case, device, 0)
    _, wrong = verify(peer, case, tensors, Exact(case, tensors))
    assert wrong is None, wrong

    def synchronised(step: Any) -> Any:
        def run() -> None:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    steps = [synchronised(one.make(case, tensors)) for one in (peer, PEERS["frozen"])]
    own, frozen = interleaved_seconds(steps, ROUNDS)
    record_ratio({"case": str(case), "what": peer.label, "of the frozen layer": percentiles(own / frozen)})
    benchmark.extra_info["over_frozen"] = float(np.median(own / frozen))
    graph = peer.graph(case, device)
    benchmark.extra_info["extra_bytes"] = None if graph is None else cost(graph, case).extra
    benchmark.pedantic(steps[0], rounds=5)
