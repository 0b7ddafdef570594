"""The second half of every split sum: add the float32 planes in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorakernels.configs.config import KernelConfig
from lorakernels.kernels.launch import cdiv, launch

_BLOCK = 1024
_CONFIG = KernelConfig(num_warps=4)


@triton.jit(do_not_specialize=["num_planes"])
def sum_planes_kernel(planes_ptr, out_ptr, num_planes, numel, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < numel
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    # In order and in one program: the sum is bitwise the same on every run.
    plane_ptr = planes_ptr
    for _ in range(num_planes):
        total += tl.load(plane_ptr + offs, mask=inside, other=0.0)
        plane_ptr += numel
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=inside)


def planes_for(out: torch.Tensor, num_planes: int) -> torch.Tensor:
    """Where `num_planes` programs write their part of `out`: `out` itself when there is one."""
    return out if num_planes == 1 else out.new_empty((num_planes, *out.shape), dtype=torch.float32)


def sum_planes(planes: torch.Tensor, out: torch.Tensor) -> None:
    """Add `planes` [P, *out.shape] float32 into `out`, contiguous and of any float dtype."""
    if planes is out:
        return
    launch(
        sum_planes_kernel,
        (cdiv(out.numel(), _BLOCK),),
        {"planes_ptr": planes, "out_ptr": out, "num_planes": planes.shape[0], "numel": out.numel()},
        {"BLOCK": _BLOCK},
        _CONFIG,
    )
