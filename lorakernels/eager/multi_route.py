"""Which tokens are whose, read on the host: on a CPU at little cost, elsewhere it waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch

from lorakernels.eager.multi_grid import Grid, Segment, grid_of
from lorakernels.plan import PlanError, PlanTensors


class Route:
    """The adapted tokens of a batch, by adapter, and where they are: None if each lot lies together already."""

    def __init__(
        self, segments: list[Segment], tokens: torch.Tensor | None, order: list[int], plan: PlanTensors
    ) -> None:
        """`order` has all tokens, those of the segments first."""
        self.segments, self.tokens, self._order = segments, tokens, order
        self._page_table, self._in_units = plan.page_table, plan.unit > 0

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

    def grid_for(self, x: torch.Tensor, columns: int) -> Grid | None:
        """How to take all adapters at once, where that is faster. torch's float16 products of a CPU are not."""
        if not x.is_cpu or x.dtype is torch.float16 or self._in_units:
            return None
        grid = self.grid
        return grid if grid is not None and grid.fits(columns) else None

    @cached_property
    def grid(self) -> Grid | None:
        return grid_of(self.segments, self._order, None if self._page_table is None else self._page_table.tolist())


def route(plan: PlanTensors, num_tokens: int) -> Route:
    layout, S = plan.layout, plan.num_slots
    numbers = plan.part(0, layout.starts + S + 2).tolist()
    ranks, starts = numbers[: S + 1], numbers[layout.starts :]
    if num_tokens > starts[S + 1]:
        raise PlanError(f"x has {num_tokens} tokens and the plan {starts[S + 1]}; expected at most as many: update it")
    scales = plan.scales.tolist()
    order = plan.part(layout.order, num_tokens)
    tokens = order.tolist()
    spans = [(slot, starts[slot], starts[slot + 1]) for slot in range(S) if starts[slot] < starts[slot + 1]]
    if plan.unit:
        spans = [(slot, *span) for slot, first, end in spans for span in _units(tokens, first, end, plan.unit)]
    together = not plan.unit and all(tokens[end - 1] - tokens[first] == end - 1 - first for _, first, end in spans)
    segments = [
        Segment(
            slot,
            ranks[slot],
            scales[slot],
            slice(tokens[first], tokens[first] + end - first) if together else slice(first, end),
        )
        for slot, first, end in spans
    ]
    return Route(segments, None if together else order[: starts[S]].long(), tokens, plan)


def _units(order: list[int], first: int, end: int, unit: int) -> Iterator[tuple[int, int]]:
    """The spans of order[first:end] whose tokens are of one unit: how long they are is up to it alone."""
    begin = first
    for i in range(first + 1, end + 1):
        if i == end or order[i] // unit != order[begin] // unit:
            yield begin, i
            begin = i
