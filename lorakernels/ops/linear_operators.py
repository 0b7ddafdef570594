"""The operators of `lora_linear` and `lora_linear_group`: one linear is a group of one.

Each has an operator forward and one backward, with one body for any number of members. That of one tensor has a schema
of its own: DTensor shards no results that come as a list.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch

from lorakernels.backend import resolve_impl
from lorakernels.dropout import drop_threshold
from lorakernels.low_rank import low_rank_dtype
from lorakernels.member import Member, cast, columns, sum_rows
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
from lorakernels.quant.packed import PackedWeight
from lorakernels.weight import scaled_linear, sum_products

Tensors = Sequence[torch.Tensor]
Maybe = Sequence[torch.Tensor | None]
Gradients = list[torch.Tensor | None]  # dW, dA, dB, dbias, drow_scale of one member; None for what is not asked for


def compute(
    x: torch.Tensor, members: Sequence[Member], seed: torch.Tensor | None, threshold: int, impl: str
) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
    """y's [..., N], and for the backward S [M, Σ r] and the mask where there are any."""
    if not any([member.scaling for member in members]):
        # The base layers' own output to the bit, whatever the adapters hold.
        ys = [scaled_linear(x, member.weight, member.bias, member.row_scale) for member in members]
        return [torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y for y in ys], None, None  # as_output
    if seed is not None:
        seed = seed[:1]  # on sharded tensors there is one a rank
    ys, s, mask = implementation(impl, x).forward(as_matrix(x), members, seed, threshold)
    return ys if x.dim() == 2 else [as_output(y, x) for y in ys], s, mask


