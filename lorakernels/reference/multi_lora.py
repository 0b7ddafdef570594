"""Many adapters in one batch in plain torch: an adapter's tokens are one matrix, and no adapter is copied for them.

Same signatures as `kernels.multi_lora`. Which tokens are whose is read on the host: on a CPU at no cost, elsewhere it
waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lorakernels.plan import PlanTensors
from lorakernels.reference.dropout import draw_mask
from lorakernels.reference.product import linear

Tensors = list[torch.Tensor]


class Segment(NamedTuple):
    """The tokens of one adapter: `rows` of what `Route.take` gives."""

    slot: int
    rank: int
    scale: float
    rows: slice


class Route(NamedTuple):
    """The adapted tokens of a batch, by adapter, and where they are: None if each lot lies together already."""

    segments: list[Segment]
    tokens: torch.Tensor | None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.tokens is None else x.index_select(0, self.tokens)

    def put_back(self, rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """[slices, rows, R] of what `take` gives as [slices, tokens, R]; zero for the base."""
        if self.tokens is None:
            return rows
        every = rows.new_zeros((rows.shape[0], num_tokens, rows.shape[2]))
        return every.index_copy_(1, self.tokens, rows)

    def add(self, y: torch.Tensor, rows: torch.Tensor) -> None:
        """y += rows, where they are y's own and not y itself."""
        if self.tokens is not None:
            y.index_add_(0, self.tokens, rows)


def route(plan: PlanTensors, num_tokens: int) -> Route:
    layout, S = plan.layout, plan.num_slots
    numbers = plan.part(0, layout.starts + S + 2).tolist()
    ranks, starts = numbers[: S + 1], numbers[layout.starts :]
    scales = plan.scales.tolist()
    order = plan.part(layout.order, num_tokens)
    tokens = order.tolist()
    spans = [(slot, starts[slot], starts[slot + 1]) for slot in range(S) if starts[slot] < starts[slot + 1]]
    together = all(tokens[end - 1] - tokens[first] == end - 1 - first for _, first, end in spans)
    segments = [
        Segment(
            slot,
            ranks[slot],
            scales[slot],
            slice(tokens[first], tokens[first] + end - first) if together else slice(first, end),
        )
        for slot, first, end in spans
    ]
    return Route(segments, None if together else order[: starts[S]].long())


