"""`lora_linear` and `lora_linear_group` with their gradients: one linear is a group of one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lorakernels import formula
from lorakernels.backend import resolve_impl
from lorakernels.dropout import drop_threshold, inverse_keep
from lorakernels.eager.dropout import unpack_mask
from lorakernels.eager.lora_linear import add_update
from lorakernels.member import Member, columns
from lorakernels.ops.linear_operators import (
    GROUP,
    GROUP_BACKWARD,
    LINEAR,
    LINEAR_BACKWARD,
    Gradients,
    Maybe,
    Tensors,
    by_example,
    by_kind,
    compute,
    gradients,
    members_of,
    taken_apart,
)
from lorakernels.ops.operator import (
    as_matrix,
    as_output,
    functorch_is_active,
    is_batched,
    linear_to_edit,
    one_by_one,
    runs_directly,
)
from lorakernels.ops.sharding import draw_seed
from lorakernels.quant.packed import PackedWeight
from lorakernels.weight import linear

# On a CPU, below this many multiplications M N K, what Python does around torch's own operators costs more than what
# is saved by writing into them: 84 µs a training step where the Function takes 146 (4 × 16 × 16, the frozen layer 25),
# 380 beside 435 at 128 × 256 × 256, 925 beside 793 at 16 × 1024 × 1024.
SMALL = 1 << 24


class _Numbers(NamedTuple):
    scalings: Sequence[float]
    dropout_p: float
    impl: str
    direct: bool  # whether the body runs as a function
    forms: Sequence[str] = ()  # of packed weights, as `weights_of` takes them


# A Function's inputs: x, the seed, the numbers, then every weight, every A, every B, every bias, every row scale, and
# the parts of packed weights.


def _forward(
    x: torch.Tensor, seed: torch.Tensor | None, numbers: _Numbers, flat: Sequence[Any]
) -> tuple[Sequence[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
    """y's, S and the mask; tensors all of them where nothing runs directly."""
    scalings, dropout_p, impl, direct, forms = numbers
    if direct:
        return compute(x, members_of(flat, scalings, forms), seed, drop_threshold(dropout_p), impl)
    n = len(scalings)
    if n > 1 or forms:
        weights, *kinds = by_kind(flat[: 5 * n], n)
        return GROUP.dispatch(x, weights, flat[5 * n :], forms, *kinds, seed, scalings, dropout_p, impl)
    y, s, mask = LINEAR.dispatch(x, *flat, seed, *scalings, dropout_p, impl)
    return (y,), s, mask


