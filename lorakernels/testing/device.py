"""Where tests run the kernels: on a GPU; else in Triton's interpreter, or on the driver that only checks, if asked."""

from __future__ import annotations

import os

import torch

# An architecture, such as sm_90: kernels are compiled for it, and launches go to `lorakernels.testing.driver`.
STUB = os.environ.get("LORAKERNELS_STUB", "")
ON_GPU = torch.cuda.is_available() and not STUB
COMPILED = ON_GPU or bool(STUB)
DEVICE = "cuda" if ON_GPU else "cpu"
# Whether results are compared: nothing runs on the driver that checks, and under a sanitizer the oracle takes minutes.
NUMBERS = not STUB and os.environ.get("LORAKERNELS_NUMBERS", "1") != "0"


def has_room(gib: int) -> bool:
    """Whether so much memory is free where the kernels run. On a CPU memory is there once it is touched."""
    return not ON_GPU or torch.cuda.mem_get_info()[0] >= gib << 30
