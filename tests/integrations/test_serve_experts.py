"""An AdapterStore whose adapters reach a mixture's experts: each row as its adapter alone would answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import Mixture, assert_same, shake
from torch import nn

import lorakernels as lk
from lorakernels.files.reading import AdapterFileError
from lorakernels.serving.errors import CapacityError

ROWS = ["a", None, "b", "c", "a"]


class Model(nn.Module):
    """A linear layer that gives a batch its rows, and a mixture behind it."""

    def __init__(self, name: str = "qwen3_moe", **options: Any) -> None:
        super().__init__()
        mixture = Mixture(name, **options)
        self.targets, self.block = mixture.targets, mixture.block
        torch.manual_seed(3)
        self.q_proj = nn.Linear(16, 16).to(next(mixture.parameters()).dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(self.q_proj(x))
        y = y[0] if isinstance(y, tuple) else y
        return y.view(x.shape)


def saved(name: str, folder: Path, **options: Any) -> None:
    """Adapters of different ranks and targets: a has both stacks and the linear, b both, c one."""
    for i, (adapter, fields) in enumerate(
        {
            "a": {"target_modules": ["q_proj"], "rank_pattern": {"down_proj": 3}},
            "b": {"lora_alpha": 5},
            "c": {"which": slice(1, 2), "r": 4},
        }.items()
    ):
        model = Model(name, **options)
        targets = model.targets[fields.pop("which", slice(None))]
        lk.inject(model, lk.LoRAConfig(**{"r": 2, "target_parameters": targets, **fields}))
        shake(model, seed=i)
        lk.save_adapter(model, folder / adapter)


def alone(name: str, folder: Path, adapter: str | None, x: torch.Tensor, **options: Any) -> torch.Tensor:
    model = Model(name, **options)
    return model(x) if adapter is None else lk.load_adapter(model, folder / adapter)(x)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4"])
def test_each_row_is_its_adapter_s(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path)
    model = Model(name)
    x = torch.randn(len(ROWS), 3, 16, dtype=torch.float64, requires_grad=True)
    plain = model(x)
    store = lk.AdapterStore(model, max_adapters=3, max_rank=4, root=tmp_path)
    for adapter in "abc":
        store.load(adapter)
    with store.batch(ROWS):
        y = model(x)
        dx = torch.autograd.grad(y.square().sum(), x)[0]
    for i, adapter in enumerate(ROWS):
        row = x[i : i + 1].detach().requires_grad_()
        expected = alone(name, tmp_path, adapter, row)
        assert_same({"y": y[i : i + 1]}, {"y": expected}, 1e-13)
        assert_same({"dx": dx[i]}, {"dx": torch.autograd.grad(expected.square().sum(), row)[0][0]}, 1e-13)
    with store.batch([None] * len(ROWS)):
        assert torch.equal(model(x), plain)
    lengths = [1, 4, 3, 5, 2]
    with store.batch(ROWS, lengths=lengths), torch.no_grad():
        packed = model(x.view(1, -1, 16))
    same = alone(name, tmp_path, "b", x.view(1, -1, 16)[:, 5:8])
    assert_same({"y": packed[:, 5:8]}, {"y": same}, 1e-13)
    store.evict("b")
    store.load("b", tmp_path / "c")
    with store.batch(["b"]):
        assert_same({"y": model(x[:1])}, {"y": alone(name, tmp_path, "c", x[:1])}, 1e-13)
    store.close()
    assert torch.equal(model(x), plain) and type(model.block.experts) is type(Model(name).block.experts)


def hooked(model: Model) -> None:
    model.block.experts.register_forward_hook(lambda *_: None)


REFUSED: list[tuple[Callable[[Model], None], dict[str, Any], type[Exception], str]] = [
    (hooked, {}, AdapterFileError, "experts that cannot be adapted: the experts have hooks"),
    (lambda _: None, {"invariant": True}, AdapterFileError, "how many rows one multiplies depends on the others"),
    (lambda _: None, {"max_rank": 2}, CapacityError, "has rank 3; the store takes at most max_rank=2"),
]


@pytest.mark.parametrize(("change", "options", "error", "message"), REFUSED, ids=[case[3] for case in REFUSED])
def test_refused(
    change: Callable[[Model], None], options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    saved("qwen3_moe", tmp_path)
    model = Model()
    change(model)
    store = lk.AdapterStore(model, **options)
    with pytest.raises(error, match=re.escape(message)):
        store.load("a", tmp_path / "a")


def test_no_other_adapter_beside_a_store_s(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path)
    model = Model()
    store = lk.AdapterStore(model, root=tmp_path)
    store.load("a")
    with pytest.raises(TypeError, match=r"target 'block.experts.gate_up_proj' is served by an AdapterStore"):
        lk.inject(model, lk.LoRAConfig(target_parameters=model.targets))
