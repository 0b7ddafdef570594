"""The public functions: check the arguments, then call the operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from lorakernels import ops
from lorakernels.backend import Explanation, explain_impl
from lorakernels.configs.heuristic import Batch
from lorakernels.configs.table import choose_with_source, takes_few_tokens_form, takes_one_pass
from lorakernels.plan import BatchPlan


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
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
        weight: [N, K], of x's dtype.
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
    if not (isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor)):
        raise TypeError(f"x and weight must be tensors; got {type(x).__name__} and {type(weight).__name__}")
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        x, weight, bias = ops.autocast_arguments(x, weight, bias, torch.get_autocast_dtype(device_type))
    _check(x, weight, lora_A, lora_B, bias)
    if row_scale is not None:
        _check_row_scale(row_scale, x, weight)
    if isinstance(scaling, torch.Tensor):
        # Into B, a [N, r] product that autograd and torch.compile see: no wait for the value.
        lora_B = lora_B * _one_element(scaling).to(lora_B)
        scaling = 1.0
    elif not _is_finite(scaling):
        raise ValueError(f"scaling is {scaling}; expected a finite number, such as lora_alpha / r")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; expected a probability in [0, 1)")
    return ops.lora_linear(x, weight, lora_A, lora_B, bias, row_scale, scaling, dropout_p if training else 0.0, impl)


def lora_linear_group(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
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
        weights: [N_i, K] each, of x's dtype; the N_i may differ.
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
    n = len(weights)
    biases = [None] * n if biases is None else list(biases)
    scalings = [1.0] * n if scalings is None else list(scalings)
    lengths = {"lora_As": len(lora_As), "lora_Bs": len(lora_Bs), "biases": len(biases), "scalings": len(scalings)}
    if n == 0 or set(lengths.values()) != {n}:
        given = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"there are {n} weights and of {given}; expected at least one weight, and as many of each")
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor; got {type(x).__name__}")
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        cast = [ops.autocast_arguments(x, W, bias, dtype) for W, bias in zip(weights, biases, strict=True)]
        x, weights, biases = cast[0][0], [W for _, W, _ in cast], [bias for *_, bias in cast]
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; expected a probability in [0, 1)")
    adapted: dict[int, tuple[torch.Tensor, torch.Tensor, float]] = {}
    for i in range(n):
        try:
            factors = _member(x, weights[i], lora_As[i], lora_Bs[i], biases[i], scalings[i])
        except (TypeError, ValueError) as error:
            raise type(error)(f"member {i}: {error}") from None
        if factors is not None:
            adapted[i] = factors
    p = dropout_p if training else 0.0
    ys: list[torch.Tensor | None] = [None] * n
    if adapted:
        lora_A, lora_B, scaling = (list(kind) for kind in zip(*adapted.values(), strict=True))
        own_weights, own_biases = [weights[i] for i in adapted], [biases[i] for i in adapted]
        outputs = ops.lora_linear_group(x, own_weights, lora_A, lora_B, own_biases, scaling, p, impl)
        for i, y in zip(adapted, outputs, strict=True):
            ys[i] = y
    for i, (A, B) in enumerate(zip(lora_As, lora_Bs, strict=True)):
        if ys[i] is None and A is not None and B is not None:
            ys[i] = ops.lora_linear(x, weights[i], A, B, biases[i], None, 0.0, 0.0, impl)
    return [torch.nn.functional.linear(x, weights[i], biases[i]) if y is None else y for i, y in enumerate(ys)]


def _member(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    bias: torch.Tensor | None,
    scaling: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """A, B and scaling of one member of a group, checked; None where its base layer is alone."""
    if lora_A is None and lora_B is None:
        lora_A, lora_B, scaling = weight.new_empty((1, weight.shape[1])), weight.new_empty((weight.shape[0], 1)), 0.0
    _check(x, weight, lora_A, lora_B, bias)  # type: ignore[arg-type]
    assert lora_A is not None and lora_B is not None
    if isinstance(scaling, torch.Tensor):
        return lora_A, lora_B * _one_element(scaling).to(lora_B), 1.0
    if not _is_finite(scaling):
        raise ValueError(f"scaling is {scaling}; expected a finite number, such as lora_alpha / r")
    return (lora_A, lora_B, scaling) if scaling != 0 else None


def row_norm(weight: torch.Tensor) -> torch.Tensor:
    """‖W‖ by rows of weight [N, K]: [N] float32 (float64 for a float64 weight), for `lora_weight_norm`."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is {_shape(weight)}, {weight.dtype}; expected [N, K] of a float dtype")
    return ops.row_norm(weight)


