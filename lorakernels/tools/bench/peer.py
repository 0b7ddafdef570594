"""What a peer is, one way to write the layer; its tensors and steps; and whether their results are right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch.nn import Parameter

from lorakernels import formula
from lorakernels.configs.table import choose_with_source, forced_configs
from lorakernels.dropout import drop_threshold, inverse_keep
from lorakernels.nn.quantized import pack
from lorakernels.plan import BatchPlan
from lorakernels.quant.packed import PackedWeight
from lorakernels.testing.budget import budget, error
from lorakernels.tools.bench.registry import Case

SCALING = 2.0  # of every layer that is measured
_SIGMAS = 6.0  # a mask of n elements may keep so many standard deviations more or fewer than n · (1 - p)
Results = dict[str, torch.Tensor]  # y, and the gradients by name
Step = Callable[[], Results]
Layer = Callable[[], torch.Tensor]


@dataclass
class Tensors:
    """x [M, K], weight [N, K], A [r, K] and B [N, r] of each adapter, dy [M, N] of a training step, else empty."""

    case: Case
    x: torch.Tensor
    weight: torch.Tensor
    adapters: list[tuple[Parameter, Parameter]]
    dy: torch.Tensor
    slots: torch.Tensor  # [M] int64: the adapter of each token
    base: torch.Tensor | PackedWeight  # the weight as layers hold it

    @property
    def numbytes(self) -> int:
        return sum(t.nbytes for pair in ((self.x, self.base, self.dy), *self.adapters) for t in pair)

    @cached_property
    def pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[sum of ranks, K] and [sum of ranks, N]."""
        A, B = zip(*self.adapters, strict=True)
        return torch.cat(A), torch.cat([each.t() for each in B])

    @cached_property
    def stacks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[adapters, r, K] and [adapters, N, r], zero past an adapter's rank."""
        S, r = len(self.adapters), self.case.r
        A, B = self.x.new_zeros(S, r, self.case.K), self.x.new_zeros(S, self.case.N, r)
        for slot, (own_A, own_B) in enumerate(self.adapters):
            A[slot, : own_A.shape[0]], B[slot, :, : own_B.shape[1]] = own_A, own_B
        return A, B

    @cached_property
    def rows(self) -> list[torch.Tensor | slice]:
        """The tokens of each adapter: a slice where they lie together, else their numbers."""
        if not self.case.together:
            return [(self.slots == slot).nonzero()[:, 0] for slot in range(len(self.adapters))]
        ends = self.slots.bincount(minlength=len(self.adapters)).cumsum(0).tolist()
        return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]

    def plan(self, paged: bool) -> BatchPlan:
        """Of the batch, for the pages or for the stacks."""
        case, device = self.case, self.x.device
        ranks = torch.tensor(case.ranks, device=device)
        table, pages = None, None
        if paged:
            first, pages = ranks.cumsum(0) - ranks, sum(case.ranks)
            table = (first[:, None] + torch.arange(case.r, device=device)).int()
        plan = BatchPlan(len(ranks), case.M, max_rank=case.r, num_pages=pages, device=device)
        plan.update(self.slots, ranks, torch.full((len(ranks),), SCALING, device=device), table)
        return plan


def make_tensors(case: Case, device: torch.device | str, seed: int) -> Tensors:
    """Random tensors of the case, x, A and B of a training step needing gradients; whose a token is is drawn too."""
    generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(seed)
    trained = case.adapters is None

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        plain = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return plain.mul_(scale).to(case.torch_dtype)

    def factor(*shape: int, scale: float) -> Parameter:
        return Parameter(randn(*shape, scale=scale), requires_grad=trained)

    x, weight = randn(case.M, case.K).requires_grad_(trained), randn(case.N, case.K, scale=case.K**-0.5)
    base = weight if case.base == "dense" else pack(weight, case.base)
    return Tensors(
        case,
        x=x,
        weight=base.dense() if isinstance(base, PackedWeight) else weight,
        adapters=[(factor(r, case.K, scale=case.K**-0.5), factor(case.N, r, scale=r**-0.5)) for r in case.ranks],
        dy=randn(case.M, case.N) if trained else randn(0),
        slots=case.slots(seed).to(device),
        base=base,
    )


@dataclass(frozen=True)
class Peer:
    """A way to write the layer: `layer` prepares it for tensors, `why_not` says why it cannot run there."""

    name: str
    label: str
    layer: Callable[[Tensors], Layer]
    why_not: Callable[[Case, torch.device], str | None] = lambda case, device: None
    many: bool | None = None  # only for a batch of many adapters (True), or only for one adapter (False)
    adapter_bytes: Callable[[Case], int] = Case.adapter_bytes  # as it holds those of a batch
    adapted: bool = True
    cublas: bool | None = None  # of the kernels' base product: True, False, or as the table says
    in_order: bool = False  # whether no launch begins before, or runs beside, another
    counted: bool = True  # a compiler or a package starts its own kernels, which nobody here counts
    on_cpu: bool = True  # whether it is measured there without being named
    packed: bool = False  # whether it takes a packed weight

    def make(self, tensors: Tensors) -> Step:
        """A training step, forward and backward, on these tensors; a forward where x needs no gradient."""
        t, layer = tensors, self.layer(tensors)
        inputs = {"x": t.x}
        if self.adapted:
            inputs["lora_A"], inputs["lora_B"] = t.adapters[0]

        def step() -> Results:
            with base_product(t.case, t.x.device, self.cublas, self.in_order):
                if not t.x.requires_grad:
                    with torch.no_grad():
                        return {"y": layer()}
                y = layer()
                grads = torch.autograd.grad(y, tuple(inputs.values()), t.dy)
            return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}

        return step


