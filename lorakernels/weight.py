"""The frozen weight [N, K] of a linear layer, and every product with it.

It is a torch.Tensor of any strides. Its transpose `weight.t()` is one too, and makes dx of dy.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch

# From so many multiplications oneDNN is the faster: 0.91 of MKL's time at 256 × 256 × 256, 1.4 of it at 16 × 256 × 256.
# With few tokens and a large weight it is too (0.43 at 4 × 1024 × 1024), but it rounds otherwise than the base layer,
# and what PEFT's tests compare with that to eight digits has such sizes.
_ONEDNN_FROM = 1 << 24


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + bias of x [..., K]: what the frozen layer gives, to the bit."""
    return torch.nn.functional.linear(x, weight, bias)


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + bias of x [M, K], as a new tensor, by the fastest route that torch has."""
    if x.is_cpu:
        if x.dtype is torch.float16 and not weight.is_contiguous():
            # torch multiplies a transposed float16 matrix by a plain loop: 10.7 s where the copy and
            # the other order take 0.1 s (512 × 2048 × 2048).
            weight = weight.contiguous()
        elif _takes_onednn(x, weight):
            if bias is not None:
                bias = bias.contiguous()  # its strides are not looked at
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def add_multiply(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """y + x Wᵀ, in y's memory where torch has such a product as fast as `multiply`; y is given up."""
    if x.is_cpu:
        if x.dtype is torch.float16 and not weight.is_contiguous():
            weight = weight.contiguous()
        elif _takes_onednn(x, weight):
            return torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")
    return y.addmm_(x, weight.t())


def sum_products(xs: Sequence[torch.Tensor], weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """Σ x Wᵀ over pairs of x [M, K] and weight [N, K]: dx of several dy's by their transposed weights."""
    first, *more = zip(xs, weights, strict=True)
    y = multiply(*first)
    for x, weight in more:
        y = add_multiply(y, x, weight)
    return y


def _takes_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    # By a weight that does not lie dense it multiplies in a plain loop: 260 ms for 0.4 (272 × 272 × 272, cut of wider).
    dense = weight.is_contiguous() or weight.t().is_contiguous()
    return dense and x.dtype is torch.float32 and _prefers_onednn() and x.numel() * weight.shape[0] >= _ONEDNN_FROM


def scaled_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    low_rank: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """row_scale ∘ (x Wᵀ + scaling · S Bᵀ) + bias with `low_rank` = (S, B, scaling): a scale for each row of the weight.

    Without either it is torch's linear to the bit.
    Scales of 1, which a new DoRA adapter has, leave what torch's linear gives to the bit: the bias is then added where
    torch adds it. Read on a CPU alone, where that makes nobody wait.
    """
    if row_scale is not None and row_scale.is_cpu and bool((row_scale == 1).all()):
        row_scale = None
    product = linear if low_rank is None else multiply
    y = product(x, weight, bias if row_scale is None else None)
    if low_rank is not None:
        s, B, scaling = low_rank
        y.addmm_(s, B.t(), alpha=scaling)
    if row_scale is not None:
        y.mul_(row_scale)
        if bias is not None:
            y.add_(bias)
    return y


@lru_cache(maxsize=1)
def _prefers_onednn() -> bool:
    """Whether oneDNN's float32 product beats MKL's: MKL, torch's own choice, reaches 0.83 of it on an AMD EPYC."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return torch.backends.mkl.is_available() and platform.machine() == "x86_64" and "Intel" not in _cpu_vendor()


def _cpu_vendor() -> str:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return next((line for line in cpuinfo if line.startswith("vendor_id")), "Intel")
    except OSError:
        return "Intel"
