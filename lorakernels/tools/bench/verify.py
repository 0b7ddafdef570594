"""Whether a step's results are right, before anybody looks at its time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from lorakernels import formula
from lorakernels.testing.budget import budget, error
from lorakernels.tools.bench.orders import SCALING
from lorakernels.tools.bench.peer import Peer, Results
from lorakernels.tools.bench.peers import Tensors
from lorakernels.tools.bench.registry import Case

# A mask of n elements may keep so many standard deviations more or fewer than n · (1 - p).
_SIGMAS = 6.0


def layer_checker(case: Case, tensors: Tensors) -> Callable[[Peer[Case, Tensors]], tuple[float, str | None]]:
    """Holds a peer's y and gradients against float64: the largest error over its budget, and what is wrong.

    The budget is twice eager torch's own error in this dtype and one rounding. With dropout, the mask that the peer
    draws is found by a run with a zero weight, where dx is zero just where x was dropped; the same seed draws it again.
    """
    without_mask: dict[bool, tuple[Results, Results]] = {}

    def check(peer: Peer[Case, Tensors]) -> tuple[float, str | None]:
        keep = None
        if case.dropout and peer.adapted:
            torch.manual_seed(0)
            blank = dataclasses.replace(tensors, weight=torch.zeros_like(tensors.weight))
            kept = peer.make(case, blank)()["x"] != 0
            p, n = case.dropout, kept.numel()
            share = float(kept.double().mean())
            if abs(share - (1 - p)) > _SIGMAS * (p * (1 - p) / n) ** 0.5 + 2 / (1 << 16):
                return float("inf"), f"it keeps {share:.4f} of x; expected {1 - p:g}"
            keep = kept.double() * peer.keep_scale(p)
        if keep is None and peer.adapted in without_mask:
            expected, eager = without_mask[peer.adapted]
        else:
            expected, eager = (_formula(tensors, keep, dtype, peer) for dtype in (torch.float64, case.torch_dtype))
            if keep is None:
                without_mask[peer.adapted] = expected, eager
        torch.manual_seed(0)
        return held(peer.make(case, tensors)(), expected, eager, case.torch_dtype)

    return check


def _formula(tensors: Tensors, keep: torch.Tensor | None, dtype: torch.dtype, peer: Peer[Case, Tensors]) -> Results:
    t = tensors
    x, weight, A, B, dy = (each.detach().to(dtype) for each in (t.x, t.weight, t.lora_A, t.lora_B, t.dy))
    if not peer.adapted:
        return {"y": x @ weight.t(), "x": dy @ weight}
    keep = None if keep is None else keep.to(dtype)
    y = formula.lora_linear(x, weight, A, B, None, SCALING, keep)
    dx, _, dA, dB, *_ = formula.lora_linear_backward(dy, x, weight, A, B, SCALING, keep)
    assert dx is not None and dA is not None and dB is not None
    return {"y": y, "x": dx, "lora_A": dA, "lora_B": dB}


def held(actual: Results, expected: Results, eager: Results, dtype: torch.dtype) -> tuple[float, str | None]:
    """The largest error of `actual` over its budget, and what is wrong (None: nothing)."""
    worst, wrong = 0.0, None
    for name, value in expected.items():
        if name not in actual or actual[name].shape != value.shape:
            return float("inf"), f"no {name} of shape {list(value.shape)} came back"
        reached, allowed = error(actual[name], value), budget(eager[name], value, dtype)
        worst = max(worst, reached / allowed)
        if wrong is None and not reached <= allowed:
            wrong = f"{name}: error {reached:.3g} is over {allowed:.3g}"
    return worst, wrong
