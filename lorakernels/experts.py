"""The public functions of mixtures of experts: LoRA on a stack of experts, without a second copy of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lorakernels import arguments, ops
from lorakernels.plan import BASE, BatchPlan, PlanError
from lorakernels.quant.stacks import PackedStack
from lorakernels.route import ExpertRoute


def expert_route(top_k_index: torch.Tensor, num_experts: int, *, impl: str = "auto") -> ExpertRoute:
    """The pairs of a token and one of its experts, sorted by expert: one sort, and no waiting for a GPU.

    Args:
        top_k_index: [T, top_k] int32 or int64, as a router gives it; a token may come twice to one expert.
        num_experts: E. An index outside 0 … E - 1 raises in plain torch; by the kernels its rows are zero.
        impl: "auto", "torch" or "triton": what `expert_lora_linear` will be.

    Returns:
        What `expert_lora_linear` and `combine_experts` are routed by.

    Raises:
        ValueError: the shape, or in plain torch an expert, is wrong.
        TypeError: top_k_index is no tensor of integers.
        BackendError: `impl="triton"` cannot run here.
    """
    if not isinstance(top_k_index, torch.Tensor):
        raise arguments.no_tensor("top_k_index", top_k_index)
    if top_k_index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"top_k_index is {top_k_index.dtype}; expected int32 or int64")
    if top_k_index.dim() != 2 or top_k_index.shape[1] < 1:
        raise ValueError(f"top_k_index is {arguments.shape_of(top_k_index)}; expected [T, top_k] with top_k ≥ 1")
    if not isinstance(num_experts, int) or num_experts < 1:
        raise ValueError(f"num_experts is {num_experts!r}; expected a positive integer")
    return ops.expert_route(top_k_index, num_experts, impl)


def expert_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | PackedStack,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    route: ExpertRoute,
    *,
    bias: torch.Tensor | None = None,
    scaling: float | torch.Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    sorted_x: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Each row through the frozen linear layer of its own expert, and that expert's low-rank update.

    y = x W_eᵀ + bias_e + scaling · (dropout(x) A_eᵀ) B_eᵀ (Hu et al., arXiv 2106.09685, section 4.1; the rows sorted by
    expert as in Gale et al., "MegaBlocks", arXiv 2211.15841). Nothing of the size of `weight` is made, forward or
    backward, where `weight` needs no gradient. Differentiable once in every tensor.

    Args:
        x: [T, K], a row a token, which goes to each of its experts; or with `sorted_x` [T · top_k, K], a row for each
            pair of token and expert as an earlier call returned them. float64, float32, float16 or bfloat16. Under
            autocast it is cast to weight's dtype: a stack is never copied.
        weight: [E, N, K], of x's dtype and any strides: give a stack [E, K, N] as `weight.mT`. Or a `PackedStack` of 4
            or 8 bits a number, of which plain torch unpacks one expert at a time.
        lora_A: [E, r, K], any r ≥ 1, any strides and float dtype. PEFT's [r · E, K] is `A.view(E, r, K)`.
        lora_B: [E, N, r], likewise. PEFT's [N, r · E] is `B.view(N, r, E).permute(2, 0, 1)`.
        route: from `expert_route`, for these tokens and experts.
        bias: [E, N], of x's dtype.
        scaling: lora_alpha / r, or lora_alpha / √r; a one-element tensor will do.
        dropout_p: the probability, in [0, 1), with which an element of a row does not reach A_e; each of a token's rows
            has a mask of its own.
        training: dropout acts only when True.
        impl: "auto", "torch" or "triton"; a named one never falls back.

    Returns:
        [T · top_k, N], sorted by expert; `combine_experts` gives the tokens' sums.

    Raises:
        ValueError: a shape, scaling or probability is wrong, or the route is not of these tokens and experts.
        TypeError: a dtype is wrong, or an argument is not a tensor.
        BackendError: `impl="triton"` cannot run here.
    """
    x = _cast(x, weight)
    arguments.check_experts(x, weight, lora_A, lora_B, bias)
    arguments.check_route(route, x, weight.shape[0], sorted_x)
    number, lora_B = arguments.number_of(scaling, lora_B)
    arguments.check_probability(dropout_p)
    p = dropout_p if training else 0.0
    return ops.expert_lora_linear(x, weight, lora_A, lora_B, bias, route, sorted_x, number, p, impl)


