"""Whether a step's results are right, before anybody looks at its time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from lorakernels import formula
from lorakernels.testing.budget import budget, error
from lorakernels.tools.bench.orders import SCALING
from lorakernels.tools.bench.peer import Peer, Results
from lorakernels.tools.bench.peers import Tensors
from lorakernels.tools.bench.registry import Case

# A mask of n elements may keep so many standard deviations more or fewer than n · (1 - p).
_SIGMAS = 6.0


@dataclass
class Exact:
    """The case in float64: the base products once, the low-rank terms under any mask."""

    case: Case
    tensors: Tensors
    _base: dict[str, torch.Tensor] = field(default_factory=dict)

    def results(self, keep: torch.Tensor | None, adapted: bool) -> Results:
        if not self._base:
            x, weight = self.tensors.x.detach().double(), self.tensors.weight.double()
            self._base = {"y": x @ weight.t(), "x": self.tensors.dy.double() @ weight}
        if not adapted:
            return dict(self._base)
        none = self.tensors.weight.new_zeros(())
        low_rank = _formula(self.tensors, keep, torch.float64, weight=none)
        return {name: value + self._base[name] if name in self._base else value for name, value in low_rank.items()}

    def eager(self, keep: torch.Tensor | None, adapted: bool) -> Results:
        """The same in plain torch, in the case's own dtype: what the budget is made of."""
        t = self.tensors
        if not adapted:
            return {"y": t.x.detach() @ t.weight.t(), "x": t.dy @ t.weight}
        return _formula(t, keep, self.case.torch_dtype, weight=t.weight)


def _formula(tensors: Tensors, keep: torch.Tensor | None, dtype: torch.dtype, weight: torch.Tensor) -> Results:
    x, dy, A, B = (t.detach().to(dtype) for t in (tensors.x, tensors.dy, tensors.lora_A, tensors.lora_B))
    keep = None if keep is None else keep.to(dtype)
    if weight.dim() == 0:  # only the low-rank terms: a zero weight would be multiplied
        adapted = x if keep is None else x * keep
        s, g = adapted @ A.t(), SCALING * (dy @ B)
        through = g @ A
        return {
            "y": SCALING * (s @ B.t()),
            "x": through if keep is None else through * keep,
            "lora_A": g.t() @ adapted,
            "lora_B": SCALING * (dy.t() @ s),
        }
    y = formula.lora_linear(x, weight, A, B, None, SCALING, keep)
    dx, _, dA, dB, *_ = formula.lora_linear_backward(dy, x, weight, A, B, SCALING, keep)
    assert dx is not None and dA is not None and dB is not None
    return {"y": y, "x": dx, "lora_A": dA, "lora_B": dB}


def verify(
    peer: Peer[Case, Tensors], case: Case, tensors: Tensors, exact: Exact, seed: int = 0
) -> tuple[float, str | None]:
    """The largest error over its budget, of y and every gradient, and what is wrong (None: nothing).

    The budget is twice eager torch's own error in this dtype and one rounding. With dropout, the mask that the peer
    draws is found by a run with a zero weight, where dx is zero just where x was dropped; the same seed draws it again.
    """
    keep = None
    if case.dropout and peer.adapted:
        torch.manual_seed(seed)
        blank = dataclasses.replace(tensors, weight=torch.zeros_like(tensors.weight))
        kept = peer.make(case, blank)()["x"] != 0
        p, n = case.dropout, kept.numel()
        share = float(kept.double().mean())
        if abs(share - (1 - p)) > _SIGMAS * (p * (1 - p) / n) ** 0.5 + 2 / (1 << 16):
            return float("inf"), f"it keeps {share:.4f} of x; expected {1 - p:g}"
        keep = kept.double() * peer.keep_scale(p)
    torch.manual_seed(seed)
    actual = peer.make(case, tensors)()
    return held(actual, exact.results(keep, peer.adapted), exact.eager(keep, peer.adapted), case.torch_dtype)


def held(actual: Results, expected: Results, eager: Results, dtype: torch.dtype) -> tuple[float, str | None]:
    """The largest error of `actual` over its budget, and what is wrong (None: nothing)."""
    worst, wrong = 0.0, None
    for name, value in expected.items():
        if name not in actual or actual[name].shape != value.shape:
            return float("inf"), f"no {name} of shape {list(value.shape)} came back"
        reached, allowed = error(actual[name], value), budget(eager[name], value, dtype)
        if reached / allowed > worst:
            worst = reached / allowed
        if wrong is None and not reached <= allowed:
            wrong = f"{name}: error {reached:.3g} is over {allowed:.3g}"
    return worst, wrong
