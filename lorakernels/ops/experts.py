"""LoRA on a stack of experts as torch sees it: the route, the linear and its gradients, and the sum over a token's
experts."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from lorakernels.backend import BackendError, resolve_impl
from lorakernels.dropout import drop_threshold
from lorakernels.eager import experts as eager_experts
from lorakernels.low_rank import low_rank_dtype, rank_room
from lorakernels.ops.flops import expert_lora_linear_backward_flops, expert_lora_linear_flops
from lorakernels.ops.operator import Operator, functorch_is_active, is_batched, one_by_one
from lorakernels.quant.stacks import PackedStack, stack_of
from lorakernels.route import ExpertRoute, expert_plan_size


def _implementation(impl: str, device: torch.device, dtype: torch.dtype = torch.float32) -> ModuleType:
    if resolve_impl(impl, device, dtype) == "torch":
        return eager_experts
    from lorakernels.kernels import experts as kernels_experts

    return kernels_experts


def _route(top_k_index: torch.Tensor, num_experts: int, impl: str) -> tuple[torch.Tensor | None, ...]:
    """order, inverse, starts, and the kernels' plan if they will run."""
    return _implementation(impl, top_k_index.device).route(top_k_index, num_experts)


def _route_fake(top_k_index: torch.Tensor, num_experts: int, impl: str) -> tuple[torch.Tensor | None, ...]:
    pairs = top_k_index.numel()
    order, inverse = (top_k_index.new_empty((pairs,), dtype=torch.int64) for _ in range(2))
    starts, plan = top_k_index.new_empty((num_experts + 1,), dtype=torch.int32), None
    if resolve_impl(impl, top_k_index.device, torch.float32) == "triton":
        plan = top_k_index.new_empty((expert_plan_size(num_experts, pairs),), dtype=torch.int32)
    return order, inverse, starts, plan


ROUTE = Operator(
    "expert_route(Tensor top_k_index, int num_experts, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    _route,
    _route_fake,
    reads=True,
)


def expert_route(top_k_index: torch.Tensor, num_experts: int, impl: str) -> ExpertRoute:
    order, inverse, starts, plan = ROUTE((top_k_index,), top_k_index, num_experts, impl)
    return ExpertRoute(order, inverse, starts, _or_none(plan), top_k_index.shape[1])