def _compute_fake(
    x: torch.Tensor, members: Sequence[Member], seed: torch.Tensor | None, threshold: int, impl: str
) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
    ys = [x.new_empty((*x.shape[:-1], member.weight.shape[0])) for member in members]
    if all(member.scaling == 0 for member in members):  # `any` knows no symbolic number
        return ys, None, None
    on_triton = resolve_impl(impl, x.device, x.dtype) == "triton"
    tokens, K = math.prod(x.shape[:-1]), x.shape[-1]
    r = sum([member.lora_A.shape[0] for member in members])
    s = x.new_empty((tokens, r), dtype=low_rank_dtype(x.dtype))
    if threshold == 0:
        return ys, s, None
    return ys, s, x.new_empty((tokens, (K + 7) // 8 if on_triton else K), dtype=torch.uint8)


def gradients(
    dys: Tensors,
    x: torch.Tensor | None,
    members: Sequence[Member],
    s: Maybe,
    mask: torch.Tensor | None,
    threshold: int,
    need_dx: bool,
    needs: Sequence[Sequence[bool]],
    impl: str,
) -> tuple[torch.Tensor | None, list[Gradients]]:
    """dx, and what `needs` asks for of each member; dA's are views of one tensor. `s` has each member's."""
    body = implementation(impl, dys[0])
    x2: Any = None if x is None else as_matrix(x)
    rows: list[torch.Tensor] = [as_matrix(dy) for dy in dys]
    need_dbias = [need[3] for need in needs]
    scaled: list[tuple[Any, Any]] = [(None, None)] * len(rows)
    for i, (member, need) in enumerate(zip(members, needs, strict=True)):
        if member.row_scale is not None:
            rows[i], scaled[i] = _through_row_scale(body, rows[i], x2, member, s[i], need)
            need_dbias[i] = False
    if any([member.scaling for member in members]):
        dx, dA, dBs, dbiases = body.backward(
            rows, x2, members, s, mask if mask is not None and mask.numel() else None, threshold,
            need_dx=need_dx, need_dA=any([need[1] for need in needs]), need_dB=[need[2] for need in needs],
            need_dbias=need_dbias,
        )  # fmt: skip
        dAs: Any = columns(dA, members, dim=0) if dA is not None else [None] * len(rows)
    else:
        dx = sum_products(rows, [member.weight.t() for member in members]) if need_dx else None
        dAs, dBs = ([_zeros(factor) for factor in factors] for factors in list(zip(*members, strict=True))[1:3])
        dbiases = [sum_rows(dy).to(dy.dtype) if dbias else None for dy, dbias in zip(rows, need_dbias, strict=True)]
    found: list[Gradients] = []
    for dy, member, need, dA, dB, dbias, (own_dbias, drow_scale) in zip(
        rows, members, needs, dAs, dBs, dbiases, scaled, strict=True
    ):
        dW = cast(dy.t() @ x2, member.weight.dtype) if need[0] else None
        dA = cast(dA, member.lora_A.dtype) if need[1] else None
        found.append([dW, dA, dB if need[2] else None, dbias if own_dbias is None else own_dbias, drow_scale])
    if dx is not None and dys[0].dim() != 2:
        dx = dx.view(*dys[0].shape[:-1], members[0].weight.shape[1])
    return dx, found


def _through_row_scale(
    body: ModuleType,
    dy: torch.Tensor,
    x: Any,
    member: Member,
    s: torch.Tensor | None,
    need: Sequence[bool],
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """The gradient of what a row scale multiplies, once, for all the products; dbias and drow_scale as needed."""
    row_scale: Any = member.row_scale
    dbias = sum_rows(dy).to(dy.dtype) if need[3] else None
    drow_scale = None
    if need[4]:
        low_rank = (s, member.lora_B) if member.scaling else None
        drow_scale = body.grad_row_scale(dy, x, member.weight, low_rank, member.scaling).to(row_scale.dtype)
    return torch.mul(dy, row_scale, out=torch.empty_like(dy)), (dbias, drow_scale)


def _gradients_fake(
    dys: Tensors, x: Any, members: Sequence[Member], s: Any, mask: Any, threshold: int, need_dx: bool,
    needs: Sequence[Sequence[bool]], impl: str,
) -> tuple[torch.Tensor | None, list[Gradients]]:  # fmt: skip
    dx = dys[0].new_empty((*dys[0].shape[:-1], members[0].weight.shape[1])) if need_dx else None
    tensors: list[tuple[Any, ...]] = [
        (weight, lora_A, lora_B, dy.new_empty(dy.shape[-1:]), row_scale)
        for dy, (weight, lora_A, lora_B, _, row_scale, _) in zip(dys, members, strict=True)
    ]
    return dx, [
        [t.new_empty(t.shape) if need else None for t, need in zip(*own, strict=True)]
        for own in zip(tensors, needs, strict=True)
    ]


def members_of(flat: Sequence[Any], scalings: Sequence[float], forms: Sequence[str] = ()) -> list[Member]:
    """Of every weight, then every A, every B, every bias, every row scale, then the parts of packed weights."""
    if not forms and len(scalings) == 1:
        return [Member(*flat, *scalings)]
    n = len(scalings)
    weights, *kinds = by_kind(flat[: 5 * n], n)
    return list(map(Member, weights_of(weights, flat[5 * n :], forms), *kinds, scalings))


def weights_of(weights: Sequence[Any], parts: Sequence[Any], forms: Sequence[str]) -> Sequence[Any]:
    """Weights as values, of what the schemas have: a text in `forms` for each, which is empty for a tensor."""
    if not forms:
        return weights
    rest = iter(parts)
    return [
        PackedWeight(form, weight, *itertools.islice(rest, len(PackedWeight._fields) - 2)) if form else weight
        for weight, form in zip(weights, forms, strict=True)
    ]


def taken_apart(weights: Sequence[Any]) -> tuple[list[Any], list[Any], list[str]]:
    """Weights as the schemas have them: tensors, then the parts and the forms of those that are packed."""
    parts: list[Any] = []
    for weight in weights:
        if isinstance(weight, PackedWeight):
            parts += weight.parts
    forms = [weight.text if isinstance(weight, PackedWeight) else "" for weight in weights]
    tensors = [weight.data if isinstance(weight, PackedWeight) else weight for weight in weights]
    return tensors, parts, forms if parts else []


def by_kind(flat: Sequence[Any], n: int) -> list[list[Any]]:
    """Lists of n: weights, lora_As, lora_Bs, biases, row_scales."""
    return [list(flat[i : i + n]) for i in range(0, len(flat), n)]


def _zeros(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter, memory_format=torch.contiguous_format)


# What the registry calls: tensors as the schemas have them, into members and back.


def _group(
    compute: Any, x: Any, weights: Any, parts: Any, forms: Any, lora_As: Any, lora_Bs: Any, biases: Any,
    row_scales: Any, seed: Any, scalings: Any, dropout_p: float, impl: str,
) -> tuple[Any, ...]:  # fmt: skip
    members = list(map(Member, weights_of(weights, parts, forms), lora_As, lora_Bs, biases, row_scales, scalings))
    return compute(x, members, seed, drop_threshold(dropout_p), impl)


def _one(
    compute: Any, x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any, row_scale: Any, seed: Any, scaling: Any,
    dropout_p: float, impl: str,
) -> tuple[Any, ...]:  # fmt: skip
    members = [Member(weight, lora_A, lora_B, bias, row_scale, scaling)]
    [y], s, mask = compute(x, members, seed, drop_threshold(dropout_p), impl)
    return y, s, mask


def _group_backward(
    gradients: Any, dys: Any, x: Any, weights: Any, parts: Any, forms: Any, lora_As: Any, lora_Bs: Any,
    row_scales: Any, s: Any, mask: Any, scalings: Any, dropout_p: float, needs: Any, impl: str,
) -> tuple[Any, ...]:  # fmt: skip
    """An operator's results share no memory, as the dA's do."""
    need_dx, *flags = needs
    n = len(dys)
    members = list(map(Member, weights_of(weights, parts, forms), lora_As, lora_Bs, [None] * n, row_scales, scalings))
    each = [flags[i::n] for i in range(n)]
    dx, found = gradients(dys, x, members, s, mask, drop_threshold(dropout_p), need_dx, each, impl)
    dWs, dAs, *rest = map(list, zip(*found, strict=True))
    return dx, dWs, [None if dA is None else dA.clone() for dA in dAs], *rest


def _one_backward(
    gradients: Any, dy: Any, x: Any, weight: Any, lora_A: Any, lora_B: Any, row_scale: Any, s: Any, mask: Any,
    scaling: Any, dropout_p: float, needs: Any, impl: str,
) -> tuple[Any, ...]:  # fmt: skip
    need_dx, *flags = needs
    members = [Member(weight, lora_A, lora_B, None, row_scale, scaling)]
    dx, [own] = gradients([dy], x, members, [s], mask, drop_threshold(dropout_p), need_dx, [flags], impl)
    return dx, *own


def autocast_arguments(
    x: torch.Tensor, weight: Any, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, Any, torch.Tensor | None]:
    """What autocast to `dtype` makes of a linear's arguments, as torch's; float64 is left alone, as torch leaves it.

    The kernels cast A and B anyway, and unpack a weight into x's dtype.
    """
    if torch.float64 in (x.dtype, weight.dtype) or not x.is_floating_point():
        return x, weight, bias
    weight = weight.to(dtype) if isinstance(weight, torch.Tensor) else weight
    return x.to(dtype), weight, None if bias is None else bias.to(dtype)


def _cast(dtype: torch.dtype, x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: Any, *rest: Any) -> tuple[Any, ...]:
    x, weight, bias = autocast_arguments(x, weight, bias, dtype)
    return x, weight, lora_A, lora_B, bias, *rest


def _cast_group(
    dtype: torch.dtype,
    x: Any,
    weights: Any,
    parts: Any,
    forms: Any,
    lora_As: Any,
    lora_Bs: Any,
    biases: Any,
    *rest: Any,
) -> tuple[Any, ...]:
    values = weights_of(weights, parts, forms)
    cast = [autocast_arguments(x, W, bias, dtype) for W, bias in zip(values, biases, strict=True)]
    weights, biases = taken_apart([W for _, W, _ in cast])[0], [bias for *_, bias in cast]
    return cast[0][0], weights, parts, forms, lora_As, lora_Bs, biases, *rest


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
    partial(_one, compute),
    partial(_one, _compute_fake),
    flops=lora_linear_flops,
    cast=_cast,
    vmap=lambda info, in_dims, *inputs: by_example(LINEAR.dispatch, inputs[6], info, in_dims, inputs),
)
LINEAR_BACKWARD = Operator(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? row_scale, "
    "Tensor? s, Tensor? mask, float scaling, float dropout_p, bool[] needs, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    partial(_one_backward, gradients),
    partial(_one_backward, _gradients_fake),
    flops=lora_linear_backward_flops,
)
GROUP = Operator(
    "lora_linear_group(Tensor x, Tensor[] weights, Tensor?[] parts, str[] forms, Tensor[] lora_As, Tensor[] lora_Bs, "
    "Tensor?[] biases, Tensor?[] row_scales, Tensor? seed, float[] scalings, float dropout_p, str impl) "
    "-> (Tensor[], Tensor, Tensor)",
    partial(_group, compute),
    partial(_group, _compute_fake),
    flops=lora_linear_group_flops,
    cast=_cast_group,
)
GROUP_BACKWARD = Operator(
    "lora_linear_group_backward(Tensor[] dys, Tensor? x, Tensor[] weights, Tensor?[] parts, str[] forms, "
    "Tensor[] lora_As, Tensor[] lora_Bs, Tensor?[] row_scales, Tensor?[] s, Tensor? mask, float[] scalings, "
    "float dropout_p, bool[] needs, str impl) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])",
    partial(_group_backward, gradients),
    partial(_group_backward, _gradients_fake),
    flops=lora_linear_group_backward_flops,
)
