"""What the tuner runs: each operation on random tensors, and what must come out."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.heuristic import MULTI_OPERATIONS, cdiv
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
    """Tensors for every operation; what one does not read is empty. What ends in _t is stored transposed, as backward
    finds it. For many adapters lora_A and lora_B have a slot more in front, and N is K.
    """

    x: torch.Tensor  # [M, K]
    z: torch.Tensor  # [M, N]
    weight: torch.Tensor  # [N, K]
    weight_t: torch.Tensor  # [K, N]
    lora_A: torch.Tensor  # [r, K]
    lora_A_t: torch.Tensor  # [K, r]
    lora_B: torch.Tensor  # [N, r]
    lora_B_t: torch.Tensor  # [r, N]
    s: torch.Tensor  # [M, r], for many adapters in float32
    mask: torch.Tensor | None  # [M, ceil(N / 8)], bits
    seed: torch.Tensor | None
    threshold: int
    plan: PlanTensors | None  # token after token takes the next slot; each is of rank r

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self if isinstance(t, torch.Tensor))


_READ = {
    "shrink": ("x", "lora_A"),
    "linear_expand": ("x", "weight", "weight_t", "lora_B", "lora_B_t", "s"),
    "few_tokens": ("x", "weight", "weight_t", "lora_A", "lora_A_t", "lora_B", "lora_B_t"),
    "outer": ("z", "lora_B", "s"),
} | dict.fromkeys(MULTI_OPERATIONS, ("x", "lora_A", "lora_B", "s"))


def make_inputs(problem: Problem, device: torch.device) -> Inputs:
    """Random, never zeros: zeros save power, and power is speed."""
    operation, M, N, K, r, dtype, dropout, slots = problem
    threshold, many = drop_threshold(dropout), problem.batch is not None
    stack = (slots,) if many else ()
    shapes = {
        **{"x": (M, K), "z": (M, N), "weight": (N, K), "weight_t": (K, N), "lora_A_t": (K, r), "lora_B_t": (r, N)},
        **{"lora_A": (*stack, r, K), "lora_B": (*stack, N, r), "s": (M, r)},
    }
    tensors = {}
    for name, shape in shapes.items():
        shape = shape if name in _READ[operation] else (0, 0)
        # Rows of unit length: sums stay in the range of float16.
        plain = torch.randn(shape, device=device, dtype=torch.float32).mul_(max(shape[-1], 1) ** -0.5)
        tensors[name] = plain.to(torch.float32 if many and name == "s" else dtype)
    mask = seed = plan = None
    if threshold:
        mask = torch.randint(256, (M if operation != "shrink" else 0, cdiv(N, 8)), device=device, dtype=torch.uint8)
        seed = torch.randint(1 << 62, (1,), device=device)
    if many:
        batch = BatchPlan(slots, M, max_rank=r, device=device)
        ranks, scalings = (torch.full((slots,), each, device=device) for each in (r, inverse_keep(threshold)))
        batch.update(torch.arange(M, device=device) % slots, ranks, scalings)
        plan = batch.tensors
    return Inputs(**tensors, mask=mask, seed=seed, threshold=threshold, plan=plan)


def run(problem: Problem, config: KernelConfig, inputs: Inputs) -> Outputs:
    """The operation with this config, in every layout that the table's key covers; last the mask that it has drawn."""
    i, keep = inputs, inverse_keep(inputs.threshold)
    outputs: tuple[torch.Tensor | None, ...]
    with forced_configs({problem.operation: config}):
        if i.plan is not None:
            outputs = _run_multi(problem, i, i.plan)
        elif problem.operation == "shrink":
            outputs = shrink(i.x, i.lora_A, i.seed, i.threshold)
        elif problem.operation == "linear_expand":
            y = linear_expand(i.x, i.weight, i.s, i.lora_B, scale=_SCALE)
            outputs = y, linear_expand(i.x, i.weight_t.t(), i.s, i.lora_B_t.t(), scale=keep, mask=i.mask)
        elif problem.operation == "few_tokens":
            y, s, drawn = few_tokens(
                i.x, i.weight, i.lora_A, i.lora_B, y_scale=_SCALE, seed=i.seed, threshold=i.threshold
            )
            dx, g, _ = few_tokens(
                i.x, i.weight_t.t(), i.lora_A_t.t(), i.lora_B_t.t(), s_scale=_SCALE, y_scale=keep, mask=i.mask
            )
            outputs = y, s, dx, g, drawn
        else:
            dB, dA = torch.empty_like(i.lora_B), i.z.new_empty((i.s.shape[1], i.z.shape[1]))
            dy_g = dy_pass(i.z, i.lora_B, i.s, _SCALE, True, dB, None)
            grad_A(i.z, i.s, i.mask, keep, dA)
            outputs = dy_g, dB, dA
    return tuple(t for t in outputs if t is not None)


