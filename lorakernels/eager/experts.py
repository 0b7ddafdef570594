"""LoRA on a stack of experts in plain torch. Same signatures as `kernels.experts`.

Rows are pairs of a token and an expert, sorted by expert. The frozen product is torch's grouped one. Those of rank r
are batched: a few experts at a time, each padded to as many rows as the longest has, so that a lot stays in a cache.
An expert a time takes twice as long with 32 rows each of 256 features, and in bfloat16 seven times. In bfloat16 experts
of many rows take torch's grouped product here too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from lorakernels.dropout import inverse_keep
from lorakernels.eager.dropout import draw_mask
from lorakernels.low_rank import low_rank_dtype, rank_room, rank_rows
from lorakernels.member import cast, sum_rows
from lorakernels.quant.stacks import PackedStack
from lorakernels.route import ExpertRoute
from lorakernels.weight import multiply

_LOT_BYTES = 1 << 20  # of rows that are padded together
_ALONE_BYTES = 3 << 16  # of an expert's rows, of which a product is worth its own call
# Numbers in an expert's rows from which bfloat16 takes grouped products: with half as many they took 1.1 to 1.2 times
# as long as padded ones, with 32 rows of 256 1.5 times.
_GROUPED_ROWS = 1 << 16


def route(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    """`order`, `inverse` and `starts` of an `ExpertRoute`, and no `plan`.

    Raises:
        ValueError: an expert is not one of 0 … num_experts - 1.
    """
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    if len(experts) and not 0 <= int(experts[0]) <= int(experts[-1]) < num_experts:
        wrong = int(experts[0]) if experts[0] < 0 else int(experts[-1])
        raise ValueError(f"top_k_index has expert {wrong}; expected 0 … {num_experts - 1}")
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    firsts = torch.arange(num_experts + 1, device=order.device, dtype=experts.dtype)
    return order, inverse, torch.searchsorted(experts, firsts, out_int32=True), None


class _Lot:
    """Some of the experts that have rows, and what is multiplied of them at once."""

    def __init__(self, experts: slice, first: int, sizes: list[int], device: torch.device) -> None:
        longest = max(sizes)
        self.experts, self.rows, self._longest = experts, slice(first, first + sum(sizes)), longest
        self._inside = None  # [experts · longest] of each padded row: whether it is no padding
        if longest * len(sizes) > self.rows.stop - first:
            within, ends = np.arange(longest), np.cumsum(sizes)
            inside = within < np.array(sizes)[:, None]
            # An expert's padding is its own last row, for what is not finite must not reach another's.
            filled = np.minimum(ends[:, None] - np.array(sizes)[:, None] + within, ends[:, None] - 1)
            self._filled, self._places, self._inside = (
                torch.from_numpy(array).to(device) for array in (filled.ravel(), np.flatnonzero(inside), inside)
            )

    def pad(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[experts, longest, K] in `dtype` of rows [P, K]."""
        own = cast(rows[self.rows], dtype)
        own = own if self._inside is None else own.index_select(0, self._filled)
        return own.view(-1, self._longest, own.shape[1])

    def clear(self, padded: torch.Tensor) -> torch.Tensor:
        """`padded` with zeros past an expert's own rows, in place."""
        return padded if self._inside is None else padded.mul_(self._inside[:, :, None])

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        flat = padded.flatten(0, 1)
        return flat if self._inside is None else flat.index_select(0, self._places)

    def add_product(self, y: torch.Tensor, s: torch.Tensor, factor: torch.Tensor) -> None:
        """y [P, N] += s factor in place, of padded s [experts, longest, r] and factor [experts, r, N]."""
        own = y[self.rows]
        if self._inside is None and y.dtype is s.dtype:
            own.view(-1, self._longest, y.shape[1]).baddbmm_(s, factor)
        else:
            own += self.unpad(torch.bmm(s, factor))


