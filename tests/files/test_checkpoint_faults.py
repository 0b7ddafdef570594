"""What a merge of files refuses, and that nothing is written then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Edit, Q, edit_config, edit_tensors, files, gpt2, llama, refused, save_adapter, save_model
from safetensors.torch import load_file, save_file

import lorakernels as lk
from lorakernels.files.checkpoint import Checkpoint
from lorakernels.files.merge import merge_files

FAULTS: dict[str, tuple[Edit, str]] = {
    "missing weight": (
        lambda base, adapter: edit_tensors(base / "model.safetensors", **{f"{Q}__weight": None}),
        r"no weight for 1 of the adapter's 21 modules, such as model\.layers\.0\.self_attn\.q_proj",
    ),
    "another shape": (
        lambda base, adapter: edit_tensors(base / "model.safetensors", **{f"{Q}__weight": torch.ones(16, 8)}),
        r"updates .*q_proj\.weight \[16, 16\], and .* has \[16, 8\]",
    ),
    "int8": (
        lambda base, adapter: edit_tensors(
            base / "model.safetensors", **{f"{Q}__weight": torch.ones(16, 16, dtype=torch.int8)}
        ),
        r"is quantised \(it is I8\)",
    ),
    "bitsandbytes": (
        lambda base, adapter: edit_tensors(base / "model.safetensors", **{f"{Q}__weight__absmax": torch.ones(4)}),
        r"is quantised \(it has model\.layers\.0\.self_attn\.q_proj\.weight\.absmax\)",
    ),
    "gptq": (
        lambda base, adapter: edit_tensors(
            base / "model.safetensors",
            **{f"{Q}__weight": None, f"{Q}__qweight": torch.ones(4, 4, dtype=torch.int32)},
        ),
        r"is quantised \(it has model\.layers\.0\.self_attn\.q_proj\.qweight\)",
    ),
    "quantised by its config": (
        lambda base, adapter: edit_config(base, quantization_config={"quant_method": "awq"}),
        r"is quantised \(config.json says awq\)",
    ),
    "pissa": (
        lambda base, adapter: edit_config(adapter, init_lora_weights="pissa"),
        "init_lora_weights='pissa' changes the base weight",
    ),
    "replaces what is not there": (
        lambda base, adapter: [
            edit_config(adapter, modules_to_save=["score"]),
            edit_tensors(adapter / "adapter_model.safetensors", base_model__model__score__weight=torch.ones(2, 16)),
        ],
        r"replaces score.weight \[2, 16\], and .* has no such tensor",
    ),
    "NaN": (
        lambda base, adapter: edit_tensors(
            adapter / "adapter_model.safetensors",
            **{f"base_model__model__{Q}__lora_B__weight": torch.full((16, 2), float("nan"))},
        ),
        "holds NaN or Inf",
    ),
    "a pickle": (
        lambda base, adapter: (base / "model.safetensors").rename(base / "model.bin"),
        "of model.bin, .*: a pickle can",
    ),
    "truncated": (
        lambda base, adapter: (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1]),
        "not a whole safetensors file",
    ),
    "two files": (
        lambda base, adapter: save_file({"a": torch.ones(1)}, base / "other.safetensors"),
        "has 2 .safetensors files and no single index",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str, tmp_path: Path) -> None:
    base, adapter = save_model(tmp_path / "base", shard="1GB"), save_adapter(tmp_path / "adapter")
    edit, message = FAULTS[fault]
    edit(base, adapter)
    refused(base, adapter, message)


INDEX_FAULTS: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
    "outside": (lambda m: m.update({next(iter(m)): "../out.safetensors"}), "expected a .safetensors file beside it"),
    "not there": (lambda m: m.update({next(iter(m)): "x.safetensors"}), "download the missing shards"),
    "a number": (lambda m: m.update({next(iter(m)): 3}), "expected a .safetensors file beside it"),
    "one less": (lambda m: m.pop("model.norm.weight"), "disagree on 1: model.norm.weight"),
    "one more": (lambda m: m.update({"ghost.weight": next(iter(m.values()))}), "disagree on 1: ghost.weight"),
    "elsewhere": (lambda m: m.update({next(iter(m)): list(m.values())[-1]}), "disagree on 1"),
    "empty": (lambda m: m.clear(), "no weight_map"),
}


def test_an_index_whose_metadata_is_a_list(tmp_path: Path) -> None:
    base, adapter = save_model(tmp_path / "base"), save_adapter(tmp_path / "adapter")
    path = base / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": [1]}))
    refused(base, adapter, r"has metadata=\[1\]; expected an object")


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_index_faults(fault: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit, message = INDEX_FAULTS[fault]
    edit(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(lk.AdapterFileError, match=message):
        Checkpoint(base)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_tied_weights(config: dict[str, Any], tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", llama(tie_word_embeddings=True))
    adapter = save_adapter(tmp_path / "adapter", **config)
    refused(base, adapter, "which is tied")


def test_a_tied_model_takes_other_adapters(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", llama(tie_word_embeddings=True))
    merge_files(base, save_adapter(tmp_path / "adapter"), tmp_path / "merged")
    head = save_adapter(tmp_path / "head", target_modules=["lm_head"])
    refused(base, head, r"tied to the embedding has no tensor of its own")
    tied = save_model(tmp_path / "gpt2", gpt2(), shard="1GB")
    conv1d = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    embedding = save_adapter(tmp_path / "wte", gpt2(), target_modules=["wte"])
    refused(tied, embedding, "which is tied")
    whole = save_adapter(tmp_path / "whole", gpt2(), modules_to_save=["wte"], **conv1d)
    refused(tied, whole, r"changes transformer\.wte\.weight, which is tied")
    edit_config(tied, tie_word_embeddings=None)  # as configurations are that leave the default out
    refused(tied, whole, r"changes transformer\.wte\.weight, which is tied")
    positions = save_adapter(tmp_path / "wpe", gpt2(), modules_to_save=["wpe"], **conv1d)
    merge_files(tied, positions, tmp_path / "with positions")
    renamed = {name.replace("wte", "words"): t for name, t in load_file(tied / "model.safetensors").items()}
    save_file(renamed, tied / "model.safetensors")
    factors = load_file(whole / "adapter_model.safetensors")
    save_file({name.replace("wte", "words"): t for name, t in factors.items()}, whole / "adapter_model.safetensors")
    edit_config(whole, modules_to_save=["words"])
    refused(tied, whole, r"changes transformer\.words\.weight, which is tied")  # by its vocab_size rows


def test_where_it_may_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = save_model(tmp_path / "base"), save_adapter(tmp_path / "adapter")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = files(tmp_path)
    for out, message in ((base, "is what is read"), (adapter, "is what is read"), ("taken", "not an empty folder")):
        with pytest.raises(lk.AdapterFileError, match=message):
            merge_files(base, adapter, tmp_path / out)
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(lk.AdapterFileError, match="is the current folder, which cannot be replaced"):
        merge_files(base, adapter, ".")
    monkeypatch.undo()
    assert files(tmp_path) == before
    merge_files(base, adapter, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_an_overflow_leaves_nothing(tmp_path: Path) -> None:
    """Found in the middle of the work, in a late shard."""
    base = save_model(tmp_path / "base", llama(torch.float16))
    adapter = save_adapter(tmp_path / "adapter", dtype=torch.float16, target_modules=["down_proj"])
    late = "base_model__model__model__layers__2__mlp__down_proj__lora_B__weight"
    edit_tensors(adapter / "adapter_model.safetensors", **{late: torch.full((16, 2), 1e5)})
    refused(base, adapter, r"layers\.2\.mlp\.down_proj\.weight would not be finite in torch\.float16")
    merge_files(base, adapter, tmp_path / "wider", dtype=torch.float32)
