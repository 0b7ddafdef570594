"""GPT-2's Conv1D as a base layer: its weight is [K, N], and what is adapted, merged and served is the transpose."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorakernels as lk

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
IDS = torch.tensor([[1, 4, 0, 9], [3, 2, 7, 5]])
TARGETS = ["c_attn", "c_proj", "c_fc"]


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).double().eval()


def of_peft(**fields: Any) -> Any:
    config = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS, "fan_in_fan_out": True, **fields}
    model = peft.get_peft_model(gpt2(), peft.LoraConfig(**config))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-10)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True, "rank_pattern": {"c_fc": 3}}], ids=str)
def test_files_both_ways(fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = of_peft(**fields)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lk.load_adapter(gpt2(), tmp_path / "theirs")
    assert close(logits(ours), logits(theirs))
    lk.save_adapter(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert (
        load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys()
    )
    assert close(logits(peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ours")), logits(theirs))


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_inject_merge_and_back(fields: dict[str, Any]) -> None:
    config = lk.LoRAConfig(**{"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **fields})
    model = lk.inject(gpt2(), config).eval()
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, lk.LoRALinear) and (layer.in_features, layer.out_features) == (8, 24)
    assert layer.weight is layer.base_layer.weight and not isinstance(model.lm_head, lk.LoRALinear)
    adapted, address = logits(model), layer.weight.data_ptr()
    if fields.get("init_lora_weights") == "pissa":
        assert close(adapted, logits(gpt2()))
    assert layer.delta_weight().shape == layer.weight.shape == (8, 24)
    lk.merge(model)
    assert close(logits(model), adapted) and layer.weight.data_ptr() == address
    lk.unmerge(model)
    assert close(logits(model), adapted)
    plain = lk.unload(model, merge=True)
    assert type(plain.transformer.h[0].attn.c_attn).__name__ == "Conv1D" and close(logits(plain), adapted)


def test_it_trains_as_peft() -> None:
    theirs = of_peft().train()
    ours = gpt2()
    lk.inject(ours, lk.LoRAConfig(r=2, lora_alpha=3, target_modules=TARGETS))
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if ".lora_" in name:
                parameter.copy_(named[f"base_model.model.{name}"])
    for model in (theirs.eval(), ours.eval()):
        model(IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in ours.named_parameters() if ".lora_" in name}
    assert len(grads) == 8 and all(close(grad, named[f"base_model.model.{name}"].grad) for name, grad in grads.items())


@pytest.mark.parametrize("use_dora", [False, True])
def test_accelerate(use_dora: bool) -> None:
    model = of_peft(use_dora=use_dora)
    plain = copy.deepcopy(model)
    report = lk.accelerate(model)
    assert report.num_accelerated == report.num_layers == 4, str(report)
    assert close(logits(model), logits(plain))
    for one in (model, plain):
        one(IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert grads and all(close(p.grad, grads[name]) for name, p in model.named_parameters() if name in grads)
    if not use_dora:
        mixed = [one.base_model(IDS, adapter_names=["default", "__base__"]).logits for one in (model, plain)]
        assert close(*mixed)


def test_a_store_serves_it(tmp_path: Path) -> None:
    of_peft().save_pretrained(tmp_path)
    expected = logits(lk.load_adapter(gpt2(), tmp_path))
    model = gpt2()
    base = logits(model)
    store = lk.AdapterStore(model, max_adapters=2, max_rank=4)
    store.load("a", tmp_path)
    with store.batch(["a", None]):
        mixed = logits(model)
    assert close(mixed[0], expected[0]) and close(mixed[1], base[1])
    assert torch.equal(logits(model), base)  # without a batch: the layer's own forward
    copied = copy.deepcopy(model)
    assert type(copied.transformer.h[0].attn.c_attn).__name__ == "Conv1D" and torch.equal(logits(copied), base)


def test_another_class_of_the_name_is_not_taken() -> None:
    class Conv1D(transformers.pytorch_utils.Conv1D):
        """May hold its weight in any form."""

    model = gpt2()
    model.transformer.h[0].mlp.c_fc.__class__ = Conv1D
    with pytest.raises(TypeError, match="c_fc"):
        lk.inject(model, lk.LoRAConfig(target_modules=["c_fc"]))
