"""Files of models whose modules transformers has renamed since: read as PEFT reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakernels as lk

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers.conversion_mapping")

IDS = torch.arange(6)[None]
FILE = "adapter_model.safetensors"


def clip_text() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 20}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(num_attention_heads=2, **sizes)).eval()


def old_file(folder: Path) -> Any:
    """An adapter as of before, when everything lay in `text_model.`; and a model that has it."""
    config = lk.LoRAConfig(
        r=2,
        target_modules=["q_proj", "fc1"],
        rank_pattern={"layers.1.self_attn.q_proj": 3},
        init_lora_weights=False,
        bias="lora_only",
    )
    model = lk.inject(clip_text(), config)
    for parameter in lk.trainable_parameters(model):
        torch.nn.init.normal_(parameter, std=0.2)
    lk.save_adapter(model, folder)
    prefix = "base_model.model."
    tensors = {key.replace(prefix, f"{prefix}text_model."): tensor for key, tensor in load_file(folder / FILE).items()}
    save_file(tensors, folder / FILE)
    return model.eval()


def test_an_old_file_is_read(tmp_path: Path) -> None:
    trained = old_file(tmp_path)
    expected = trained(IDS).last_hidden_state
    ours = lk.load_adapter(clip_text(), tmp_path).eval()
    assert torch.equal(ours(IDS).last_hidden_state, expected)
    assert not any("text_model" in key for key in load_file(lk.save_adapter(ours, tmp_path / "again") / FILE))


def test_two_names_of_one_module(tmp_path: Path) -> None:
    old_file(tmp_path)
    tensors = load_file(tmp_path / FILE)
    tensors |= {key.replace("text_model.", ""): tensor + 1 for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(lk.AdapterFileError, match="of the model; expected one of them"):
        lk.load_adapter(clip_text(), tmp_path)


def test_a_name_that_never_was_is_still_refused(tmp_path: Path) -> None:
    old_file(tmp_path)
    tensors = {key.replace("text_model", "image_model"): t for key, t in load_file(tmp_path / FILE).items()}
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(lk.AdapterFileError, match=r"image_model.*expected a bias that the model has"):
        lk.load_adapter(clip_text(), tmp_path)