def forward(
    x: torch.Tensor,
    weights: Tensors,
    biases: list[torch.Tensor | None],
    lora_As: Tensors,
    lora_Bs: Tensors,
    plan: PlanTensors,
    *,
    keep_s: bool,
    seed: torch.Tensor | None,
    thresholds: torch.Tensor | None,
) -> tuple[Tensors, torch.Tensor | None, torch.Tensor | None]:
    """A y [T, N] for each slice, S [slices, T, R] if it is to be kept, and dropout's mask [T, K] uint8.

    The mask is in the order of `Route.take`.
    """
    ys = [torch.nn.functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    where = route(plan, x.shape[0])
    rows = where.take(x)
    mask = None
    if thresholds is not None:
        assert seed is not None
        mask = _draw(seed, where, thresholds.tolist(), x)
    width = lora_As[0].shape[1] if plan.pages is None else plan.pages.shape[1]
    kept = x.new_zeros((len(ys), rows.shape[0], width)) if keep_s else None
    outs = ys if where.tokens is None else [x.new_empty((rows.shape[0], y.shape[1])) for y in ys]
    for segment in where.segments:
        adapted = rows[segment.rows]
        if mask is not None:
            adapted = adapted * mask[segment.rows]
        for i, (lora_A, lora_B) in enumerate(zip(lora_As, lora_Bs, strict=True)):
            A = _rank_rows(lora_A, plan, segment, is_B=False).to(x.dtype)
            B = _rank_rows(lora_B, plan, segment, is_B=True).to(x.dtype)
            s = linear(adapted, A).mul_(segment.scale)
            if where.tokens is None:
                outs[i][segment.rows].addmm_(s, B)
            else:
                torch.mm(s, B, out=outs[i][segment.rows])
            if kept is not None:
                kept[i, segment.rows, : segment.rank] = s
    for y, out in zip(ys, outs, strict=True):
        where.add(y, out)
    if kept is not None:
        kept = where.put_back(kept, x.shape[0])
    return ys, kept, mask


def backward(
    dys: Tensors,
    x: torch.Tensor | None,
    weights: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    plan: PlanTensors,
    s: torch.Tensor | None,
    mask: torch.Tensor | None,
    *,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[torch.Tensor | None, Tensors, Tensors]:
    """dx [T, K], and for each slice a dA and a dB, as their parameters are shaped; empty lists where not asked for."""
    where = route(plan, dys[0].shape[0])
    rows = None if x is None else where.take(x)
    dy_rows = [where.take(dy) for dy in dys]
    s_rows = None if s is None or not need_dB else [where.take(of_slice) for of_slice in s]
    dAs = [torch.zeros_like(A, memory_format=torch.contiguous_format) for A in lora_As] if need_dA else []
    dBs = [torch.zeros_like(B, memory_format=torch.contiguous_format) for B in lora_Bs] if need_dB else []
    dx = None
    if need_dx:
        dx = linear(dys[0], weights[0].t())
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx += linear(dy, weight.t())
    out = dx if dx is None or where.tokens is None else dx.new_zeros((dy_rows[0].shape[0], dx.shape[1]))
    for segment in where.segments:
        kept = None if mask is None else mask[segment.rows]
        for i, (lora_A, lora_B) in enumerate(zip(lora_As, lora_Bs, strict=True)):
            dy = dy_rows[i][segment.rows]
            if s_rows is not None:
                low_rank = s_rows[i][segment.rows, : segment.rank]
                _add_rank_rows(dBs[i], plan, segment, low_rank.t() @ dy, is_B=True)
            if not (need_dx or need_dA):
                continue
            B = _rank_rows(lora_B, plan, segment, is_B=True).to(dy.dtype)
            g = linear(dy, B).mul_(segment.scale)
            if need_dA:
                assert rows is not None
                adapted = rows[segment.rows] if kept is None else rows[segment.rows] * kept
                _add_rank_rows(dAs[i], plan, segment, g.t() @ adapted, is_B=False)
            if out is not None:
                A = _rank_rows(lora_A, plan, segment, is_B=False).to(dy.dtype)
                if kept is None:
                    out[segment.rows].addmm_(g, A)
                else:
                    out[segment.rows].add_((g @ A).mul_(kept))
    if dx is not None and out is not None:
        where.add(dx, out)
    return dx, dAs, dBs


def shrink(x: torch.Tensor, lora_As: Tensors, plan: PlanTensors) -> torch.Tensor:
    """S [slices, T, R] float32 (float64 for x in it), zero past each slot's rank and in rows of the base."""
    where = route(plan, x.shape[0])
    rows = where.take(x)
    width = lora_As[0].shape[1] if plan.pages is None else plan.pages.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    s = x.new_zeros((len(lora_As), rows.shape[0], width), dtype=dtype)
    for segment in where.segments:
        for i, lora_A in enumerate(lora_As):
            A = _rank_rows(lora_A, plan, segment, is_B=False).to(x.dtype)
            s[i, segment.rows, : segment.rank] = linear(rows[segment.rows], A).to(dtype).mul_(segment.scale)
    return where.put_back(s, x.shape[0])


def expand(s: torch.Tensor, lora_Bs: Tensors, plan: PlanTensors, ys: Tensors) -> None:
    """Add S Bᵀ to each y, in place."""
    where = route(plan, s.shape[1])
    for i, (lora_B, y) in enumerate(zip(lora_Bs, ys, strict=True)):
        rows = where.take(s[i])
        out = y if where.tokens is None else y.new_empty((rows.shape[0], y.shape[1]))
        for segment in where.segments:
            B = _rank_rows(lora_B, plan, segment, is_B=True).to(y.dtype)
            low_rank = rows[segment.rows, : segment.rank].to(y.dtype)
            if where.tokens is None:
                out[segment.rows].addmm_(low_rank, B)
            else:
                torch.mm(low_rank, B, out=out[segment.rows])
        where.add(y, out)


def _rank_rows(adapters: torch.Tensor, plan: PlanTensors, segment: Segment, *, is_B: bool) -> torch.Tensor:
    """The rank rows [rank, columns] of a slot: views of a stack, copies of pages."""
    if plan.pages is not None:
        return adapters.index_select(0, plan.pages[segment.slot, : segment.rank])
    stack = adapters[segment.slot]
    return (stack.t() if is_B else stack)[: segment.rank]


def _add_rank_rows(
    gradient: torch.Tensor, plan: PlanTensors, segment: Segment, rows: torch.Tensor, *, is_B: bool
) -> None:
    if plan.pages is not None:
        gradient.index_add_(0, plan.pages[segment.slot, : segment.rank], rows.to(gradient.dtype))
    else:
        stack = gradient[segment.slot]
        (stack.t() if is_B else stack)[: segment.rank] = rows


def _draw(seed: torch.Tensor, where: Route, thresholds: list[int], x: torch.Tensor) -> torch.Tensor:
    """The mask of each segment from the seed and its slot, so that a job's does not depend on who else is there."""
    mask = x.new_empty(x.shape, dtype=torch.uint8)
    for segment in where.segments:
        rows = mask[segment.rows]
        rows.copy_(draw_mask(seed + segment.slot, rows.shape[0], rows.shape[1], thresholds[segment.slot]))
    return mask
