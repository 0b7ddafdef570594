"""The one algorithm of an adapted linear layer, whoever holds its adapters: LoRALinear, or a layer of PEFT's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lorakernels import functional, ops
from lorakernels.configs.table import FEW_TOKENS
from lorakernels.functional import lora_linear
from lorakernels.low_rank import low_rank_dtype
from lorakernels.nn.dora import change_of_base, scale_product
from lorakernels.nn.modules import runs_more_than_forward
from lorakernels.nn.siblings import Part, Way, from_group
from lorakernels.nn.terms import Call, Term
from lorakernels.quant.packed import PackedWeight


def adapted_linear(
    x: torch.Tensor,
    weight: Any,
    bias: torch.Tensor | None,
    terms: Sequence[Term],
    base_layer: nn.Module | None = None,
    layer: Any = None,
) -> torch.Tensor:
    """x [..., K] to [..., N]: x Wᵀ + bias and what each term adds (arXiv 2106.09685; with DoRA arXiv 2402.09353).

    One term, and several without dropout, are one `lora_linear`. Each has a mask of its own. `base_layer` is the module
    to run for x Wᵀ + bias where somebody watches it; `layer` the one whose call this is, if it may have siblings.

    Raises what `lora_linear` does.
    """
    if bias is not None and bias.dtype is not x.dtype and isinstance(weight, PackedWeight):
        bias = bias.to(x.dtype)
    if not terms:
        return ops.frozen_linear(x, weight, bias)
    if len(terms) == 1 and base_layer is None:
        if _is_small(x, weight, terms[0]):
            A, B, _, scaling, *_ = terms[0]
            return ops.small_lora_linear(x, weight, A, B, bias, scaling)  # type: ignore[arg-type]
        grouped = None if layer is None else from_group(layer, x, (weight, bias, terms, None), _TOGETHER)
        return _fused(x, weight, bias, terms[0]) if grouped is None else grouped
    scales: Sequence[torch.Tensor | None] = [_row_scale(weight, term) for term in terms]
    base_scale = change_of_base(scales)
    if base_layer is not None:
        y = base_layer(x)
        if base_scale is not None:
            added = 0 if bias is None else bias.to(y.dtype)
            y = (y - added) * base_scale.to(y.dtype) + added
    elif base_scale is not None:
        y = scale_product(base_scale, lambda x: ops.frozen_linear(x, weight, None), x)
        y = y if bias is None else y + bias.to(y.dtype)
    elif not any(term.p for term in terms):
        # Several adapters are one of their ranks' sum: still one pass over x.
        A = torch.cat([term.A for term in terms])
        B = torch.cat([term.B * term.scaling for term in terms], dim=1)
        return lora_linear(x, weight, A, B, bias=_sum_of_biases(bias, terms, x.dtype))
    else:
        y = _fused(x, weight, bias, terms[0])
        terms, scales = terms[1:], scales[1:]
    low = low_rank_dtype(x.dtype)
    for term, scale in zip(terms, scales, strict=True):
        B = term.B * term.scaling if scale is None else term.B * (term.scaling * scale)[:, None]
        lora_bias = None if term.bias is None else (term.bias * term.scaling).to(low)
        update = F.linear(F.linear(F.dropout(x, term.p).to(low), term.A.to(low)), B.to(low), lora_bias)
        y = (y + update).to(y.dtype)
    return y


def _is_small(x: torch.Tensor, weight: Any, term: Term) -> bool:
    """Where `lora_linear` would come to `small_lora_linear` too: it takes 20 µs to, between the layers of a model."""
    A, B, bias, scaling, p, magnitude = term
    return (
        not p
        and bias is None
        and magnitude is None
        and ops.is_small(x, weight, A, B, "auto")
        and isinstance(scaling, (int, float))
        and scaling != 0
        and math.isfinite(scaling)
        and weight.dtype is x.dtype
        and weight.shape[1:] == x.shape[-1:]
    )


def _fused(x: torch.Tensor, weight: Any, bias: torch.Tensor | None, term: Term) -> torch.Tensor:
    if term.bias is not None:
        bias = _sum_of_biases(bias, [term], x.dtype)
    scale = None if term.magnitude is None else _row_scale(weight, term)
    return lora_linear(x, weight, term.A, term.B, bias=bias, row_scale=scale, scaling=term.scaling, dropout_p=term.p)


def _row_scale(weight: Any, term: Term) -> torch.Tensor | None:
    magnitude = term.magnitude
    return None if magnitude is None else magnitude.row_scale(weight, weight, term.A, term.B, term.scaling)


def _sum_of_biases(bias: torch.Tensor | None, terms: Sequence[Term], dtype: torch.dtype) -> torch.Tensor | None:
    """The base bias [N] and scaling times the bias of each B."""
    total = bias
    for term in terms:
        if term.bias is not None:
            scaled = term.bias * term.scaling
            total = scaled if total is None else total + scaled
    return total if total is bias or total is None else total.to(dtype)


def _call_of(sibling: Any, x: torch.Tensor) -> Call | None:
    """Layers have `linear_call(x)`, which says what they would do with x."""
    if not hasattr(sibling, "linear_call") or runs_more_than_forward(sibling):
        return None
    return sibling.linear_call(x)


def _part_of(x: torch.Tensor, call: Call, with_dropout: bool) -> Part | None:
    """What `lora_linear_group` takes."""
    weight, bias, terms, base_layer = call
    A, B, lora_bias, scaling, p, magnitude = terms[0]
    if x.is_cuda:
        pays = x.numel() > FEW_TOKENS * x.shape[-1]
    else:
        pays = x.is_cpu and (p > 0 or x.numel() * weight.shape[0] >= ops.linear.SMALL)
    plain = len(terms) == 1 and base_layer is None and lora_bias is None and magnitude is None
    return (weight, bias, A, B, scaling, p) if pays and plain and (not p or with_dropout) else None


def _run(x: torch.Tensor, parts: list[Part]) -> list[torch.Tensor]:
    weights, biases, As, Bs, scalings, (p, *_) = zip(*parts, strict=True)
    return functional.lora_linear_group(x, weights, As, Bs, biases=biases, scalings=scalings, dropout_p=p)


_TOGETHER = Way(_call_of, _part_of, _run)
