"""Which implementation a call takes and why, and what it launches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from lorakernels.arguments import no_tensor
from lorakernels.backend import Explanation, explain_impl
from lorakernels.configs.heuristic import Batch
from lorakernels.configs.table import choose_with_source, takes_few_tokens_form, takes_one_pass
from lorakernels.plan import BatchPlan


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
    if not isinstance(x, torch.Tensor):
        raise no_tensor("x", x)
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
