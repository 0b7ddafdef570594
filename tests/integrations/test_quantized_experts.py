"""Mixtures whose experts are packed by `quantize`: their unpacked numbers', adapted, trained and served."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import Mixture, assert_same, shake

import lorakernels as lk
from lorakernels.nn.experts import stack_names, stack_weight
from lorakernels.testing.guards import watch_allocations

SIZES: dict[str, Any] = {"hidden": 64, "inner": 64, "dtype": torch.float32}


def packed_and_plain(name: str, kind: str = "nf4", **options: Any) -> tuple[Mixture, Mixture]:
    """A quantised model, and one with its numbers."""
    packed = lk.quantize(Mixture(name, **SIZES), kind, experts=True, exclude=r"(?!.*\.experts$).*", **options)
    plain = Mixture(name, **SIZES)
    assert isinstance(packed, Mixture)
    for stack in stack_names(plain.block.experts):
        own, weight = plain.block.experts.get_parameter(stack), stack_weight(packed.block.experts, stack)
        own.data.copy_(weight.weight.dense(torch.float32).view_as(own))
    return packed, plain.requires_grad_(False)


@pytest.mark.parametrize(("name", "kind"), [("qwen3_moe", "nf4"), ("gpt_oss", "int8"), ("llama4", "int4")])
def test_trained_as_the_unpacked_ones(name: str, kind: str, tmp_path: Path) -> None:
    packed, plain = packed_and_plain(name, kind)
    x = torch.randn(2, 5, 64)
    assert_same({"y": packed(x)}, {"y": plain(x)}, 1e-5)
    for model in (packed, plain):
        lk.inject(model, lk.LoRAConfig(r=2, target_parameters=model.targets))
        shake(model)
    run = {"y": packed(x), "plain": plain(x)}
    assert_same({"y": run["y"]}, {"y": run["plain"]}, 1e-5)
    gradients = []
    for y in run.values():
        y.square().sum().backward()
    for model in (packed, plain):
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 4
    assert_same(gradients[0], gradients[1], 1e-5)
    lk.save_adapter(packed, tmp_path)
    assert_same({"y": lk.load_adapter(packed_and_plain(name, kind)[0], tmp_path)(x)}, {"y": packed(x)}, 0)
    assert_same({"y": copy.deepcopy(packed)(x)}, {"y": packed(x)}, 0)
    with pytest.raises(ValueError, match="stacks of these experts are packed"):
        lk.merge(packed)


def test_served(tmp_path: Path) -> None:
    packed, _ = packed_and_plain("qwen3_moe")
    x = torch.randn(2, 5, 64)
    single = copy.deepcopy(packed)
    lk.inject(single, lk.LoRAConfig(r=2, target_parameters=packed.targets))
    shake(single)
    lk.save_adapter(single, tmp_path / "a")
    store = lk.AdapterStore(packed, root=tmp_path)
    store.load("a")
    with store.batch(["a", None]):
        y = packed(x)
    plain = packed_and_plain("qwen3_moe")[0]
    assert_same({"a": y[:1], "none": y[1:]}, {"a": single(x[:1]), "none": plain(x[1:])}, 1e-5)


def test_no_stack_is_made_whole() -> None:
    model = lk.quantize(Mixture("qwen3_moe", experts=32, **SIZES), "nf4", experts=True)
    lk.inject(model, lk.LoRAConfig(r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"]))
    state = model.state_dict()
    x = torch.randn(1, 8, 64)
    model(x).sum().backward()
    with watch_allocations() as made:
        model(x).sum().backward()
    assert 0 < max(made) < 32 * 64 * 64 * 4 / 2
    assert sum(tensor.nbytes for key, tensor in state.items() if "proj" in key) < 32 * 64 * 192 * 4 / 6


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match=r"experts 'block.experts': .* are not whole blocks"):
        lk.quantize(Mixture("qwen3_moe", inner=3, hidden=24, dtype=torch.float32), "nf4", experts=True)
    model = Mixture("qwen3_moe", **SIZES)
    model.block.experts.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"experts 'block.experts': the experts have hooks"):
        lk.quantize(model, "nf4", experts=True)
