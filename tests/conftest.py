"""Kernels run in Triton's interpreter where there is no GPU; uninitialised memory is NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    # Before anything imports the kernels: a kernel is made for the interpreter or for a GPU when it is defined.
    os.environ["TRITON_INTERPRET"] = "1"

DEVICE = "cuda" if ON_GPU else "cpu"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the processes share the cores


def pytest_report_header() -> str:
    kernels = "on the GPU" if ON_GPU else "in Triton's interpreter (no GPU here)"
    return f"lorakernels: kernels run {kernels}; torch {torch.__version__}"


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