def _run_multi(problem: Problem, i: Inputs, plan: PlanTensors) -> tuple[torch.Tensor | None, ...]:
    A, B = factor_A(i.lora_A), factor_B(i.lora_B)
    if problem.operation == "multi_shrink":
        thresholds = torch.full_like(plan.scales, i.threshold, dtype=torch.int32) if i.threshold else None
        planes, drawn = multi_shrink([i.x], [A], plan, plan.scales, problem.r, i.seed, thresholds)
        g_planes, _ = multi_shrink([i.x], [B], plan, plan.scales, problem.r)
        s, g = (p.new_empty(p.shape[2:]) if len(p) > 1 else p[0, 0] for p in (planes, g_planes))
        for total, parts in ((s, planes), (g, g_planes)):
            if len(parts) > 1:
                sum_planes(parts[:, 0], total)
        return s, g, drawn
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


def formula(problem: Problem, inputs: Inputs, drawn: torch.Tensor | None, dtype: torch.dtype) -> Outputs:
    """What `run` returns, but for drawn masks, in plain torch and in this dtype. `drawn` is the mask over x."""
    operation, keep, mask = problem.operation, inverse_keep(inputs.threshold), inputs.mask
    x, z, weight, weight_t, A, A_t, B, B_t, s = (t.to(dtype) for t in inputs[:9])
    kept_x = x if drawn is None else x * unpack_mask(drawn, problem.K).to(dtype)
    kept = unpack_mask(mask, problem.N).to(dtype) if mask is not None and len(mask) else x.new_ones(problem.M, 1)
    if operation == "shrink":
        return (kept_x @ A.t() * keep,)
    if operation == "linear_expand":
        return x @ weight.t() + _SCALE * (s @ B.t()), x @ weight_t + keep * kept * (s @ B_t)
    if operation == "few_tokens":
        low, g = kept_x @ A.t() * keep, _SCALE * (x @ A_t)
        return x @ weight.t() + _SCALE * (low @ B.t()), low, x @ weight_t + keep * kept * (g @ B_t), g
    if operation == "outer":
        return _SCALE * (z @ B), _SCALE * (z.t() @ s), keep * (s.t() @ (z * kept))
    of_slots = []  # for many adapters
    for slot in range(problem.slots):
        mine = slice(slot, None, problem.slots)
        if operation == "multi_shrink":
            of_slots.append((kept_x[mine] @ A[slot].t() * keep, x[mine] @ B[slot] * keep))
        elif operation == "multi_expand":
            of_slots.append((x[mine] + s[mine] @ B[slot].t(), x[mine] + (s[mine] @ A[slot]) * kept[mine]))
        else:
            of_slots.append((s[mine].t() @ (x * kept)[mine], x[mine].t() @ s[mine]))
    firsts, seconds = zip(*of_slots, strict=True)
    if operation == "multi_outer":
        return torch.stack(firsts), torch.stack(seconds)
    tokens = torch.arange(problem.M, device=x.device)
    order = torch.cat([tokens[slot :: problem.slots] for slot in range(problem.slots)]).argsort()
    return torch.cat(firsts)[order], torch.cat(seconds)[order]


class Check:
    """Whether outputs are right: within twice plain torch's error in the same dtype, and one rounding."""

    def __init__(self, problem: Problem, inputs: Inputs, reference: Outputs) -> None:
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
