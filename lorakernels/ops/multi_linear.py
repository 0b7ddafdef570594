"""`multi_lora_linear` as torch sees it: schemas, fakes, autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lorakernels.backend import resolve_impl
from lorakernels.dropout import LEVELS
from lorakernels.eager import multi_lora as eager_multi_lora
from lorakernels.low_rank import low_rank_dtype
from lorakernels.member import sum_rows
from lorakernels.ops.flops import multi_lora_linear_backward_flops, multi_lora_linear_flops
from lorakernels.ops.linear_operators import taken_apart, weights_of
from lorakernels.ops.multi_shared import (
    PlanOperator,
    Tensors,
    check_stamp,
    implementation_of,
    is_transformed,
    on_host,
    stamp_of,
    width_of,
)
from lorakernels.ops.operator import is_batched, one_by_one
from lorakernels.plan import BatchPlan, PlanTensors


def _forward(
    x: torch.Tensor,
    weights: Tensors,
    parts: list[torch.Tensor | None],
    forms: list[str],
    biases: list[torch.Tensor | None],
    lora_As: Tensors,
    lora_Bs: Tensors,
    plan: PlanTensors,
    seed: torch.Tensor | None,
    thresholds: torch.Tensor | None,
    keep_s: bool,
    impl: str,
    **route: Any,
) -> tuple[Tensors, torch.Tensor | None, torch.Tensor | None]:
    """y's, and for the backward S and the mask where there are any."""
    return implementation_of(impl, x).forward(
        x,
        weights_of(weights, parts, forms),
        biases,
        lora_As,
        lora_Bs,
        plan,
        keep_s=keep_s,
        seed=seed,
        thresholds=thresholds,
        **route,
    )