class _Spans:
    """The rows of each expert, read on the host: on a CPU at little cost, elsewhere it waits for the device."""

    def __init__(self, where: ExpertRoute) -> None:
        starts = where.starts.tolist()
        self.sizes = [end - start for start, end in itertools.pairwise(starts)]
        self.present = [expert for expert, size in enumerate(self.sizes) if size]
        self._device = where.starts.device

    def each(self, rows: Sequence[torch.Tensor], stacks: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """Of each expert that has rows: those of tensors [P, …], and its own of stacks [E, …]."""
        known = [t[: sum(self.sizes)].split(self.sizes) for t in rows]  # the kernels' route has others at the end
        parts = zip(self.sizes, *known, *(t.unbind(0) for t in stacks), strict=True)
        return [part for size, *part in parts if size]  # type: ignore[misc]

    def add_products(
        self, y: torch.Tensor, s: torch.Tensor, factor: torch.Tensor, kept: torch.Tensor | None = None
    ) -> None:
        """y [P, N] += kept ∘ (s factor) in place, of s [P, r] and factor [E, r, N]: nothing of y's size is made."""
        if kept is None:
            for y_e, s_e, factor_e in self.each([y, s], [factor]):
                y_e.addmm_(s_e, factor_e)
        else:
            for y_e, s_e, kept_e, factor_e in self.each([y, s, kept], [factor]):
                y_e += torch.mm(s_e, factor_e).mul_(kept_e)

    def own(self, stack: torch.Tensor) -> torch.Tensor:
        """Of a stack [E, …] those experts that have rows."""
        if len(self.present) == len(self.sizes):
            return stack
        return stack.index_select(0, self._present)

    def whole(self, own: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A stack with zeros for the experts that `own` left out, lying as `rank_room` has it and of `like`'s dtype."""
        if len(self.present) == len(self.sizes):
            return cast(own, like.dtype)
        room = rank_room(like, like.dtype).zero_()
        return room.index_copy_(0, self._present, cast(own, like.dtype))

    @cached_property
    def _present(self) -> torch.Tensor:
        return torch.tensor(self.present, device=self._device, dtype=torch.int64)

    def lots(self, columns: int, dtype: torch.dtype) -> Iterator[_Lot]:
        """`experts` of a lot are counted among those of `own`."""
        line = max(1, columns) * dtype.itemsize
        begin = first = 0
        sizes: list[int] = []
        for expert in self.present:
            size = self.sizes[expert]
            padded = max(*sizes, size) * (len(sizes) + 1) * line if sizes else 0
            if padded > _LOT_BYTES or (sizes and max(sizes[-1], size) * line > _ALONE_BYTES):
                yield _Lot(slice(begin, begin + len(sizes)), first, sizes, self._device)
                begin, first, sizes = begin + len(sizes), first + sum(sizes), []
            sizes.append(size)
        if sizes:
            yield _Lot(slice(begin, begin + len(sizes)), first, sizes, self._device)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    where: ExpertRoute,
    seed: torch.Tensor | None,
    threshold: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y [P, N], S = (mask ∘ x) Aᵀ [P, r], and the mask [P, K] uint8 (None without dropout), of sorted x [P, K].

    weight is [E, N, K], lora_A [E, r, K], lora_B [E, N, r] and bias [E, N].
    """
    spans = _Spans(where)
    y = _multiply(x, weight, where, spans)
    if bias is not None:
        for y_e, bias_e in spans.each([y], [bias]):
            y_e += bias_e
    mask, adapted = None, x
    if threshold:
        assert seed is not None
        mask = draw_mask(seed, x.shape[0], x.shape[1], threshold)
        adapted = mask.to(x.dtype).mul_(x)
    dtype, r = low_rank_dtype(x.dtype), lora_A.shape[1]
    s = x.new_empty((x.shape[0], r), dtype=dtype)
    if _groups_ranks([adapted], weight, r, where):
        s = F.grouped_mm(adapted, rank_rows(lora_A, dtype).mT, offs=where.starts[1:])
        spans.add_products(y, s * (scaling * inverse_keep(threshold)), rank_rows(lora_B.mT, dtype))
    elif r:
        A, B = rank_rows(spans.own(lora_A), dtype), rank_rows(spans.own(lora_B).mT, dtype)
        for lot in spans.lots(max(weight.shape[1:]), dtype):
            s_lot = torch.bmm(lot.pad(adapted, dtype), A[lot.experts].mT)
            s[lot.rows] = lot.unpad(s_lot)
            s_lot *= scaling * inverse_keep(threshold)
            lot.add_product(y, s_lot, B[lot.experts])
    return y, s, mask


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    where: ExpertRoute,
    s: torch.Tensor | None,
    mask: torch.Tensor | None,
    threshold: int,
    scaling: float,
    *,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx [P, K], dA [E, r, K] and dB [E, r, N], of which rows lie as those of lora_A and of lora_Bᵀ do."""
    spans, dtype, r = _Spans(where), low_rank_dtype(dy.dtype), lora_A.shape[1]
    dy = dy.contiguous()
    dx = _multiply(dy, weight.mT, where, spans) if need_dx else None
    own_A, own_B = spans.own(lora_A), spans.own(lora_B).mT
    dA = rank_room(own_A, dtype) if need_dA else None
    dB = rank_room(own_B, dtype) if need_dB else None
    kept = None if mask is None else mask.to(dy.dtype)
    adapted = x if kept is None or x is None else x * kept
    by = scaling * inverse_keep(threshold)
    if (need_dx or need_dA or need_dB) and _groups_ranks([dy, adapted], weight, r, where):
        offs, A, B = where.starts[1:], rank_rows(lora_A, dtype), rank_rows(lora_B.mT, dtype)
        g = F.grouped_mm(dy, B.mT, offs=offs).mul_(by) if need_dx or need_dA else None
        if dx is not None and g is not None:
            spans.add_products(dx, g, A, kept)
        whole_A = whole_B = None
        if need_dA and g is not None and adapted is not None:
            whole_A = rank_room(lora_A, lora_A.dtype).copy_(F.grouped_mm(g.t(), adapted, offs=offs))
        if need_dB and s is not None:
            whole_B = rank_room(lora_B.mT, lora_B.dtype).copy_(F.grouped_mm((s * by).t(), dy, offs=offs))
        return dx, whole_A, whole_B
    if r and (need_dx or need_dA or need_dB):
        A, B = rank_rows(own_A, dtype), rank_rows(own_B, dtype)
        for lot in spans.lots(max(weight.shape[1:]), dtype):
            padded = lot.pad(dy, dtype)
            if dB is not None and s is not None:
                dB[lot.experts] = torch.bmm(lot.clear(lot.pad(s, dtype) * by).mT, padded)
            if not (need_dx or need_dA):
                continue
            g = torch.bmm(padded, B[lot.experts].mT).mul_(by)
            if dA is not None and adapted is not None:
                dA[lot.experts] = torch.bmm(lot.clear(g).mT, lot.pad(adapted, dtype))
            if dx is not None and kept is not None:
                dx[lot.rows] += lot.unpad(torch.bmm(g, A[lot.experts])) * kept[lot.rows]
            elif dx is not None:
                lot.add_product(dx, g, A[lot.experts])
    return dx, None if dA is None else spans.whole(dA, lora_A), None if dB is None else spans.whole(dB, lora_B.mT)


def grad_base(
    dy: torch.Tensor, x: torch.Tensor | None, where: ExpertRoute, need_dbias: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dW [E, N, K] where there is an x [P, K], and dbias [E, N]: for experts that are trained themselves."""
    spans, E = _Spans(where), where.num_experts
    dW = None if x is None else dy.new_zeros((E, dy.shape[1], x.shape[1]))
    dbias = dy.new_zeros((E, dy.shape[1])) if need_dbias else None
    for expert, (dy_e,) in zip(spans.present, spans.each([dy], []), strict=True):
        if dbias is not None:
            dbias[expert] = sum_rows(dy_e)
    if dW is not None and x is not None:
        for dy_e, x_e, dW_e in spans.each([dy, x], [dW]):
            torch.mm(dy_e.t(), x_e, out=dW_e)
    return dW, dbias


def _multiply(x: torch.Tensor, weight: torch.Tensor, where: ExpertRoute, spans: _Spans) -> torch.Tensor:
    """[P, N] of x [P, K] sorted by expert and weight [E, N, K] of any strides."""
    if _takes_grouped(x, weight):
        return F.grouped_mm(x, weight.mT, offs=where.starts[1:])
    y = x.new_empty((x.shape[0], weight.shape[1]))
    for x_e, y_e, W_e in spans.each([x, y], [weight]):
        y_e.copy_(multiply(x_e, W_e))
    return y


def _groups_ranks(rows: Sequence[torch.Tensor | None], weight: Any, r: int, where: ExpertRoute) -> bool:
    """Whether the products of rank r are torch's grouped ones too: of experts with so many rows padding costs more."""
    P, given = where.order.shape[0], [t for t in rows if t is not None]
    many = _GROUPED_ROWS * where.num_experts <= P * max(weight.shape[1:])
    many = many and all(t.is_cpu and t.dtype is torch.bfloat16 for t in given)
    aligned = r > 0 and not any(size % 8 for size in (r, *weight.shape[1:]))
    aligned = aligned and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in given)
    return many and aligned and int(where.starts[-1]) == P  # the kernels' route may have others at the end


def _takes_grouped(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch's grouped product takes these, and is not slow: a CPU's of float16 is, with a transposed weight."""
    if (
        isinstance(weight, PackedStack)
        or x.shape[0] == 0
        or x.dtype is torch.float64
        or (x.is_cpu and x.dtype is torch.float16)
    ):
        return False
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    matrices = (x, weight[0] if weight.stride(2) == 1 else weight[0].t())
    lines = [matrix.stride(0) for matrix in matrices] + [weight.stride(0), weight.shape[1]]  # and those of y
    return (
        all(matrix.stride(1) == 1 and matrix.data_ptr() % 16 == 0 for matrix in matrices)
        and all(line * x.element_size() % 16 == 0 for line in lines)
        and all(matrix.stride(0) >= matrix.shape[1] for matrix in matrices)
    )
