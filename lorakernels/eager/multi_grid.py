"""All adapters of a batch as few batched products, for a CPU: a loop over adapters takes some 20 µs for each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, groupby
from typing import NamedTuple

import torch

from lorakernels.member import cast

# Fewer tokens a lot are gathered: two batched products take 40 µs before their first number.
_LOT_TOKENS = 64

Adder = Callable[[torch.Tensor, torch.Tensor], None]  # y, x: adds to y in place


class Segment(NamedTuple):
    """The tokens of one adapter: `rows` of what `Route.take` gives."""

    slot: int
    rank: int
    scale: float
    rows: slice


class Steps(NamedTuple):
    """Tokens at regular steps, which a view has as [adapters, height, columns]: first + i across + j along."""

    first: int
    adapters: int
    height: int
    across: int
    along: int

    def strided(self, row: int, column: int, columns: int) -> tuple[tuple[int, int, int], tuple[int, int, int], int]:
        """Size, strides and offset of the view of rows [T, columns] with these strides."""
        return (self.adapters, self.height, columns), (self.across * row, self.along * row, column), self.first * row

    def take(self, x: torch.Tensor) -> torch.Tensor:
        row, column = x.stride()
        size, strides, offset = self.strided(row, column, x.shape[1])
        return x.as_strided(size, strides, x.storage_offset() + offset)

    def add_product(self, y: torch.Tensor, s: torch.Tensor, B: torch.Tensor, scale: float) -> None:
        _add_product(self.take(y), s, B, scale)

    def put(self, kept: torch.Tensor, s: torch.Tensor) -> None:
        self.take(kept).copy_(s)


class Gathered(NamedTuple):
    """Tokens in any order. An adapter of fewer than `height` has its first one again, in rows that nobody reads."""

    adapters: int
    height: int
    take_from: torch.Tensor  # [adapters * height] tokens
    back: torch.Tensor  # where each adapted token's row is in what is taken
    tokens: torch.Tensor | None  # the adapted ones, ascending; None for all

    def take(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, self.take_from).view(self.adapters, self.height, x.shape[1])

    def add_product(self, y: torch.Tensor, s: torch.Tensor, B: torch.Tensor, scale: float) -> None:
        self.add_rows(y, torch.bmm(s, B), scale)

    def add_rows(self, y: torch.Tensor, rows: torch.Tensor, scale: float) -> None:
        added = self._by_token(rows)
        if self.tokens is None:
            y.add_(added, alpha=scale)
        else:
            y.index_add_(0, self.tokens, added, alpha=scale)

    def put(self, kept: torch.Tensor, s: torch.Tensor) -> None:
        if self.tokens is None:
            kept.copy_(self._by_token(s))
        else:
            kept.index_copy_(0, self.tokens, self._by_token(s))

    def _by_token(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.flatten(0, 1).index_select(0, self.back)


Arranged = tuple[Steps | Gathered, list[Segment]]


class Lot(NamedTuple):
    """Adapters, with repetitions, of equally many tokens each: one product of [adapters, height, …] matrices."""

    rows: Steps | Gathered
    rank: int
    scale: float | torch.Tensor  # [adapters, 1, 1 or rank], 0 past an adapter's rank
    held: slice | torch.Tensor  # the adapters in their stack; of pages their rank rows, adapters * rank of them
    is_paged: bool

    def factors(self, adapters: torch.Tensor, dtype: torch.dtype, *, is_B: bool) -> torch.Tensor:
        """The rank rows [adapters, rank, columns]: views where the slots or pages lie in order, or else a copy."""
        if self.is_paged:
            held = self._select(adapters)
            return cast(held.view(held.shape[0] // self.rank, self.rank, held.shape[1]), dtype)
        by_rank = adapters.mT if is_B else adapters
        if by_rank.shape[1] != self.rank:
            by_rank = by_rank[:, : self.rank]
        return cast(self._select(by_rank), dtype)

    def shrink(self, x: torch.Tensor, A: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """scale · x Aᵀ of x [T, K] and `factors`: [adapters, height, rank]."""
        s = cast(torch.bmm(self.rows.take(x), A.mT), dtype)
        return s.mul_(self.scale if isinstance(self.scale, float) else cast(self.scale, dtype))

    def add(self, y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> None:
        """y [T, N] += scale · (x Aᵀ) B of x [T, K] and `factors`; tokens of no adapter here are left alone."""
        s = torch.bmm(self.rows.take(x), A.mT)
        if isinstance(self.scale, float):
            self.rows.add_product(y, s, B, self.scale)
        else:
            self.rows.add_product(y, s.mul_(cast(self.scale, s.dtype)), B, 1.0)

    def bound_add(self, As: list[torch.Tensor], Bs: list[torch.Tensor]) -> Adder:
        """`add` of several slices, whose columns lie side by side in y, for contiguous y and x of any leading shape.

        All is looked up that does not depend on y and x, and the slices' A are one: between the layers of a model each
        operator that is saved, a view too, is 4 µs.
        """
        rows, A = self.rows, As[0] if len(As) == 1 else torch.cat(As, 1)
        A_t, K, N = A.mT, A.shape[2], sum(B.shape[2] for B in Bs)
        scale, scales = (self.scale, None) if isinstance(self.scale, float) else (1.0, cast(self.scale, A.dtype))
        if scales is not None and scales.shape[2] > 1:
            scales = scales.repeat(1, 1, len(As))

        def shrink(x: torch.Tensor) -> list[torch.Tensor]:
            s = torch.bmm(x, A_t)
            if scales is not None:
                s.mul_(scales)
            return [s] if len(As) == 1 else list(s.split([B.shape[1] for B in Bs], 2))

        if isinstance(rows, Gathered):

            def add_gathered(y: torch.Tensor, x: torch.Tensor) -> None:
                products = list(map(torch.bmm, shrink(rows.take(x.view(-1, K))), Bs))
                rows.add_rows(y.view(-1, N), products[0] if len(Bs) == 1 else torch.cat(products, 2), scale)

            return add_gathered
        x_size, x_strides, x_offset = rows.strided(K, 1, K)
        views = []
        for B, end in zip(Bs, accumulate(B.shape[2] for B in Bs), strict=True):
            size, strides, offset = rows.strided(N, 1, B.shape[2])
            views.append((B, size, strides, offset + end - B.shape[2]))

        def add(y: torch.Tensor, x: torch.Tensor) -> None:
            slices = shrink(x.as_strided(x_size, x_strides, x.storage_offset() + x_offset))
            for s, (B, size, strides, offset) in zip(slices, views, strict=True):
                _add_product(y.as_strided(size, strides, y.storage_offset() + offset), s, B, scale)

        return add

    def _select(self, adapters: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.held, slice):
            return adapters.index_select(0, self.held)
        return adapters if self.held == slice(0, adapters.shape[0]) else adapters[self.held]


class Grid(NamedTuple):
    """The adapters of a batch as products of a few lots."""

    lots: list[Lot]
    padding: int  # zeros to multiply, for each column of A and B

    def fits(self, columns: int) -> bool:
        """Whether the padding costs less than the loop."""
        return self.padding * columns <= 1 << 19

    def bound_add(self, lora_As: list[torch.Tensor], lora_Bs: list[torch.Tensor], dtype: torch.dtype) -> Adder:
        """What adds the adapters' updates to contiguous y [..., ΣN], from contiguous x [..., K] of this dtype."""
        adds = []
        for lot in self.lots:
            As = [lot.factors(A, dtype, is_B=False) for A in lora_As]
            adds.append(lot.bound_add(As, [lot.factors(B, dtype, is_B=True) for B in lora_Bs]))
        if len(adds) == 1:
            return adds[0]

        def add(y: torch.Tensor, x: torch.Tensor) -> None:
            for each in adds:
                each(y, x)

        return add


