"""What the tuner runs: each operation on random tensors, and what must come out."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.table import forced_configs
from lorakernels.dropout import drop_threshold, inverse_keep
from lorakernels.eager.dropout import unpack_mask
from lorakernels.kernels.adapters import factor_A, factor_B
from lorakernels.kernels.few_tokens import few_tokens
from lorakernels.kernels.linear_expand import linear_expand
from lorakernels.kernels.multi_expand import multi_expand
from lorakernels.kernels.multi_outer import multi_outer
from lorakernels.kernels.multi_shrink import multi_shrink
from lorakernels.kernels.outer import dy_pass, grad_A
from lorakernels.kernels.shrink import shrink
from lorakernels.kernels.tiles import sum_planes
from lorakernels.plan import BatchPlan, PlanTensors
from lorakernels.testing.budget import budget, error
from lorakernels.tools.tune.problem import Problem

_SCALE = 0.5
Outputs = tuple[torch.Tensor, ...]


class Inputs(NamedTuple):
    """Tensors for every operation. What ends in _t is stored transposed, as backward finds it."""

    x: torch.Tensor  # [M, K]
    z: torch.Tensor  # [M, N]
    weight: torch.Tensor  # [N, K]
    weight_t: torch.Tensor  # [K, N]
    lora_A: torch.Tensor  # [r, K]
    lora_A_t: torch.Tensor  # [K, r]
    lora_B: torch.Tensor  # [N, r]
    lora_B_t: torch.Tensor  # [r, N]
    s: torch.Tensor  # [M, r]
    mask: torch.Tensor | None  # [M, ceil(N / 8)], bits
    seed: torch.Tensor | None
    threshold: int

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self if isinstance(t, torch.Tensor))


class MultiInputs(NamedTuple):
    """Tensors for the operations for many adapters, each of rank r and with as many tokens as the others."""

    x: torch.Tensor  # [M, K]
    lora_A: torch.Tensor  # [slots, r, K]
    lora_B: torch.Tensor  # [slots, K, r]
    s: torch.Tensor  # [M, r] float32
    mask: torch.Tensor | None  # [M, ceil(K / 8)], bits
    seed: torch.Tensor | None
    threshold: int
    token_slots: torch.Tensor  # [M]
    plan: PlanTensors

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self if isinstance(t, torch.Tensor))


def make_inputs(problem: Problem, device: torch.device) -> Inputs | MultiInputs:
    """Random, never zeros: zeros save power, and power is speed. What an operation does not read is empty."""
    return _multi_inputs(problem, device) if problem.batch else _inputs(problem, device)


def _inputs(problem: Problem, device: torch.device) -> Inputs:
    operation, M, N, K, r, dtype, dropout, _ = problem
    whole, outer = operation in ("few_tokens", "linear_expand"), operation == "outer"

    def random(needed: bool, *shape: int) -> torch.Tensor:
        # Rows of unit length: sums stay in the range of float16.
        shape = shape if needed else (0, 0)
        return torch.randn(shape, device=device, dtype=torch.float32).mul_(shape[1] ** -0.5 if needed else 1).to(dtype)

    threshold = drop_threshold(dropout)
    mask = seed = None
    if threshold:
        mask = torch.randint(0, 256, (M, -(-N // 8)) if whole or outer else (0, 0), device=device, dtype=torch.uint8)
        seed = torch.randint(1 << 62, (1,), device=device)
    return Inputs(
        x=random(not outer, M, K),
        z=random(outer, M, N),
        weight=random(whole, N, K),
        weight_t=random(whole, K, N),
        lora_A=random(operation in ("shrink", "few_tokens"), r, K),
        lora_A_t=random(operation == "few_tokens", K, r),
        lora_B=random(whole or outer, N, r),
        lora_B_t=random(whole, r, N),
        s=random(outer or operation == "linear_expand", M, r),
        mask=mask,
        seed=seed,
        threshold=threshold,
    )


def _multi_inputs(problem: Problem, device: torch.device) -> MultiInputs:
    _, M, _, K, r, dtype, dropout, slots = problem

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.float32).mul_(shape[-1] ** -0.5)

    threshold = drop_threshold(dropout)
    mask = torch.randint(0, 256, (M, -(-K // 8)), device=device, dtype=torch.uint8) if threshold else None
    seed = torch.randint(1 << 62, (1,), device=device) if threshold else None
    plan = BatchPlan(slots, M, max_rank=r, device=device)
    token_slots = torch.arange(M, device=device) % slots
    ranks = torch.full((slots,), r, device=device)
    plan.update(token_slots, ranks, torch.full((slots,), inverse_keep(threshold), device=device))
    A, B = random(slots, r, K).to(dtype), random(slots, K, r).to(dtype)
    return MultiInputs(random(M, K).to(dtype), A, B, random(M, r), mask, seed, threshold, token_slots, plan.tensors)


def run(problem: Problem, config: KernelConfig, inputs: Inputs | MultiInputs) -> Outputs:
    """The operation with this config, in every layout that the table's key covers."""
    with forced_configs({problem.operation: config}):
        if isinstance(inputs, MultiInputs):
            return _run_multi(problem, inputs)
        i, keep = inputs, inverse_keep(inputs.threshold)
        if problem.operation == "shrink":
            s, drawn = shrink(i.x, i.lora_A, i.seed, i.threshold)
            return (s,) if drawn is None else (s, drawn)
        if problem.operation == "linear_expand":
            y = linear_expand(i.x, i.weight, i.s, i.lora_B, scale=_SCALE)
            return y, linear_expand(i.x, i.weight_t.t(), i.s, i.lora_B_t.t(), scale=keep, mask=i.mask)
        if problem.operation == "few_tokens":
            y, s, drawn = few_tokens(
                i.x, i.weight, i.lora_A, i.lora_B, y_scale=_SCALE, seed=i.seed, threshold=i.threshold
            )
            dx, g, _ = few_tokens(
                i.x, i.weight_t.t(), i.lora_A_t.t(), i.lora_B_t.t(), s_scale=_SCALE, y_scale=keep, mask=i.mask
            )
            return (y, s, dx, g) if drawn is None else (y, s, dx, g, drawn)
        if problem.operation == "outer":
            dy_g, dB, _ = dy_pass(i.z, i.lora_B, i.s, _SCALE, need_g=True, need_dB=True, bias_dtype=None)
            assert dy_g is not None and dB is not None
            return dy_g, dB, grad_A(i.z, i.s, i.mask, keep, i.z.dtype)
    raise ValueError(f"there is no operation {problem.operation!r}")


