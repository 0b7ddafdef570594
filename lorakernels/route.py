"""Which experts take which tokens, as tensors on the device: a mixture's counterpart of a `BatchPlan`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lorakernels.plan_layout import num_tiles, plan_layout

TALL = 128  # the height of further tiles, which stand behind a plan's own


class ExpertRoute(NamedTuple):
    """The pairs of a token and one of its `top_k` choices, sorted by expert; made by `expert_route`.

    One serves all projections of the mixture. P = tokens · top_k.
    """

    order: torch.Tensor  # [P] int64: the pair, token · top_k + choice, at each place
    inverse: torch.Tensor  # [P] int64: the place of each pair
    starts: torch.Tensor  # [E + 1] int32: the places of expert e are starts[e] … starts[e + 1] - 1
    # int32: the same as a plan of E slots, and tiles, for the kernels; plain torch needs none.
    plan: torch.Tensor | None
    top_k: int

    @property
    def num_experts(self) -> int:
        return self.starts.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        return self.order.shape[0] // self.top_k

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """[P, K], a row a place, of x [tokens, K]."""
        return x.index_select(0, self.order // self.top_k if self.top_k > 1 else self.order)

    def by_token(self, rows: torch.Tensor) -> torch.Tensor:
        """[tokens, top_k, K] of rows [P, K]."""
        return rows.index_select(0, self.inverse).unflatten(0, (-1, self.top_k))


def expert_plan_size(num_experts: int, num_pairs: int) -> int:
    """Of `ExpertRoute.plan`."""
    layout = plan_layout.__wrapped__(num_experts, num_pairs)  # a number that torch.compile traces cannot be looked up
    return layout.size + 3 * num_tiles(num_pairs, num_experts, TALL)
