"""Names inside torch's wrappers, and inside PEFT's layers: the plain model's, both ways."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.parallel import DistributedDataParallel

import lorakernels as lk
from lorakernels.nn.modules import named_modules, named_parameters

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.q_proj(x)) * self.k_proj(x)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 3)).double()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    rendezvous = f"file://{tmp_path_factory.mktemp('group')}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def checkpointed(model: Any) -> Any:
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    return model


def block_by_block(model: Any, wrap: Callable[[nn.Module], Any]) -> Any:
    model[0], model[1] = wrap(model[0]), wrap(model[1])
    return model


def each_layer(model: Any) -> Any:
    for block in (model[0], model[1]):
        block.q_proj, block.k_proj = checkpoint_wrapper(block.q_proj), checkpoint_wrapper(block.k_proj)
    return model


def distributed(module: Any) -> nn.Module:
    return DistributedDataParallel(module) if any(p.requires_grad for p in module.parameters()) else module


WAYS: dict[str, Callable[[Any], Any]] = {
    "checkpointed": checkpointed,
    "each layer": each_layer,
    "compiled blocks": lambda model: block_by_block(model, lambda block: torch.compile(block, backend="eager")),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "distributed blocks": lambda model: block_by_block(model, distributed),
    "nested": lambda model: torch.compile(block_by_block(checkpointed(model), distributed), backend="eager"),
}
CONFIG = lk.LoRAConfig(r=2, target_modules=["0.q_proj", "k_proj"], modules_to_save=["2"], bias="lora_only")


@pytest.mark.parametrize("way", WAYS)
def test_files_have_the_plain_models_names(way: str, tmp_path: Path, one_process: None) -> None:
    """Wrapped before or after the adapter came; saved from either, loaded into the other."""
    expected_names = {path for path, _ in named_modules(plain())}
    wrapped = WAYS[way](plain())
    assert {path for path, _ in named_modules(wrapped)} == expected_names
    assert [name for name, _ in named_parameters(wrapped)] == [name for name, _ in plain().named_parameters()]
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    saved = {}
    for order in ("before", "after"):
        model = lk.inject(WAYS[way](plain()) if order == "before" else plain(), CONFIG)
        model = WAYS[way](model) if order == "after" else model
        torch.manual_seed(1)
        for parameter in lk.trainable_parameters(model):
            nn.init.normal_(parameter)
        lk.save_adapter(model, tmp_path / order)
        saved[order] = load_file(tmp_path / order / "adapter_model.safetensors")
        for target in (plain(), WAYS[way](plain())):
            loaded = lk.load_adapter(target, tmp_path / order)
            torch.testing.assert_close(loaded(x), model(x))
    assert saved["before"].keys() == saved["after"].keys()
    assert not any(word in key for key in saved["before"] for word in ("_orig", "wrapped", "module."))
    assert all(torch.equal(tensor, saved["after"][key]) for key, tensor in saved["before"].items())


@pytest.mark.parametrize("way", ["checkpointed", "compiled blocks", "compiled", "nested"])
def test_a_store_over_a_wrapped_model(way: str, tmp_path: Path, one_process: None) -> None:
    model = lk.inject(plain(), lk.LoRAConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lk.save_adapter(model, tmp_path)
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    base = plain().requires_grad_(False)
    expected = torch.stack([model(x)[0], base(x)[1]])
    served = WAYS[way](copy.deepcopy(base))
    store = lk.AdapterStore(served, max_rank=8)
    store.load("a", tmp_path)
    with torch.no_grad(), store.batch(["a", None]):
        found = served(x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["LoraConfig", "LoHaConfig", "VeraConfig", "IA3Config"])
def test_the_inside_of_pefts_layers_is_closed(method: str) -> None:
    peft = pytest.importorskip("peft")
    fields: dict[str, Any] = {"feedforward_modules": []} if method == "IA3Config" else {"r": 2}
    fields |= {"modules_to_save": ["2"]} if method == "LoraConfig" else {}
    model = peft.get_peft_model(plain(), getattr(peft, method)(target_modules=["q_proj"], **fields))
    lk.inject(model, lk.LoRAConfig(r=2, target_modules="all-linear", exclude_modules=["2"]), "own")
    adapted = [name for name, module in model.named_modules() if isinstance(module, lk.LoRALinear)]
    assert adapted == ["base_model.model.0.k_proj", "base_model.model.1.k_proj"]
    with pytest.raises(ValueError, match="matches 0 modules"):
        lk.inject(model, lk.LoRAConfig(r=2, target_modules=["default"]), "inner")


def test_the_inside_of_our_layers_is_closed_to_peft() -> None:
    """Which would adapt the base layer, and that is not called."""
    peft = pytest.importorskip("peft")
    model, x = lk.inject(plain(), CONFIG), torch.randn(4, WIDTH, dtype=torch.float64)
    before = model(x)
    with pytest.raises(TypeError, match=r"peft\.tuners\.lora\..*would have no effect"):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert torch.equal(model(x), before)