def _run_multi(problem: Problem, inputs: MultiInputs) -> Outputs:
    i, plan, thresholds = inputs, inputs.plan, None
    A, B = factor_A(i.lora_A), factor_B(i.lora_B)
    if problem.operation == "multi_shrink":
        if i.threshold:
            thresholds = torch.full_like(plan.scales, i.threshold, dtype=torch.int32)
        planes, drawn = multi_shrink([i.x], [A], plan, plan.scales, problem.r, i.seed, thresholds)
        g_planes, _ = multi_shrink([i.x], [B], plan, plan.scales, problem.r)
        s, g = (p.new_empty(p.shape[2:]) if len(p) > 1 else p[0, 0] for p in (planes, g_planes))
        for total, parts in ((s, planes), (g, g_planes)):
            if len(parts) > 1:
                sum_planes(parts[:, 0], total)
        return (s, g) if drawn is None else (s, g, drawn)
    if problem.operation == "multi_expand":
        # Added in place: a copy for each run, the same for every config.
        y, dx = i.x.clone(), i.x.clone()
        multi_expand(i.s[None, None], [B], plan, [y])
        multi_expand(i.s[None, None], [A], plan, [dx], i.mask)
        return y, dx
    dA, dB = torch.empty_like(i.lora_A), torch.empty_like(i.lora_B)
    multi_outer([i.x], i.s[None], [factor_A(dA)], plan, i.mask)
    multi_outer([i.x], i.s[None], [factor_B(dB)], plan)
    return dA, dB


