"""`lora_linear_group` as torch sees it: schemas, fakes, autograd, autocast, vmap."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from lorakernels import formula
from lorakernels.backend import resolve_impl
from lorakernels.dropout import drop_threshold, inverse_keep
from lorakernels.eager import lora_linear_group as eager_lora_linear_group
from lorakernels.eager.dropout import unpack_mask
from lorakernels.ops import linear
from lorakernels.ops.library import (
    as_matrix,
    as_output,
    functorch_is_active,
    is_batched,
    library,
    nothing,
    runs_directly,
    without_autocast,
)
from lorakernels.ops.small_linear import is_small

Tensors = list[torch.Tensor]
Maybe = list[torch.Tensor | None]

library.define(
    "lora_linear_group(Tensor x, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor?[] biases, Tensor? seed, "
    "float[] scalings, float dropout_p, str impl) -> (Tensor[], Tensor, Tensor)"
)
library.define(
    "lora_linear_group_backward(Tensor[] dys, Tensor? x, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, "
    "Tensor[] s, Tensor mask, float[] scalings, float dropout_p, bool need_dx, bool[] needs, int[] bias_dtypes, "
    "str impl) -> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[])"
)
# A dtype a bias, where the schema has no list of dtypes; 0 where no gradient is asked for.
_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _implementation(impl: str, x: torch.Tensor) -> ModuleType:
    if resolve_impl(impl, x.device, x.dtype) == "torch":
        return eager_lora_linear_group
    from lorakernels.kernels import lora_linear_group as kernels_lora_linear_group

    return kernels_lora_linear_group


def _compute(
    x: torch.Tensor,
    weights: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    biases: Maybe,
    seed: torch.Tensor | None,
    scalings: list[float],
    dropout_p: float,
    impl: str,
) -> tuple[Tensors, torch.Tensor, torch.Tensor | None]:
    """y's [..., N], and for the backward S [M, Σ r] and the mask where there is one."""
    ys, s, mask = _implementation(impl, x).forward(
        as_matrix(x), weights, lora_As, lora_Bs, biases, seed, scalings, drop_threshold(dropout_p)
    )
    return [as_output(y, x) for y in ys], s, mask


def _forward(x: torch.Tensor, *rest: Any) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
    ys, s, mask = _compute(x, *rest)
    return ys, s, nothing(x, torch.uint8) if mask is None else mask