def grid_of(segments: list[Segment], order: list[int], pages: list[list[int]] | None) -> Grid | None:
    """The grid of a batch of len(order) tokens, those of the segments first.

    None where there are not several adapters, or a stack's are of several ranks: past them it is not read.
    """
    ranks = [segment.rank for segment in segments]
    if len(segments) < 2 or (pages is None and min(ranks) < max(ranks)):
        return None
    rank, tokens = max(ranks), _tokens(segments, order)
    arranged = _regular(segments, tokens) or _in_runs(segments, tokens, len(order), rank)
    arranged = arranged or [(_gathered(tokens, len(order)), segments)]
    lots, multiplied = [], 0
    for rows, adapters in arranged:
        scale, held = _scale(adapters, rank), _held(adapters, rank, pages)
        lots.append(Lot(rows, rank, scale, held, pages is not None))
        multiplied += len(adapters) * rows.height * rank
    return Grid(lots, multiplied - sum(len(each) * rank for each, rank in zip(tokens, ranks, strict=True)))


def _tokens(segments: list[Segment], order: list[int]) -> list[list[int]]:
    ends = list(accumulate(segment.rows.stop - segment.rows.start for segment in segments))
    return [order[first:end] for first, end in zip([0, *ends], ends, strict=False)]


def _regular(segments: list[Segment], tokens: list[list[int]]) -> list[Arranged]:
    """All adapters at once, if one step leads from each one's tokens to the next's: in order, in turn."""
    first, height = tokens[0][0], len(tokens[0])
    across, along = tokens[1][0] - first, tokens[0][1] - first if height > 1 else 1
    regular = [[first + i * across + j * along for j in range(height)] for i in range(len(tokens))]
    if across < 0 or tokens != regular:
        return []
    return [(Steps(first, len(tokens), height, across, along), segments)]


