"""What a training step of several LoRA linears of one x costs, by formula, and what the kernels really ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lorakernels.dropout import drop_threshold
from lorakernels.member import Member, training_step
from lorakernels.tools.bench import passes
from lorakernels.tools.bench.counting import Counted, count
from lorakernels.tools.bench.passes import Pass, Sizes, base_products, rank_flops
from lorakernels.tools.bench.registry import Case

_META = torch.device("meta")


def group_passes(members: Sequence[Case], device: torch.device = _META, cublas: bool = False) -> list[Pass]:
    """Forward and backward in the general form by the package's kernels; the members differ in N and r alone.

    With `cublas` the base products are torch's own.
    """
    whole = replace(members[0], r=sum(case.r for case in members))
    size, seed = Sizes(whole), passes._SEED_BYTES if whole.dropout else 0
    mask = whole.M * -(-whole.K // 8) if whole.dropout else 0
    stack = Pass("A's", 2 * size.A, 0)
    steps = [stack, *passes._shrink(whole, device, "S = D(x) Aᵀ", whole.K, mask, seed)]
    for case in members:
        own = Sizes(case)
        y_base, _ = base_products(own)
        over_N = rank_flops(case, case.N)
        steps += passes._expand(y_base, "x Wᵀ + S Bᵀ", own.s + own.B, own.y, over_N, cublas, 0)
    for case in members:
        steps += passes._dy_pass(case, device, need_g=True)
    steps += [Pass("G's", 2 * size.s, 0), *passes._outer(whole, device, "dA", whole.K, mask=mask), stack]
    bases = [base_products(Sizes(case))[1] for case in members]
    low_rank, over_K = size.s + size.A + mask, rank_flops(whole, whole.K)
    if cublas:
        # Each further product reads what it adds to.
        more = [replace(base, bytes=base.bytes + size.x, tall=base.tall + size.x) for base in bases[1:]]
        return [*steps, bases[0], *more, Pass("D'(G A)", low_rank + 2 * size.x, 2 * size.x + mask, over_K)]
    again = size.x * (len(members) - 1)  # each base counts dx, which is written once
    total, tall = (sum(getattr(base, name) for base in bases) - again for name in ("bytes", "tall"))
    flops = sum(base.flops for base in bases) + over_K
    return [*steps, Pass("Σ dy W + D'(G A)", total + low_rank, tall + mask, flops)]


def frozen_passes(members: Sequence[Case]) -> list[Pass]:
    """The frozen layers one by one, and what autograd does to their dx: it adds them, two at a time."""
    bases = [base for case in members for base in base_products(Sizes(case))]
    x = Sizes(members[0]).x
    return [*bases, *[Pass("dx +=", 3 * x, 3 * x)] * (len(members) - 1)]


def own_group(members: Sequence[Case]) -> list[Counted]:
    """The same by the package's kernels, recorded on meta tensors."""
    from lorakernels.kernels import lora_linear

    first = members[0]

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=first.torch_dtype, device="meta")

    x, dys = meta(first.M, first.K), [meta(case.M, case.N) for case in members]
    linears = [Member(meta(c.N, c.K), meta(c.r, c.K), meta(c.N, c.r), scaling=0.5) for c in members]
    with count() as counted:
        training_step(lora_linear, x, dys, linears, drop_threshold(first.dropout))
    return counted
