"""Which implementation a call takes and why, and what it launches: recorded on meta tensors, not written down again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from lorakernels.arguments import no_tensor
from lorakernels.backend import Explanation, explain_impl
from lorakernels.configs.device import assume, device_of
from lorakernels.configs.table import record_choices
from lorakernels.member import Member, training_step
from lorakernels.plan import BatchPlan

Tensors = list[torch.Tensor]


def explain(
    x: torch.Tensor,
    weight: torch.Tensor | Sequence[torch.Tensor] | None = None,
    lora_A: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    plan: BatchPlan | None = None,
    dropout_p: float | torch.Tensor = 0.0,
    row_scale: bool = False,
    impl: str = "auto",
) -> Explanation:
    """Which implementation `lora_linear` takes for x, and why; with weight and lora_A, its launches and configs too.

    The launches are all of forward and backward, in order, with all gradients but the weight's and with a contiguous
    dy. Lists of weights and of A's are `lora_linear_group`'s, and with a `plan` it is `multi_lora_linear` that is
    explained. With `row_scale` the layer has DoRA, whose norm is made too. A config comes from the user's tuning table,
    the shipped one, or the heuristic.

    Raises what `lora_linear` would raise for this `impl`.
    """
    if not isinstance(x, torch.Tensor):
        raise no_tensor("x", x)
    resolved, why = explain_impl(impl, x.device, x.dtype)
    if resolved == "torch" or weight is None or lora_A is None:
        return Explanation(resolved, why)
    weights, As = ([t] if isinstance(t, torch.Tensor) else list(t) for t in (weight, lora_A))
    if len(weights) != len(As):
        raise ValueError(f"weight has {len(weights)} tensors and lora_A {len(As)}; expected one A for each weight")
    dropout = isinstance(dropout_p, torch.Tensor) or dropout_p > 0
    with assume(device_of(x.device), here=x.is_cuda):
        x2, weights = _meta(x).reshape(math.prod(x.shape[:-1]), x.shape[-1]), [_meta(W) for W in weights]
        As = [_meta(A if A.dim() < 4 else A.squeeze(1)) for A in As]  # an engine's stacks have a dimension of 1
        if plan is not None:
            base = f"torch's linear for x Wᵀ; {len(x2)} tokens of at most {plan.num_slots} adapters"
            return Explanation(resolved, why, (base, *_multi_launches(x2, weights, As, plan, dropout)))
        return Explanation(resolved, why, tuple(_layer_launches(x2, weights, As, dropout, row_scale)))


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    """Of the same shape, strides and distance from a multiple of 16 bytes: what may keep it from a descriptor."""
    start = 0 if tensor.is_meta else tensor.data_ptr() % 16 // tensor.element_size()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    buffer = torch.empty(start + max(span, 0), dtype=tensor.dtype, device="meta")
    return buffer.as_strided(tensor.shape, tensor.stride(), start)


def _layer_launches(x: torch.Tensor, weights: Tensors, As: Tensors, dropout: bool, row_scale: bool) -> list[str]:
    from lorakernels.kernels import lora_linear as kernels

    members = [
        Member(W, A, A.new_empty((len(W), len(A))), None, W.new_empty(len(W)) if row_scale else None)
        for W, A in zip(weights, As, strict=True)
    ]
    dys = [x.new_empty((len(x), len(W))) for W in weights]
    with _recorded() as (lines, ran):
        training_step(kernels, x, dys, members, int(dropout), ran=ran)
    return lines


def _multi_launches(x: torch.Tensor, weights: Tensors, As: Tensors, plan: BatchPlan, dropout: bool) -> list[str]:
    from lorakernels.kernels import multi_lora as kernels

    tensors = plan.tensors
    table = None if tensors.page_table is None else tensors.page_table.to("meta")
    tensors = tensors._replace(buffer=tensors.buffer.to("meta"), scales=tensors.scales.to("meta"), page_table=table)
    Bs = [
        A.new_empty((len(A), len(W)) if table is not None else (len(A), len(W), A.shape[-2]))
        for W, A in zip(weights, As, strict=True)
    ]
    seed = x.new_empty(1, dtype=torch.int64) if dropout else None
    thresholds = x.new_empty(plan.num_slots + 1, dtype=torch.int32) if dropout else None
    dys = [x.new_empty((len(x), len(W))) for W in weights]
    with _recorded() as (lines, ran):
        _, s, mask = kernels.forward(
            x, weights, [None] * len(weights), As, Bs, tensors, keep_s=True, seed=seed, thresholds=thresholds
        )
        ran("forward")
        kernels.backward(dys, x, weights, As, Bs, tensors, s, mask, need_dx=True, need_dA=True, need_dB=True)
        ran("backward")
    return lines


@contextmanager
def _recorded() -> Iterator[tuple[list[str], Callable[[str], None]]]:
    """A line for each launch inside the block, and what is to be told the name of each part when it has run.

    A line is the kernel, its config, and where that comes from.
    """
    from lorakernels.kernels.launch import record_launches

    lines: list[str] = []
    with record_choices() as asked, record_launches() as launches:

        def ran(part: str) -> None:
            sources = {each.choice.config: each.choice.source for each in asked}
            for launch in launches[len(lines) :]:
                name, config = launch.kernel.__name__.removesuffix("_kernel"), launch.config
                form = ""
                if name.startswith(("multi_shrink", "multi_expand")):
                    tiles = f"tiles of {config.BLOCK_M} tokens of one slot"
                    form = ", a program a token" if config.BLOCK_M == 1 else f", {tiles}"
                lines.append(f"{name} ({part}){form}: {config} ({sources.get(config, 'fixed')})")

        yield lines, ran