class LoRALinearFunction(torch.autograd.Function):
    """(*y's, S, mask); S and the mask are outputs only so that they can be kept."""

    @staticmethod
    def forward(x: torch.Tensor, seed: torch.Tensor | None, numbers: _Numbers, *flat: torch.Tensor | None) -> Any:
        ys, s, mask = _forward(x, seed, numbers, flat)
        return (*ys, s, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        *_, s, mask = output
        ctx.mark_non_differentiable(s, mask)
        _keep(ctx, inputs, s, mask)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[Any, ...]:
        return _backward(ctx, dys[:-2])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        return by_example(LoRALinearFunction.apply, inputs[1], info, in_dims, inputs)


class _EagerFunction(torch.autograd.Function):
    """The y's for plain eager calls: torch binds the signature of a `forward` beside a `setup_context` anew at every
    call, which took 60 µs of a layer's 110.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        x, seed, numbers, *flat = inputs
        ys, s, mask = _forward(x, seed, numbers, flat)
        _keep(ctx, inputs, s, mask)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[Any, ...]:
        return _backward(ctx, dys)


def _keep(ctx: Any, inputs: tuple[Any, ...], s: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    """What the backward needs, into the context of a Function."""
    x, _, ctx.numbers, *flat = inputs
    n, flags = len(ctx.numbers.scalings), ctx.needs_input_grad[3:]
    ctx.set_materialize_grads(False)
    # dB needs S alone, until it is differentiated again: torch.func always asks for that.
    need_x = any(flags[: 2 * n]) or any(flags[4 * n : 5 * n]) or (any(flags[2 * n : 3 * n]) and functorch_is_active())
    ctx.save_for_backward(x if need_x else None, s, mask, *flat[: 3 * n], *[None] * n, *flat[4 * n :])


def _backward(ctx: Any, dys: Maybe) -> tuple[Any, ...]:
    """The gradients that are needed, in the order of a Function's inputs. An output nobody used takes no part."""
    need_dx, _, _, *flags = ctx.needs_input_grad
    n = len(dys)
    used = [i for i, dy in enumerate(dys) if dy is not None]
    if not used:
        return (None,) * len(ctx.needs_input_grad)
    try:
        x, s, mask, *flat = ctx.saved_tensors
    except RuntimeError as error:
        if n == 1 or "second time" not in str(error):
            raise
        raise RuntimeError(
            "layers of one x that are computed together have one backward, and it has run: keep it for another with "
            "retain_graph=True, or compute each layer by itself (group=False in inject and accelerate)"
        ) from error
    scalings, dropout_p, impl, _, forms = ctx.numbers
    given: Any = dys
    members: Any = members_of(flat, scalings, forms)
    parts: Any = columns(s, members)
    needs = [flags[i : 5 * n : n] for i in range(n)]
    if len(used) < n:
        given, members, parts = ([each[i] for i in used] for each in (dys, members, parts))
        needs = [needs[i] for i in used]
    batched = is_batched(given)
    if torch.is_grad_enabled() or batched:
        dx, found = _watched(given, x, members, parts, mask, dropout_p, need_dx, needs, impl, batched)
    else:
        dx, found = _computed(given, x, members, parts, mask, dropout_p, need_dx, needs, impl)
    gradients: list[Any] = [None] * len(flags)
    for i, own in zip(used, found, strict=True):
        gradients[i : 5 * n : n] = own
    return (dx, None, None, *gradients)


def _computed(
    dys: Tensors,
    x: Any,
    members: Sequence[Member],
    s: Maybe,
    mask: Any,
    dropout_p: float,
    need_dx: bool,
    needs: list[list[bool]],
    impl: str,
) -> tuple[Any, Sequence[Gradients]]:
    """dx, and of each member what `needs` asks for."""
    if runs_directly(*dys):
        return gradients(dys, x, members, s, mask, drop_threshold(dropout_p), need_dx, needs, impl)
    tensors, As, Bs, _, row_scales, scalings = zip(*members, strict=True)
    flags = [need_dx, *itertools.chain.from_iterable(zip(*needs, strict=True))]
    rest = (mask, list(scalings), dropout_p, flags, impl)
    found: Sequence[Any]
    weights, packed, forms = taken_apart(tensors)
    if len(dys) == 1 and not forms:
        dx, *own = LINEAR_BACKWARD.dispatch(*dys, x, *weights, *As, *Bs, *row_scales, *s, mask, *scalings, *rest[2:])
        found = [own]
    else:
        kinds = map(list, (As, Bs, row_scales, s))
        dx, *kinds = GROUP_BACKWARD.dispatch(dys, x, weights, packed, forms, *kinds, *rest)
        found = list(zip(*kinds, strict=True))
    # Of what nobody asked for the dispatcher gives an empty tensor.
    return dx if need_dx else None, list(map(_needed, found, needs))


def _needed(found: Sequence[torch.Tensor | None], needs: Sequence[bool]) -> Gradients:
    return [gradient if need else None for gradient, need in zip(found, needs, strict=True)]


def _watched(
    dys: Tensors,
    x: Any,
    members: Sequence[Member],
    s: Maybe,
    mask: Any,
    dropout_p: float,
    need_dx: bool,
    needs: list[list[bool]],
    impl: str,
    batched: bool,
) -> tuple[Any, Sequence[Gradients]]:
    """`_computed` where the gradients may be differentiated again, or are batched by autograd."""
    x_is_missing = x is None and any(need[2] for need in needs)
    if batched and x_is_missing and not torch.is_grad_enabled():

        def flat(*dys: torch.Tensor) -> list[torch.Tensor | None]:
            dx, found = _computed(dys, x, members, s, mask, dropout_p, need_dx, needs, impl)
            return [dx, *itertools.chain.from_iterable(found)]

        dx, *rest = one_by_one(flat, dys)
        return dx, by_kind(rest, 5)
    if x_is_missing:
        raise RuntimeError(
            "the gradient of lora_B cannot be differentiated again: x is not kept when neither lora_A nor weight "
            "needs a gradient; call lora_A.requires_grad_() before the forward"
        )
    dx, found = _differentiable(dys, x, members, mask, dropout_p)
    return dx if need_dx else None, list(map(_needed, found, needs))


def _differentiable(
    dys: Tensors, x: torch.Tensor | None, members: Sequence[Member], mask: torch.Tensor | None, dropout_p: float
) -> tuple[torch.Tensor, list[Sequence[torch.Tensor | None]]]:
    """The gradients as plain torch: for gradients of gradients and torch.func, whatever `impl` is."""
    keep, K = None, members[0].weight.shape[1]
    if not all(isinstance(member.weight, torch.Tensor) for member in members):
        raise RuntimeError(
            "gradients of gradients, and torch.func, need the whole base weight, and a packed one is never made whole; "
            "use a base layer that is not quantised"
        )
    if mask is not None and mask.numel():
        keep = unpack_mask(mask, K).to(dys[0].dtype) * inverse_keep(drop_threshold(dropout_p))
    x2 = None if x is None else as_matrix(x)
    dxs: list[Any] = []
    found: list[Sequence[torch.Tensor | None]] = []
    for dy, (weight, A, B, _, row_scale, scaling) in zip(dys, members, strict=True):
        dx, *own = formula.lora_linear_backward(as_matrix(dy), x2, weight, A, B, scaling, keep, row_scale)
        dxs.append(dx)
        found.append(own)
    return sum(dxs[1:], dxs[0]).reshape(*dys[0].shape[:-1], K), found


def _linears(
    x: torch.Tensor,
    scalings: Sequence[float],
    dropout_p: float,
    impl: str,
    weights: Sequence[Any],
    *others: torch.Tensor | None,
) -> Sequence[torch.Tensor]:
    """The y's; no autograd.Function when nothing needs a gradient."""
    seed, flat = None, (*weights, *others)
    forms: Sequence[str] = ()
    if PackedWeight in map(type, weights):
        tensors, parts, forms = taken_apart(weights)
        flat = (*tensors, *others, *parts)
    if dropout_p > 0:
        # On x's device, and read there: the host never waits. randint takes part in checkpointing's
        # stash of the generator, so a recomputed forward draws the same mask.
        if hasattr(x, "device_mesh"):
            seed = draw_seed(x)
        else:
            seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    direct = runs_directly(x, *flat[: 3 * len(scalings)])  # type: ignore[arg-type]
    # Under torch.func and in forward mode always: the operator alone drops the tangents, where the Function raises.
    transformed = torch.autograd.forward_ad._current_level >= 0 or (not direct and functorch_is_active())
    if transformed or (torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (x, *flat)])):
        if transformed or (not direct and torch.compiler.is_compiling()):
            return LoRALinearFunction.apply(x, seed, _Numbers(scalings, dropout_p, impl, False, forms), *flat)[:-2]
        # Resolved once: the backward's reading of the environment took 2 µs.
        numbers = _Numbers(scalings, dropout_p, resolve_impl(impl, x.device, x.dtype), direct, forms)
        return _EagerFunction.apply(x, seed, numbers, *flat)
    return _forward(x, seed, _Numbers(scalings, dropout_p, impl, direct, forms), flat)[0]


