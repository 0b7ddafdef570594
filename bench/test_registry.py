"""The small set of `lorakernels bench` through pytest-benchmark, which keeps and compares runs: a case and peer a row.

pytest bench/test_registry.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lorakernels.tools.bench.counting import count
from lorakernels.tools.bench.peer import checker, make_tensors
from lorakernels.tools.bench.peers import PEERS
from lorakernels.tools.bench.registry import SETS, Case
from lorakernels.tools.bench.run import default_device
from lorakernels.tools.bench.timing import interleaved_seconds, p20_50_80

ROUNDS = 20
MEASURED = ("ours-auto", "peft", "eager", "loop")


@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in SETS["small"] for name in MEASURED if PEERS[name].many in (None, bool(case.adapters))],
    ids=str,
)
def test_small_set(benchmark: Any, record_ratio: Any, case: Case, name: str) -> None:
    device, peer = default_device(), PEERS[name]
    reason = peer.why_not(case, device)
    if reason is not None:
        pytest.skip(reason)
    tensors = make_tensors(case, device, 0)
    _, wrong = checker(tensors)(peer)
    assert wrong is None, wrong

    def synchronised(step: Any) -> Any:
        def run() -> None:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    steps = [synchronised(one.make(tensors)) for one in (peer, PEERS["frozen"])]
    own, frozen = interleaved_seconds(steps, ROUNDS)
    record_ratio({"case": str(case), "what": peer.label, "of the frozen layer": p20_50_80(own / frozen)})
    benchmark.extra_info["over_frozen"] = float(np.median(own / frozen))
    with count() as counted:
        steps[0]()
    benchmark.extra_info["extra_bytes"] = sum(each.bytes for each in counted) - case.frozen_bytes
    benchmark.pedantic(steps[0], rounds=5)
