"""Models and adapters in folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lorakernels as lk
from lorakernels.files.merge import merge_files

Tensors = dict[str, torch.Tensor]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(dtype: torch.dtype = torch.float64, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "attention_bias": True, **changes})).to(dtype)


def save_model(folder: Path, model: Any = None, shard: str = "8KB") -> Path:
    (llama() if model is None else model).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "old.bin").write_bytes(b"a pickle")
    return folder


def randomise(model: torch.nn.Module) -> None:
    """Every trained number away from its start: lora_B is zero there, and DoRA's magnitude that of the weight."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def save_adapter(folder: Path, model: Any = None, dtype: torch.dtype = torch.float64, **config: Any) -> Path:
    config = {"r": 2, "lora_alpha": 3, "target_modules": ALL, **config}
    trained = get_peft_model(llama(dtype) if model is None else model, LoraConfig(**config))
    randomise(trained)
    trained.save_pretrained(folder, save_embedding_layers=False)
    return folder


def state_of(folder: Path) -> Tensors:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_layer_model(folder: Path, model: torch.nn.Module) -> Path:
    folder.mkdir()
    save_file({name: t.clone() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def with_head() -> torch.nn.Module:
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    return torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4), "head": head, "score": torch.nn.Linear(4, 2)}).double()


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    """Give the tensors of a one-file checkpoint other names."""
    tensors = load_file(folder / "model.safetensors")
    save_file({new_name(name): t for name, t in tensors.items()}, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / ("adapter_config.json" if (folder / "adapter_config.json").exists() else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(file: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(file), **{name.replace("__", "."): t for name, t in changes.items()}}
    save_file({name: t for name, t in tensors.items() if t is not None}, file)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=2, n_head=2)).double()


Q = "model__layers__0__self_attn__q_proj"
Edit = Callable[[Path, Path], object]


def refused(base: Path, adapter: Path, message: str, **options: Any) -> None:
    """Refused before anything is written: the folders stay as they are and no other appears."""
    parent = base.parent
    before = files(parent)
    with pytest.raises(lk.AdapterFileError, match=message):
        merge_files(base, adapter, parent / "refused", **options)
    assert files(parent) == before and not (parent / "refused").exists()
    assert not [path.name for path in parent.iterdir() if "partial" in path.name]