def lora_weight_norm(
    weight: torch.Tensor,
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
    _check(weight, weight, lora_A, lora_B, None)
    base_norm = row_norm(weight) if base_norm is None else base_norm
    if base_norm.shape != weight.shape[:1]:
        raise ValueError(f"base_norm is {_shape(base_norm)}; expected [{weight.shape[0]}], from row_norm(weight)")
    if isinstance(scaling, torch.Tensor):
        lora_B = lora_B.detach() * _one_element(scaling).to(lora_B)
        scaling = 1.0
    return ops.lora_weight_norm(weight, lora_A, lora_B, base_norm, scaling, impl)


def explain(
    x: torch.Tensor,
    weight: torch.Tensor | Sequence[torch.Tensor] | None = None,
    lora_A: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    plan: BatchPlan | None = None,
    dropout_p: float | torch.Tensor = 0.0,
    impl: str = "auto",
) -> Explanation:
    """Which implementation `lora_linear` takes for x, and why; with weight and lora_A, its launches and configs too.

    The launches are of forward and backward, with all gradients but the weight's and with a contiguous dy.

    With a `plan` it is `multi_lora_linear` that is explained, with lists for several projections, and with its
    `dropout_p`, which needs tiles. A config comes from the user's tuning table, the shipped one, or the heuristic.

    Raises what `lora_linear` would raise for this `impl`.
    """
    resolved, why = explain_impl(impl, x.device, x.dtype)
    if resolved == "torch" or weight is None or lora_A is None:
        return Explanation(resolved, why)
    if plan is not None:
        weights = [weight] if isinstance(weight, torch.Tensor) else list(weight)
        first = lora_A if isinstance(lora_A, torch.Tensor) else lora_A[0]
        width = plan.max_rank if plan.num_pages is not None else first.shape[-2]
        dropout = isinstance(dropout_p, torch.Tensor) or dropout_p > 0
        return Explanation(resolved, why, _multi_kernels(x, weights, width, plan, dropout))
    if not (isinstance(weight, torch.Tensor) and isinstance(lora_A, torch.Tensor)):
        raise TypeError("weight and lora_A are lists; expected tensors, or plan= as multi_lora_linear has it")
    return Explanation(resolved, why, _kernels(x, weight, lora_A.shape[0]))


def _kernels(x: torch.Tensor, weight: torch.Tensor, r: int) -> tuple[str, ...]:
    """The launches of forward and backward, as the kernels' launchers ask for their configs; dy taken as contiguous."""
    from lorakernels.kernels.descriptors import fits_descriptor

    (N, K), M, itemsize, device = weight.shape, math.prod(x.shape[:-1]), x.element_size(), x.device
    # y and dx are new, and dy is taken to be: nothing but the length of their rows may keep them from a descriptor.
    y_fits, dx_fits = N * itemsize % 16 == 0, K * itemsize % 16 == 0
    forward_tma = y_fits and fits_descriptor(x.reshape(M, K)) and _fits(weight, fits_descriptor)
    backward_tma = M > 0 and y_fits and dx_fits and _fits(weight.t(), fits_descriptor)
    dA = ("outer (backward, dA)", "outer", K, K, False)
    dB = ("outer (backward, dB)", "outer", N, N, False)
    if takes_few_tokens_form(M, r, itemsize):
        launches = [
            ("few_tokens", "few_tokens", N, K, False),
            ("few_tokens (backward, dx and G)", "few_tokens", K, N, False),
            dB,
            dA,
        ]
    else:
        one_pass = takes_one_pass(N, r, itemsize, choose_with_source("outer", M, N, N, r, itemsize, device)[0].BLOCK_N)
        launches = [
            ("shrink", "shrink", K, K, False),
            ("linear_expand", "linear_expand", N, K, forward_tma),
            *(
                [("outer (backward, dB and G)", *dB[1:])]
                if one_pass
                else [("shrink (backward, G)", "shrink", N, N, False), dB]
            ),
            dA,
            ("linear_expand (backward, dx)", "linear_expand", K, N, backward_tma),
        ]
    kernels = []
    for title, operation, outputs, summed, tma in launches:
        config, source = choose_with_source(operation, M, outputs, summed, r, itemsize, device, tma)
        kernels.append(f"{title}: {config} ({source})")
    return tuple(kernels)


def _fits(weight: torch.Tensor, fits_descriptor: Callable[[torch.Tensor], bool]) -> bool:
    return fits_descriptor(weight if weight.stride(1) == 1 else weight.t())


def _multi_kernels(
    x: torch.Tensor, weights: list[torch.Tensor], width: int, plan: BatchPlan, dropout: bool
) -> tuple[str, ...]:
    """The launches of forward and backward for many adapters, as the kernels' launchers ask for their configs."""
    slices, K, N = len(weights), x.shape[-1], max(weight.shape[0] for weight in weights)
    T, itemsize = math.prod(x.shape[:-1]), x.element_size()
    launches = [
        ("multi_shrink", "S", K, slices, dropout),
        ("multi_expand", "y", N, slices, False),
        ("multi_shrink", "backward, G", N, slices, False),
        ("multi_expand", "backward, dx", K, 1, slices > 1 or dropout),
        ("multi_outer", "backward, dA", K, slices, False),
        ("multi_outer", "backward, dB", N, slices, False),
    ]
    kernels = []
    for operation, product, cols, number, tiles in launches:
        batch = Batch(plan.num_slots, number, tiles)
        config, source = choose_with_source(operation, T, cols, cols, width, itemsize, x.device, batch=batch)
        form = "a program a token" if config.BLOCK_M == 1 else f"tiles of {config.BLOCK_M} tokens of one slot"
        kernels.append(f"{operation} ({product}), {form}: {config} ({source})")
    base = f"torch's linear for x Wᵀ; {T} tokens of at most {plan.num_slots} adapters"
    return (base, *kernels)


def _check(
    x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Raise, naming the argument, unless shapes, dtypes and devices fit together."""
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"x {_shape(x)} and weight {_shape(weight)} do not fit: expected x [..., K] and weight [N, K] with the "
            "same K (weight as in torch.nn.Linear: [out_features, in_features])"
        )
    N, K = weight.shape
    if lora_A.dim() != 2 or lora_A.shape[1] != K or lora_A.shape[0] < 1:
        hint = "; transposed?" if lora_A.dim() == 2 and lora_A.shape[0] == K else ""
        raise ValueError(f"lora_A is {_shape(lora_A)}; expected [r, {K}] with r ≥ 1, for weight {_shape(weight)}{hint}")
    r = lora_A.shape[0]
    if lora_B.dim() != 2 or lora_B.shape[0] != N or lora_B.shape[1] != r:
        hint = "; transposed?" if lora_B.dim() == 2 and tuple(lora_B.shape) == (r, N) else ""
        raise ValueError(f"lora_B is {_shape(lora_B)}; expected [{N}, {r}], for lora_A {_shape(lora_A)}{hint}")
    if not x.is_floating_point() or weight.dtype != x.dtype:
        raise TypeError(
            f"x is {x.dtype} and weight is {weight.dtype}; expected one float dtype for both "
            "(only lora_A and lora_B may differ): cast one of them, or use torch.autocast"
        )
    if not (lora_A.is_floating_point() and lora_B.is_floating_point()):
        raise TypeError(f"lora_A is {lora_A.dtype} and lora_B is {lora_B.dtype}; expected float dtypes")
    device = x.device
    if weight.device != device or lora_A.device != device or lora_B.device != device:
        raise ValueError(
            f"x is on {device}, weight on {weight.device}, lora_A on {lora_A.device}, lora_B on {lora_B.device}; "
            "expected one device: move them with .to(x.device)"
        )
    if bias is not None:
        if not isinstance(bias, torch.Tensor):
            raise TypeError(f"bias must be a tensor or None; got {type(bias).__name__}")
        if bias.dim() != 1 or bias.shape[0] != N:
            raise ValueError(f"bias is {_shape(bias)}; expected [{N}], for weight {_shape(weight)}")
        if bias.dtype != x.dtype or bias.device != device:
            raise TypeError(f"bias is {bias.dtype} on {bias.device}; expected x's: {x.dtype} on {device}")


def _check_row_scale(row_scale: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    if row_scale.dim() != 1 or row_scale.shape[0] != weight.shape[0]:
        raise ValueError(f"row_scale is {_shape(row_scale)}; expected [{weight.shape[0]}], for weight {_shape(weight)}")
    if not row_scale.is_floating_point() or row_scale.device != x.device:
        raise TypeError(f"row_scale is {row_scale.dtype} on {row_scale.device}; expected a float dtype on {x.device}")


def _is_finite(scaling: float) -> bool:
    try:
        return -math.inf < scaling < math.inf  # math.isfinite of a dynamic float breaks the graph
    except TypeError:
        raise TypeError(f"scaling is {scaling!r}; expected a number, such as lora_alpha / r, or a tensor") from None


def _one_element(scaling: torch.Tensor) -> torch.Tensor:
    if scaling.numel() != 1:
        raise ValueError(f"scaling is a tensor of shape {_shape(scaling)}; expected a number or one element")
    return scaling.reshape(())


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))
