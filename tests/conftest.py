"""Kernels run in Triton's interpreter where there is no GPU; uninitialised memory is NaN."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorakernels.testing.device import COMPILED, DEVICE, STUB

with contextlib.suppress(ImportError):  # not in every environment of the checks
    from hypothesis import Phase, settings

    # Of sequences of calls: the same few in every run, or many new ones by `--hypothesis-profile long`.
    # Without a deadline; and without explaining, which takes minutes.
    common = settings(deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink])
    settings.register_profile("short", common, max_examples=6, stateful_step_count=16, derandomize=True)
    settings.register_profile("long", common, max_examples=1000, stateful_step_count=50)
    settings.load_profile("short")
RESULTS = os.environ.get("LORAKERNELS_RESULTS")  # a file that gets a line of JSON for each test
if not COMPILED:
    # Before anything imports the kernels: a kernel is made for the interpreter or for a GPU when it is defined.
    os.environ["TRITON_INTERPRET"] = "1"
    from lorakernels.testing.interpreter import quicken

    quicken()
elif STUB:
    from lorakernels.testing import driver

    driver.install(STUB)
elif "LORAKERNELS_COMPILED" in os.environ:
    from lorakernels.testing import driver

    driver.log_compilations()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the processes share the cores


def pytest_report_header() -> str:
    kernels = "in Triton's interpreter (no GPU here)"
    if COMPILED:
        kernels = f"on a driver that only checks ({STUB}): no number is compared" if STUB else "on the GPU"
    return f"lorakernels: kernels run {kernels}; torch {torch.__version__}"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if RESULTS and "PYTEST_XDIST_WORKER" not in os.environ and (report.when == "call" or report.outcome != "passed"):
        row = {"kind": "test", "test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.outcome != "passed":
            row["why"] = str(report.longrepr)[-1000:]
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """torch.empty gives NaN, so that an element nobody wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors must be for impl="triton"."""
    return DEVICE


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What runs writes into a temporary folder, and takes the implementation that a user would get.

    On one thread: layers this small lose more to waiting threads than they gain.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORAKERNELS_IMPL", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tuning tables in a temporary folder, none read, and every warning seen anew."""
    from lorakernels.configs import table, table_file

    monkeypatch.setenv("LORAKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(table_file, "SHIPPED", tmp_path / "shipped")
    table.clear()
    yield
    table.clear()