def _in_runs(segments: list[Segment], tokens: list[list[int]], T: int, rank: int) -> list[Arranged]:
    """Lots of runs, equally many tokens of one adapter each, as in rows of prompts: an adapter is there for each of
    its runs. Those in order are views; others are copied, for runs that are no shorter than an adapter has rank rows.
    """
    owners = [-1] * T
    for i, each in enumerate(tokens):
        for token in each:
            owners[token] = i
    adapted = sum(map(len, tokens))
    most = adapted // _LOT_TOKENS
    # So many runs fit neither kind of lot, and to list them takes 100 ms where 32768 tokens are in any order.
    count = sum(owner >= 0 and owner != before for before, owner in zip([-1, *owners], owners, strict=False))
    if count > most * len(segments) and count * rank > adapted:
        return []
    runs, first = [], 0
    for owner, run in groupby(owners):
        length = len(list(run))
        if owner >= 0:
            runs.append((first, length, segments[owner]))
        first += length
    lots = _lots(runs, in_order=True)
    if len(lots) > most and min(length for _, length, _ in runs) >= rank:
        lots = _lots(runs, in_order=False)
    if len(lots) > most:
        return []
    return [(Steps(first, len(each), length, length, 1), each) for first, length, each in lots]


def _lots(runs: list[tuple[int, int, Segment]], *, in_order: bool) -> list[tuple[int, int, list[Segment]]]:
    """First token, tokens of each run, adapters: of runs that follow each other, `in_order` in slots too."""
    lots: list[tuple[int, int, list[Segment]]] = []
    end = slot = -1
    for first, length, segment in runs:
        follows = first == end and length == lots[-1][1] and (segment.slot == slot + 1 or not in_order)
        if not follows:
            lots.append((first, length, []))
        lots[-1][2].append(segment)
        end, slot = first + length, segment.slot
    return lots


def _gathered(tokens: list[list[int]], T: int) -> Gathered:
    height = max(map(len, tokens))
    take, back = [], [-1] * T
    for i, each in enumerate(tokens):
        take += each + each[:1] * (height - len(each))
        for row, token in enumerate(each, i * height):
            back[token] = row
    adapted = [token for token in range(T) if back[token] >= 0]
    return Gathered(
        len(tokens),
        height,
        torch.tensor(take, device="cpu"),
        torch.tensor([back[token] for token in adapted], device="cpu"),
        None if len(adapted) == T else torch.tensor(adapted, device="cpu"),
    )


def _scale(segments: list[Segment], rank: int) -> float | torch.Tensor:
    if all(s.rank == rank and s.scale == segments[0].scale for s in segments):
        return segments[0].scale
    columns = 1 if all(s.rank == rank for s in segments) else rank
    within = [[s.scale if i < s.rank else 0.0 for i in range(columns)] for s in segments]
    return torch.tensor(within, dtype=torch.float64, device="cpu")[:, None]


def _held(segments: list[Segment], rank: int, pages: list[list[int]] | None) -> slice | torch.Tensor:
    """Past its rank an adapter of pages has its own first page again, which meets a scale of 0."""
    held = [segment.slot for segment in segments]
    if pages is not None:
        held = [pages[s.slot][i if i < s.rank else 0] for s in segments for i in range(rank)]
    in_order = held == list(range(held[0], held[0] + len(held)))
    return slice(held[0], held[0] + len(held)) if in_order else torch.tensor(held, device="cpu")


def _add_product(rows: torch.Tensor, s: torch.Tensor, B: torch.Tensor, scale: float) -> None:
    """A product into rows that are not one block would be a loop of products."""
    if rows.is_contiguous():
        rows.baddbmm_(s, B, alpha=scale)
    else:
        rows.add_(torch.bmm(s, B), alpha=scale)
