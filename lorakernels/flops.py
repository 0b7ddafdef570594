"""How many floating-point operations an operator makes, for torch's FlopCounterMode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lorakernels.when_imported import when_imported


def lora_linear_flops(
    x_shape: Sequence[int], weight_shape: Sequence[int], a_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    """The base product and the two of rank r: 2 M (N K + r (N + K))."""
    tokens, (N, K), r = math.prod(x_shape[:-1]), weight_shape, a_shape[0]
    return 2 * tokens * (N * K + r * (N + K))


def lora_linear_backward_flops(
    dy_shape: Sequence[int],
    x_shape: Sequence[int] | None,
    weight_shape: Sequence[int],
    a_shape: Sequence[int],
    b_shape: Sequence[int],
    row_scale_shape: Sequence[int] | None,
    s_shape: Sequence[int],
    mask_shape: Sequence[int],
    scaling: float,
    dropout_p: float,
    needs: Sequence[bool],
    *_: Any,
    **__: Any,
) -> int:
    """dx and dweight, and of rank r: G and dB over N, dx's part and dA over K; only what is asked for.

    The gradient of the row scale makes the forward's product again.
    """
    tokens, (N, K), r = math.prod(dy_shape[:-1]), weight_shape, a_shape[0]
    need_dx, need_dweight, need_dA, need_dB, need_drow_scale = needs
    full = 2 * tokens * N * K * (need_dx + need_dweight + need_drow_scale)
    over_N = (need_dx or need_dA) + need_dB + need_drow_scale
    return full + 2 * tokens * r * (N * over_N + K * (need_dx + need_dA))


def lora_linear_group_flops(
    x_shape: Sequence[int],
    weight_shapes: Sequence[Sequence[int]],
    a_shapes: Sequence[Sequence[int]],
    *_: Any,
    **__: Any,
) -> int:
    """What the members take one by one."""
    return sum(lora_linear_flops(x_shape, W, A) for W, A in zip(weight_shapes, a_shapes, strict=True))


def lora_linear_group_backward_flops(
    dy_shapes: Sequence[Sequence[int]],
    x_shape: Sequence[int] | None,
    weight_shapes: Sequence[Sequence[int]],
    a_shapes: Sequence[Sequence[int]],
    b_shapes: Sequence[Sequence[int]],
    s_shapes: Sequence[Sequence[int]],
    mask_shape: Sequence[int],
    scalings: Sequence[float],
    dropout_p: float,
    need_dx: bool,
    needs: Sequence[bool],
    *_: Any,
    **__: Any,
) -> int:
    """What the members take one by one; every dA where one is asked for."""
    n, total = len(dy_shapes), 0
    need_dA = any(needs[n : 2 * n])
    for i, (dy, (N, K), A) in enumerate(zip(dy_shapes, weight_shapes, a_shapes, strict=True)):
        over_N, over_K = (need_dx or need_dA) + needs[2 * n + i], need_dx + need_dA
        total += 2 * math.prod(dy[:-1]) * (N * K * (need_dx + needs[i]) + A[0] * (N * over_N + K * over_K))
    return total


def multi_lora_linear_flops(
    x_shape: Sequence[int],
    weight_shapes: Sequence[Sequence[int]],
    bias_shapes: Sequence[Sequence[int] | None],
    a_shapes: Sequence[Sequence[int]],
    b_shapes: Sequence[Sequence[int]],
    plan_shape: Sequence[int],
    scales_shape: Sequence[int],
    pages_shape: Sequence[int] | None,
    *_: Any,
    **__: Any,
) -> int:
    """Of each slice the base product and the two of rank R: 2 T (N K + R (N + K)).

    Every token counts with the plan's whole width R: which rank it has, or none, only the device knows, and the host
    does not wait for it. So this is what a batch may take at most, on every device.
    """
    T, R = x_shape[0], _width(a_shapes, pages_shape)
    return sum(2 * T * (N * K + R * (N + K)) for N, K in weight_shapes)


def multi_lora_linear_backward_flops(
    dy_shapes: Sequence[Sequence[int]],
    x_shape: Sequence[int] | None,
    weight_shapes: Sequence[Sequence[int]],
    a_shapes: Sequence[Sequence[int]],
    b_shapes: Sequence[Sequence[int]],
    plan_shape: Sequence[int],
    scales_shape: Sequence[int],
    pages_shape: Sequence[int] | None,
    num_slots: int,
    max_tokens: int,
    s_shape: Sequence[int],
    mask_shape: Sequence[int],
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    *_: Any,
    **__: Any,
) -> int:
    """Of each slice dx, and of rank R: G and dB over N, dx's part and dA over K; only what is asked for.

    At the plan's whole width, as the forward.
    """
    T, R = dy_shapes[0][0], _width(a_shapes, pages_shape)
    over_N, over_K = (need_dx or need_dA) + need_dB, need_dx + need_dA
    return sum(2 * T * (N * K * need_dx + R * (N * over_N + K * over_K)) for N, K in weight_shapes)


def multi_lora_shrink_flops(
    x_shape: Sequence[int],
    a_shapes: Sequence[Sequence[int]],
    plan_shape: Sequence[int],
    scales_shape: Sequence[int],
    pages_shape: Sequence[int] | None,
    *_: Any,
    **__: Any,
) -> int:
    """2 T R K a slice, at the plan's whole width."""
    T, K = x_shape
    return 2 * T * _width(a_shapes, pages_shape) * K * len(a_shapes)


def multi_lora_expand_flops(
    s_shape: Sequence[int],
    b_shapes: Sequence[Sequence[int]],
    *_: Any,
    **__: Any,
) -> int:
    """2 T R N a slice, at the plan's whole width."""
    tokens, width = s_shape[1:]
    return sum(2 * tokens * width * b_shape[1] for b_shape in b_shapes)


def _width(a_shapes: Sequence[Sequence[int]], pages_shape: Sequence[int] | None) -> int:
    return a_shapes[0][1] if pages_shape is None else pages_shape[1]


def register_flop_formulas() -> None:
    """Register the formulas, now if the counter is imported already, else when it is: it imports triton."""
    when_imported("torch.utils.flop_counter", _register)


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.lorakernels.lora_linear)(lora_linear_flops)
    register_flop_formula(torch.ops.lorakernels.lora_linear_backward)(lora_linear_backward_flops)
    register_flop_formula(torch.ops.lorakernels.lora_linear_group)(lora_linear_group_flops)
    register_flop_formula(torch.ops.lorakernels.lora_linear_group_backward)(lora_linear_group_backward_flops)
    register_flop_formula(torch.ops.lorakernels.multi_lora_linear)(multi_lora_linear_flops)
    register_flop_formula(torch.ops.lorakernels.multi_lora_linear_backward)(multi_lora_linear_backward_flops)
    register_flop_formula(torch.ops.lorakernels.multi_lora_shrink)(multi_lora_shrink_flops)
    register_flop_formula(torch.ops.lorakernels.multi_lora_expand)(multi_lora_expand_flops)
