"""The public functions: one checker of arguments (`arguments.py`), then the operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch

from lorakernels import arguments, ops
from lorakernels.arguments import shape_of
from lorakernels.backend import resolve_impl
from lorakernels.plan import BatchPlan
from lorakernels.quant.packed import Weight

Slices = Sequence[torch.Tensor]


def lora_linear(
    x: torch.Tensor,
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    scaling: float | torch.Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    impl: str = "auto",
) -> torch.Tensor:
    """A frozen linear layer and its low-rank update: y = row_scale ∘ (x Wᵀ + scaling · (dropout(x) Aᵀ) Bᵀ) + bias.

    Hu et al., "LoRA: Low-rank adaptation of large language models", arXiv 2106.09685, section 4.1.
    Between forward and backward it keeps x, x Aᵀ and dropout's mask. Differentiable in every tensor,
    a second time too.

    Args:
        x: [..., K]; float64, float32, float16 or bfloat16, any strides, zero tokens included.
        weight: [N, K], of x's dtype; or a `PackedWeight`, which is unpacked in x's dtype by parts.
        lora_A: [r, K], any r ≥ 1; any float dtype: it is cast to x's, x never to its.
        lora_B: [N, r], likewise.
        bias: [N], of x's dtype.
        row_scale: [N], any float dtype: one factor a row of the weight (Liu et al., "DoRA", arXiv 2402.09353, eq. 5:
            magnitude / norm, see `lora_weight_norm`). Its gradient makes the base product a second time in the
            backward, so that nothing of size [M, N] is kept.
        scaling: lora_alpha / r, or lora_alpha / √r for rsLoRA. 0 gives the base layer's output to the bit.
            A one-element tensor will do.
        dropout_p: the probability, in [0, 1), with which an element of x does not reach A.
        training: dropout acts only when True.
        impl: "auto", "torch" or "triton"; a named one never falls back.

    Returns:
        [..., N], of x's dtype.

    Raises:
        ValueError: a shape, rank, scaling or probability is wrong.
        TypeError: a dtype is wrong, or an argument is not a tensor.
        BackendError: `impl="triton"` cannot run here.
    """
    if arguments.autocasts(x):
        x, [weight], [bias] = arguments.under_autocast(x, [weight], [bias])
    arguments.check_base(x, weight, bias)
    arguments.check_adapter(weight, lora_A, lora_B)
    if row_scale is not None:
        arguments.check_of_rows("row_scale", row_scale, weight)
    number, lora_B = arguments.number_of(scaling, lora_B)
    if dropout_p != 0:
        arguments.check_probability(dropout_p)
    return ops.lora_linear(x, weight, lora_A, lora_B, bias, row_scale, number, dropout_p if training else 0.0, impl)


def lora_linear_group(
    x: torch.Tensor,
    weights: Sequence[Weight],
    lora_As: Sequence[torch.Tensor | None],
    lora_Bs: Sequence[torch.Tensor | None],
    *,
    biases: Sequence[torch.Tensor | None] | None = None,
    scalings: Sequence[float | torch.Tensor] | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    impl: str = "auto",
) -> list[torch.Tensor]:
    """Several LoRA linears of one x (q, k, v; gate, up): y_i = x W_iᵀ + scaling_i · (dropout(x) A_iᵀ) B_iᵀ + bias_i.

    What `lora_linear` gives for each, with one dropout mask for all of them. x is read once for all A's in the
    forward and once for their gradients, and dx is one product over all outputs. All y's have one backward: for two
    of them one after the other, the first needs `retain_graph=True`.

    Args:
        x: [..., K], as for `lora_linear`.
        weights: [N_i, K] each, of x's dtype, or packed; the N_i may differ.
        lora_As: [r_i, K] each; the r_i may differ. None where a member has no adapter.
        lora_Bs: [N_i, r_i] each, None likewise.
        biases: [N_i] each, or None, of x's dtype.
        scalings: 1 if not given; otherwise one for each member, as for `lora_linear`. A member with 0 gives the base
            layer's output to the bit.
        dropout_p, training, impl: as for `lora_linear`.

    Returns:
        [..., N_i] of each member, of x's dtype.

    Raises:
        ValueError: the lists differ in length or are empty; else as `lora_linear`, naming the member.
        TypeError, BackendError: as `lora_linear`.
    """
    weights, lora_As = arguments.listed("weights", weights), arguments.listed("lora_As", lora_As)
    lora_Bs, n = arguments.listed("lora_Bs", lora_Bs), len(weights)
    if n == 0:
        raise ValueError("weights is an empty list; expected at least one weight")
    biases = [None] * n if biases is None else arguments.listed("biases", biases)
    scalings = [1.0] * n if scalings is None else arguments.listed("scalings", scalings)
    arguments.check_lengths(weights=weights, lora_As=lora_As, lora_Bs=lora_Bs, biases=biases, scalings=scalings)
    if arguments.autocasts(x):
        x, weights, biases = arguments.under_autocast(x, weights, biases)
    arguments.check_probability(dropout_p)
    adapted: dict[int, tuple[torch.Tensor, torch.Tensor, float]] = {}
    for i, (weight, A, B, bias, scaling) in enumerate(zip(weights, lora_As, lora_Bs, biases, scalings, strict=True)):
        try:
            arguments.check_base(x, weight, bias)
            if A is None and B is None:
                continue
            arguments.check_adapter(weight, A, B)
            number, B = arguments.number_of(scaling, B)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise type(error)(f"member {i}: {error}") from None
        adapted[i] = A, B, number  # type: ignore[assignment]
    p = dropout_p if training else 0.0
    together = [i for i, (_, _, scaling) in adapted.items() if scaling != 0]
    ys: dict[int, torch.Tensor] = {}
    if together:
        lora_A, lora_B, scaling = (list(kind) for kind in zip(*(adapted[i] for i in together), strict=True))
        own_weights, own_biases = [weights[i] for i in together], [biases[i] for i in together]
        outputs = ops.lora_linear_group(x, own_weights, lora_A, lora_B, own_biases, scaling, p, impl)
        ys = dict(zip(together, outputs, strict=True))
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if i not in adapted:
            ys[i] = ops.frozen_linear(x, weight, bias)
        elif i not in ys:
            A, B, scaling = adapted[i]
            ys[i] = ops.lora_linear(x, weight, A, B, bias, None, scaling, 0.0, impl)
    return [ys[i] for i in range(n)]


def row_norm(weight: Weight) -> torch.Tensor:
    """‖W‖ by rows of weight [N, K]: [N] float32 (float64 for a float64 weight), for `lora_weight_norm`."""
    arguments.check_weight(weight)
    return ops.row_norm(weight)


def lora_weight_norm(
    weight: Weight,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    scaling: float | torch.Tensor = 1.0,
    base_norm: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """The norm of each row of W + scaling · B A, without making B A: DoRA's denominator.

    Liu et al., "DoRA: Weight-decomposed low-rank adaptation", arXiv 2402.09353, eq. 5; it carries no gradient
    (section 4.3). Where the update cancels a row of W to a small remainder, that remainder's norm has the
    absolute error of ‖W‖.

    Args:
        weight: [N, K], any float dtype and any strides.
        lora_A: [r, K]. lora_B: [N, r].
        scaling: as for `lora_linear`.
        base_norm: `row_norm(weight)`, to spare reading the weight once more.
        impl: as for `lora_linear`.

    Returns:
        [N] float32, float64 for a float64 weight.

    Raises:
        ValueError, TypeError, BackendError: as `lora_linear`.
    """
    arguments.check_weight(weight)
    base_norm = ops.row_norm(weight) if base_norm is None else base_norm
    arguments.check_adapter(weight, lora_A, lora_B)
    arguments.check_of_rows("base_norm", base_norm, weight)
    number, lora_B = arguments.number_of(scaling, lora_B.detach())
    return ops.lora_weight_norm(weight, lora_A, lora_B, base_norm, number, impl)


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
    lora_As, single = arguments.slices_of("lora_A", lora_A)
    arguments.check_floats("x", x)
    arguments.check_plan(plan, "x", x, x.shape[:-1])
    arguments.check_adapters("lora_A", lora_As, plan, "x", x, [x.shape[-1]] * len(lora_As), is_B=False)
    arguments.refuse_gradient("lora_shrink", [x, *lora_As])
    s = ops.multi_lora_shrink(ops.as_matrix(x), lora_As, plan, impl)
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
        ValueError, TypeError, BackendError: as `lora_shrink`.
    """
    lora_Bs, single = arguments.slices_of("lora_B", lora_B)
    outs, single_out = arguments.slices_of("out", out)
    if single != single_out or len(lora_Bs) != len(outs):
        raise ValueError(f"there are {len(lora_Bs)} of lora_B and {len(outs)} of out; expected one out for each lora_B")
    arguments.check_floats("s", s)
    for y in outs:
        arguments.check_floats("out", y)
        if y.dim() != 2:
            raise ValueError(f"out is {shape_of(y)}; expected [T, N]")
        arguments.check_alike("out", y, "the first out", outs[0])
        arguments.check_plan(plan, "out", y, y.shape[:-1])
    arguments.check_adapters("lora_B", lora_Bs, plan, "out", outs[0], [y.shape[1] for y in outs], is_B=True)
    width = plan.max_rank if plan.num_pages is not None else lora_Bs[0].shape[2]
    expected = [plan.num_tokens, width] if single else [len(outs), plan.num_tokens, width]
    if list(s.shape) != expected or s.device != outs[0].device:
        raise ValueError(f"s is {shape_of(s)} on {s.device}; expected {expected} on {outs[0].device}, from lora_shrink")
    arguments.refuse_gradient("lora_expand", [s, *lora_Bs, *outs])
    ops.multi_lora_expand(s[None] if single else s, lora_Bs, plan, outs, impl)
    return out


