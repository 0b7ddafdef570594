"""Adapter files of every kind of layer and adapter: to PEFT and back, and switched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import (
    CONFIG,
    IDS,
    KINDS,
    PREFIX,
    WEIGHTS,
    arguments,
    assert_close,
    assert_same_tensors,
    change,
    net,
    shake,
)
from safetensors.torch import load_file
from torch import nn

import lorakernels as lk
from lorakernels.adapters.saved_modules import SavedModule
from lorakernels.files.config_file import config_from_fields
from lorakernels.nn.layer import LoRALayer

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("kind", KINDS)
def test_from_peft_and_back(kind: str, tmp_path: Path) -> None:
    theirs = shake(peft.get_peft_model(net(), peft.LoraConfig(**arguments(kind)))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(IDS)
    assert not torch.allclose(expected, net()(IDS))
    ours = lk.load_adapter(net(), tmp_path / "theirs")
    assert_close(ours(IDS), expected)
    assert not lk.trainable_parameters(ours)
    lk.save_adapter(ours, tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    assert_close(again(IDS), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_to_peft_and_back(kind: str, tmp_path: Path) -> None:
    ours = shake(lk.inject(net(), lk.LoRAConfig(**arguments(kind)))).eval()
    lk.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    assert_close(theirs(IDS), ours(IDS))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "theirs", tmp_path / "ours")
    again = lk.load_adapter(net(), tmp_path / "theirs", trainable=True)
    assert torch.equal(again(IDS), ours(IDS))
    assert lk.trainable_parameters(again).num_trainable == lk.trainable_parameters(ours).num_trainable


@pytest.mark.parametrize("kind", KINDS)
def test_what_inject_trains_is_what_peft_trains(kind: str) -> None:
    ours = lk.inject(net(), lk.LoRAConfig(**arguments(kind)))
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**arguments(kind)))
    trained = {name.removeprefix(PREFIX): p.shape for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name: p.shape for name, p in ours.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("kind", KINDS)
def test_switching_scaling_merging_and_deleting(kind: str, tmp_path: Path) -> None:
    model = shake(lk.inject(net(), lk.LoRAConfig(**arguments(kind)))).eval()
    answer, base = model(IDS), net()(IDS)
    lk.set_adapter(model, [])
    if KINDS[kind].get("bias", "none") == "none":
        assert torch.equal(model(IDS), base)
    off = model(IDS)
    lk.set_adapter(model, "default")
    assert torch.equal(model(IDS), answer)
    lk.set_scale(model, "default", 0.5)
    assert not torch.allclose(model(IDS), answer)
    lk.set_scale(model, "default", 1)
    if "grouped" not in KINDS[kind]["target_modules"]:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        lk.merge(model, keep_base=True)
        assert_close(model(IDS), answer)
        lk.unmerge(model)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    lk.delete_adapter(model, "default")
    assert torch.equal(model(IDS), off)
    assert not any(isinstance(module, SavedModule) for module in model.modules())
    with pytest.raises(KeyError, match="no adapter 'default'; its adapters"):
        lk.delete_adapter(model, "default")
    with pytest.raises(KeyError, match="no adapter"):
        lk.save_adapter(model, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_8", "orthogonal", "gaussian"])
@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"rank_pattern": {"embed": 2}, "alpha_pattern": {"conv": 3}}]
)
def test_other_starts_are_saved_for_the_original_base(init: str, fields: dict[str, Any], tmp_path: Path) -> None:
    config = lk.LoRAConfig(
        r=4, lora_alpha=7, target_modules=["embed", "conv", "q_proj"], init_lora_weights=init, **fields
    )
    model = shake(lk.inject(net(), config)).eval()
    lk.save_adapter(model, tmp_path)
    assert_close(lk.load_adapter(net(), tmp_path)(IDS), model(IDS))
    assert_close(peft.PeftModel.from_pretrained(net(), tmp_path).eval()(IDS), model(IDS))


def test_nothing_stands_beside_an_adapter_that_changed_the_base(tmp_path: Path) -> None:
    other = lk.save_adapter(lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj"])), tmp_path)
    model = lk.inject(net(), lk.LoRAConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    weight = model.q_proj.weight.clone()
    for call, error in (
        (lambda: lk.inject(model, lk.LoRAConfig(target_modules=["conv"]), "other"), RuntimeError),
        (lambda: lk.load_adapter(model, other, "other"), lk.AdapterFileError),
        (lambda: lk.hotswap_adapter(model, other), RuntimeError),
        (lambda: lk.prepare_for_hotswap(model, 8), RuntimeError),
        (lambda: lk.add_weighted_adapter(model, ["default"], [1.0], "other"), RuntimeError),
    ):
        with pytest.raises(error, match="'default' has changed the base weights"):
            call()
    assert torch.equal(model.q_proj.weight, weight) and not isinstance(model.conv, LoRALayer)
    lk.delete_adapter(model, "default")
    assert_close(model.q_proj.weight, net().q_proj.weight)
    plain = lk.inject(net(), lk.LoRAConfig(target_modules=["conv"]))
    with pytest.raises(RuntimeError, match="expected a model without adapters"):
        lk.inject(plain, lk.LoRAConfig(target_modules=["q_proj"], init_lora_weights="olora"), "other")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_adapters_keep_the_dtype_of_their_file(dtype: torch.dtype, tmp_path: Path) -> None:
    there = lk.save_adapter(shake(lk.inject(net(), lk.LoRAConfig(**arguments("DoRA")))), tmp_path / "there")
    change(lambda tensors: tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()}))(there)
    model = lk.load_adapter(lk.inject(net(), lk.LoRAConfig(**arguments("DoRA"))), there)
    assert_same_tensors(lk.save_adapter(model, tmp_path / "back"), there)


def test_fields_that_are_not_there_are_pefts_defaults() -> None:
    config = config_from_fields({"peft_type": "LORA", "target_modules": ["q_proj"]}, "a file")
    assert (config.r, config.lora_alpha) == (peft.LoraConfig().r, peft.LoraConfig().lora_alpha) == (8, 8)


@pytest.mark.parametrize("field", ["use_rslora", "use_dora", "lora_bias"])
def test_flags_and_patterns_have_their_types(field: str) -> None:
    with pytest.raises(TypeError, match=f"{field} is 'false'"):
        lk.LoRAConfig(**{field: "false"})
    with pytest.raises(lk.AdapterFileError, match=f"{field} is 'false'"):
        config_from_fields({field: "false"}, "a file")
    for pattern in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(TypeError, match=f"{pattern} is .*; expected a mapping"):
            lk.LoRAConfig(**{pattern: [1]})


def test_a_null_start_is_the_default() -> None:
    assert config_from_fields({"init_lora_weights": None}, "a file").init_lora_weights is True


@pytest.mark.parametrize(
    "fields",
    [
        dict(alpha_pattern={"v_proj": 8, "0.v_proj": 64}),
        dict(rank_pattern={"v_proj": 8, "0.v_proj": 2}),
        dict(alpha_pattern={"q_proj": 3, r".*q_proj": 64}, init_lora_weights="pissa"),
        dict(alpha_pattern={".*q_proj": 64}, init_lora_weights="pissa"),
    ],
    ids=str,
)
def test_the_first_pattern_that_matches_counts_in_a_file_too(fields: dict[str, Any], tmp_path: Path) -> None:
    def two() -> nn.Module:
        torch.manual_seed(1)
        blocks = [nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8)}) for _ in range(2)]
        return nn.Sequential(*blocks).double()

    model = lk.inject(two(), lk.LoRAConfig(r=4, target_modules=["q_proj", "v_proj"], **fields))
    shake(model)
    again = lk.load_adapter(two(), lk.save_adapter(model, tmp_path))
    for one, other in zip(model, again, strict=True):
        for name in ("q_proj", "v_proj"):
            x = torch.eye(8, dtype=torch.float64)
            assert torch.allclose(one[name](x), other[name](x), atol=1e-12)
    written = json.loads((tmp_path / CONFIG).read_text())
    pattern = next(iter(fields))
    assert list(written[pattern])[-len(fields[pattern]) :] == list(fields[pattern])


def test_a_loaded_adapter_is_no_view_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lk.inject(net().float(), lk.LoRAConfig(target_modules=["q_proj"]))
    folder = lk.save_adapter(model, tmp_path)
    held = {key: tensor.half() for key, tensor in load_file(folder / WEIGHTS).items()}
    monkeypatch.setattr("lorakernels.files.peft.read_tensors", lambda path: (dict(held), {}))
    layer = lk.load_adapter(net().float(), folder).q_proj
    places = {parameter.data_ptr() for parameter in layer.adapter_tensors().values()}
    assert not places & {tensor.data_ptr() for tensor in held.values()}
