"""Many adapters in one batch: the public functions, which check the arguments, then call the operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch

from lorakernels import ops
from lorakernels.plan import BatchPlan, PlanError

Slices = Sequence[torch.Tensor]
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FLOATS = "float64, float32, float16 or bfloat16"


def lora_shrink(x: torch.Tensor, lora_A: torch.Tensor | Slices, plan: BatchPlan, *, impl: str = "auto") -> torch.Tensor:
    """Each token through its own adapter's A, times the slot's scaling: S = scaling · x Aᵀ. For inference.

    Chen et al., "Punica: Multi-tenant LoRA serving", arXiv 2310.18547, section 4.

    Args:
        x: [T, K], of any leading shape with the plan's number of tokens.
        lora_A: [S, R, K] of any strides and float dtype; [pages, K] for a plan with pages; a list of them for several
            projections of one x. A dimension of 1 after the first is taken out: [S, 1, R, K] will do.
        plan: which token is whose.
        impl: "auto", "torch" or "triton"; a named one never falls back.

    Returns:
        [T, R] float32 (float64 for x in it), zero past a slot's rank and for tokens of the base; [slices, T, R] for a
        list.

    Raises:
        ValueError: a shape does not fit, or (PlanError) the plan does not fit x or the adapters.
        TypeError: a dtype is wrong.
        BackendError: `impl="triton"` cannot run here.
    """
    lora_As, single = _slices("lora_A", lora_A)
    _check_float("x", x)
    _check_plan(plan, x, x.shape[:-1])
    _check_factors("lora_A", lora_As, plan, x, [x.shape[-1]] * len(lora_As), is_B=False)
    _no_gradient("lora_shrink", [x, *lora_As])
    s = ops.multi_lora_shrink(_matrix(x), lora_As, plan, impl)
    return s[0] if single else s


def lora_expand(
    s: torch.Tensor,
    lora_B: torch.Tensor | Slices,
    plan: BatchPlan,
    *,
    out: torch.Tensor | Slices,
    impl: str = "auto",
) -> torch.Tensor | Slices:
    """Add each token's S Bᵀ, with its own adapter's B, into `out`. For inference.

    Args:
        s: [T, R], or [slices, T, R] for lists, as `lora_shrink` returns it.
        lora_B: [S, N, R] of any strides and float dtype; [pages, N] for a plan with pages; a list of them, whose N may
            differ. [S, 1, N, R] will do.
        plan, impl: as for `lora_shrink`.
        out: [T, N] of any strides, changed in place; a list for a list. Tokens of the base are left to the bit.

    Returns:
        `out`.

    Raises:
        as `lora_shrink`.
    """
    lora_Bs, single = _slices("lora_B", lora_B)
    outs, single_out = _slices("out", out)
    if single != single_out or len(lora_Bs) != len(outs):
        raise ValueError(f"there are {len(lora_Bs)} of lora_B and {len(outs)} of out; expected one out for each lora_B")
    _check_float("s", s)
    given, s = s.shape, s[None] if single else s
    for y in outs:
        _check_float("out", y)
        if y.dim() != 2 or y.dtype != outs[0].dtype:
            raise ValueError(f"out is {_shape(y)} {y.dtype}; expected [T, N], all of one dtype")
        _check_plan(plan, y, y.shape[:-1])
    _check_factors("lora_B", lora_Bs, plan, outs[0], [y.shape[1] for y in outs], is_B=True)
    width = plan.max_rank if plan.num_pages is not None else lora_Bs[0].shape[2]
    if tuple(s.shape) != (len(outs), plan.num_tokens, width) or s.device != outs[0].device:
        raise ValueError(
            f"s is {list(given)} on {s.device}; expected {[plan.num_tokens, width]} on {outs[0].device}, from "
            "lora_shrink (a list of slices makes one more dimension, before these)"
        )
    _no_gradient("lora_expand", [s, *lora_Bs, *outs])
    ops.multi_lora_expand(s, lora_Bs, plan, outs, impl)
    return out


@overload
def multi_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    plan: BatchPlan,
    *,
    bias: torch.Tensor | None = ...,
    dropout_p: float | torch.Tensor = ...,
    training: bool = ...,
    impl: str = ...,
) -> torch.Tensor: ...
@overload
def multi_lora_linear(
    x: torch.Tensor,
    weight: Slices,
    lora_A: Slices,
    lora_B: Slices,
    plan: BatchPlan,
    *,
    bias: Sequence[torch.Tensor | None] | None = ...,
    dropout_p: float | torch.Tensor = ...,
    training: bool = ...,
    impl: str = ...,
) -> list[torch.Tensor]: ...


def multi_lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Slices,
    lora_A: torch.Tensor | Slices,
    lora_B: torch.Tensor | Slices,
    plan: BatchPlan,
    *,
    bias: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
    dropout_p: float | torch.Tensor = 0.0,
    training: bool = True,
    impl: str = "auto",
) -> torch.Tensor | list[torch.Tensor]:
    """A frozen linear layer, and to each token the low-rank update of its own adapter.

    y = x Wᵀ + bias + scaling_slot · (dropout(x) A_slotᵀ) B_slotᵀ (Hu et al., arXiv 2106.09685, section 4.1; batched
    over adapters: Chen et al., "Punica", arXiv 2310.18547). Rows of the base (slot -1, rank 0, scaling 0) are
    torch.nn.functional.linear's to the bit, where that sees x as one matrix. Differentiable once in every tensor: an
    adapter's gradient is of its own tokens alone, the other slots' are zero. The backward keeps its own copy of the
    plan: later updates do not matter, but with activation checkpointing, whose recomputation has the plan as it then
    is: the backward raises RuntimeError after an update, and with `use_reentrant=True` cannot tell. Forward-mode AD and
    torch.func's derivatives raise.

    Args:
        x: [..., K], of as many tokens as the plan's last update; float64, float32, float16 or bfloat16, any strides.
        weight: [N, K], of x's dtype. A list for several projections of one x (q, k and v), with lists for lora_A,
            lora_B and bias too: their low-rank products are one launch, and the result is a list.
        lora_A: [S, R, K], S and R at least the plan's num_slots and max_rank, any strides and float dtype; [pages, K]
            for a plan with pages. What is past a slot's rank is never read. [S, 1, R, K] will do.
        lora_B: [S, N, R], or [pages, N], or [S, 1, N, R].
        plan: which token is whose.
        bias: [N], of x's dtype.
        dropout_p: the probability in [0, 1) with which an element of x does not reach A; or [num_slots], one a slot,
            on x's device (its values are checked on a CPU, and clamped elsewhere).
        training: dropout acts only when True.
        impl: "auto", "torch" or "triton"; a named one never falls back.

    Returns:
        [..., N], of x's dtype.

    Raises:
        ValueError: a shape or probability is wrong, or (PlanError) the plan does not fit x or the adapters.
        TypeError: a dtype is wrong, or an argument is not a tensor.
        BackendError: `impl="triton"` cannot run here.
    """
    weights, single = _slices("weight", weight)
    lora_As, _ = _slices("lora_A", lora_A)
    lora_Bs, _ = _slices("lora_B", lora_B)
    biases = _biases(bias, len(weights))
    if not len(weights) == len(lora_As) == len(lora_Bs) == len(biases):
        raise ValueError(
            f"there are {len(weights)} weights, {len(lora_As)} of lora_A, {len(lora_Bs)} of lora_B and {len(biases)} "
            "biases; expected as many of each"
        )
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}")
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        cast = [ops.autocast_arguments(x, w, b, dtype) for w, b in zip(weights, biases, strict=True)]
        x, weights, biases = cast[0][0], [w for _, w, _ in cast], [b for _, _, b in cast]
    _check_bases(x, weights, biases)
    _check_plan(plan, x, x.shape[:-1])
    _check_factors("lora_A", lora_As, plan, x, [w.shape[1] for w in weights], is_B=False)
    _check_factors("lora_B", lora_Bs, plan, x, [w.shape[0] for w in weights], is_B=True)
    _check_one_rank(lora_As[0], lora_Bs[0], plan)
    dropout = _check_dropout(dropout_p, plan) if training else 0.0
    apart = ops.adds_bias_apart(x)
    within = _biases(None, len(weights)) if apart else biases
    ys = ops.multi_lora_linear(_matrix(x), weights, within, lora_As, lora_Bs, plan, dropout, impl)
    if x.dim() != 2:
        ys = [y.view(*x.shape[:-1], y.shape[1]) for y in ys]
    if apart:
        ys = [y if bias is None else y + bias for y, bias in zip(ys, biases, strict=True)]
    return ys[0] if single else ys


def multi_lora_embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    plan: BatchPlan,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """An embedding, and to each token the update of its own adapter: y = weight[id] + scaling · A[:, id]ᵀ Bᵀ.

    The columns of A that the ids name are read and no others; no dropout, as in PEFT. Differentiable once in weight,
    lora_A and lora_B.

    Args:
        ids: [...] int32 or int64 in 0 … V - 1, as many as the plan's last update.
        weight: [V, N].
        lora_A: [S, R, V], or [pages, V] for a plan with pages.
        lora_B: [S, N, R], or [pages, N].
        plan, impl: as for `multi_lora_linear`.

    Returns:
        [..., N], of weight's dtype.

    Raises:
        as `multi_lora_linear`.
    """
    _check_float("weight", weight)
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int32, torch.int64):
        given = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"ids must be a tensor of int32 or int64; got {given}")
    if weight.dim() != 2:
        raise ValueError(f"weight is {_shape(weight)}; expected [V, N]")
    if not (isinstance(lora_A, torch.Tensor) and isinstance(lora_B, torch.Tensor)):
        raise TypeError(f"lora_A and lora_B must be tensors; got {type(lora_A).__name__} and {type(lora_B).__name__}")
    [lora_A], _ = _slices("lora_A", lora_A)
    [lora_B], _ = _slices("lora_B", lora_B)
    _check_plan(plan, ids, ids.shape)
    _check_factors("lora_A", [lora_A], plan, weight, [weight.shape[0]], is_B=False)
    _check_factors("lora_B", [lora_B], plan, weight, [weight.shape[1]], is_B=True)
    _check_one_rank(lora_A, lora_B, plan)
    return ops.multi_lora_embedding(ids.reshape(-1), weight, lora_A, lora_B, plan, impl).view(
        *ids.shape, weight.shape[1]
    )


def _slices(name: str, given: torch.Tensor | Slices) -> tuple[list[torch.Tensor], bool]:
    """What was given as a list, and whether it was one tensor; [S, 1, …] as [S, …]."""
    single = isinstance(given, torch.Tensor)
    tensors = [given] if isinstance(given, torch.Tensor) else _list(name, given)
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor or a list of them; got a list with {type(tensor).__name__}")
    if not tensors:
        raise ValueError(f"{name} is an empty list; expected a tensor for each slice")
    return [t.squeeze(1) if t.dim() == 4 and t.shape[1] == 1 else t for t in tensors], single


def _biases(given: torch.Tensor | Sequence[torch.Tensor | None] | None, num_slices: int) -> list[torch.Tensor | None]:
    if given is None:
        return [None] * num_slices
    biases = [given] if isinstance(given, torch.Tensor) else _list("bias", given)
    for bias in biases:
        if not (bias is None or isinstance(bias, torch.Tensor)):
            raise TypeError(f"bias must be a tensor or a list of them and None; got a list with {type(bias).__name__}")
    return biases


def _list(name: str, given: Sequence[Any]) -> list[Any]:
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name} must be a tensor or a list of them; got {type(given).__name__}")
    return list(given)


def _check_float(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} is {_shape(tensor)} {tensor.dtype}; expected {_FLOATS}")


def _check_plan(plan: BatchPlan, x: torch.Tensor, lead: Sequence[int]) -> None:
    if not isinstance(plan, BatchPlan):
        raise TypeError(f"plan must be a BatchPlan; got {type(plan).__name__}")
    if math.prod(lead) != plan.num_tokens:
        raise PlanError(
            f"x has {math.prod(lead)} tokens ({list(lead)}) and the plan was updated for {plan.num_tokens}: call "
            "plan.update with a slot for each of them"
        )
    if x.device != plan.device:
        raise PlanError(f"x is on {x.device} and the plan on {plan.device}: make the plan with device=x.device")


def _check_bases(x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> None:
    if x.dim() < 1 or x.dtype not in _DTYPES:
        raise TypeError(f"x is {_shape(x)} {x.dtype}; expected [..., K] of {_FLOATS}")
    for weight, bias in zip(weights, biases, strict=True):
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            raise ValueError(f"x {_shape(x)} and weight {_shape(weight)} do not fit: expected [..., K] and [N, K]")
        if weight.dtype != x.dtype or weight.device != x.device:
            raise TypeError(f"weight is {weight.dtype} on {weight.device}; expected x's: {x.dtype} on {x.device}")
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype or bias.device != x.device):
            raise ValueError(
                f"bias is {_shape(bias)} {bias.dtype} on {bias.device}; expected [{weight.shape[0]}], {x.dtype} on "
                f"{x.device}"
            )


def _check_factors(
    name: str, factors: list[torch.Tensor], plan: BatchPlan, x: torch.Tensor, cols: list[int], *, is_B: bool
) -> None:
    letter = "N" if is_B else "K"
    first = factors[0]
    for factor, number in zip(factors, cols, strict=True):
        if plan.num_pages is not None:
            fits = factor.dim() == 2 and factor.shape[0] >= plan.num_pages and factor.shape[1] == number
            expected = f"[pages, {number}] with at least {plan.num_pages} pages, as the plan has"
        else:
            S, R, N = (factor.shape[0], *factor.shape[1:][:: -1 if is_B else 1]) if factor.dim() == 3 else (0, 0, 0)
            fits = plan.num_slots <= S and plan.max_rank <= R and number == N
            shape = f"[S, {number}, R]" if is_B else f"[S, R, {number}]"
            expected = f"{shape} with S ≥ {plan.num_slots} and R ≥ {plan.max_rank}, the plan's num_slots and max_rank"
            if fits and (first.shape[2 if is_B else 1] != R):
                raise ValueError(f"{name} is {_shape(first)} and {_shape(factor)}; expected one R for all slices")
        if not fits:
            raise PlanError(f"{name} is {_shape(factor)}; expected {expected} ({letter} = {number})")
        if not factor.is_floating_point() or factor.dtype != first.dtype:
            raise TypeError(f"{name} is {factor.dtype}; expected a float dtype, the same for all slices")
        if factor.device != x.device:
            raise ValueError(f"{name} is on {factor.device} and x on {x.device}: move it with .to(x.device)")


def _check_one_rank(lora_A: torch.Tensor, lora_B: torch.Tensor, plan: BatchPlan) -> None:
    if plan.num_pages is None and lora_A.shape[1] != lora_B.shape[2]:
        raise ValueError(f"lora_A is {_shape(lora_A)} and lora_B {_shape(lora_B)}; expected one R for both")


def _check_dropout(dropout_p: float | torch.Tensor, plan: BatchPlan) -> float | torch.Tensor:
    if not isinstance(dropout_p, torch.Tensor):
        if not isinstance(dropout_p, (int, float)):
            raise TypeError(f"dropout_p must be a number or a tensor; got {type(dropout_p).__name__}")
        if not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"dropout_p is {dropout_p}; expected a probability in [0, 1)")
        return dropout_p
    if tuple(dropout_p.shape) != (plan.num_slots,) or dropout_p.device != plan.device:
        raise ValueError(
            f"dropout_p is {_shape(dropout_p)} on {dropout_p.device}; expected [{plan.num_slots}] on {plan.device}"
        )
    if dropout_p.device.type == "cpu" and not ((dropout_p >= 0) & (dropout_p < 1)).all():
        raise ValueError(f"dropout_p is {dropout_p.tolist()}; expected probabilities in [0, 1)")
    return dropout_p


def _no_gradient(name: str, tensors: list[torch.Tensor]) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{name} has no gradient: use multi_lora_linear, or call it under torch.no_grad()")


def _matrix(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(-1 if x.numel() else math.prod(x.shape[:-1]), x.shape[-1])


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))
