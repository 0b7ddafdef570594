"""The operators of `lora_linear` and `lora_linear_group`: one linear is a group of one.

Each has an operator forward and one backward, with one body for any number of members. That of one tensor has a schema
of its own: DTensor shards no results that come as a list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from lorakernels.backend import resolve_impl
from lorakernels.dropout import drop_threshold
from lorakernels.member import Member, cast, sum_rows
from lorakernels.ops.flops import (
    lora_linear_backward_flops,
    lora_linear_flops,
    lora_linear_group_backward_flops,
    lora_linear_group_flops,
)
from lorakernels.ops.operator import (
    Operator,
    as_matrix,
    as_output,
    implementation,
)
from lorakernels.weight import scaled_linear, sum_products

Tensors = Sequence[torch.Tensor]
Maybe = Sequence[torch.Tensor | None]


def _compute(
    x: torch.Tensor,
    weights: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    biases: Maybe,
    row_scales: Maybe,
    seed: torch.Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
    impl: str,
) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
    """y's [..., N], and for the backward S [M, Σ r] and the mask where there are any."""
    if not any(scalings):
        # The base layers' own output to the bit, whatever the adapters hold.
        ys = map(scaled_linear, [x] * len(weights), weights, biases, row_scales)
        return [torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y for y in ys], None, None  # as_output
    if seed is not None:
        seed = seed[:1]  # on sharded tensors there is one a rank
    members = list(map(Member, weights, lora_As, lora_Bs, biases, row_scales, scalings))
    ys, s, mask = implementation(impl, x).forward(as_matrix(x), members, seed, drop_threshold(dropout_p))
    return ys if x.dim() == 2 else [as_output(y, x) for y in ys], s, mask


