"""Ray Serve over AdapterStore: two replicas, one killed under load. It needs Ray: `pip install .[ray]`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_no_answer_is_lost_or_wrong_when_a_replica_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[2] / "examples"), *sys.path])
    import ray_serve

    told = ray_serve.main(requests=64)
    assert (told["lost"], told["wrong"]) == (0, 0)
    assert told["asked again"] > 0 and told["replicas"] >= 2
