"""The frozen weight [N, K] of a linear layer, and every product with it.

It is a torch.Tensor of any strides, or a `PackedWeight`, which holds 4 or 8 bits a number. Its transpose `weight.t()`
is one too, and makes dx of dy. A packed weight is never made whole: a product unpacks a part of it at a time into one
scratch, rows of it for y and columns for dx, so that either is rounded once.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch

from lorakernels.low_rank import add_expand
from lorakernels.quant.packed import PackedWeight, Transposed

# From so many multiplications oneDNN is the faster: 0.91 of MKL's time at 256 × 256 × 256, 1.4 of it at 16 × 256 × 256.
# With few tokens and a large weight it is too (0.43 at 4 × 1024 × 1024), but it rounds otherwise than the base layer,
# and what PEFT's tests compare with that to eight digits has such sizes.
_ONEDNN_FROM = 1 << 24
# Of a packed weight: the scratch that one product fills, which with what unpacking takes comes to less than 16 MiB.
SCRATCH_BYTES = 12 << 20

# (weight, row, last row, column, last column, out): `PackedWeight.unpack`, or a kernel that does it.
Unpack = Callable[[PackedWeight, int, int, int, int, torch.Tensor], None]


def linear(
    x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None, unpack: Unpack = PackedWeight.unpack
) -> torch.Tensor:
    """x Wᵀ + bias of x [..., K]: what the frozen layer gives, to the bit where its weight is a tensor."""
    if not isinstance(weight, torch.Tensor):
        y = multiply(x.reshape(-1, x.shape[-1]), weight, bias, unpack)
        return y.view(*x.shape[:-1], y.shape[1])
    return torch.nn.functional.linear(x, weight, bias)


def multiply(
    x: torch.Tensor, weight: Any, bias: torch.Tensor | None = None, unpack: Unpack = PackedWeight.unpack
) -> torch.Tensor:
    """x Wᵀ + bias of x [M, K], as a new tensor, by the fastest route that torch has."""
    if not isinstance(weight, torch.Tensor):
        return _multiply_packed(x, weight, bias, None, unpack)
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


def add_multiply(y: torch.Tensor, x: torch.Tensor, weight: Any, unpack: Unpack = PackedWeight.unpack) -> torch.Tensor:
    """y + x Wᵀ, in y's memory where torch has such a product as fast as `multiply`; y is given up."""
    if not isinstance(weight, torch.Tensor):
        return _multiply_packed(x, weight, None, y, unpack)
    if x.is_cpu:
        if x.dtype is torch.float16 and not weight.is_contiguous():
            weight = weight.contiguous()
        elif _takes_onednn(x, weight):
            return torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")
    return y.addmm_(x, weight.t())


def sum_products(
    xs: Sequence[torch.Tensor], weights: Iterable[Any], unpack: Unpack = PackedWeight.unpack
) -> torch.Tensor:
    """Σ x Wᵀ over pairs of x [M, K] and weight [N, K]: dx of several dy's by their transposed weights."""
    first, *more = zip(xs, weights, strict=True)
    y = multiply(*first, unpack=unpack)
    for x, weight in more:
        y = add_multiply(y, x, weight, unpack)
    return y


def _multiply_packed(
    x: torch.Tensor,
    weight: PackedWeight | Transposed,
    bias: torch.Tensor | None,
    onto: torch.Tensor | None,
    unpack: Unpack,
) -> torch.Tensor:
    """x Wᵀ + bias, or added to `onto`, by parts of the columns of y."""
    y = x.new_empty((x.shape[0], weight.shape[0])) if onto is None else onto
    for first, last, part in parts_of(weight, x.dtype, unpack):
        columns = y[:, first:last]
        if onto is not None:
            columns.addmm_(x, part.t())
        elif last - first == y.shape[1]:
            return multiply(x, part, bias)
        elif bias is None:
            torch.mm(x, part.t(), out=columns)
        else:
            torch.addmm(bias[first:last], x, part.t(), out=columns)
    return y


def parts_of(
    weight: PackedWeight | Transposed, dtype: torch.dtype, unpack: Unpack = PackedWeight.unpack
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The rows of a packed weight, or of its transpose, a few at a time: (first, last, [rows, columns] in `dtype`).

    The part is valid until the next one is asked for.
    """
    packed = weight.weight if isinstance(weight, Transposed) else weight
    total, width = weight.shape
    by_columns = weight is not packed
    at_once = unpack is PackedWeight.unpack and packed.unpacks_at_once(dtype)
    step = max(1, SCRATCH_BYTES // (max(1, width) * dtype.itemsize))
    if at_once and step < total:  # two parts are there while the next one is made
        step = max(1, step // 2)
    if by_columns and step < total:  # whole blocks
        step = max(packed.form.block, step // packed.form.block * packed.form.block)
    scratch = None if at_once else _scratch(min(step, total) * width, dtype, packed.device)
    for first in range(0, total, step):
        last = min(first + step, total)
        place = (0, width, first, last) if by_columns else (first, last, 0, width)
        if scratch is None:
            out = packed.unpack_at_once(*place, dtype)
        else:
            out = scratch[: (last - first) * width].view(place[1] - place[0], place[3] - place[2])
            unpack(packed, *place, out)
        yield first, last, out.t() if by_columns else out


class _Thread(threading.local):
    scratch: torch.Tensor | None = None


_thread = _Thread()


def _scratch(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Not initialised. On a CPU it is kept, a thread its own: the pages of 16 MiB take 3 ms to come."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(numel, dtype=dtype, device=device)
    needed = numel * dtype.itemsize
    if _thread.scratch is None or _thread.scratch.numel() < needed:
        _thread.scratch = None
        _thread.scratch = torch.empty(needed, dtype=torch.uint8)
    return _thread.scratch[:needed].view(dtype)


def _takes_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    # By a weight that does not lie dense it multiplies in a plain loop: 260 ms for 0.4 (272 × 272 × 272, cut of wider).
    dense = weight.is_contiguous() or weight.t().is_contiguous()
    return dense and x.dtype is torch.float32 and _prefers_onednn() and x.numel() * weight.shape[0] >= _ONEDNN_FROM


def scaled_linear(
    x: torch.Tensor,
    weight: Any,
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
        add_expand(y, s, B, scaling)
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
