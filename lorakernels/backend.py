"""What this machine can run, and which implementation a call takes."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache

import torch

IMPLS = ("auto", "torch", "triton")
ENVIRONMENT = "LORAKERNELS_IMPL"
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
launches_are_checked = False  # `lorakernels.testing.driver` takes launches on tensors of the CPU, and runs nothing


class BackendError(RuntimeError):
    """The implementation that was asked for by name cannot run here."""


@dataclass(frozen=True)
class Explanation:
    """What a call will run and why, as `lorakernels.explain` returns it."""

    impl: str
    why: str
    kernels: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"impl={self.impl}: {self.why}"]
        lines += [f"  {kernel}" for kernel in self.kernels]
        return "\n".join(lines)


@lru_cache(maxsize=1)
def triton_installed() -> bool:
    """Whether `import triton` would work; does not import it."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # sys.modules holds None for it: somebody has taken it away on purpose
        return False


def interpreter_on() -> bool:
    """Whether kernels run in Triton's interpreter, on any device. Read when kernels are imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot run on tensors of this device and dtype, with the mend; None when it can."""
    if not triton_installed():
        return "Triton is not installed (pip install triton, on Linux)"
    if dtype not in TRITON_DTYPES:
        return f"the Triton kernels take float32, float16 and bfloat16, not {dtype}"
    if device.type == "cuda" or launches_are_checked or interpreter_on():
        return None
    return (
        f"x is on {device}, and Triton needs a GPU (move the model there), "
        "or its interpreter (set TRITON_INTERPRET=1 before Python starts)"
    )


def resolve_impl(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """`"torch"` or `"triton"` for this call. A named implementation is never replaced by another.

    Raises:
        TypeError: `impl` is not a string.
        ValueError: `impl`, or LORAKERNELS_IMPL behind `"auto"`, is not one of auto, torch, triton.
        BackendError: it is `"triton"`, which cannot run here.
    """
    if impl == "torch":
        return impl
    if impl == "auto" and ENVIRONMENT in os.environ:  # by `get` a name that is not there takes 0.9 µs, so 0.4
        impl = os.environ[ENVIRONMENT]
        if impl == "torch":
            return impl
    if impl == "auto":
        # Only a GPU makes Triton worth it: its interpreter is for tests.
        return "triton" if device.type == "cuda" and triton_problem(device, dtype) is None else "torch"
    if impl != "triton":
        error = ValueError if isinstance(impl, str) else TypeError
        raise error(f'impl (or {ENVIRONMENT}) is {impl!r}; expected "auto", "torch" or "triton"')
    problem = triton_problem(device, dtype)
    if problem is not None:
        otherwise = 'use impl="auto", which then takes torch'
        if os.environ.get(ENVIRONMENT) == "triton":
            otherwise = f"unset {ENVIRONMENT}, which makes every call take triton"
        raise BackendError(f'impl="triton" cannot run: {problem}; or {otherwise}')
    return impl


def explain_impl(impl: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The implementation a call takes, and the reason as a sentence."""
    resolved = resolve_impl(impl, device, dtype)
    if impl != "auto":
        return resolved, f"asked for with impl={impl!r}"
    if os.environ.get(ENVIRONMENT, "auto") != "auto":
        return resolved, f"{ENVIRONMENT}={os.environ[ENVIRONMENT]} is set"
    if resolved == "triton":
        return resolved, f"x is on {device} and Triton is installed"
    if device.type != "cuda":
        return resolved, f"x is on {device}; Triton's kernels need a GPU"
    return resolved, str(triton_problem(device, dtype))
