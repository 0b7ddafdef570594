"""Products with factors of rank r in plain torch: S = x Aᵀ, y += S Bᵀ and Sᵀ x; and how those of experts lie.

S and G = dy B have x's dtype, but for float16 float32: x of 1e3 overflows there, and gradients of 1e-6 vanish. Their
products with factors, and so the gradients of A and B, are then float32's, here and in the kernels, as PEFT's are. A
float16 matrix of tokens is read in float32 for it, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_SCRATCH_BYTES = 4 << 20


def low_rank_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of S and G, where x and dy have `dtype`."""
    return torch.float32 if dtype is torch.float16 else dtype


def shrink(x: torch.Tensor, lora_A: torch.Tensor) -> torch.Tensor:
    """x Aᵀ [M, r] of x [M, K] and lora_A [r, K], in `low_rank_dtype`."""
    dtype = low_rank_dtype(x.dtype)
    A = lora_A if lora_A.dtype is dtype else lora_A.to(dtype)
    if x.dtype is dtype:
        return x @ A.t()
    s = x.new_empty((x.shape[0], A.shape[0]), dtype=dtype)
    for rows in _parts(x):
        torch.mm(x[rows].to(dtype), A.t(), out=s[rows])
    return s


def add_expand(
    y: torch.Tensor,
    s: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float = 1.0,
    kept: torch.Tensor | None = None,
    room: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [M, N] += scaling · kept ∘ (S Bᵀ) in place, of s [M, r] and lora_B [N, r].

    `kept` [M, N] is dropout's mask in y's dtype. `room` [M, N] of y's dtype is written to: another would cost its page
    faults.
    """
    B = lora_B if lora_B.dtype is s.dtype else lora_B.to(s.dtype)
    if s.dtype is y.dtype:
        if kept is None:
            return y.addmm_(s, B.t(), alpha=scaling)
        return y.add_(torch.mm(s, B.t(), out=room).mul_(kept), alpha=scaling)
    for rows in _parts(y):
        update = s[rows] @ B.t()
        if kept is not None:
            update *= kept[rows]
        y[rows] = update.mul_(scaling).add_(y[rows])
    return y


def outer(s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sᵀ x [r, K] of s [M, r] and x [M, K], in the dtype of s."""
    if s.dtype is x.dtype:
        return s.t() @ x
    total = s.new_zeros((s.shape[1], x.shape[1]))
    for rows in _parts(x):
        total.addmm_(s[rows].t(), x[rows].to(s.dtype))
    return total


def _parts(x: torch.Tensor) -> Iterator[slice]:
    step = max(1, _SCRATCH_BYTES // (4 * max(1, x.shape[1])))
    for first in range(0, x.shape[0], step):
        yield slice(first, first + step)


def rank_rows(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of rank [E, r, columns] in `dtype`, whose columns or rows are contiguous.

    PEFT's B has the expert as its fastest dimension. As a transposed matrix it is copied 8 to 14 times faster than as
    three permuted dimensions; uncopied every element of an expert's would come from a sector of its own.
    """
    factor = factor.to(dtype)
    if not _is_rank_major(factor):
        return factor
    E, r, columns = factor.shape
    return factor.permute(2, 1, 0).reshape(columns, r * E).t().contiguous().view(r, E, columns).transpose(0, 1)


def rank_room(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where the gradient of rows of rank goes: [E, r, columns], the ranks outermost in memory where `rank_rows` so
    copies, for PEFT's layout is then one transposed copy away.
    """
    E, r, columns = factor.shape
    if _is_rank_major(factor):
        return factor.new_empty((r, E, columns), dtype=dtype).transpose(0, 1)
    return factor.new_empty((E, r, columns), dtype=dtype)


def _is_rank_major(factor: torch.Tensor) -> bool:
    return factor.shape[0] > 1 and factor.stride(0) < factor.stride(1)
