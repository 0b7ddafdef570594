"""All adapters of a batch as one batched product, for a CPU: a loop over adapters takes some 20 µs for each."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lorakernels.reference.product import cast


class Segment(NamedTuple):
    """The tokens of one adapter: `rows` of what `Route.take` gives."""

    slot: int
    rank: int
    scale: float
    rows: slice


class Grid(NamedTuple):
    """The adapters of a batch as one product of [adapters, height, …] matrices, each with tokens of its own alone.

    An adapter of fewer tokens has its first one again, in rows that nobody reads.
    """

    height: int
    rank: int
    padding: int  # tokens
    rank_padding: int
    steps: tuple[int, int] | None  # from an adapter's first token to the next one's, and to its own next, if all equal
    take: torch.Tensor | None  # [adapters * height] tokens; None where `steps` tells
    back: torch.Tensor | None  # where each adapted token's row is in the grid; None likewise
    tokens: torch.Tensor | None  # the adapted tokens, ascending; None for all
    scale: float | torch.Tensor  # [adapters, 1, 1 or rank], 0 past an adapter's rank
    held: slice | torch.Tensor  # the adapters in their stack; of pages their rank rows, adapters * rank of them
    is_paged: bool

    def fits(self, columns: int) -> bool:
        """Whether the padding costs less than the loop."""
        return (self.padding * self.rank + self.rank_padding * self.height) * columns <= 1 << 19

    def factors(self, adapters: torch.Tensor, dtype: torch.dtype, *, is_B: bool) -> torch.Tensor:
        """The rank rows [adapters, rank, columns]: views where the slots or pages lie in order, or else a copy."""
        if self.is_paged:
            held = self._select(adapters)
            return cast(held.view(-1, self.rank, held.shape[1]), dtype)
        by_rank = adapters.mT if is_B else adapters
        if by_rank.shape[1] != self.rank:
            by_rank = by_rank[:, : self.rank]
        return cast(self._select(by_rank), dtype)

    def add(self, y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> None:
        """y [T, N] += scale · (x Aᵀ) B of x [T, K] and `factors`."""
        s = torch.bmm(self.by_adapter(x), A.mT)
        if isinstance(self.scale, float):
            self.expand(s, B, y, self.scale)
        else:
            self.expand(s.mul_(cast(self.scale, s.dtype)), B, y, 1.0)

    def shrink(self, x: torch.Tensor, A: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """scale · x Aᵀ of x [T, K] and `factors`: [adapters, height, rank]."""
        s = cast(torch.bmm(self.by_adapter(x), A.mT), dtype)
        return s.mul_(self.scale if isinstance(self.scale, float) else cast(self.scale, dtype))

    def expand(self, s: torch.Tensor, B: torch.Tensor, y: torch.Tensor, scale: float) -> None:
        """y [T, N] += scale · s B of `factors`; tokens of the base are left alone."""
        if self.steps is not None:
            rows = self._strided(y, self.steps)
            # A product into rows that are not one block would be a loop of products.
            if rows.is_contiguous():
                rows.baddbmm_(s, B, alpha=scale)
            else:
                rows.add_(torch.bmm(s, B), alpha=scale)
            return
        added = self._by_token(torch.bmm(s, B))
        if self.tokens is None:
            y.add_(added, alpha=scale)
        else:
            y.index_add_(0, self.tokens, added, alpha=scale)

    def keep(self, s: torch.Tensor, kept: torch.Tensor) -> None:
        """s [adapters, height, rank] into its tokens' rows of kept [T, at least rank]."""
        if self.steps is not None:
            self._strided(kept[:, : self.rank], self.steps).copy_(s)
        elif self.tokens is None:
            kept[:, : self.rank] = self._by_token(s)
        else:
            kept[:, : self.rank].index_copy_(0, self.tokens, self._by_token(s))

    def by_adapter(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, columns] as [adapters, height, columns]: a view where the tokens lie at regular steps, or a copy."""
        if self.steps is not None:
            return self._strided(x, self.steps)
        assert self.take is not None
        return x.index_select(0, self.take).view(-1, self.height, x.shape[1])

    def _strided(self, x: torch.Tensor, steps: tuple[int, int]) -> torch.Tensor:
        T, columns = x.shape
        row, column = x.stride()
        return x.as_strided((T // self.height, self.height, columns), (steps[0] * row, steps[1] * row, column))

    def _by_token(self, rows: torch.Tensor) -> torch.Tensor:
        """[adapters, height, columns] as [adapted tokens, columns]."""
        assert self.back is not None
        return rows.view(-1, rows.shape[2]).index_select(0, self.back)

    def _select(self, adapters: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.held, slice):
            return adapters.index_select(0, self.held)
        return adapters if self.held == slice(0, adapters.shape[0]) else adapters[self.held]


def grid_of(segments: list[Segment], order: list[int], pages: list[list[int]] | None) -> Grid | None:
    """The grid of a batch of len(order) tokens, those of the segments first.

    None where there are not several adapters, or a stack's are of several ranks: past them it is not read.
    """
    T = len(order)
    ranks = [segment.rank for segment in segments]
    lengths = [segment.rows.stop - segment.rows.start for segment in segments]
    if len(segments) < 2 or (pages is None and min(ranks) < max(ranks)):
        return None
    rank, height, adapted = max(ranks), max(lengths), sum(lengths)
    take, back, first = [], [0] * T, 0
    for i, length in enumerate(lengths):
        tokens = order[first : first + length]
        take += tokens + tokens[:1] * (height - length)
        for row, token in enumerate(tokens, i * height):
            back[token] = row
        first += length
    tokens = sorted(order[:adapted])
    steps = _steps(take, height) if adapted == len(take) == T else None
    return Grid(
        height,
        rank,
        len(take) - adapted,
        rank * len(ranks) - sum(ranks),
        steps,
        None if steps else torch.tensor(take, device="cpu"),
        None if steps else torch.tensor([back[token] for token in tokens], device="cpu"),
        None if adapted == T else torch.tensor(tokens, device="cpu"),
        _scale(segments, rank),
        _held(segments, rank, pages),
        pages is not None,
    )


def _steps(take: list[int], height: int) -> tuple[int, int] | None:
    """(a, b) if the i-th adapter's j-th token is token i a + j b of all, as in order or in turn."""
    a, b = take[height], take[min(1, height - 1)]
    regular = [i * a + j * b for i in range(len(take) // height) for j in range(height)]
    return (a, b) if take == regular else None


def _scale(segments: list[Segment], rank: int) -> float | torch.Tensor:
    if all(s.rank == rank and s.scale == segments[0].scale for s in segments):
        return segments[0].scale
    within = [[s.scale if i < s.rank else 0.0 for i in range(rank)] for s in segments]
    return torch.tensor(within, dtype=torch.float64, device="cpu")[:, None]


def _held(segments: list[Segment], rank: int, pages: list[list[int]] | None) -> slice | torch.Tensor:
    """Past its rank an adapter of pages has its own first page again, which meets a scale of 0."""
    held = [segment.slot for segment in segments]
    if pages is not None:
        held = [pages[s.slot][i if i < s.rank else 0] for s in segments for i in range(rank)]
    in_order = held == list(range(held[0], held[0] + len(held)))
    return slice(held[0], held[0] + len(held)) if in_order else torch.tensor(held, device="cpu")
