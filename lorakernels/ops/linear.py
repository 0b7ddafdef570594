"""`lora_linear` as torch sees it: schemas, fakes, autograd, autocast, vmap."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from lorakernels import formula
from lorakernels.backend import resolve_impl
from lorakernels.dropout import drop_threshold, inverse_keep
from lorakernels.eager.dropout import unpack_mask
from lorakernels.eager.product import scaled_linear, sum_rows
from lorakernels.ops.library import (
    as_matrix,
    as_output,
    functorch_is_active,
    implementation,
    is_batched,
    library,
    nothing,
    runs_directly,
    without_autocast,
)
from lorakernels.ops.small_linear import is_small, small_lora_linear
from lorakernels.sharding import draw_seed

library.define(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? row_scale, Tensor? seed, "
    "float scaling, float dropout_p, str impl) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? row_scale, "
    "Tensor s, Tensor mask, float scaling, float dropout_p, bool[] needs, ScalarType? bias_dtype, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _compute(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """y [..., N], and for the backward S and the mask where there are any."""
    if scaling == 0:
        # Switched off: the base layer's own output to the bit, whatever the adapter holds.
        y = scaled_linear(x, weight, bias, row_scale)
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y, None, None  # as in as_output
    if seed is not None:
        seed = seed[:1]  # on sharded tensors there is one a rank
    y, s, mask = implementation(impl, x).forward(
        as_matrix(x), weight, lora_A, lora_B, bias, row_scale, seed, scaling, drop_threshold(dropout_p)
    )
    return as_output(y, x), s, mask


def _forward(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, s, mask = _compute(x, *rest)
    return y, nothing(x) if s is None else s, nothing(x, torch.uint8) if mask is None else mask


def _forward_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    seed: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if scaling == 0:
        return y, nothing(x), nothing(x, torch.uint8)
    on_triton = resolve_impl(impl, x.device, x.dtype) == "triton"
    tokens, K = math.prod(x.shape[:-1]), x.shape[-1]
    s = x.new_empty((tokens, lora_A.shape[0]))
    if drop_threshold(dropout_p) == 0:
        return y, s, nothing(x, torch.uint8)
    return y, s, x.new_empty((tokens, (K + 7) // 8 if on_triton else K), dtype=torch.uint8)


def _gradients(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    row_scale: torch.Tensor | None,
    s: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    needs: list[bool],
    bias_dtype: torch.dtype | None,
    impl: str,
) -> tuple[torch.Tensor | None, ...]:
    """Of x, weight, A, B, bias and the row scale; None for what is not asked for."""
    need_dx, need_dweight, need_dA, need_dB, need_drow_scale = needs
    dy2 = as_matrix(dy)
    x2 = None if x is None else as_matrix(x)
    dx = dA = dB = dbias = drow_scale = None
    if row_scale is not None:
        if need_drow_scale:
            assert x2 is not None
            low_rank = (s, lora_B) if scaling and s is not None else None
            drow_scale = implementation(impl, dy).grad_row_scale(dy2, x2, weight, low_rank, scaling)
            drow_scale = drow_scale.to(row_scale.dtype)
        if bias_dtype is not None:
            dbias = sum_rows(dy2).to(bias_dtype)
            bias_dtype = None
        # The gradient of what is scaled, once, for all the products below.
        dy2 = torch.mul(dy2, row_scale, out=torch.empty_like(dy2))
    if scaling == 0:
        dx = dy2 @ weight if need_dx else None
        dA = torch.zeros_like(lora_A, memory_format=torch.contiguous_format) if need_dA else None
        dB = torch.zeros_like(lora_B, memory_format=torch.contiguous_format) if need_dB else None
        dbias = dbias if bias_dtype is None else sum_rows(dy2).to(bias_dtype)
    else:
        assert s is not None
        dx, dA, dB, summed = implementation(impl, dy).backward(
            dy2,
            x2,
            weight,
            lora_A,
            lora_B,
            s,
            mask if mask is not None and mask.numel() else None,
            scaling,
            drop_threshold(dropout_p),
            need_dx=need_dx,
            need_dA=need_dA,
            need_dB=need_dB,
            bias_dtype=bias_dtype,
        )
        dbias = summed if dbias is None else dbias
    dweight = None
    if need_dweight:
        assert x2 is not None
        dweight = (dy2.t() @ x2).to(weight.dtype)
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    return dx, dweight, dA, dB, dbias, drow_scale


def _backward(dy: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return tuple(nothing(dy) if gradient is None else gradient for gradient in _gradients(dy, *rest))


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    row_scale: torch.Tensor | None,
    s: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    dropout_p: float,
    needs: list[bool],
    bias_dtype: torch.dtype | None,
    impl: str,
) -> tuple[torch.Tensor, ...]:
    need_dx, need_dweight, need_dA, need_dB, need_drow_scale = needs
    return (
        dy.new_empty((*dy.shape[:-1], weight.shape[1])) if need_dx else nothing(dy),
        weight.new_empty(weight.shape) if need_dweight else nothing(dy),
        lora_A.new_empty(lora_A.shape) if need_dA else nothing(dy),
        lora_B.new_empty(lora_B.shape) if need_dB else nothing(dy),
        nothing(dy) if bias_dtype is None else dy.new_empty((weight.shape[0],), dtype=bias_dtype),
        row_scale.new_empty(row_scale.shape) if need_drow_scale and row_scale is not None else nothing(dy),
    )


def _autocast(device_type: str) -> None:
    """Under autocast x, weight and bias take its dtype, as in torch's linear; the kernels cast A and B anyway."""

    def forward(x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any, *rest: Any) -> Any:
        x, weight, bias = autocast_arguments(x, weight, bias, torch.get_autocast_dtype(device_type))
        return torch.ops.lorakernels.lora_linear(x, weight, lora_A, lora_B, bias, *rest)

    without_autocast("lora_linear", device_type, forward)
    without_autocast("lora_linear_backward", device_type)


