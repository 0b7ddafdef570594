"""How many floating-point operations an operator makes, for torch's FlopCounterMode."""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_FLOP_COUNTER = "torch.utils.flop_counter"


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
    if _FLOP_COUNTER in sys.modules:
        _register(sys.modules[_FLOP_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())


def _register(flop_counter: ModuleType) -> None:
    flop_counter.register_flop_formula(torch.ops.lorakernels.lora_linear)(lora_linear_flops)
    flop_counter.register_flop_formula(torch.ops.lorakernels.lora_linear_backward)(lora_linear_backward_flops)


class _WhenImported(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch's counter once, lets its own loader load it, and registers the formulas behind it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _FLOP_COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        self.spec, self.loader = spec, spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.spec.loader = self.loader
        self.loader.exec_module(module)
        _register(module)