def expert_plan(
    route: ExpertRoute,
    token_slots: torch.Tensor | Sequence[int],
    slot_ranks: Sequence[int],
    slot_scalings: Sequence[float],
    page_table: torch.Tensor | None = None,
    *,
    num_pages: int | None = None,
    invariant: bool = False,
) -> BatchPlan:
    """Which row of a route uses which adapter of its expert: what `multi_expert_lora_linear` is planned by.

    A plan of E · S slots, expert · S + adapter, of the route's rows, and for this route alone.

    Args:
        route: from `expert_route`.
        token_slots: [T] integers, the adapter of each token, 0 … S - 1, or -1 for the experts as they are.
        slot_ranks, slot_scalings: [S] of the adapters; rank or scaling 0 switches one off.
        page_table: [E · S, R] int32 where the rank rows lie in pages: those of each slot, R at least the largest rank.
        num_pages: the pages' number, with `page_table`.
        invariant: as of `BatchPlan`.

    Raises:
        PlanError: a number or shape does not fit; on a CPU, a token's adapter is not one of the S.
        TypeError: a dtype is wrong, or the route is none.
    """
    if not isinstance(route, ExpertRoute):
        raise TypeError(f"route must be an ExpertRoute, from expert_route; got {type(route).__name__}")
    S, E, P = len(slot_ranks), route.num_experts, route.order.shape[0]
    device = route.order.device
    adapters = torch.as_tensor(token_slots, device=device)
    if adapters.shape != (route.num_tokens,) or adapters.is_floating_point():
        given = f"{arguments.shape_of(adapters)} {adapters.dtype}"
        raise PlanError(f"token_slots is {given}; expected [{route.num_tokens}] integers, as the route has tokens")
    if len(slot_scalings) != S:
        raise PlanError(f"slot_scalings has {len(slot_scalings)} numbers; expected {S}, as slot_ranks has")
    width = max(*slot_ranks, 1) if page_table is None else page_table.shape[-1]
    plan = BatchPlan(E * S, max(P, 1), max_rank=width, num_pages=num_pages, invariant=invariant, device=device)
    if device.type != "cpu" and ops.route_adapters(plan, route, adapters, slot_ranks, slot_scalings, page_table):
        return plan
    unknown = (adapters < BASE) | (adapters >= S)
    ranks, scalings = [*slot_ranks] * E, [*slot_scalings] * E
    if device.type == "cpu":  # by numpy it takes a tenth of the time
        if unknown.any():
            token = int(unknown.to(torch.uint8).argmax())
            raise PlanError(f"token {token} has adapter {int(adapters[token])}; expected -1 or 0 … {S - 1}")
        of_row = adapters.numpy()[route.order.numpy() // route.top_k]
        of_expert = np.repeat(np.arange(E), np.diff(route.starts.numpy()))
        of_row[len(of_expert) :] = BASE  # of experts that the kernels' route does not know
        slots = np.where(of_row == BASE, BASE, np.resize(of_expert, P) * S + of_row)
        table = None if page_table is None else page_table.numpy()
        plan.update_host(slots, None, np.asarray(ranks), np.asarray(scalings, dtype=np.float32), table)
        return plan
    places = torch.arange(P, device=device, dtype=route.starts.dtype)
    experts = torch.searchsorted(route.starts[1:], places, right=True)  # E for what the route does not know
    own = adapters.masked_fill(unknown, BASE).index_select(0, route.order // route.top_k)
    plan.update(torch.where((own == BASE) | (experts == E), BASE, experts * S + own), ranks, scalings, page_table)
    return plan


def multi_expert_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | PackedStack,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    route: ExpertRoute,
    plan: BatchPlan,
    *,
    bias: torch.Tensor | None = None,
    sorted_x: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """`expert_lora_linear` of many adapters: each row with its own token's, of its own expert.

    y = x W_eᵀ + bias_e + scaling_s · (x A_esᵀ) B_esᵀ for a row of expert e and adapter s. A row without an adapter is
    the frozen experts' to the bit. Differentiable once in x, lora_A and lora_B.

    Args:
        x, weight, route, bias, sorted_x: as for `expert_lora_linear`.
        lora_A: [E · S, R, K], slot expert · S + adapter; [pages, K] for a plan with pages. Any strides and float dtype.
        lora_B: [E · S, N, R], or [pages, N].
        plan: from `expert_plan`, of this route.
        impl: "auto", "torch" or "triton"; a named one never falls back.

    Returns:
        [T · top_k, N], sorted by expert; `combine_experts` gives the tokens' sums.

    Raises:
        ValueError: a shape is wrong, or (PlanError) the plan does not fit the route or the adapters.
        TypeError: a dtype is wrong, or an argument is not a tensor.
        BackendError: `impl="triton"` cannot run here.
    """
    x = _cast(x, weight)
    arguments.check_stack(x, weight, bias)
    arguments.check_route(route, x, weight.shape[0], sorted_x)
    arguments.check_plan(plan, "the route", x, route.order.shape)
    if plan.num_slots % weight.shape[0]:
        expected = f"expected E · S of E={weight.shape[0]}, from expert_plan"
        raise PlanError(f"the plan has {plan.num_slots} slots; {expected}")
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(factor, torch.Tensor):
            raise arguments.no_tensor(name, factor)
    arguments.check_adapters("lora_A", [lora_A], plan, "x", x, [weight.shape[2]], is_B=False)
    arguments.check_adapters("lora_B", [lora_B], plan, "x", x, [weight.shape[1]], is_B=True)
    arguments.check_one_rank(lora_A, lora_B, plan)
    return ops.multi_expert_lora_linear(x, weight, lora_A, lora_B, bias, route, plan, sorted_x, impl)


def _cast(x: torch.Tensor, weight: Any) -> torch.Tensor:
    """Under autocast in the dtype of a stack that is a tensor, and in autocast's own for one that is packed."""
    if not arguments.autocasts(x):
        return x
    if isinstance(weight, torch.Tensor):
        return x.to(weight.dtype)
    return x.to(torch.get_autocast_dtype(x.device.type)) if isinstance(weight, PackedStack) else x


def combine_experts(y: torch.Tensor, top_k_weights: torch.Tensor, route: ExpertRoute) -> torch.Tensor:
    """The sum over each token's experts, weighted by the router: bitwise the same on every run.

    Args:
        y: [T · top_k, N], as `expert_lora_linear` returns it.
        top_k_weights: [T, top_k], the router's.
        route: what y was made with.

    Returns:
        [T, N], of the dtype that y and top_k_weights promote to.

    Raises:
        ValueError: a shape is wrong.
        TypeError: an argument is not a tensor of floats.
    """
    arguments.check_matrix("y", y, "[T · top_k, N]")
    arguments.check_matrix("top_k_weights", top_k_weights, "[T, top_k]")
    arguments.check_route(route, y, None, True)
    if tuple(top_k_weights.shape) != (route.num_tokens, route.top_k) or top_k_weights.device != y.device:
        raise ValueError(
            f"top_k_weights is {arguments.shape_of(top_k_weights)} on {top_k_weights.device}; expected "
            f"{[route.num_tokens, route.top_k]} on {y.device}, as the route has"
        )
    return ops.combine_experts(y, top_k_weights, route)
