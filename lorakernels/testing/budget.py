"""How far a result may be from the truth: twice as far as plain torch in the same dtype, and one rounding."""

from __future__ import annotations

import torch


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """‖actual - exact‖ / ‖exact‖ in float64; the norm of the difference where exact is zero. NaN is infinitely far."""
    actual, exact = actual.detach(), exact.detach()
    difference = torch.linalg.vector_norm(actual.double() - exact.double())
    norm = torch.linalg.vector_norm(exact.double())
    value = float(difference / norm) if norm > 0 else float(difference)
    return value if value == value else float("inf")


def budget(eager: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> float:
    """Twice eager torch's own error in `dtype`, plus one rounding to it (half its spacing at 1)."""
    return 2 * error(eager, exact) + torch.finfo(dtype).eps / 2


def assert_within_budget(
    actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, name: str = "result"
) -> None:
    """`actual` has exact's shape and lies within `budget` of it."""
    assert actual.shape == exact.shape, f"{name} is {list(actual.shape)}; expected {list(exact.shape)}"
    reached, allowed = error(actual, exact), budget(eager, exact, dtype)
    assert reached <= allowed, f"{name}: error {reached:.3g} is over {allowed:.3g} (eager: {error(eager, exact):.3g})"
