"""Many adapters in one batch: the tensors of a case, what is right, and what reading everything once would cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from lorakernels.configs.data_sheet import DataSheet
from lorakernels.plan import BatchPlan
from lorakernels.tools.bench.orders import SCALING
from lorakernels.tools.bench.peer import Peer, Results
from lorakernels.tools.bench.registry import MultiCase
from lorakernels.tools.bench.verify import held

_PAGE_NUMBER_BYTES = 4  # of int32, in a table of pages


@dataclass
class MultiTensors:
    """x [M, K], weight [N, K], and the adapters as pages [sum of ranks, K] and [sum of ranks, N]."""

    case: MultiCase
    x: torch.Tensor
    weight: torch.Tensor
    pages_A: torch.Tensor
    pages_B: torch.Tensor
    slots: torch.Tensor  # [M] int64

    @property
    def numbytes(self) -> int:
        tensors = (self.x, self.weight, self.pages_A, self.pages_B)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @cached_property
    def adapters(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A [r, K] and B [N, r] of each, in memory of its own as a library holds them."""
        ranks = self.case.ranks
        rows = zip(self.pages_A.split(ranks), self.pages_B.split(ranks), strict=True)
        return [(A.clone(), B.t().contiguous()) for A, B in rows]

    @cached_property
    def stacks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[adapters, r, K] and [adapters, N, r], zero past an adapter's rank."""
        S, r = self.case.adapters, self.case.r
        A, B = self.x.new_zeros(S, r, self.case.K), self.x.new_zeros(S, self.case.N, r)
        for slot, (own_A, own_B) in enumerate(self.adapters):
            A[slot, : own_A.shape[0]], B[slot, :, : own_B.shape[1]] = own_A, own_B
        return A, B

    @cached_property
    def tokens(self) -> list[torch.Tensor | slice]:
        """Of each adapter: a slice where they lie together, else their numbers."""
        if not self.case.together:
            return [(self.slots == slot).nonzero()[:, 0] for slot in range(self.case.adapters)]
        ends = self.slots.bincount(minlength=self.case.adapters).cumsum(0).tolist()
        return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]

    def plan(self, paged: bool) -> BatchPlan:
        """Of the batch, for the pages or for the stacks."""
        case, device = self.case, self.x.device
        ranks = torch.tensor(case.ranks, device=device)
        table = None
        if paged:
            first = ranks.cumsum(0) - ranks
            table = (first[:, None] + torch.arange(case.r, device=device)).int()
        pages = self.pages_A.shape[0] if paged else None
        plan = BatchPlan(case.adapters, case.M, max_rank=case.r, num_pages=pages, device=device)
        plan.update(self.slots, ranks, torch.full((case.adapters,), SCALING, device=device), table)
        return plan


def make_multi_tensors(case: MultiCase, device: torch.device | str, seed: int) -> MultiTensors:
    """Random tensors of the case; which token is whose is drawn too."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    pages = sum(case.ranks)
    ranks = torch.tensor(case.ranks, device=device)
    by_rank = ranks.repeat_interleave(ranks)[:, None] ** -0.5
    return MultiTensors(
        case,
        x=randn(case.M, case.K).to(case.torch_dtype),
        weight=randn(case.N, case.K).mul_(case.K**-0.5).to(case.torch_dtype),
        pages_A=randn(pages, case.K).mul_(case.K**-0.5).to(case.torch_dtype),
        pages_B=randn(pages, case.N).mul_(by_rank).to(case.torch_dtype),
        slots=case.slots(seed).to(device),
    )


def looped(tensors: MultiTensors, dtype: torch.dtype, adapted: bool = True) -> Results:
    """y by one product after the other for each adapter, in `dtype`."""
    x, weight = tensors.x.to(dtype), tensors.weight.to(dtype)
    y = x @ weight.t()
    for tokens, (A, B) in zip(tensors.tokens, tensors.adapters, strict=True) if adapted else ():
        y[tokens] += SCALING * (x[tokens] @ A.to(dtype).t()) @ B.to(dtype).t()
    return {"y": y}


@torch.no_grad()
def multi_checker(case: MultiCase, tensors: MultiTensors) -> Callable[[Peer[MultiCase, MultiTensors]], tuple]:
    """Holds a peer's y against float64: the largest error over its budget, and what is wrong (None: nothing)."""
    by_adapted = {}

    def check(peer: Peer[MultiCase, MultiTensors]) -> tuple[float, str | None]:
        if peer.adapted not in by_adapted:
            by_adapted[peer.adapted] = [
                looped(tensors, dtype, peer.adapted) for dtype in (torch.float64, case.torch_dtype)
            ]
        expected, eager = by_adapted[peer.adapted]
        return held(peer.make(case, tensors)(), expected, eager, case.torch_dtype)

    return check


# ------------------------------------------------------------------------------------------- by formula


def frozen_bytes(case: MultiCase) -> int:
    """x and W read, y written, once."""
    return (case.M * (case.K + case.N) + case.N * case.K) * case.itemsize


def frozen_flops(case: MultiCase) -> int:
    return 2 * case.M * case.N * case.K


def low_rank_flops(case: MultiCase) -> int:
    """Of every token through its own adapter's A and B."""
    ranks = torch.tensor(case.ranks)[case.slots()]
    return 2 * int(ranks.sum()) * (case.K + case.N)


def paged_bytes(case: MultiCase) -> int:
    """Of adapters that are held as pages, a page a row of rank, and of their table, which has a row for the base."""
    return sum(case.ranks) * (case.K + case.N) * case.itemsize + (case.adapters + 1) * case.r * _PAGE_NUMBER_BYTES


def padded_bytes(case: MultiCase) -> int:
    """Of adapters that are held as stacks, every one as large as the largest."""
    return case.adapters * case.r * (case.K + case.N) * case.itemsize


def own_bytes(case: MultiCase) -> int:
    """Of adapters that are held each for itself, which is also what a batch of all must read."""
    return sum(case.ranks) * (case.K + case.N) * case.itemsize


def memory_floor(case: MultiCase) -> float:
    """The least that can be read and written, over the frozen layer's: each adapter of the batch once more."""
    return 1 + own_bytes(case) / frozen_bytes(case)


def floor(case: MultiCase, sheet: DataSheet | None = None) -> float:
    """The least (adapted layer) / (frozen layer): on a device that is known its roofline, else the least on any."""
    moved, flops = frozen_bytes(case), frozen_flops(case)
    more_moved, more_flops = own_bytes(case), low_rank_flops(case)
    if sheet is None:
        return 1 + min(more_moved / moved, more_flops / flops)
    return sheet.seconds(flops + more_flops, moved + more_moved, case.dtype) / sheet.seconds(flops, moved, case.dtype)