def autocast_arguments(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What autocast to `dtype` makes of a linear's arguments; float64 is left alone, as torch leaves it."""
    if torch.float64 in (x.dtype, weight.dtype):
        return x, weight, bias
    if not x.is_floating_point():
        return x, weight, bias
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


_autocast("cpu")
_autocast("cuda")
library.impl("lora_linear", _forward, "CompositeExplicitAutograd")
library.impl("lora_linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("lorakernels::lora_linear", _forward_fake, lib=library)
torch.library.register_fake("lorakernels::lora_linear_backward", _backward_fake, lib=library)


class LoRALinearFunction(torch.autograd.Function):
    """(y, S, mask) of `lora_linear`; S and the mask are outputs only so that they can be kept."""

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        bias: torch.Tensor | None,
        row_scale: torch.Tensor | None,
        seed: torch.Tensor | None,
        scaling: float,
        dropout_p: float,
        impl: str,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.ops.lorakernels.lora_linear(
            x, weight, lora_A, lora_B, bias, row_scale, seed, scaling, dropout_p, impl
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        _, s, mask = output
        ctx.mark_non_differentiable(s, mask)
        _keep(ctx, inputs, s, mask)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None, *unused: Any) -> tuple[Any, ...]:
        return _function_backward(ctx, dy, _operator_gradients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, tuple[int | None, ...]]:
        return _vmap(LoRALinearFunction.apply, info, in_dims, inputs)


class _EagerFunction(torch.autograd.Function):
    """y of `lora_linear` for plain eager calls: torch binds the signature of a `forward` beside a `setup_context` anew
    at every call, which took 60 µs of a layer's 110.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        y, s, mask = (_compute if runs_directly(*inputs[:4]) else torch.ops.lorakernels.lora_linear)(*inputs)
        _keep(ctx, inputs, s, mask)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[Any, ...]:
        direct = dy is not None and runs_directly(dy)
        return _function_backward(ctx, dy, _gradients if direct else _operator_gradients)


def _operator_gradients(dy: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    *tensors, s, mask, scaling, dropout_p, needs, bias_dtype, impl = arguments
    s, mask = nothing(dy) if s is None else s, nothing(dy, torch.uint8) if mask is None else mask
    return torch.ops.lorakernels.lora_linear_backward(
        dy, *tensors, s, mask, scaling, dropout_p, needs, bias_dtype, impl
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], s: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    """What the backward needs, into the context of a Function."""
    x, weight, lora_A, lora_B, bias, row_scale, _, ctx.scaling, ctx.dropout_p, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    _, need_weight, need_A, need_B, need_bias, need_row_scale, *_ = ctx.needs_input_grad
    ctx.bias_dtype = bias.dtype if need_bias else None
    # dB needs S alone, until it is differentiated again: torch.func always asks for that.
    need_x = need_weight or need_A or need_row_scale or (need_B and functorch_is_active())
    ctx.save_for_backward(x if need_x else None, weight, lora_A, lora_B, row_scale, s, mask)


def _function_backward(ctx: Any, dy: torch.Tensor | None, gradients: Callable[..., Any]) -> tuple[Any, ...]:
    """The gradients that are needed, in the order of a Function's inputs."""
    if dy is None:
        return (None,) * 10
    x, weight, lora_A, lora_B, row_scale, s, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad[:6]
    *need_tensors, _, need_row_scale = needs
    need_B = need_tensors[3]
    if torch.is_grad_enabled() or (is_batched((dy,)) and not (x is None and need_B)):
        grads = _differentiable_backward(ctx, dy)
        if x is None and need_B:
            raise RuntimeError(
                "the gradient of lora_B cannot be differentiated again: x is not kept when neither lora_A nor "
                "weight needs a gradient; call lora_A.requires_grad_() before the forward"
            )
    else:
        needed = [*need_tensors, need_row_scale]
        numbers = (ctx.scaling, ctx.dropout_p, needed, ctx.bias_dtype, ctx.impl)
        grads = gradients(dy, x, weight, lora_A, lora_B, row_scale, s, mask, *numbers)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None, None)


def _differentiable_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients as plain torch: for gradients of gradients and torch.func, whatever `impl` is."""
    x, weight, lora_A, lora_B, row_scale, _, mask = ctx.saved_tensors
    keep = None
    if mask is not None and mask.numel():
        keep = unpack_mask(mask, weight.shape[1]).to(dy.dtype) * inverse_keep(drop_threshold(ctx.dropout_p))
    dy2, x2 = as_matrix(dy), None if x is None else as_matrix(x)
    dx, *grads = formula.lora_linear_backward(dy2, x2, weight, lora_A, lora_B, ctx.scaling, keep, row_scale)
    assert dx is not None
    return dx.reshape(*dy.shape[:-1], weight.shape[1]), *grads


def _vmap(
    call: Any, info: Any, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]
) -> tuple[Any, tuple[int | None, ...]]:
    """A batched x alone is only more tokens; anything else is a loop over the examples."""
    x, *others = inputs
    seed = others[5]  # flattened tokens would get one mask from it, and equal examples different ones
    if in_dims[0] is not None and seed is None and all(dim is None for dim in in_dims[1:]):
        x = x.movedim(in_dims[0], 0)
        tokens = math.prod(x.shape[1:-1])
        y, *kept = call(x, *others)
        dims = tuple(0 if tensor.dim() == 2 else None for tensor in kept)
        kept = [
            tensor.view(info.batch_size, tokens, tensor.shape[1]) if tensor.dim() == 2 else tensor for tensor in kept
        ]
        return (y, *kept), (0, *dims)
    examples = [
        call(*(value if dim is None else value.select(dim, i) for value, dim in zip(inputs, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(outputs) for outputs in zip(*examples, strict=True)), (0, 0, 0)


def _op_vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, tuple[int | None, ...]]:
    return _vmap(torch.ops.lorakernels.lora_linear, info, in_dims, inputs)


torch.library.register_vmap("lorakernels::lora_linear", _op_vmap, lib=library)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    scaling: float,
    dropout_p: float,
    impl: str,
) -> torch.Tensor:
    """The layer on checked arguments; no autograd.Function when nothing needs a gradient."""
    if dropout_p == 0 and row_scale is None and scaling != 0 and is_small(x, weight, lora_A, lora_B, impl):
        return small_lora_linear(x, weight, lora_A, lora_B, bias, scaling)
    seed = None
    if dropout_p > 0:
        # On x's device, and read there: the host never waits. randint takes part in checkpointing's
        # stash of the generator, so a recomputed forward draws the same mask.
        if hasattr(x, "device_mesh"):
            seed = draw_seed(x)
        else:
            seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    arguments = (x, weight, lora_A, lora_B, bias, row_scale, seed, scaling, dropout_p, impl)
    # In forward mode too.
    functorch = functorch_is_active() or torch.autograd.forward_ad._current_level >= 0
    transformed = functorch or torch.compiler.is_compiling()
    # Under torch.func always: the operator alone would drop the tangents of jvp, where the Function raises.
    if functorch or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:6])):
        return LoRALinearFunction.apply(*arguments)[0] if transformed else _EagerFunction.apply(*arguments)
    return (_compute if runs_directly(x, weight, lora_A, lora_B) else torch.ops.lorakernels.lora_linear)(*arguments)[0]