@overload
def multi_lora_linear(
    x: torch.Tensor, weight: Weight, lora_A: torch.Tensor, lora_B: torch.Tensor, plan: BatchPlan, *,
    bias: torch.Tensor | None = ..., dropout_p: float | torch.Tensor = ..., training: bool = ..., impl: str = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def multi_lora_linear(
    x: torch.Tensor, weight: Sequence[Weight], lora_A: Slices, lora_B: Slices, plan: BatchPlan, *,
    bias: Sequence[torch.Tensor | None] | None = ..., dropout_p: float | torch.Tensor = ..., training: bool = ...,
    impl: str = ...,
) -> list[torch.Tensor]: ...  # fmt: skip


def multi_lora_linear(
    x: torch.Tensor,
    weight: Weight | Sequence[Weight],
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
        weight: [N, K], of x's dtype, or a `PackedWeight`. A list for several projections of one x (q, k and v), with
            lists for lora_A, lora_B and bias too: their low-rank products are one launch, and the result is a list.
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
    weights, single = arguments.slices_of("weight", weight)
    lora_As, _ = arguments.slices_of("lora_A", lora_A)
    lora_Bs, _ = arguments.slices_of("lora_B", lora_B)
    biases = arguments.biases_of(bias, len(weights))
    arguments.check_lengths(weight=weights, lora_A=lora_As, lora_B=lora_Bs, bias=biases)
    if arguments.autocasts(x):
        x, weights, biases = arguments.under_autocast(x, weights, biases)
    for each, its_bias in zip(weights, biases, strict=True):
        arguments.check_base(x, each, its_bias)
    arguments.check_plan(plan, "x", x, x.shape[:-1])
    arguments.check_adapters("lora_A", lora_As, plan, "x", x, [w.shape[1] for w in weights], is_B=False)
    arguments.check_adapters("lora_B", lora_Bs, plan, "x", x, [w.shape[0] for w in weights], is_B=True)
    arguments.check_one_rank(lora_As[0], lora_Bs[0], plan)
    arguments.check_probabilities(dropout_p, plan)
    apart = ops.adds_bias_apart(x)
    within = arguments.biases_of(None, len(weights)) if apart else biases
    p = dropout_p if training else 0.0
    ys = ops.multi_lora_linear(ops.as_matrix(x), weights, within, lora_As, lora_Bs, plan, p, impl)
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
    arguments.check_matrix("weight", weight, "[V, N]")
    resolve_impl(impl, weight.device, weight.dtype)
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int32, torch.int64):
        given = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"ids must be a tensor of int32 or int64; got {given}")
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(factor, torch.Tensor):
            raise arguments.no_tensor(name, factor)
    [lora_A], _ = arguments.slices_of("lora_A", lora_A)
    [lora_B], _ = arguments.slices_of("lora_B", lora_B)
    arguments.check_plan(plan, "ids", ids, ids.shape)
    arguments.check_adapters("lora_A", [lora_A], plan, "weight", weight, [weight.shape[0]], is_B=False)
    arguments.check_adapters("lora_B", [lora_B], plan, "weight", weight, [weight.shape[1]], is_B=True)
    arguments.check_one_rank(lora_A, lora_B, plan)
    y = ops.multi_lora_embedding(ids.reshape(-1), weight, lora_A, lora_B, plan, impl)
    return y.view(*ids.shape, weight.shape[1])
