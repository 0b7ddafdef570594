"""Adapters of kohya and mlx-lm written as PEFT's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_files import MLX_CONFIG, dora, fresh_model, kohya_tensors, mlx_tensors, randn, write_kohya, write_mlx
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import lorakernels as lk
from lorakernels.files.convert import convert
from lorakernels.files.formats import read_adapter
from lorakernels.files.peft import PREFIX


def test_kohya_is_the_same_update_in_peft(tmp_path: Path, model_folder: Path) -> None:
    tensors = kohya_tensors()
    folder = convert(write_kohya(tmp_path / "k.safetensors", tensors), tmp_path / "out", model=model_folder)
    theirs = PeftModel.from_pretrained(fresh_model(), folder)
    base, merged = fresh_model().state_dict(), theirs.merge_and_unload().state_dict()
    expected = {
        "down_blocks.0.to_q": ("lora_unet_down_blocks_0_to_q", 1.5 / 2),
        "down_blocks.1.to_q": ("lora_unet_down_blocks_1_to_q", 1.5 / 2),
        "down_blocks.1.to_out.0": ("lora_unet_down_blocks_1_to_out_0", 1.0),  # no alpha means alpha = r
        "down_blocks.1.conv_in": ("lora_unet_down_blocks_1_conv_in", 4 / 2),
        "down_blocks.0.proj": ("lora_unet_down_blocks_0_proj", -2.0),
    }
    for path, (name, scaling) in expected.items():
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        delta = scaling * torch.einsum("nr,rk...->nk...", up.flatten(1), down)
        assert (merged.pop(f"{path}.weight") - base[f"{path}.weight"] - delta).abs().max() < 1e-10
    assert all(torch.equal(tensor, base[name]) for name, tensor in merged.items())


def test_kohya_parts(tmp_path: Path, model_folder: Path) -> None:
    tensors = kohya_tensors()
    tensors["lora_te1_text_model_q.lora_down.weight"] = randn(2, 6)
    tensors["lora_te1_text_model_q.lora_up.weight"] = randn(6, 2)
    file = write_kohya(tmp_path / "k.safetensors", tensors)
    with pytest.raises(lk.AdapterFileError, match=r"lora_te1 \(1 modules\), lora_unet \(5 modules\).*--prefix"):
        convert(file, tmp_path / "out", model=model_folder)
    with pytest.raises(lk.AdapterFileError, match="no modules of the prefix 'lora_te2'"):
        convert(file, tmp_path / "out", model=model_folder, prefix="lora_te2")
    convert(file, tmp_path / "out", model=model_folder, prefix="lora_unet")
    assert len(read_adapter(tmp_path / "out").updates) == 5


def test_kohya_names_need_the_model(tmp_path: Path, model_folder: Path) -> None:
    file = write_kohya(tmp_path / "k.safetensors", kohya_tensors())
    with pytest.raises(lk.AdapterFileError, match="underscores for dots; give the model's folder as --model"):
        convert(file, tmp_path / "out")
    weights = model_folder / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({**state, "down.blocks.0.to_q.weight": randn(8, 6)}, weights)
    with pytest.raises(lk.AdapterFileError, match=r"can mean down.blocks.0.to_q or down_blocks.0.to_q|can mean"):
        convert(file, tmp_path / "out", model=model_folder)
    save_file({name: tensor for name, tensor in state.items() if "to_out" not in name}, weights)
    with pytest.raises(
        lk.AdapterFileError, match="no module for 1 of 5 names, such as lora_unet_down_blocks_1_to_out_0"
    ):
        convert(file, tmp_path / "out", model=model_folder)
    save_file({**state, "down_blocks.0.to_q.weight": randn(8, 7)}, weights)
    with pytest.raises(lk.AdapterFileError, match=r"to_q\.weight \[8, 6\], and .* has \[8, 7\]"):
        convert(file, tmp_path / "out", model=model_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.safetensors", "model"]


def test_a_pipeline_is_told_its_parts(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    file = write_kohya(tmp_path / "k.safetensors", kohya_tensors())
    file = file.rename(model_folder.parent / "k.kohya.safetensors")
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    model_folder.rename(pipeline / "unet")
    with pytest.raises(lk.AdapterFileError, match=r"pipeline: give one of its parts \(unet\)"):
        convert(file, tmp_path / "out", model=pipeline)


def test_mlx_keeps_the_bits(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in mlx_tensors().items()}
    folder = convert(write_mlx(tmp_path / "mlx", tensors, MLX_CONFIG), tmp_path / "out")
    converted = load_file(folder / "adapter_model.safetensors")
    assert len(converted) == len(tensors)
    for name, tensor in tensors.items():
        key = PREFIX + name.replace("lora_a", "lora_A.weight").replace("lora_b", "lora_B.weight")
        assert torch.equal(converted[key], tensor.T) and converted[key].dtype == torch.bfloat16


@pytest.mark.parametrize("with_dora", [False, True])
def test_mlx_is_the_same_function_in_peft(with_dora: bool, tmp_path: Path) -> None:
    tensors = mlx_tensors(with_dora)
    source = write_mlx(tmp_path / "mlx", tensors, dora() if with_dora else MLX_CONFIG)
    model, x = fresh_model(), randn(4, 6)
    theirs = PeftModel.from_pretrained(fresh_model(), convert(source, tmp_path / "out")).eval()
    for layer in (0, 1):
        weight = model.get_parameter(f"down_blocks.{layer}.to_q.weight")
        a, b = (tensors[f"down_blocks.{layer}.to_q.lora_{part}"] for part in "ab")
        with torch.no_grad():
            weight += 20.0 * (a @ b).T
            if with_dora:
                weight *= (tensors[f"down_blocks.{layer}.to_q.m"] / weight.norm(dim=1))[:, None]
    assert (theirs(x) - model(x)).abs().max() < 1e-10
    assert theirs.peft_config["default"].lora_dropout == 0.1


def test_a_converted_adapter_loads_here(tmp_path: Path) -> None:
    source = write_mlx(tmp_path / "mlx", mlx_tensors(), MLX_CONFIG)
    folder = convert(source, tmp_path / "out")
    theirs, x = PeftModel.from_pretrained(fresh_model(), folder).eval(), randn(4, 6)
    assert (lk.load_adapter(fresh_model(), folder).eval()(x) - theirs(x)).abs().max() < 1e-10


def test_a_root_module_does_not_lend_its_rank(tmp_path: Path) -> None:
    """`proj` alone, as a pattern, would mean every module that ends in .proj."""
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "deep": nn.ModuleDict({"proj": nn.Linear(4, 4)})})
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    tensors = {}
    for name, r in (("proj", 3), ("deep_proj", 1)):
        tensors |= {f"lora_te_{name}.lora_down.weight": randn(r, 4), f"lora_te_{name}.lora_up.weight": randn(4, r)}
    out = convert(write_kohya(tmp_path / "k.safetensors", tensors), tmp_path / "out", model=folder)
    updates = read_adapter(out).updates
    assert {path: (u.r, u.scaling) for path, u in updates.items()} == {"proj": (3, 1.0), "deep.proj": (1, 1.0)}
    theirs = PeftModel.from_pretrained(model.double(), out)
    assert theirs.base_model.model["proj"].r == {"default": 3}
    assert theirs.base_model.model["deep"]["proj"].r == {"default": 1}


def test_what_is_there_stays(tmp_path: Path) -> None:
    source = write_mlx(tmp_path / "mlx", mlx_tensors(), MLX_CONFIG)
    before = {path: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(lk.AdapterFileError, match="is what is read"):
        convert(source, source)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note").write_text("mine")
    with pytest.raises(lk.AdapterFileError, match="not an empty folder"):
        convert(source, tmp_path / "taken")
    with pytest.raises(lk.AdapterFileError, match="in PEFT's format already"):
        convert(convert(source, tmp_path / "out"), tmp_path / "again")
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlx", "out", "taken"]