def _multi_formula(problem: Problem, inputs: MultiInputs, drawn: torch.Tensor | None, dtype: torch.dtype) -> Outputs:
    x, A, B, s = (t.to(dtype) for t in inputs[:4])
    mask = inputs.mask if drawn is None else drawn
    kept = x if mask is None else x * unpack_mask(mask, problem.K).to(dtype)
    scale, of_slots = inverse_keep(inputs.threshold), []
    for slot in range(problem.slots):
        rows = inputs.token_slots == slot
        if problem.operation == "multi_shrink":
            of_slots.append((kept[rows] @ A[slot].t() * scale, x[rows] @ B[slot] * scale))
        elif problem.operation == "multi_expand":
            low = s[rows] @ A[slot]
            dropped = low if mask is None else low * unpack_mask(mask, problem.K)[rows].to(dtype)
            of_slots.append((x[rows] + s[rows] @ B[slot].t(), x[rows] + dropped))
        else:
            of_slots.append((s[rows].t() @ kept[rows], x[rows].t() @ s[rows]))
    firsts, seconds = zip(*of_slots, strict=True)
    if problem.operation == "multi_outer":
        return torch.stack(firsts), torch.stack(seconds)
    order = torch.argsort(inputs.token_slots, stable=True).argsort()
    return torch.cat(firsts)[order], torch.cat(seconds)[order]


def formula(problem: Problem, inputs: Inputs | MultiInputs, drawn: torch.Tensor | None, dtype: torch.dtype) -> Outputs:
    """What `run` returns, but for drawn masks, in plain torch and in this dtype. `drawn` is the mask over x."""
    if isinstance(inputs, MultiInputs):
        return _multi_formula(problem, inputs, drawn, dtype)
    operation, keep = problem.operation, inverse_keep(inputs.threshold)
    x, z, weight, weight_t, A, A_t, B, B_t, s = (t.to(dtype) for t in inputs[:9])
    kept_x = 1.0 if drawn is None else unpack_mask(drawn, problem.K).to(dtype)
    kept = 1.0 if inputs.mask is None or inputs.mask.numel() == 0 else unpack_mask(inputs.mask, problem.N).to(dtype)
    if operation == "shrink":
        return ((x * kept_x) @ A.t() * keep,)
    if operation == "linear_expand":
        return x @ weight.t() + _SCALE * (s @ B.t()), x @ weight_t + keep * kept * (s @ B_t)
    if operation == "few_tokens":
        low, g = (x * kept_x) @ A.t() * keep, _SCALE * (x @ A_t)
        return x @ weight.t() + _SCALE * (low @ B.t()), low, x @ weight_t + keep * kept * (g @ B_t), g
    return _SCALE * (z @ B), _SCALE * (z.t() @ s), keep * (s.t() @ (z * kept))


class Check:
    """Whether outputs are right: within twice plain torch's error in the same dtype, and one rounding."""

    def __init__(self, problem: Problem, inputs: Inputs | MultiInputs, reference: Outputs) -> None:
        """`reference` is what the heuristic's config gave: dropout's mask must not depend on the config."""
        self.drawn = next((t for t in reference if t.dtype == torch.uint8), None)
        self.exact = formula(problem, inputs, self.drawn, torch.float64)
        eager = formula(problem, inputs, self.drawn, problem.dtype)
        self.allowed = [budget(e, x, problem.dtype) for e, x in zip(eager, self.exact, strict=True)]

    def fault(self, outputs: Outputs) -> str:
        """What is wrong; empty if nothing is."""
        for index, (exact, allowed) in enumerate(zip(self.exact, self.allowed, strict=True)):
            reached = error(outputs[index], exact)
            if not reached <= allowed:
                return f"wrong: output {index} has error {reached:.3g}, over {allowed:.3g}"
        if self.drawn is not None and not torch.equal(outputs[-1], self.drawn):
            return "wrong: dropout's mask differs"
        return ""