def _forward_fake(
    x: torch.Tensor,
    weights: Tensors,
    parts: list[torch.Tensor | None],
    forms: list[str],
    biases: list[torch.Tensor | None],
    lora_As: Tensors,
    lora_Bs: Tensors,
    plan: PlanTensors,
    seed: torch.Tensor | None,
    thresholds: torch.Tensor | None,
    keep_s: bool,
    impl: str,
) -> tuple[Tensors, torch.Tensor | None, torch.Tensor | None]:
    T, K = x.shape
    on_triton = resolve_impl(impl, x.device, x.dtype) == "triton"
    sizes = [weight.shape for weight in weights_of(weights, parts, forms)]
    ys, s, mask = [x.new_empty((T, N)) for N, _ in sizes], None, None
    if keep_s:
        dtype = torch.float32 if on_triton else low_rank_dtype(x.dtype)
        s = x.new_empty((len(ys), T, width_of(lora_As, plan.page_table)), dtype=dtype)
    if thresholds is not None:
        mask = x.new_empty((T, (K + 7) // 8 if on_triton else K), dtype=torch.uint8)
    return ys, s, mask


def _backward(
    dys: Tensors,
    x: torch.Tensor | None,
    weights: Tensors,
    parts: list[torch.Tensor | None],
    forms: list[str],
    lora_As: Tensors,
    lora_Bs: Tensors,
    plan: PlanTensors,
    s: torch.Tensor | None,
    mask: torch.Tensor | None,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    impl: str,
    **route: Any,
) -> tuple[torch.Tensor | None, Tensors, Tensors]:
    mask = mask if mask is not None and mask.numel() else None
    needs = {"need_dx": need_dx, "need_dA": need_dA, "need_dB": need_dB}
    values = weights_of(weights, parts, forms)
    return implementation_of(impl, dys[0]).backward(dys, x, values, lora_As, lora_Bs, plan, s, mask, **needs, **route)


def _backward_fake(
    dys: Tensors,
    x: torch.Tensor | None,
    weights: Tensors,
    parts: list[torch.Tensor | None],
    forms: list[str],
    lora_As: Tensors,
    lora_Bs: Tensors,
    plan: PlanTensors,
    s: torch.Tensor | None,
    mask: torch.Tensor | None,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    impl: str,
) -> tuple[torch.Tensor | None, Tensors, Tensors]:
    K = weights_of(weights, parts, forms)[0].shape[1] if need_dx else 0
    dx = dys[0].new_empty((dys[0].shape[0], K)) if need_dx else None
    dAs = [A.new_empty(A.shape) for A in lora_As] if need_dA else []
    return dx, dAs, [B.new_empty(B.shape) for B in lora_Bs] if need_dB else []


MULTI = PlanOperator(
    "multi_lora_linear(Tensor x, Tensor[] weights, Tensor?[] parts, str[] forms, Tensor?[] biases, Tensor[] lora_As, "
    "Tensor[] lora_Bs, PLAN, Tensor? seed, Tensor? thresholds, bool keep_s, str impl) -> (Tensor[], Tensor, Tensor)",
    _forward,
    _forward_fake,
    multi_lora_linear_flops,
)
MULTI_BACKWARD = PlanOperator(
    "multi_lora_linear_backward(Tensor[] dys, Tensor? x, Tensor[] weights, Tensor?[] parts, str[] forms, "
    "Tensor[] lora_As, Tensor[] lora_Bs, PLAN, Tensor? s, Tensor? mask, bool need_dx, bool need_dA, bool need_dB, "
    "str impl) -> (Tensor, Tensor[], Tensor[])",
    _backward,
    _backward_fake,
    multi_lora_linear_backward_flops,
)


class _MultiLoRALinear(torch.autograd.Function):
    """The ys of `multi_lora_linear`. Tensors come one after the other: x, the plan's, then those of each slice."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, options: Any, *tensors: Any) -> tuple[torch.Tensor, ...]:
        *sizes, num_slices, forms, impl, where = options
        buffer, scales, page_table, stamp, seed, thresholds, *rest = tensors
        parts = rest[4 * num_slices :]
        weights, biases, lora_As, lora_Bs = (rest[i * num_slices : (i + 1) * num_slices] for i in range(4))
        need_x, _, *needs = ctx.needs_input_grad
        need_weights, need_biases, need_As, need_Bs = (
            any(needs[6 + i * num_slices : 6 + (i + 1) * num_slices]) for i in range(4)
        )
        call = MULTI.pick((x, *weights, *lora_As, *lora_Bs))
        ys, s, mask = call(
            x, weights, parts, forms, biases, lora_As, lora_Bs, PlanTensors(buffer, scales, page_table, *sizes), seed,
            thresholds, need_Bs, impl, **(where if call is MULTI.body else {}),
        )  # fmt: skip
        ctx.options = options
        ctx.needs = need_x, need_weights, need_biases, need_As, need_Bs
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        kept_x = x if need_As or need_weights else None
        ctx.version = None if stamp is None else stamp.item()
        ctx.save_for_backward(kept_x, buffer, scales, page_table, stamp, s, mask, *weights, *lora_As, *lora_Bs, *parts)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("multi_lora_linear cannot be differentiated twice: use lora_linear for one adapter")
        if is_batched(dys):
            return tuple(one_by_one(lambda *dys: _MultiLoRALinear.backward(ctx, *dys), dys))
        *sizes, num_slices, forms, impl, where = ctx.options
        x, buffer, scales, page_table, stamp, s, mask, *rest = ctx.saved_tensors
        check_stamp("multi_lora_linear", stamp, ctx.version)
        weights, lora_As, lora_Bs = (rest[i * num_slices : (i + 1) * num_slices] for i in range(3))
        need_x, need_weights, need_biases, need_As, need_Bs = ctx.needs
        call = MULTI_BACKWARD.pick(dys)
        dx, dAs, dBs = call(
            list(dys), x, weights, rest[3 * num_slices :], forms, lora_As, lora_Bs,
            PlanTensors(buffer, scales, page_table, *sizes), s, mask, need_x, need_As, need_Bs, impl,
            **(where if call is MULTI_BACKWARD.body else {}),
        )  # fmt: skip
        none = [None] * num_slices
        dweights = [(dy.t() @ x).to(w.dtype) for dy, w in zip(dys, weights, strict=True)] if need_weights else none
        dbiases = [
            None if dtype is None or not need_biases else sum_rows(dy).to(dtype)
            for dy, dtype in zip(dys, ctx.bias_dtypes, strict=True)
        ]
        grads = [*dweights, *dbiases, *(dAs or none), *(dBs or none)]
        needed = ctx.needs_input_grad[8:]
        kept = [grad if need else None for grad, need in zip(grads, needed, strict=False)]  # of the parts none
        return (dx if need_x else None, *[None] * 7, *kept, *[None] * (len(needed) - len(kept)))


def multi_lora_linear(
    x: torch.Tensor,
    weights: Sequence[Any],
    biases: list[torch.Tensor | None],
    lora_As: Tensors,
    lora_Bs: Tensors,
    plan: BatchPlan,
    dropout_p: float | torch.Tensor,
    impl: str,
) -> Tensors:
    """The ys [T, N] of checked arguments, x [T, K]; no autograd.Function when nothing needs a gradient."""
    weights, parts, forms = taken_apart(weights)
    need_grad = is_transformed() or (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (x, *weights, *biases, *lora_As, *lora_Bs))
    )
    call = MULTI.pick((x, *weights, *lora_As, *lora_Bs))
    planned = plan.snapshot() if need_grad else plan.tensors
    seed = thresholds = None
    if isinstance(dropout_p, torch.Tensor) or dropout_p > 0:
        thresholds = _thresholds(dropout_p, planned.scales)
        # A unit's mask would be drawn as its adapter's.
        planned = planned._replace(scales=planned.scales * (LEVELS / (LEVELS - thresholds)), unit=0)
        seed = torch.randint(-(2**62), 2**62, (1,), dtype=torch.int64, device=x.device)
    # Dropout changes the scales, which are part of the route.
    where = on_host(plan, impl, x, call is MULTI.body and seed is None)
    if not need_grad:
        return call(
            x, weights, parts, forms, biases, lora_As, lora_Bs, planned, seed, thresholds, False, impl, **where
        )[0]
    buffer, scales, page_table, *sizes = planned
    options = (*sizes, len(weights), forms, impl, where)
    tensors = (buffer, scales, page_table, stamp_of(plan), seed, thresholds, *weights, *biases, *lora_As, *lora_Bs)
    return list(_MultiLoRALinear.apply(x, options, *tensors, *parts))


def bound_update(
    x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, plan: BatchPlan
) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
    """`bound_updates` of one slice."""
    return bound_updates(x, [lora_A], [lora_B], plan)


def bound_updates(
    x: torch.Tensor, lora_As: Tensors, lora_Bs: Tensors, plan: BatchPlan
) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
    """What adds a plan's updates to base products side by side, (y, x) -> None in place, for batches such as x [T, K].

    For whoever infers with the same adapters many times on a CPU: what does not depend on x's numbers is looked up
    here once, which takes `multi_lora_linear` 40 µs between the layers of a model. None where that is the only way.
    It holds for this version of the plan and of LORAKERNELS_IMPL, and where `runs_directly` does, without gradients;
    y [..., ΣN] and x [..., K] must be contiguous.
    """
    if not plan.tensors.buffer.is_cpu or implementation_of("auto", x) is not eager_multi_lora:
        return None
    where: eager_multi_lora.Route = on_host(plan, "auto", x, True)["where"]
    width = sum(B.shape[1] for B in lora_Bs)
    grid = where.grid_for(x, x.shape[1] + width)
    return None if grid is None else grid.bound_add(lora_As, lora_Bs, x.dtype)


def _thresholds(dropout_p: float | torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Of 65536 levels, how many are dropped: [S + 1] int32, none for the base."""
    thresholds = scales.new_zeros(scales.shape, dtype=torch.int32)
    if isinstance(dropout_p, torch.Tensor):
        levels = (dropout_p.double() * LEVELS).round().clamp(0, LEVELS - 1)
        thresholds[:-1] = levels.nan_to_num().to(torch.int32)  # as an integer NaN is any
    else:
        thresholds[:-1] = min(round(dropout_p * LEVELS), LEVELS - 1)
    return thresholds
