"""The one place where a kernel is started, so that launches can be recorded instead of run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lorakernels.tuning.config import KernelConfig


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for: what the compile report compiles, and what bench counts."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constexprs: dict[str, Any]
    config: KernelConfig


_recorded: list[Launch] | None = None


def input_precision(x: torch.Tensor) -> str:
    """How float32 products are made: exactly, unless torch was told that TF32 will do. Moot for 16-bit x."""
    if x.dtype is not torch.float32 or not x.is_cuda:
        return "ieee"
    # The older reading raises once the newer setting was used.
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def compile_options(config: KernelConfig) -> dict[str, Any]:
    """What the compiler is told. Fused multiply-adds are asked for by name: their default changes in triton 3.10."""
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}


def launch(
    kernel: Any, grid: tuple[int, ...], args: dict[str, Any], constexprs: dict[str, Any], config: KernelConfig
) -> None:
    """Start `kernel` on `grid`. A grid with no programs starts nothing: CUDA refuses it."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, constexprs, config))
        return
    if 0 in grid:
        return
    device = next((tensor.device for tensor in args.values() if isinstance(tensor, torch.Tensor)), None)
    # Triton starts kernels on the current device, which need not be the tensors'.
    elsewhere = device is not None and device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](**args, **constexprs, **compile_options(config))


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect the launches made inside the block instead of starting them; meta tensors will do."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer
