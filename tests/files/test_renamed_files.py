"""Adapters and checkpoints on two sides of a renaming by transformers: converted and merged, in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import randn
from safetensors.torch import load_file, save_file

import lorakernels as lk
from lorakernels.files.convert import convert
from lorakernels.files.merge import merge_files

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.conversion_mapping")
SIZES: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def clip() -> Any:
    config = transformers.CLIPTextConfig(vocab_size=12, bos_token_id=0, eos_token_id=1, **SIZES)
    return transformers.CLIPTextModel(config)


def qwen2_vl() -> Any:
    """illuin-tech/colpali #424 and hiyouga/LlamaFactory: `model.layers` has become `model.language_model.layers`."""
    text = {**SIZES, "vocab_size": 12, "num_key_value_heads": 1, "tie_word_embeddings": False}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 0]}
    vision = {"depth": 1, "embed_dim": 8, "num_heads": 2, "hidden_size": 8, "mlp_ratio": 1}
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    )


def old_clip(name: str) -> str:
    return f"text_model.{name}"


def old_qwen2_vl(name: str) -> str:
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


MODELS: dict[str, tuple[Callable[[], Any], Callable[[str], str], str]] = {
    "CLIP": (clip, old_clip, "encoder.layers.0.mlp.fc1"),
    "Qwen2-VL": (qwen2_vl, old_qwen2_vl, "model.language_model.layers.0.mlp.down_proj"),
    "the eyes of Qwen2-VL": (qwen2_vl, old_qwen2_vl, "model.visual.blocks.0.attn.proj"),
}


def same(name: str) -> str:
    return name


def model_folder(
    folder: Path, make: Callable[[], Any], named: Callable[[str], str]
) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = make().double()
    folder.mkdir()
    state = {named(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | {"architectures": [type(model).__name__]}))
    return folder, state


def pair(shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return randn(2, shape[1]), randn(shape[0], 2)


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("old_model", [False, True])
@pytest.mark.parametrize("kohya", [False, True])
def test_merged(which: str, old_model: bool, kohya: bool, tmp_path: Path) -> None:
    """The adapter has the names of one side, the model's files those of the other."""
    make, old, path = MODELS[which]
    base, state = model_folder(tmp_path / "model", make, old if old_model else same)
    mine, theirs = (same, old) if old_model else (old, same)
    weight = f"{theirs(path)}.weight"
    A, B = pair(state[f"{(old if old_model else same)(path)}.weight"].shape)
    name = mine(path)
    if kohya:
        source = tmp_path / "k.safetensors"
        flat = f"lora_te_{name.replace('.', '_')}"
        tensors = {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B}
        save_file(tensors | {f"{flat}.alpha": torch.tensor(6.0)}, source)
    else:
        source = tmp_path / "adapter"
        source.mkdir()
        tensors = {
            f"base_model.model.{name}.lora_{half}.weight": factor for half, factor in zip("AB", (A, B), strict=True)
        }
        save_file(tensors, source / "adapter_model.safetensors")
        (source / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6}))
    merge_files(base, source, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    weight = f"{(old if old_model else same)(path)}.weight"
    assert merged.keys() == state.keys()
    assert (merged.pop(weight) - state[weight] - 3 * B @ A).abs().max() < 1e-10
    assert all(torch.equal(tensor, state[key]) for key, tensor in merged.items())
    if kohya:
        folder = convert(source, tmp_path / "out", model=base)
        assert f"base_model.model.{weight.replace('.weight', '.lora_A.weight')}" in load_file(
            folder / "adapter_model.safetensors"
        )
        layer = lk.load_adapter(make().double(), folder).get_submodule(path)
        assert torch.equal(layer.lora_A["default"].weight, A)


def test_a_file_of_old_names_into_a_model(tmp_path: Path) -> None:
    """The command of the docs: kohya's `lora_te_text_model_…` for a CLIP of today."""
    A, B = pair(torch.Size((8, 8)))
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    save_file({f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}, tmp_path / "k.safetensors")
    with pytest.warns(UserWarning, match="this is inferred: kohya format, of which the part is lora_te"):
        model = lk.load_adapter(clip().double(), tmp_path / "k.safetensors")
    assert torch.equal(model.encoder.layers[0].mlp.fc1.lora_B["default"].weight, B)


def test_both_names_of_one_module(tmp_path: Path) -> None:
    base, _ = model_folder(tmp_path / "model", clip, same)
    A, B = pair(torch.Size((8, 8)))
    tensors = {}
    for name in ("text_model_encoder_layers_0_mlp_fc1", "encoder_layers_0_mlp_fc1"):
        tensors |= {f"lora_te_{name}.lora_down.weight": A.clone(), f"lora_te_{name}.lora_up.weight": B.clone()}
    save_file(tensors, tmp_path / "k.safetensors")
    with pytest.raises(lk.AdapterFileError, match=r"are both encoder\.layers\.0\.mlp\.fc1"):
        convert(tmp_path / "k.safetensors", tmp_path / "out", model=base)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["CLIPTextModel"], "num_hidden_layers": 10**9},
        {"architectures": ["CLIPTextModel"], "hidden_size": "eight"},
        {"architectures": ["pipeline"]},
        {"architectures": [["CLIPTextModel"]]},
        {"architectures": "CLIPTextModel"},
        {},
    ],
    ids=str,
)
def test_configurations_that_mean_no_model(config: dict[str, Any], tmp_path: Path) -> None:
    base, _ = model_folder(tmp_path / "model", clip, same)
    (base / "config.json").write_text(json.dumps(config))
    A, B = pair(torch.Size((8, 8)))
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    save_file({f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}, tmp_path / "k.safetensors")
    with pytest.raises(lk.AdapterFileError, match="has no module for 1 of 1 names"):
        convert(tmp_path / "k.safetensors", tmp_path / "out", model=base)