def _forward_fake(
    x: torch.Tensor,
    weights: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    biases: Maybe,
    seed: torch.Tensor | None,
    scalings: list[float],
    dropout_p: float,
    impl: str,
) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
    on_triton = resolve_impl(impl, x.device, x.dtype) == "triton"
    tokens, K = math.prod(x.shape[:-1]), x.shape[-1]
    ys = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    s = x.new_empty((tokens, sum(A.shape[0] for A in lora_As)))
    if drop_threshold(dropout_p) == 0:
        return ys, s, nothing(x, torch.uint8)
    return ys, s, x.new_empty((tokens, (K + 7) // 8 if on_triton else K), dtype=torch.uint8)


def _gradients(
    dys: Tensors,
    x: torch.Tensor | None,
    weights: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    s: Tensors,
    mask: torch.Tensor | None,
    scalings: list[float],
    dropout_p: float,
    need_dx: bool,
    needs: list[bool],
    bias_dtypes: list[int],
    impl: str,
) -> tuple[torch.Tensor | None, Maybe, Maybe, Maybe, Maybe]:
    """dx, and of each member dW, dA, dB and dbias; None for what is not asked for. The dA's are views of one tensor.

    `needs` has a flag for each weight, each A, each B, in this order.
    """
    n = len(dys)
    need_dW, need_dA, need_dB = needs[:n], needs[n : 2 * n], needs[2 * n :]
    matrices = [as_matrix(dy) for dy in dys]
    x2 = None if x is None else as_matrix(x)
    dx, dA, dBs, dbiases = _implementation(impl, dys[0]).backward(
        matrices,
        x2,
        weights,
        lora_As,
        lora_Bs,
        s,
        mask if mask is not None and mask.numel() else None,
        scalings,
        drop_threshold(dropout_p),
        need_dx=need_dx,
        dA_dtype=functools.reduce(torch.promote_types, [A.dtype for A in lora_As]) if any(need_dA) else None,
        need_dB=need_dB,
        bias_dtypes=[_DTYPES[index] for index in bias_dtypes],
    )
    dAs: Maybe = [None] * n
    if dA is not None:
        parts = dA.split([A.shape[0] for A in lora_As])
        dAs = [part.to(A.dtype) if need else None for part, A, need in zip(parts, lora_As, need_dA, strict=True)]
    dWs: Maybe = [None] * n
    if any(need_dW):
        assert x2 is not None
        dWs = [
            (dy.t() @ x2).to(W.dtype) if need else None for dy, W, need in zip(matrices, weights, need_dW, strict=True)
        ]
    if dx is not None and dys[0].dim() != 2:
        dx = dx.view(*dys[0].shape[:-1], weights[0].shape[1])
    return dx, dWs, dAs, dBs, dbiases


def _backward(dys: Tensors, *rest: Any) -> tuple[torch.Tensor, Tensors, Tensors, Tensors, Tensors]:
    like = dys[0]
    dx, dWs, dAs, dBs, dbiases = _gradients(dys, *rest)

    def or_nothing(kind: Maybe) -> Tensors:
        return [nothing(like) if gradient is None else gradient for gradient in kind]

    dAs = [None if dA is None else dA.clone() for dA in dAs]  # an operator's outputs share no memory
    found = [or_nothing(kind) for kind in (dWs, dAs, dBs, dbiases)]
    return nothing(like) if dx is None else dx, *found  # type: ignore[return-value]


def _backward_fake(
    dys: Tensors,
    x: torch.Tensor | None,
    weights: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    s: Tensors,
    mask: torch.Tensor,
    scalings: list[float],
    dropout_p: float,
    need_dx: bool,
    needs: list[bool],
    bias_dtypes: list[int],
    impl: str,
) -> tuple[torch.Tensor, Tensors, Tensors, Tensors, Tensors]:
    like = dys[0]
    factors = [
        tensor.new_empty(tensor.shape) if need else nothing(like)
        for tensor, need in zip((*weights, *lora_As, *lora_Bs), needs, strict=True)
    ]
    dbiases = [
        like.new_empty((weight.shape[0],), dtype=_DTYPES[index]) if index else nothing(like)
        for weight, index in zip(weights, bias_dtypes, strict=True)
    ]
    dx = like.new_empty((*like.shape[:-1], weights[0].shape[1])) if need_dx else nothing(like)
    n = len(dys)
    return dx, factors[:n], factors[n : 2 * n], factors[2 * n :], dbiases


def _autocast(device_type: str) -> None:
    def forward(x: Any, weights: Any, lora_As: Any, lora_Bs: Any, biases: Any, *rest: Any) -> Any:
        x, weights, biases = autocast_group_arguments(x, weights, biases, torch.get_autocast_dtype(device_type))
        return torch.ops.lorakernels.lora_linear_group(x, weights, lora_As, lora_Bs, biases, *rest)

    without_autocast("lora_linear_group", device_type, forward)
    without_autocast("lora_linear_group_backward", device_type)


def autocast_group_arguments(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], dtype: torch.dtype
) -> tuple[torch.Tensor, Tensors, Maybe]:
    """As for `lora_linear`; x is cast once."""
    cast = []
    for W, bias in zip(weights, biases, strict=True):
        x, W, bias = linear.autocast_arguments(x, W, bias, dtype)
        cast.append((W, bias))
    return x, [W for W, _ in cast], [bias for _, bias in cast]


_autocast("cpu")
_autocast("cuda")
library.impl("lora_linear_group", _forward, "CompositeExplicitAutograd")
library.impl("lora_linear_group_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("lorakernels::lora_linear_group", _forward_fake, lib=library)
torch.library.register_fake("lorakernels::lora_linear_group_backward", _backward_fake, lib=library)


class _Group(NamedTuple):
    """A Function's inputs behind x and the seed: numbers, then weights, A's, B's and biases, flat."""

    scalings: list[float]
    dropout_p: float
    impl: str

    def arguments(self, x: Any, seed: Any, flat: Sequence[Any]) -> tuple[Any, ...]:
        """As the operator takes them."""
        return (x, *_fourths(flat), seed, self.scalings, self.dropout_p, self.impl)


def _fourths(flat: Sequence[Any]) -> list[list[Any]]:
    n = len(flat) // 4
    return [list(flat[i * n : (i + 1) * n]) for i in range(4)]


class LoRALinearGroupFunction(torch.autograd.Function):
    """(y's, S, mask) of `lora_linear_group`; S and the mask are outputs only so that they can be kept."""

    @staticmethod
    def forward(x: torch.Tensor, seed: torch.Tensor | None, group: _Group, *flat: torch.Tensor | None) -> Any:
        ys, s, mask = torch.ops.lorakernels.lora_linear_group(*group.arguments(x, seed, flat))
        return (*ys, s, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        *_, s, mask = output
        ctx.mark_non_differentiable(s, mask)
        _keep(ctx, inputs, s, mask)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[Any, ...]:
        return _function_backward(ctx, dys[:-2], _operator_gradients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        """A loop over the examples."""
        dims = [dim if isinstance(value, torch.Tensor) else None for dim, value in zip(in_dims, inputs, strict=True)]
        examples = [
            LoRALinearGroupFunction.apply(
                *(value if dim is None else value.select(dim, i) for value, dim in zip(inputs, dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(outputs) for outputs in zip(*examples, strict=True))
        return stacked, (0,) * len(stacked)


class _EagerFunction(torch.autograd.Function):
    """y's of `lora_linear_group` for plain eager calls, as that of `lora_linear`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        x, seed, group, *flat = inputs
        direct = runs_directly(x, *flat[: 3 * len(flat) // 4])
        ys, s, mask = (_compute if direct else torch.ops.lorakernels.lora_linear_group)(*group.arguments(x, seed, flat))
        _keep(ctx, inputs, s, mask)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor | None) -> tuple[Any, ...]:
        given = [dy for dy in dys if dy is not None]
        direct = bool(given) and runs_directly(given[0], *given[1:])
        return _function_backward(ctx, dys, _gradients if direct else _operator_gradients)


def _operator_gradients(dys: Tensors, *arguments: Any) -> Any:
    *tensors, mask, scalings, dropout_p, need_dx, needs, bias_dtypes, impl = arguments
    mask = nothing(dys[0], torch.uint8) if mask is None else mask
    return torch.ops.lorakernels.lora_linear_group_backward(
        dys, *tensors, mask, scalings, dropout_p, need_dx, needs, bias_dtypes, impl
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], s: torch.Tensor, mask: torch.Tensor | None) -> None:
    """What the backward needs, into the context of a Function."""
    x, _, ctx.group, *flat = inputs
    weights, lora_As, lora_Bs, biases = _fourths(flat)
    ctx.set_materialize_grads(False)
    need_W, need_A, need_B, _ = _fourths(ctx.needs_input_grad[3:])
    ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
    need_x = any(need_W) or any(need_A) or (any(need_B) and functorch_is_active())
    ctx.save_for_backward(x if need_x else None, s, mask, *weights, *lora_As, *lora_Bs)


def _function_backward(ctx: Any, dys: Sequence[torch.Tensor | None], gradients: Callable[..., Any]) -> tuple[Any, ...]:
    """The gradients that are needed, in the order of a Function's inputs. An output nobody used takes no part."""
    need_dx, _, _, *needs_flat = ctx.needs_input_grad
    n = len(dys)
    used = [i for i, dy in enumerate(dys) if dy is not None]
    grads: list[torch.Tensor | None] = [None] * (4 * n)
    if not used:
        return (None, None, None, *grads)
    try:
        x, s, mask, *flat = ctx.saved_tensors
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise RuntimeError(
            "layers of one x that are computed together have one backward, and it has run: keep it for another with "
            "retain_graph=True, or compute each layer by itself (group=False in inject and accelerate)"
        ) from error
    weights, lora_As, lora_Bs = (flat[i * n : (i + 1) * n] for i in range(3))
    of_used = [k * n + i for k in range(4) for i in used]
    needs = [needs_flat[j] for j in of_used]
    parts = s.split([A.shape[0] for A in lora_As], dim=1)
    tensors = [[kind[i] for i in used] for kind in (weights, lora_As, lora_Bs, parts)]
    scalings = [ctx.group.scalings[i] for i in used]
    given = [dy for dy in dys if dy is not None]
    needs_x = x is None and any(needs[2 * len(used) : 3 * len(used)])
    if torch.is_grad_enabled() or (is_batched(given) and not needs_x):
        *factors, _ = tensors
        dx, *kinds = _differentiable_backward(ctx, given, x, factors, mask, scalings)
        if needs_x:
            raise RuntimeError(
                "the gradient of lora_Bs cannot be differentiated again: x is not kept when neither lora_As nor "
                "weights need a gradient; call requires_grad_() of a lora_A before the forward"
            )
    else:
        dtypes = [ctx.bias_dtypes[i] if needs_flat[3 * n + i] else None for i in used]
        numbers = (scalings, ctx.group.dropout_p, need_dx, needs[: 3 * len(used)], list(map(_DTYPES.index, dtypes)))
        dx, *kinds = gradients(given, x, *tensors, mask, *numbers, ctx.group.impl)
    found = [grad for kind in kinds for grad in kind]
    for j, grad, need in zip(of_used, found, needs, strict=True):
        grads[j] = grad if need else None
    return (dx if need_dx else None, None, None, *grads)


def _differentiable_backward(
    ctx: Any,
    dys: Tensors,
    x: torch.Tensor | None,
    factors: list[Tensors],
    mask: torch.Tensor | None,
    scalings: list[float],
) -> list[Any]:
    """The gradients as plain torch: for gradients of gradients and torch.func, whatever `impl` is."""
    keep = None
    if mask is not None and mask.numel():
        keep = unpack_mask(mask, factors[0][0].shape[1]).to(dys[0].dtype)
        keep = keep * inverse_keep(drop_threshold(ctx.group.dropout_p))
    x2 = None if x is None else as_matrix(x)
    members = [
        formula.lora_linear_backward(as_matrix(dy), x2, W, A, B, scaling, keep)
        for dy, W, A, B, scaling in zip(dys, *factors, scalings, strict=True)
    ]
    dxs, dWs, dAs, dBs, dbiases, _ = zip(*members, strict=True)
    dx = sum(dxs[1:], dxs[0]).reshape(*dys[0].shape[:-1], factors[0][0].shape[1])
    return [dx, dWs, dAs, dBs, dbiases]


def lora_linear_group(
    x: torch.Tensor,
    weights: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    biases: Maybe,
    scalings: list[float],
    dropout_p: float,
    impl: str,
) -> Tensors:
    """The layers on checked arguments; no autograd.Function when nothing needs a gradient."""
    members = list(zip(weights, lora_As, lora_Bs, biases, scalings, strict=True))
    small = not dropout_p and all(is_small(x, W, A, B, impl) for W, A, B, _, _ in members)
    if small or hasattr(x, "device_mesh"):  # no layout of sharded tensors is registered for a group
        return [linear.lora_linear(x, W, A, B, bias, None, c, dropout_p, impl) for W, A, B, bias, c in members]
    seed = None
    if dropout_p > 0:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    group, flat = _Group(scalings, dropout_p, impl), (*weights, *lora_As, *lora_Bs, *biases)
    functorch = functorch_is_active() or torch.autograd.forward_ad._current_level >= 0
    if functorch or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *flat))):
        if functorch or torch.compiler.is_compiling():
            return list(LoRALinearGroupFunction.apply(x, seed, group, *flat)[:-2])
        return list(_EagerFunction.apply(x, seed, group, *flat))
    direct = runs_directly(x, *weights, *lora_As, *lora_Bs)
    ys, _, _ = (_compute if direct else torch.ops.lorakernels.lora_linear_group)(*group.arguments(x, seed, flat))
    return ys