def _or_none(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Of what nobody asked for the dispatcher gives an empty tensor."""
    return tensor if tensor is not None and tensor.numel() else None


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    order: torch.Tensor,
    inverse: torch.Tensor,
    starts: torch.Tensor,
    plan: torch.Tensor | None,
    top_k: int,
    sorted_x: bool,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    impl: str,
    parts: Sequence[torch.Tensor | None],
    form: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y, and for the backward S and the mask. `parts` and `form` are those of a packed stack."""
    weight = stack_of(weight, parts, form)
    where = ExpertRoute(order, inverse, starts, plan, top_k)
    rows, threshold = x if sorted_x else where.take(x), drop_threshold(dropout_p)
    return _implementation(impl, x.device, x.dtype).forward(
        rows, weight, lora_A, lora_B, bias, where, seed, threshold, scaling
    )


def _forward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    order: torch.Tensor,
    inverse: torch.Tensor,
    starts: torch.Tensor,
    plan: torch.Tensor | None,
    top_k: int,
    sorted_x: bool,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    impl: str,
    parts: Sequence[torch.Tensor | None],
    form: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    P, (_, N, K) = order.shape[0], stack_of(weight, parts, form).shape
    s = x.new_empty((P, lora_A.shape[1]), dtype=low_rank_dtype(x.dtype))
    on_triton = resolve_impl(impl, x.device, x.dtype) == "triton"
    mask = x.new_empty((P, (K + 7) // 8 if on_triton else K), dtype=torch.uint8) if drop_threshold(dropout_p) else None
    return x.new_empty((P, N)), s, mask


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    starts: torch.Tensor,
    plan: torch.Tensor | None,
    top_k: int,
    sorted_x: bool,
    s: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: list[bool],
    impl: str,
    parts: Sequence[torch.Tensor | None],
    form: str,
) -> tuple[torch.Tensor | None, ...]:
    """dx, dW, dA, dBᵀ and dbias; None for what is not asked for."""
    weight = stack_of(weight, parts, form)
    where = ExpertRoute(order, inverse, starts, plan, top_k)
    need_dx, need_dW, need_dA, need_dB, need_dbias = needs
    rows = x if x is None or sorted_x else where.take(x)
    dx, dA, dB = _implementation(impl, dy.device, dy.dtype).backward(
        dy, rows, weight, lora_A, lora_B, where, s, _or_none(mask),
        drop_threshold(dropout_p), scaling, need_dx=need_dx, need_dA=need_dA, need_dB=need_dB,
    )  # fmt: skip
    dW = dbias = None
    if need_dW or need_dbias:  # which reads the route on the host
        dW, dbias = eager_experts.grad_base(dy, rows if need_dW else None, where, need_dbias)
    if dx is not None and not sorted_x:
        dx = where.by_token(dx).sum(1)
    return dx, dW, dA, dB, dbias


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
    starts: torch.Tensor,
    plan: torch.Tensor | None,
    top_k: int,
    sorted_x: bool,
    s: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: list[bool],
    impl: str,
    parts: Sequence[torch.Tensor | None],
    form: str,
) -> tuple[torch.Tensor | None, ...]:
    E, N, K = stack_of(weight, parts, form).shape
    need_dx, need_dW, need_dA, need_dB, need_dbias = needs
    return (
        dy.new_empty((order.shape[0] // (1 if sorted_x else top_k), K)) if need_dx else None,
        dy.new_empty((E, N, K)) if need_dW else None,
        rank_room(lora_A, lora_A.dtype) if need_dA else None,
        rank_room(lora_B.mT, lora_B.dtype) if need_dB else None,
        dy.new_empty((E, N)) if need_dbias else None,
    )


LINEAR = Operator(
    "expert_lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor order, "
    "Tensor inverse, Tensor starts, Tensor? plan, int top_k, bool sorted_x, Tensor? seed, float scaling, "
    "float dropout_p, str impl, Tensor?[] parts, str form) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    flops=expert_lora_linear_flops,
    # A stack is never cast; that of a packed one's numbers are none of x's.
    cast=lambda dtype, x, weight, *rest: (x.to(weight.dtype if weight.is_floating_point() else dtype), weight, *rest),
    reads=True,
)
LINEAR_BACKWARD = Operator(
    "expert_lora_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor order, "
    "Tensor inverse, Tensor starts, Tensor? plan, int top_k, bool sorted_x, Tensor? s, Tensor? mask, float scaling, "
    "float dropout_p, bool[] needs, str impl, Tensor?[] parts, str form) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    flops=expert_lora_linear_backward_flops,
    reads=True,
)


class _ExpertLoRALinear(torch.autograd.Function):
    """(y, S, mask); S and the mask are outputs only so that they can be kept.

    The route is kept as saved tensors: a forward that checkpointing makes again may route otherwise.
    """

    @staticmethod
    def forward(*inputs: Any) -> Any:
        *arguments, form = inputs[:16]
        return LINEAR(inputs[:4], *arguments, list(inputs[16:]), form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, A, B, _, order, inverse, starts, plan, *numbers = inputs[:16]
        ctx.top_k, ctx.sorted_x, _, ctx.scaling, ctx.dropout_p, ctx.impl, ctx.form = numbers
        _, s, mask = output
        ctx.mark_non_differentiable(*(t for t in (s, mask) if t is not None))
        ctx.set_materialize_grads(False)
        need_x = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(x if need_x else None, weight, A, B, order, inverse, starts, plan, s, mask, *inputs[16:])

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[Any, ...]:
        dy = dys[0]
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            raise RuntimeError("expert_lora_linear cannot be differentiated twice: use lora_linear for one expert")
        if is_batched((dy,)):
            return tuple(one_by_one(lambda dy: _ExpertLoRALinear.backward(ctx, dy), (dy,)))
        x, weight, A, B, order, inverse, starts, plan, s, mask, *parts = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        found = LINEAR_BACKWARD(
            (dy, weight, A, B), dy, x, weight, A, B, order, inverse, starts, plan, ctx.top_k, ctx.sorted_x, s, mask,
            ctx.scaling, ctx.dropout_p, needs, ctx.impl, parts, ctx.form,
        )  # fmt: skip
        dx, dW, dA, dB, dbias = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
        return (dx, dW, dA, None if dB is None else dB.mT, dbias, *[None] * (len(ctx.needs_input_grad) - 5))


def expert_lora_linear(
    x: torch.Tensor,
    weight: Any,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    where: ExpertRoute,
    sorted_x: bool,
    scaling: float,
    dropout_p: float,
    impl: str,
) -> torch.Tensor:
    """y [P, N] of checked arguments."""
    parts: tuple[torch.Tensor | None, ...] = ()
    form = ""
    if isinstance(weight, PackedStack):
        impl = _impl_of_packed(weight, impl, x)
        form, parts, weight = weight.text, weight.weight.parts, weight.weight.data
    seed = None
    if dropout_p > 0:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    inputs = (
        x, weight, lora_A, lora_B, bias, where.order, where.inverse, where.starts, where.plan, where.top_k,
        sorted_x, seed, scaling, dropout_p, impl,
    )  # fmt: skip
    # Under a transform of torch.func the operator alone would lose the tangents, where the Function raises.
    transformed = torch.autograd.forward_ad._current_level >= 0 or functorch_is_active()
    if transformed or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:5])):
        return _ExpertLoRALinear.apply(*inputs, form, *parts)[0]
    return LINEAR(inputs[:4], *inputs, list(parts), form)[0]


def _impl_of_packed(stack: PackedStack, impl: str, x: torch.Tensor) -> str:
    if resolve_impl(impl, x.device, x.dtype) == "torch":
        return "torch"
    from lorakernels.kernels.packed import fits_kernel

    if fits_kernel(stack.weight):
        return "triton"
    if impl == "triton":
        raise BackendError(
            f"impl='triton' has no kernel for a stack that is packed so ({stack.text}); expected 'auto' or 'torch', "
            "which unpack one expert at a time"
        )
    return "torch"


def frozen_experts(
    x: torch.Tensor, weight: Any, bias: torch.Tensor | None, where: ExpertRoute, sorted_x: bool, impl: str
) -> torch.Tensor:
    """x W_eᵀ + bias_e: experts that no adapter changes."""
    E, N, K = weight.shape
    A, B = x.new_empty((E, 0, K)), x.new_empty((E, N, 0))
    return expert_lora_linear(x, weight, A, B, bias, where, sorted_x, 1.0, 0.0, impl)


class _Combine(torch.autograd.Function):
    """Σ over the experts of each token, without atomics: its rows are brought together."""

    @staticmethod
    def forward(y: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        by_token = y.index_select(0, inverse).unflatten(0, weights.shape)
        dtype = torch.promote_types(y.dtype, weights.dtype)
        return torch.bmm(weights.to(dtype).unsqueeze(1), by_token.to(dtype)).squeeze(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        y, *rest = inputs
        ctx.y_dtype = y.dtype
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, *rest)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [d_sum], (y, weights, order, inverse) = dys, ctx.saved_tensors
        dy = d_weights = None
        if ctx.needs_input_grad[0]:
            places = order // weights.shape[1]
            by_place = weights.reshape(-1).index_select(0, order).unsqueeze(-1)
            dy = d_sum.index_select(0, places).mul_(by_place).to(ctx.y_dtype)
        if ctx.needs_input_grad[1]:
            by_token = y.index_select(0, inverse).unflatten(0, weights.shape)
            d_weights = torch.bmm(by_token.to(d_sum.dtype), d_sum.unsqueeze(-1)).squeeze(-1).to(weights.dtype)
        return dy, d_weights, None, None


def combine_experts(y: torch.Tensor, weights: torch.Tensor, where: ExpertRoute) -> torch.Tensor:
    """[tokens, N] = Σ over a token's experts of weight · y, of y [P, N] and weights [tokens, top_k]."""
    return _Combine.apply(y, weights, where.order, where.inverse)