def _compute_fake(
    x: torch.Tensor,
    weights: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    biases: Maybe,
    row_scales: Maybe,
    seed: torch.Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
    impl: str,
) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
    ys = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    if all(scaling == 0 for scaling in scalings):  # `any` knows no symbolic number
        return ys, None, None
    on_triton = resolve_impl(impl, x.device, x.dtype) == "triton"
    tokens, K = math.prod(x.shape[:-1]), x.shape[-1]
    s = x.new_empty((tokens, sum([A.shape[0] for A in lora_As])))
    if drop_threshold(dropout_p) == 0:
        return ys, s, None
    return ys, s, x.new_empty((tokens, (K + 7) // 8 if on_triton else K), dtype=torch.uint8)


def _gradients(
    dys: Tensors,
    x: Any,
    weights: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    row_scales: Maybe,
    s: Tensors,
    mask: torch.Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Any, ...]:
    """dx, and lists of dW, dA, dB, dbias and drow_scale; None for what is not asked for. dA's are views of one tensor.

    `needs` has a flag for x, then for each weight, each A, each B, each bias, each row scale. `s` is each member's.
    """
    need_dx, *flags = needs
    need_dW, need_dA, need_dB, need_dbias, need_drow_scale = by_kind(flags)
    n, body = len(dys), implementation(impl, dys[0])
    rows: list[torch.Tensor] = list(map(as_matrix, dys))
    x2: Any = None if x is None else as_matrix(x)
    none: Any = [None] * n
    dWs: Any = none
    drow_scales: Any = none.copy()
    apart: dict[int, torch.Tensor] = {}  # gradients of biases
    for i, row_scale in enumerate(row_scales):
        if row_scale is None:
            continue
        if need_drow_scale[i]:
            low_rank = (s[i], lora_Bs[i]) if scalings[i] else None
            drow_scales[i] = body.grad_row_scale(rows[i], x2, weights[i], low_rank, scalings[i]).to(row_scale.dtype)
        if need_dbias[i]:
            apart[i], need_dbias[i] = sum_rows(rows[i]).to(dys[i].dtype), False
        # The gradient of what is scaled, once, for all the products below.
        rows[i] = torch.mul(rows[i], row_scale, out=torch.empty_like(rows[i]))
    if any(scalings):
        members = list(map(Member, weights, lora_As, lora_Bs, none, none, scalings))
        dx, dA, dBs, dbiases = body.backward(
            rows, x2, members, s, mask if mask is not None and mask.numel() else None, drop_threshold(dropout_p),
            need_dx=need_dx, need_dA=any(need_dA), need_dB=need_dB, need_dbias=need_dbias,
        )  # fmt: skip
        dAs: list[torch.Tensor | None] = none
        if dA is not None:
            parts = [dA] if n == 1 else dA.split([A.shape[0] for A in lora_As])
            dAs = [cast(part, A.dtype) if need else None for part, A, need in zip(parts, lora_As, need_dA, strict=True)]
    else:
        dx = sum_products(rows, [weight.t() for weight in weights]) if need_dx else None
        dAs, dBs = _zeros(lora_As, need_dA), _zeros(lora_Bs, need_dB)
        dbiases = [sum_rows(dy).to(dy.dtype) if need else None for dy, need in zip(rows, need_dbias, strict=True)]
    for i, dbias in apart.items():
        dbiases[i] = dbias
    if any(need_dW):
        dWs = [cast(dy.t() @ x2, W.dtype) if need else None for dy, W, need in zip(rows, weights, need_dW, strict=True)]
    if dx is not None and dys[0].dim() != 2:
        dx = dx.view(*dys[0].shape[:-1], weights[0].shape[1])
    return dx, dWs, dAs, dBs, dbiases, drow_scales


def _gradients_fake(
    dys: Tensors,
    x: torch.Tensor | None,
    weights: Tensors,
    lora_As: Tensors,
    lora_Bs: Tensors,
    row_scales: Maybe,
    s: Tensors,
    mask: torch.Tensor | None,
    scalings: Sequence[float],
    dropout_p: float,
    needs: Sequence[bool],
    impl: str,
) -> tuple[Any, ...]:
    need_dx, *flags = needs
    dx = dys[0].new_empty((*dys[0].shape[:-1], weights[0].shape[1])) if need_dx else None
    biases = [dy.new_empty(dy.shape[-1:]) for dy in dys]
    tensors: tuple[Sequence[Any], ...] = (weights, lora_As, lora_Bs, biases, row_scales)
    kinds = zip(tensors, by_kind(flags), strict=True)
    return dx, *([t.new_empty(t.shape) if need else None for t, need in zip(*kind, strict=True)] for kind in kinds)


def by_kind(flat: Sequence[Any], kinds: int = 5) -> list[list[Any]]:
    """What there is of each member, a list a kind: weights, lora_As, lora_Bs, biases, row_scales."""
    n = len(flat) // kinds
    return [[each] for each in flat] if n == 1 else [list(flat[i : i + n]) for i in range(0, len(flat), n)]


def _zeros(parameters: Tensors, needs: Sequence[bool]) -> list[torch.Tensor | None]:
    contiguous = torch.contiguous_format
    return [
        torch.zeros_like(p, memory_format=contiguous) if n else None for p, n in zip(parameters, needs, strict=True)
    ]


def _one(
    compute: Any, x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any, row_scale: Any, seed: Any, scaling: Any,
    *rest: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """A group of one, without the lists."""
    [y], s, mask = compute(x, [weight], [lora_A], [lora_B], [bias], [row_scale], seed, [scaling], *rest)
    return y, s, mask


def _one_backward(
    gradients: Any, dy: Any, x: Any, weight: Any, lora_A: Any, lora_B: Any, row_scale: Any, s: Any, mask: Any,
    scaling: Any, *rest: Any,
) -> tuple[Any, ...]:  # fmt: skip
    dx, *kinds = gradients([dy], x, [weight], [lora_A], [lora_B], [row_scale], [s], mask, [scaling], *rest)
    return dx, *[kind[0] for kind in kinds]


def _own_memory(*arguments: Any) -> tuple[Any, ...]:
    """`_gradients` as an operator's results have to be, which share no memory."""
    dx, dWs, dAs, *rest = _gradients(*arguments)
    return dx, dWs, [None if dA is None else dA.clone() for dA in dAs], *rest


def autocast_arguments(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What autocast to `dtype` makes of a linear's arguments, as torch's; float64 is left alone, as torch leaves it.

    The kernels cast A and B anyway.
    """
    if torch.float64 in (x.dtype, weight.dtype) or not x.is_floating_point():
        return x, weight, bias
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _cast(dtype: torch.dtype, x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any, *rest: Any) -> tuple[Any, ...]:
    x, weight, bias = autocast_arguments(x, weight, bias, dtype)
    return x, weight, lora_A, lora_B, bias, *rest


def _cast_group(
    dtype: torch.dtype, x: Any, weights: Any, lora_As: Any, lora_Bs: Any, biases: Any, *rest: Any
) -> tuple[Any, ...]:
    cast = [autocast_arguments(x, W, bias, dtype) for W, bias in zip(weights, biases, strict=True)]
    return cast[0][0], [W for _, W, _ in cast], lora_As, lora_Bs, [bias for *_, bias in cast], *rest


def by_example(
    call: Any, seed: Any, info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A batched x alone is only more tokens; anything else is a loop over the examples."""
    dims = [dim if isinstance(value, torch.Tensor) else None for dim, value in zip(in_dims, inputs, strict=True)]
    # Flattened tokens would get one mask from the seed, and equal examples different ones.
    if dims[0] is not None and seed is None and all(dim is None for dim in dims[1:]):
        x = inputs[0].movedim(dims[0], 0)
        tokens = math.prod(x.shape[1:-1])
        *ys, s, mask = call(x, *inputs[1:])
        kept = [t.view(info.batch_size, tokens, t.shape[1]) if t.dim() == 2 else t for t in (s, mask)]
        return (*ys, *kept), (*[0] * len(ys), *[0 if t.dim() == 3 else None for t in kept])
    examples = [
        call(*(value if dim is None else value.select(dim, i) for value, dim in zip(inputs, dims, strict=True)))
        for i in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(outputs) for outputs in zip(*examples, strict=True))
    return stacked, (0,) * len(stacked)


LINEAR: Operator = Operator(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? row_scale, Tensor? seed, "
    "float scaling, float dropout_p, str impl) -> (Tensor, Tensor, Tensor)",
    partial(_one, _compute),
    partial(_one, _compute_fake),
    flops=lora_linear_flops,
    cast=_cast,
    vmap=lambda info, in_dims, *inputs: by_example(LINEAR.dispatch, inputs[6], info, in_dims, inputs),
)
LINEAR_BACKWARD = Operator(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? row_scale, "
    "Tensor? s, Tensor? mask, float scaling, float dropout_p, bool[] needs, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    partial(_one_backward, _gradients),
    partial(_one_backward, _gradients_fake),
    flops=lora_linear_backward_flops,
)
GROUP = Operator(
    "lora_linear_group(Tensor x, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, Tensor?[] biases, "
    "Tensor?[] row_scales, Tensor? seed, float[] scalings, float dropout_p, str impl) -> (Tensor[], Tensor, Tensor)",
    _compute,
    _compute_fake,
    flops=lora_linear_group_flops,
    cast=_cast_group,
)
GROUP_BACKWARD = Operator(
    "lora_linear_group_backward(Tensor[] dys, Tensor? x, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, "
    "Tensor?[] row_scales, Tensor[] s, Tensor? mask, float[] scalings, float dropout_p, bool[] needs, str impl) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])",
    _gradients,
    _gradients_fake,
    flops=lora_linear_group_backward_flops,
    registered=_own_memory,
)
