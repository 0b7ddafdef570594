"""Many adapters in one batch in plain torch: an adapter's tokens are one matrix, and no adapter is copied for them.

Same signatures as `kernels.multi_lora`, and the plan's route where the caller has read it already.
"""

from __future__ import annotations

import torch

from lorakernels.eager.dropout import draw_mask
from lorakernels.eager.multi_grid import Segment
from lorakernels.eager.multi_route import Route, route
from lorakernels.low_rank import add_expand, low_rank_dtype, outer
from lorakernels.low_rank import shrink as shrink_one
from lorakernels.member import cast
from lorakernels.plan import PlanTensors
from lorakernels.weight import linear, multiply, sum_products

Tensors = list[torch.Tensor]


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
    where: Route | None = None,
) -> tuple[Tensors, torch.Tensor | None, torch.Tensor | None]:
    """A y [T, N] for each slice, S [slices, T, R] if it is to be kept, and dropout's mask [T, K] uint8.

    The mask is in the order of `Route.take`. `where` is the plan's route if it has been read already.
    """
    ys = [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    s, mask = add(x, lora_As, lora_Bs, plan, ys, keep_s=keep_s, seed=seed, thresholds=thresholds, where=where)
    return ys, s, mask


def add(
    x: torch.Tensor,
    lora_As: Tensors,
    lora_Bs: Tensors,
    plan: PlanTensors,
    ys: Tensors,
    *,
    keep_s: bool = False,
    seed: torch.Tensor | None = None,
    thresholds: torch.Tensor | None = None,
    where: Route | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Add each slice's update to its y, in place; S and the mask as of `forward`."""
    where = where or route(plan, x.shape[0])
    if ys[0].dtype is not x.dtype:  # logits in float32
        expand(shrink(x, lora_As, plan, where=where), lora_Bs, plan, ys, where=where)
        return None, None
    width = lora_As[0].shape[1] if plan.page_table is None else plan.page_table.shape[1]
    columns = x.shape[1] + sum([y.shape[1] for y in ys])
    if thresholds is None and (grid := where.grid_for(x, columns)) is not None:
        kept = x.new_zeros((len(ys), x.shape[0], width)) if keep_s else None
        for i, (y, lora_A, lora_B) in enumerate(zip(ys, lora_As, lora_Bs, strict=True)):
            for lot in grid.lots:
                A, B = lot.factors(lora_A, x.dtype, is_B=False), lot.factors(lora_B, x.dtype, is_B=True)
                if kept is None:
                    lot.add(y, x, A, B)
                else:
                    s = lot.shrink(x, A, x.dtype)
                    lot.rows.add_product(y, s, B, 1.0)
                    lot.rows.put(kept[i, :, : lot.rank], s)
        return kept, None
    rows = where.take(x)
    mask = None
    if thresholds is not None:
        assert seed is not None
        mask = _draw(seed, where, thresholds.tolist(), x)
    kept = x.new_zeros((len(ys), rows.shape[0], width), dtype=low_rank_dtype(x.dtype)) if keep_s else None
    outs = ys if where.tokens is None else [x.new_empty((rows.shape[0], y.shape[1])) for y in ys]
    for segment in where.segments:
        adapted = _cut(rows, segment.rows)
        if mask is not None:
            adapted = adapted * mask[segment.rows]
        for i, (lora_A, lora_B) in enumerate(zip(lora_As, lora_Bs, strict=True)):
            s = _multiply(adapted, _rank_rows(lora_A, plan, segment, is_B=False)).mul_(segment.scale)
            B = _rank_rows(lora_B, plan, segment, is_B=True)
            _expand_into(_cut(outs[i], segment.rows), s, B, onto=where.tokens is None)
            if kept is not None:
                kept[i, segment.rows, : segment.rank] = s
    for y, out in zip(ys, outs, strict=True):
        where.add(y, out)
    if kept is not None:
        kept = where.put_back(kept, x.shape[0])
    return kept, mask


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
    where: Route | None = None,
) -> tuple[torch.Tensor | None, Tensors, Tensors]:
    """dx [T, K], and for each slice a dA and a dB, as their parameters are shaped; empty lists where not asked for."""
    where = where or route(plan, dys[0].shape[0])
    rows = None if x is None else where.take(x)
    dy_rows = [where.take(dy) for dy in dys]
    s_rows = None if s is None or not need_dB else [where.take(of_slice) for of_slice in s]
    dAs = [torch.zeros_like(A, memory_format=torch.contiguous_format) for A in lora_As] if need_dA else []
    dBs = [torch.zeros_like(B, memory_format=torch.contiguous_format) for B in lora_Bs] if need_dB else []
    dx = None
    if need_dx:
        dx = sum_products(dys, [weight.t() for weight in weights])
    out = dx if dx is None or where.tokens is None else dx.new_zeros((dy_rows[0].shape[0], dx.shape[1]))
    for segment in where.segments:
        kept = None if mask is None else mask[segment.rows]
        for i, (lora_A, lora_B) in enumerate(zip(lora_As, lora_Bs, strict=True)):
            dy = dy_rows[i][segment.rows]
            if s_rows is not None:
                low_rank = s_rows[i][segment.rows, : segment.rank]
                _add_rank_rows(dBs[i], plan, segment, outer(low_rank, dy), is_B=True)
            if not (need_dx or need_dA):
                continue
            g = _multiply(dy, _rank_rows(lora_B, plan, segment, is_B=True)).mul_(segment.scale)
            if need_dA:
                assert rows is not None
                adapted = rows[segment.rows] if kept is None else rows[segment.rows] * kept
                _add_rank_rows(dAs[i], plan, segment, outer(g, adapted), is_B=False)
            if out is not None:
                A = _rank_rows(lora_A, plan, segment, is_B=False)
                add_expand(out[segment.rows], g, A.t(), kept=kept)
    if dx is not None and out is not None:
        where.add(dx, out)
    return dx, dAs, dBs


def shrink(x: torch.Tensor, lora_As: Tensors, plan: PlanTensors, *, where: Route | None = None) -> torch.Tensor:
    """S [slices, T, R] float32 (float64 for x in it), zero past each slot's rank and in rows of the base."""
    where = where or route(plan, x.shape[0])
    width = lora_As[0].shape[1] if plan.page_table is None else plan.page_table.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    if (grid := where.grid_for(x, x.shape[1])) is not None:
        s = x.new_zeros((len(lora_As), x.shape[0], width), dtype=dtype)
        for i, lora_A in enumerate(lora_As):
            for lot in grid.lots:
                low_rank = lot.shrink(x, lot.factors(lora_A, x.dtype, is_B=False), dtype)
                lot.rows.put(s[i, :, : lot.rank], low_rank)
        return s
    rows = where.take(x)
    s = x.new_zeros((len(lora_As), rows.shape[0], width), dtype=dtype)
    for segment in where.segments:
        for i, lora_A in enumerate(lora_As):
            product = _multiply(rows[segment.rows], _rank_rows(lora_A, plan, segment, is_B=False))
            s[i, segment.rows, : segment.rank] = product.to(dtype).mul_(segment.scale)
    return where.put_back(s, x.shape[0])


def expand(s: torch.Tensor, lora_Bs: Tensors, plan: PlanTensors, ys: Tensors, *, where: Route | None = None) -> None:
    """Add S Bᵀ to each y, in place."""
    where = where or route(plan, s.shape[1])
    grid = where.grid_for(ys[0], s.shape[2] + sum([y.shape[1] for y in ys]))
    if grid is not None and len({segment.rank for segment in where.segments}) == 1:
        for low_rank, lora_B, y in zip(s, lora_Bs, ys, strict=True):
            for lot in grid.lots:
                rows = cast(lot.rows.take(low_rank[:, : lot.rank]), y.dtype)
                lot.rows.add_product(y, rows, lot.factors(lora_B, y.dtype, is_B=True), 1.0)
        return
    for i, (lora_B, y) in enumerate(zip(lora_Bs, ys, strict=True)):
        rows = where.take(s[i])
        out = y if where.tokens is None else y.new_empty((rows.shape[0], y.shape[1]))
        for segment in where.segments:
            low_rank = cast(rows[segment.rows, : segment.rank], low_rank_dtype(y.dtype))
            B = _rank_rows(lora_B, plan, segment, is_B=True)
            _expand_into(out[segment.rows], low_rank, B, onto=where.tokens is None)
        where.add(y, out)


def _multiply(x: torch.Tensor, rank_rows: torch.Tensor) -> torch.Tensor:
    """x Rᵀ of rank rows R [rank, columns], in `low_rank_dtype`."""
    return shrink_one(x, rank_rows) if x.dtype is torch.float16 else multiply(x, cast(rank_rows, x.dtype))


def _expand_into(out: torch.Tensor, s: torch.Tensor, rank_rows: torch.Tensor, *, onto: bool) -> None:
    """out [tokens, N] = S R of rank rows R [rank, N], or += it."""
    if onto:
        add_expand(out, s, rank_rows.t())
    elif s.dtype is out.dtype:
        torch.mm(s, cast(rank_rows, s.dtype), out=out)
    else:
        out.copy_(s @ cast(rank_rows, s.dtype))


def _cut(rows: torch.Tensor, wanted: slice) -> torch.Tensor:
    return rows if wanted.stop - wanted.start == rows.shape[0] else rows[wanted]


def _rank_rows(adapters: torch.Tensor, plan: PlanTensors, segment: Segment, *, is_B: bool) -> torch.Tensor:
    """The rank rows [rank, columns] of a slot: views of a stack, copies of pages."""
    if plan.page_table is not None:
        return adapters.index_select(0, plan.page_table[segment.slot, : segment.rank])
    stack = adapters[segment.slot]
    return (stack.t() if is_B else stack)[: segment.rank]


def _add_rank_rows(
    gradient: torch.Tensor, plan: PlanTensors, segment: Segment, rows: torch.Tensor, *, is_B: bool
) -> None:
    if plan.page_table is not None:
        gradient.index_add_(0, plan.page_table[segment.slot, : segment.rank], rows.to(gradient.dtype))
    else:
        stack = gradient[segment.slot]
        (stack.t() if is_B else stack)[: segment.rank] += rows  # an adapter's units are several segments


def _draw(seed: torch.Tensor, where: Route, thresholds: list[int], x: torch.Tensor) -> torch.Tensor:
    """The mask of each segment from the seed and its slot, so that a job's does not depend on who else is there."""
    mask = x.new_empty(x.shape, dtype=torch.uint8)
    for segment in where.segments:
        rows = mask[segment.rows]
        rows.copy_(draw_mask(seed + segment.slot, rows.shape[0], rows.shape[1], thresholds[segment.slot]))
    return mask
