"""Which calls took the fused path, which the multi-adapter product, an x, and a stand-in for vLLM."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_stand_in import METHODS, SOURCES

from lorakernels.integrations import peft_mixed, vllm
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


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every multi-adapter product, and its plan."""
    calls: list[tuple[Any, ...]] = []
    real: Callable[..., Any] = peft_mixed._product

    def spy(pack: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> Any:
        calls.append((pack, x, weight, bias, pack.plan(x[0, ..., 0].numel())))
        return real(pack, x, weight, bias)

    monkeypatch.setattr(peft_mixed, "_product", spy)
    return calls


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `vllm` of `vllm_stand_in`."""
    root = tmp_path / "vllm"
    sources = SOURCES | {
        f"lora/punica_wrapper/{module}.py": METHODS.format(name=name) for name, module in vllm.PARENTS.items()
    }
    for name, source in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    yield root
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "vllm":
            del sys.modules[name]
    vllm.wrapper_over.cache_clear()