def base_product(
    case: Case, device: torch.device, cublas: bool | None, in_order: bool = False
) -> AbstractContextManager[None]:
    """The base product by cuBLAS (True), by the kernel (False), or as the table says (None); all `in_order` or not."""
    if cublas is None and not in_order:
        return nullcontext()
    # A tensor descriptor asks that every row starts at a multiple of 16 bytes.
    tma = all(width * case.itemsize % 16 == 0 for width in (case.K, case.N))
    # Whoever records what a step asks for does not see this.
    expand = choose_with_source("linear_expand", case.M, case.N, case.K, case.r, case.itemsize, device, tma).config
    by = expand.cublas if cublas is None else cublas
    forced = {"linear_expand": dataclasses.replace(expand, cublas=by, dependent=expand.dependent and not in_order)}
    if in_order:
        outer = choose_with_source("outer", case.M, case.N, case.N, case.r, case.itemsize, device).config
        few = choose_with_source("few_tokens", case.M, case.N, case.K, case.r, case.itemsize, device).config
        forced |= {
            name: dataclasses.replace(c, side_stream=False) for name, c in (("outer", outer), ("few_tokens", few))
        }
    elif by is expand.cublas:
        return nullcontext()
    return forced_configs(forced)


def checker(tensors: Tensors) -> Callable[[Peer], tuple[float, str | None]]:
    """Holds a peer's y and gradients against float64: the largest error over its budget, and what is wrong (or None).

    The budget is twice eager torch's own error in this dtype and one rounding. With dropout, the mask that the peer
    draws is found by a run with a zero weight, where dx is zero just where x was dropped; the same seed draws it again.
    """
    dtype, p = tensors.case.torch_dtype, tensors.case.dropout

    @lru_cache
    def without_mask(adapted: bool) -> tuple[Results, Results]:
        return by_formula(tensors, torch.float64, adapted), by_formula(tensors, dtype, adapted)

    def check(peer: Peer) -> tuple[float, str | None]:
        if p and peer.adapted:
            torch.manual_seed(0)
            zeros = torch.zeros_like(tensors.weight)
            blank = dataclasses.replace(tensors, weight=zeros, base=zeros)
            kept = peer.make(blank)()["x"] != 0
            share = float(kept.double().mean())
            if abs(share - (1 - p)) > _SIGMAS * (p * (1 - p) / kept.numel()) ** 0.5 + 2 / (1 << 16):
                return float("inf"), f"it keeps {share:.4f} of x; expected {1 - p:g}"
            keep = kept.double() * (inverse_keep(drop_threshold(p)) if peer.name.startswith("ours") else 1 / (1 - p))
            expected, eager = (by_formula(tensors, to, True, keep.to(to)) for to in (torch.float64, dtype))
        else:
            expected, eager = without_mask(peer.adapted)
        torch.manual_seed(0)
        return _held(peer.make(tensors)(), expected, eager, dtype)

    return check


@torch.no_grad()
def by_formula(t: Tensors, dtype: torch.dtype, adapted: bool = True, keep: torch.Tensor | None = None) -> Results:
    """y, and the gradients of a training step, in `dtype`, one adapter after the other; `keep` is dropout's [M, K]."""
    x, weight, dy = (each.to(dtype) for each in (t.x, t.weight, t.dy))
    adapters = [(A.to(dtype), B.to(dtype)) for A, B in t.adapters]
    y = x @ weight.t()
    for rows, (A, B) in zip(t.rows, adapters, strict=True) if adapted else ():
        y[rows] = formula.lora_linear(x[rows], weight, A, B, scaling=SCALING, keep=keep)
    if t.case.adapters is not None:
        return {"y": y}
    if not adapted:
        return {"y": y, "x": dy @ weight}
    dx, _, dA, dB, *_ = formula.lora_linear_backward(dy, x, weight, *adapters[0], SCALING, keep)
    assert dx is not None and dA is not None and dB is not None
    return {"y": y, "x": dx, "lora_A": dA, "lora_B": dB}


def _held(actual: Results, expected: Results, eager: Results, dtype: torch.dtype) -> tuple[float, str | None]:
    worst, wrong = 0.0, None
    for name, value in expected.items():
        if name not in actual or actual[name].shape != value.shape:
            return float("inf"), f"no {name} of shape {list(value.shape)} came back"
        reached, allowed = error(actual[name], value), budget(eager[name], value, dtype)
        worst = max(worst, reached / allowed)
        if wrong is None and not reached <= allowed:
            wrong = f"{name}: error {reached:.3g} is over {allowed:.3g}"
    return worst, wrong