def lora_linear(
    x: torch.Tensor,
    weight: Any,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    impl: str,
) -> torch.Tensor:
    """The layer on checked arguments."""
    if dropout_p == 0 and row_scale is None and scaling != 0 and is_small(x, weight, lora_A, lora_B, impl):
        return small_lora_linear(x, weight, lora_A, lora_B, bias, scaling)
    return _linears(x, [scaling], dropout_p, impl, (weight,), lora_A, lora_B, bias, row_scale)[0]


def frozen_linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + bias [..., N], with x's gradient: a layer that no adapter changes now."""
    if isinstance(weight, torch.Tensor):
        return torch.nn.functional.linear(x, weight, bias)
    N, K = weight.shape
    # An adapter of no rank.
    return _linears(x, [0.0], 0.0, "auto", (weight,), x.new_empty((0, K)), x.new_empty((N, 0)), bias, None)[0]


def lora_linear_group(
    x: torch.Tensor,
    weights: Sequence[Any],
    lora_As: Tensors,
    lora_Bs: Tensors,
    biases: Maybe,
    scalings: list[float],
    dropout_p: float,
    impl: str,
) -> Sequence[torch.Tensor]:
    """The layers on checked arguments."""
    members = list(zip(weights, lora_As, lora_Bs, biases, scalings, strict=True))
    small = not dropout_p and all(is_small(x, W, A, B, impl) for W, A, B, _, _ in members)
    if small or hasattr(x, "device_mesh"):  # no layout of sharded tensors is registered for a group
        return [lora_linear(x, W, A, B, bias, None, c, dropout_p, impl) for W, A, B, bias, c in members]
    none = [None] * len(members)
    return _linears(x, scalings, dropout_p, impl, weights, *lora_As, *lora_Bs, *biases, *none)


def is_small(x: torch.Tensor, weight: Any, lora_A: torch.Tensor, lora_B: torch.Tensor, impl: str) -> bool:
    """Whether torch's own operators compute the layer faster than the Function, and nobody would see a difference."""
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and x.numel() * weight.shape[0] < SMALL
        and lora_A.dtype is lora_B.dtype is x.dtype  # else their casts would be kept for the backward
        and x.dtype is not torch.float16  # whose S is float32
        and runs_directly(x, weight, lora_A, lora_B)
        and torch.autograd.forward_ad._current_level < 0
        and resolve_impl(impl, x.device, x.dtype) == "torch"
    )


def small_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """The layer where `is_small` says so, with a scaling that is not 0 and dtypes that fit."""
    rows = as_matrix(x)
    if torch.is_grad_enabled():
        return as_output(add_update(linear(rows, weight, bias), rows, lora_A, lora_B, scaling), x)
    y = linear_to_edit(x, weight, bias)
    add_update(as_matrix(y), rows, lora_A, lora_B, scaling)
    return y
