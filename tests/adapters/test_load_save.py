"""Adapters go through files, and broken files change nothing."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, X, adapted_names, edit_config, edit_tensors, net, saved, trained, write
from safetensors.torch import load_file, save_file
from torch import nn

import lorakernels as lk
from lorakernels import patterns
from lorakernels.patterns import by_pattern


def test_files_go_round(tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "a", rank_pattern={"head": 2}, alpha_pattern={"layers.1.q_proj": 5})
    again = lk.load_adapter(net().eval(), folder)
    assert torch.equal(again(X), model(X))
    assert not lk.trainable_parameters(again)
    lk.save_adapter(again, tmp_path / "b")
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert lk.trainable_parameters(lk.load_adapter(net(), folder, trainable=True)).num_trainable > 0


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_in_the_files(bias: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, folder = saved(tmp_path / "ours", bias=bias)
    again = lk.load_adapter(net().eval(), folder)
    assert torch.equal(again(X), model(X)) and not lk.trainable_parameters(again)
    trainable = lk.trainable_parameters(lk.load_adapter(net(), folder, trainable=True))
    assert trainable.num_trainable == lk.trainable_parameters(model).num_trainable
    theirs = peft.PeftModel.from_pretrained(net().eval(), folder)
    assert torch.allclose(theirs(X), model(X), atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(lk.load_adapter(net().eval(), tmp_path / "theirs")(X), model(X))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(".bias"))
    save_file({**tensors, key: torch.ones(99)}, path)
    with pytest.raises(lk.AdapterFileError, match=r"bias is \[99\]"):
        lk.load_adapter(net(), folder)


def test_a_shared_layer_goes_through_files(tmp_path: Path) -> None:
    def shared() -> Net:
        model = net()
        model.layers[2].q_proj = model.layers[0].q_proj
        return model

    model = trained(lk.inject(shared(), lk.LoRAConfig(r=2, target_modules=["q_proj"]))).eval()
    again = lk.load_adapter(shared().eval(), lk.save_adapter(model, tmp_path))
    assert again.layers[2].q_proj is again.layers[0].q_proj
    assert torch.equal(again(X), model(X))


def test_loading_over_an_adapter_takes_its_alpha_too(tmp_path: Path) -> None:
    model, folder = saved(tmp_path, lora_alpha=32, use_rslora=False)
    other = lk.inject(
        net().eval(), lk.LoRAConfig(r=3, lora_alpha=2, lora_dropout=0.5, target_modules=["q_proj", "head"])
    )
    lk.load_adapter(other, folder)
    assert torch.equal(other(X), model(X))
    assert other.head.scaling == 32 / 3 and other.head.adapters["default"].lora_dropout == 0


def test_8_bit_adapters_are_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    edit_tensors(lambda tensors: tensors.update({A: tensors[A].to(torch.float8_e4m3fn)}))(folder)
    with pytest.raises(lk.AdapterFileError, match=r"head\.lora_A\.weight is torch\.float8_e4m3fn; expected float64"):
        lk.load_adapter(net(), folder)


def test_files_are_pefts_both_ways(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, folder = saved(tmp_path / "ours", rank_pattern={"head": 2})
    theirs = peft.PeftModel.from_pretrained(net().eval(), folder)
    assert torch.allclose(theirs(X), model(X), atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, back = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == back.keys() and all(torch.equal(ours[key], back[key]) for key in ours)
    again = lk.load_adapter(net().eval(), tmp_path / "theirs")
    assert torch.equal(again(X), model(X))


def test_loading_under_a_taken_name_replaces_the_weights(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    answer = model(X)
    weight = model.head.lora_A["default"].weight
    trained(model)
    lk.load_adapter(model, folder)
    assert torch.equal(model(X), answer) and model.head.lora_A["default"].weight is weight
    lk.load_adapter(model, folder, "second")
    assert torch.equal(model(X), answer) and model.head.active_adapters == ["second"]
    other = lk.inject(net(), lk.LoRAConfig(r=5, target_modules=["head"]))
    with pytest.raises(lk.AdapterFileError, match="other layers or ranks"):
        lk.load_adapter(other, folder)
    lk.merge(model)
    with pytest.raises(lk.AdapterFileError, match="call unmerge first"):
        lk.load_adapter(model, folder)


HEAD = "base_model.model.head.lora_{}.weight"
A, B = HEAD.format("A"), HEAD.format("B")


def only_a_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"never": "read"}))


def pipe(name: str) -> Callable[[Path], None]:
    """Whoever opens it to read waits for ever."""

    def replace(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return replace


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe for the config": (pipe("adapter_config.json"), "adapter_config.json is not a regular file"),
    "a pipe for the weights": (pipe("adapter_model.safetensors"), "adapter_model.safetensors is not a regular file"),
    "no B": (edit_tensors(lambda t: t.pop(B)), "module 'head' has no lora_B.weight"),
    "no A": (edit_tensors(lambda t: t.pop(A)), "module 'head' has no lora_A.weight"),
    "unknown key": (edit_tensors(lambda t: t.update(extra=torch.ones(2))), "unknown key 'extra'"),
    "unknown module": (
        edit_tensors(lambda t: t.update({A.replace("head", "hed"): t.pop(A), B.replace("head", "hed"): t.pop(B)})),
        "no module 'hed'; near names: head",
    ),
    "other prefix": (edit_tensors(lambda t: t.update({A[5:]: t.pop(A)})), "unknown key"),
    "ranks differ": (
        edit_tensors(lambda t: t.update({B: torch.ones(4, 5)})),
        r"head.lora_B.weight is \[4, 5\]; expected \[4, 3\]",
    ),
    "A transposed": (edit_tensors(lambda t: t.update({A: t[A].T})), "transposed"),
    "NaN": (edit_tensors(lambda t: t[A].fill_(float("nan"))), "head.lora_A.weight holds NaN or Inf"),
    "Inf": (edit_tensors(lambda t: t[B].fill_(float("inf"))), "head.lora_B.weight holds NaN or Inf"),
    "integers": (edit_tensors(lambda t: t.update({A: t[A].int()})), "head.lora_A.weight is torch.int32"),
    "three dimensions": (edit_tensors(lambda t: t.update({A: t[A][None]})), r"is \[1, 3, 12\]; expected \[3, 12\]"),
    "a layer that is no linear": (
        edit_tensors(lambda t: t.update({k.replace("head", "layers.0.norm"): t[k].clone() for k in (A, B)})),
        "'layers.0.norm' is a torch.nn.modules.normalization.LayerNorm",
    ),
    "inside an adapted layer": (
        edit_tensors(lambda t: t.update({k.replace("head", "head.base_layer"): t.pop(k) for k in (A, B)})),
        "no module 'head.base_layer'",
    ),
    "lora_ga": (edit_config(init_lora_weights="lora_ga"), "changes the base weight"),
    "alpha of 401 digits": (edit_config(lora_alpha=10**400), "lora_alpha is an int too large for a float"),
    "alpha of 5000 digits": (
        lambda f: write("adapter_config.json", b'{"r": 3, "lora_alpha": 1' + b"0" * 5000 + b"}")(f),
        "cannot be read as JSON",
    ),
    "no tensors": (edit_tensors(lambda t: t.clear()), "holds no tensors"),
    "truncated": (
        lambda f: write("adapter_model.safetensors", (f / "adapter_model.safetensors").read_bytes()[:-9])(f),
        "not a whole safetensors file",
    ),
    "empty": (write("adapter_model.safetensors", b""), "not a whole safetensors file"),
    "header of 2**62 bytes": (write("adapter_model.safetensors", (2**62).to_bytes(8, "little")), "not a whole"),
    "a pickle by another name": (write("adapter_model.safetensors", pickle.dumps({"a": 1})), "not a whole"),
    "only a pickle": (only_a_pickle, "a pickle can run any code and is not read"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "broken config": (write("adapter_config.json", b"{"), "cannot be read as JSON"),
    "config that is a list": (write("adapter_config.json", b"[]"), "holds a list"),
    "config of bytes": (write("adapter_config.json", b"\xff\xfe\x00"), "cannot be read as JSON"),
    "another method": (edit_config(peft_type="LOHA"), "peft_type is 'LOHA'"),
    "r = 0": (edit_config(r=0), "r is 0"),
    "r negative": (edit_config(r=-1), "r is -1"),
    "r a text": (edit_config(r="8"), "r is '8'"),
    "r huge": (edit_config(r=10**9), "says r=1000000000"),
    "r null": (edit_config(r=None), "r is null"),
    "alpha NaN": (edit_config(lora_alpha=float("nan")), "lora_alpha is nan"),
    "alpha Inf": (edit_config(lora_alpha=float("inf")), "lora_alpha is inf"),
    "alpha null": (edit_config(lora_alpha=None), "lora_alpha is null"),
    "unknown field": (edit_config(use_magic=True), "use_magic=True is a field that is not known, and may change"),
    "a field of PEFT's": (edit_config(alora_invocation_tokens="1 2"), "alora_invocation_tokens='1 2' changes"),
    "fan_in_fan_out": (edit_config(fan_in_fan_out=True), "fan_in_fan_out=True"),
    "replication": (edit_config(layer_replication=[[0, 2]]), "layer_replication"),
    "PiSSA": (edit_config(init_lora_weights="pissa"), "'pissa' changes the base weight"),
    "rank_pattern disagrees": (edit_config(rank_pattern={"head": 9}), "says r=9"),
    "broken rank_pattern": (edit_config(rank_pattern={"(": 9}), "not a regular expression"),
}


HARMLESS = {
    "ensure_weight_tying": True,
    "swift_type": "LORA",
    "lorap_lr_ratio": 16.0,
    "merge_weights": True,
    "lora_ga_config": {"iters": 2},
    "velora_config": {"rank": 1},
    "trained_by": None,
    "tags": [],
}


def test_fields_that_change_nothing(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    edit_config(**HARMLESS)(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.load_adapter(net(), folder)
    edit_config(note="a run of May", author="anna")(folder)
    with pytest.warns(UserWarning, match="PEFT has no field 'note', 'author'; taken for a note"):
        lk.load_adapter(net(), folder)
    edit_config(peft_version="0.99.0")(folder)
    with pytest.raises(lk.AdapterFileError, match=r"='(anna|a run of May)' is a field that is not known"):
        lk.load_adapter(net(), folder)


def test_tying_that_ties_something_is_refused(tmp_path: Path) -> None:
    """PEFT would have one adapter for both."""
    model = net()
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    _, folder = saved(tmp_path, target_modules=["layers.0.q_proj"])
    edit_config(ensure_weight_tying=True)(folder)
    weights = folder / "adapter_model.safetensors"
    head = torch.zeros_like(model.head.weight)  # PEFT saves the tied weights too
    save_file(load_file(weights) | {"base_model.model.head.weight": head}, weights)
    with pytest.raises(lk.AdapterFileError, match="share one weight, so ensure_weight_tying=True"):
        lk.load_adapter(model, folder)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_faults_in_files_are_refused_and_change_nothing(fault: str, tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    spoil, message = FAULTS[fault]
    spoil(folder)
    model = net()
    answer = model(X)
    with pytest.raises(lk.AdapterFileError, match=message):
        lk.load_adapter(model, folder)
    assert not adapted_names(model) and torch.equal(model(X), answer)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("value", ["[", 5, [1], ["nothing"], {"head": 1}], ids=repr)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_the_names_of_a_file_are_not_looked_at(field: str, value: Any, tmp_path: Path) -> None:
    """Its tensors say which layers are adapted."""
    model, folder = saved(tmp_path / "a")
    edit_config(**{field: value, "rank_pattern": {"nothing": 2}})(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = lk.load_adapter(net().eval(), folder)
        lk.save_adapter(again, tmp_path / "b")
    assert torch.equal(again(X), model(X))


@pytest.mark.filterwarnings("ignore:rank_pattern.'nothing':UserWarning")
def test_patterns_of_a_file_have_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved(tmp_path, rank_pattern={"head": 3, "nothing": 2})
    lk.load_adapter(net(), folder)
    monkeypatch.setattr(patterns, "MAX_MATCHES", 7)
    with pytest.raises(lk.AdapterFileError, match="2 patterns for 4 modules; expected at most 7 pairs"):
        lk.load_adapter(net(), folder)
    with pytest.raises(lk.AdapterFileError, match="no module"):  # which comes first
        lk.load_adapter(nn.Sequential(nn.Linear(2, 2)), folder)


def test_a_pattern_that_never_ends_is_given_up() -> None:
    with pytest.raises(ValueError, match=r"took over 1\.0 s"):
        by_pattern(["a" * 60 + "b"], {"(a|aa)+!": 3}, 8)


def test_many_entries_are_refused_soon(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    entries = {f"entry.{i}": torch.ones(1) for i in range(20_000)}
    save_file(entries, folder / "adapter_model.safetensors")
    with pytest.raises(lk.AdapterFileError, match="unknown key"):
        lk.load_adapter(net(), folder)


def test_saving_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="no adapter 'default'; its adapters"):
        lk.save_adapter(net(), tmp_path)
    assert not list(tmp_path.iterdir())
