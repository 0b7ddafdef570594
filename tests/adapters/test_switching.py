"""Adapters are chosen, scaled and merged, and stand beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nets import X, adapted_names, net, saved, trained
from torch import nn

import lorakernels as lk


def test_switching_scaling_and_merging() -> None:
    model = trained(lk.inject(net(), lk.LoRAConfig(r=2, target_modules=["q_proj"]))).eval()
    base = net()(X)
    one = model(X)
    lk.inject(model, lk.LoRAConfig(r=3, target_modules=["v_proj", "head"]), "other")
    lk.set_adapter(model, "default")
    assert torch.equal(model(X), one)
    lk.set_adapter(model, "other")
    trained(model)
    other = model(X)
    lk.set_adapter(model, ["default", "other"])
    both = model(X)
    assert not torch.allclose(both, one) and not torch.allclose(both, other)
    lk.set_scale(model, "other", 0)
    assert torch.equal(model(X), one)
    lk.set_scale(model, "default", 0)
    assert torch.equal(model(X), base)
    for name in ("default", "other"):
        lk.set_scale(model, name, 1)
    assert torch.equal(model(X), both)
    before = {name: p.clone() for name, p in model.named_parameters()}
    lk.merge(model, keep_base=True)
    assert torch.allclose(model(X), both, atol=1e-5) and not torch.equal(model(X), both)
    lk.unmerge(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    lk.merge(model, "other")
    assert torch.allclose(model(X), other, atol=1e-5)
    lk.unmerge(model)
    for call in (lambda: lk.set_adapter(net(), "x"), lambda: lk.set_scale(model, "x", 1)):
        with pytest.raises(KeyError, match="no adapter 'x'; its adapters"):
            call()


def test_merging_a_tied_weight_is_refused() -> None:
    model = net()
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"]))
    before = model.layers[0].q_proj.weight.clone()
    with pytest.raises(ValueError, match="share one weight"):
        lk.merge(model)
    assert torch.equal(before, model.layers[0].q_proj.weight) and not model.layers[0].q_proj.merged


def test_nothing_switches_or_is_added_while_a_layer_is_merged() -> None:
    model = lk.inject(net().eval(), lk.LoRAConfig(target_modules=["q_proj"]))
    lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"]), "other")
    model.layers[2].q_proj.merge()
    for call in (
        lambda: lk.set_adapter(model, "other"),
        lambda: lk.set_scale(model, "default", 0),
        lambda: lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"]), "third"),
    ):
        with pytest.raises(RuntimeError, match="unmerge first"):
            call()
    assert model.layers[0].q_proj.active_adapters == ["default"]
    assert model.layers[0].q_proj.adapter_names == ["default", "other"]


@pytest.mark.parametrize(("first", "second"), [("all", "none"), ("none", "lora_only"), ("all", "all")])
def test_an_adapter_that_trains_biases_is_alone(first: str, second: str, tmp_path: Path) -> None:
    _, folder = saved(tmp_path, bias=second)
    model = lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj"], bias=first))
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(lk.AdapterFileError, match="trains biases"):
        lk.load_adapter(model, folder, "other")
    with pytest.raises(ValueError, match=r"trains biases, .* the model has"):
        lk.inject(model, lk.LoRAConfig(target_modules=["head"], bias=second), "other")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[name], p) and after[name].requires_grad == needed for name, (p, needed) in before.items()
    )
    again = lk.load_adapter(net(), folder)
    lk.load_adapter(again, folder)  # the same one once more


@pytest.mark.parametrize("active", [["default"], []])
def test_a_second_adapter_changes_neither_the_output_nor_what_trains(active: list[str]) -> None:
    model = lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj"], init_lora_weights=False))
    lk.set_adapter(model, active)
    output, trains = model(X), set(map(id, lk.trainable_parameters(model)))
    config = lk.LoRAConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["head"], init_lora_weights=False)
    lk.inject(model, config, "other")
    assert torch.equal(model(X), output) and set(map(id, lk.trainable_parameters(model))) == trains
    assert model.layers[0].q_proj.active_adapters == active and model.layers[0].v_proj.active_adapters == []
    assert model.head.active_adapters == []
    lk.set_adapter(model, "other")
    assert not torch.equal(model(X), output) and model.head.active_adapters == ["other"]


def test_merging_is_all_or_nothing() -> None:
    model = trained(lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj", "head"])))
    nn.init.constant_(model.head.lora_A["default"].weight, float("inf"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"^'head': .* not finite; nothing changed"):
        lk.merge(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not any(model.get_submodule(name).merged for name in adapted_names(model))


def test_a_merge_that_fails_leaves_the_earlier_adapter_active() -> None:
    model = lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj"]))
    lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"], use_dora=True), "two")
    trains = set(map(id, lk.trainable_parameters(model)))
    nn.init.zeros_(model.layers[2].q_proj.adapter_tensors("two")["lora_magnitude_vector"])
    with pytest.raises(ValueError, match="a magnitude is zero"):
        lk.merge(model, "two")
    layers = [model.get_submodule(name) for name in adapted_names(model)]
    assert not any(layer.merged for layer in layers) and all(layer.active_adapters == ["default"] for layer in layers)
    assert set(map(id, lk.trainable_parameters(model))) == trains
