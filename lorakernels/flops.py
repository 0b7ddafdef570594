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


def register_flop_formulas() -> None:
    """Register the formulas, now if the counter is imported already, else when it is: it imports triton."""
    when_imported("torch.utils.flop_counter", _register)


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.lorakernels.lora_linear)(lora_linear_flops)
    register_flop_formula(torch.ops.lorakernels.lora_linear_backward)(lora_linear_backward_flops)
