"""How many floating-point operations an operator makes, for torch's FlopCounterMode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lorakernels.quant.packed import Form
from lorakernels.when_imported import when_imported

Shape = Sequence[int]
_FORMULAS: dict[Any, Callable[..., int]] = {}


def count_flops(operator: Any, formula: Callable[..., int]) -> None:
    """Have an operator of torch's registry counted by a formula of its arguments, in which tensors are shapes."""
    _FORMULAS[operator] = formula


def register_flop_formulas() -> None:
    """Register the formulas, now if the counter is imported already, else when it is: it imports triton."""
    when_imported("torch.utils.flop_counter", _register)


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for operator, formula in _FORMULAS.items():
        register_flop_formula(operator)(formula)


def lora_linear_flops(x: Shape, weight: Shape, lora_A: Shape, *_: Any, **__: Any) -> int:
    """The base product and the two of rank r: 2 M (N K + r (N + K))."""
    tokens, (N, K), r = math.prod(x[:-1]), weight, lora_A[0]
    return 2 * tokens * (N * K + r * (N + K))


def lora_linear_group_flops(
    x: Shape, weights: Sequence[Shape], parts: Any, forms: Sequence[str], lora_As: Sequence[Shape], *_: Any, **__: Any
) -> int:
    """What the members take one by one."""
    sizes = _sizes(weights, forms)
    return sum(lora_linear_flops(x, weight, lora_A) for weight, lora_A in zip(sizes, lora_As, strict=True))


def _sizes(weights: Sequence[Shape], forms: Sequence[str]) -> Sequence[Shape]:
    """[N, K] of each weight, packed or not."""
    return [
        Form.read(form)[1:3] if form else weight
        for weight, form in zip(weights, forms or [""] * len(weights), strict=True)
    ]


def lora_linear_backward_flops(dy: Shape, x: Shape | None, weight: Shape, lora_A: Shape, *rest: Any, **__: Any) -> int:
    """Of a group of one."""
    *_, needs, _ = rest
    return lora_linear_group_backward_flops([dy], x, [weight], [], [], [lora_A], needs, "")


def lora_linear_group_backward_flops(
    dys: Sequence[Shape], x: Shape | None, weights: Sequence[Shape], parts: Any, forms: Sequence[str],
    lora_As: Sequence[Shape], *rest: Any, **__: Any,
) -> int:  # fmt: skip
    """dx and dW, and of rank r: G and dB over N, dx's part and dA over K; only what is asked for.

    Where one dA is, all are. The gradient of a row scale makes the forward's product again.
    """
    *_, (need_dx, *flags), _ = rest
    n, total = len(dys), 0
    need_dA = any(flags[n : 2 * n])
    for i, (dy, (N, K), lora_A) in enumerate(zip(dys, _sizes(weights, forms), lora_As, strict=True)):
        need_dW, _, need_dB, _, need_drow_scale = flags[i::n]
        full = N * K * (need_dx + need_dW + need_drow_scale)
        over_N, over_K = (need_dx or need_dA) + need_dB + need_drow_scale, need_dx + need_dA
        total += 2 * math.prod(dy[:-1]) * (full + lora_A[0] * (N * over_N + K * over_K))
    return total


def multi_lora_linear_flops(
    x: Shape, weights: Sequence[Shape], parts: Any, forms: Sequence[str], biases: Any, lora_As: Sequence[Shape],
    lora_Bs: Any, plan: Shape, scales: Shape, page_table: Shape | None, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Of each slice the base product and the two of rank R: 2 T (N K + R (N + K)).

    Every token counts with the plan's whole width R: which rank it has, or none, only the device knows, and the host
    does not wait for it. So this is what a batch may take at most, on every device.
    """
    T, R = x[0], _width(lora_As, page_table)
    return sum(2 * T * (N * K + R * (N + K)) for N, K in _sizes(weights, forms))


def multi_lora_linear_backward_flops(
    dys: Sequence[Shape], x: Shape | None, weights: Sequence[Shape], parts: Any, forms: Sequence[str],
    lora_As: Sequence[Shape], lora_Bs: Any, plan: Shape, scales: Shape, page_table: Shape | None, *rest: Any, **__: Any,
) -> int:  # fmt: skip
    """Of each slice dx, and of rank R: G and dB over N, dx's part and dA over K; only what is asked for.

    At the plan's whole width, as the forward.
    """
    *_, need_dx, need_dA, need_dB, _ = rest
    T, R = dys[0][0], _width(lora_As, page_table)
    over_N, over_K = (need_dx or need_dA) + need_dB, need_dx + need_dA
    return sum(2 * T * (N * K * need_dx + R * (N * over_N + K * over_K)) for N, K in _sizes(weights, forms))


def multi_lora_shrink_flops(
    x: Shape, lora_As: Sequence[Shape], plan: Shape, scales: Shape, page_table: Shape | None, *_: Any, **__: Any
) -> int:
    """2 T R K a slice, at the plan's whole width."""
    T, K = x
    return 2 * T * _width(lora_As, page_table) * K * len(lora_As)


def multi_lora_expand_flops(s: Shape, lora_Bs: Sequence[Shape], *_: Any, **__: Any) -> int:
    """2 T R N a slice, at the plan's whole width."""
    tokens, width = s[1:]
    return sum(2 * tokens * width * lora_B[1] for lora_B in lora_Bs)


def multi_lora_add_flops(
    outs: Sequence[Shape], x: Shape, lora_As: Sequence[Shape], lora_Bs: Any, plan: Shape, scales: Shape,
    page_table: Shape | None, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """2 T R (N + K) a slice, at the plan's whole width."""
    T, K = x
    return sum(2 * T * _width(lora_As, page_table) * (out[1] + K) for out in outs)


def expert_lora_linear_flops(
    x: Shape, weight: Shape, lora_A: Shape, lora_B: Shape, bias: Any, order: Shape, *_: Any, **__: Any
) -> int:
    """What as many rows of one linear take, for each pair of a token and an expert is a row."""
    return lora_linear_flops([order[0], x[1]], [lora_B[1], x[1]], lora_A[1:])


def expert_lora_linear_backward_flops(
    dy: Shape, x: Shape | None, weight: Shape, lora_A: Shape, lora_B: Shape, *rest: Any, **__: Any
) -> int:
    """As `expert_lora_linear_flops`."""
    needs, impl = rest[10:12]
    return lora_linear_backward_flops(dy, x, [lora_B[1], lora_A[2]], lora_A[1:], [*needs, False], impl)


def _width(lora_As: Sequence[Shape], page_table: Shape | None) -> int:
    return lora_As[0][1] if page_table is None else page_table[1]
