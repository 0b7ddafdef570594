"""Which calls took the fused path, and an x."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorakernels.nn import adapted


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keyword arguments of every call that took the fused path."""
    calls: list[dict[str, Any]] = []

    def spy_on(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(kwargs)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)

    spy_on(adapted, "lora_linear")
    spy_on(adapted.ops, "small_lora_linear")
    return calls


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 7, 24, dtype=torch.float64)  # for `accelerated.Two`
