"""The one place where a kernel is started, so that launches can be recorded instead of run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


def input_precision() -> str:
    """How float32 products are made: exactly, unless torch was told that TF32 will do. Moot for 16-bit x."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


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
