"""Merging into a checkpoint whose weights bitsandbytes has packed: as merging into the loaded model, and plain then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_config, llama, refused, state_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lorakernels as lk
from lorakernels.files.checkpoint import Checkpoint
from lorakernels.files.merge import merge_files
from lorakernels.quant.layers import read
from lorakernels.testing.budget import assert_within_budget

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

WEIGHTS = 21  # 7 projections of 3 layers
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nested": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4 in bfloat16": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
}


def packed_model(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    if not folder.exists():
        llama(dtype).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **fields)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


def save(tmp_path: Path, shard: int | str = "1GB", **fields: Any) -> tuple[Path, Path]:
    """The folders of a packed model and of an adapter of some of its layers."""
    model, base, adapter = packed_model(tmp_path / "plain", **fields), tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base, max_shard_size=shard)
    (base / "tokenizer.json").write_text("{}")
    targets = ["q_proj", "v_proj", "down_proj"]
    lk.inject(model, lk.LoRAConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False))
    lk.save_adapter(model, adapter)
    return base, adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_merges_as_the_loaded_model(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In shards so small that a weight's tensors lie in several, and of some shards nothing is left.

    The weights are those of W + s B A in float64: half a step of the dtype, beside the float32 sum's own error.
    """
    base, adapter = save(tmp_path, shard=100, dtype=dtype, **FORMATS[kind])
    shards = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert len({shards[name], shards[f"{name}.absmax"], shards[f"{name}.quant_map"]}) > 1
    report = merge_files(base, adapter, tmp_path / "merged")
    assert str(report).endswith(f"{WEIGHTS} {FORMATS[kind]['bnb_4bit_quant_type']} weights are plain now")
    assert report.dequantised.keys() == Checkpoint(base).packed.keys() and len(report.dequantised) == WEIGHTS

    model, merged = AutoModelForCausalLM.from_pretrained(base), state_of(tmp_path / "merged")
    lk.load_adapter(model, adapter)
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    for name, tensor in merged.items():
        assert tensor.dtype is dtype
        layer = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, lk.LoRALinear) or name.endswith("bias"):
            value = read(layer).dense() if name in report.dequantised else layer.get_parameter(name.split(".")[-1])
            assert torch.equal(tensor, value), name
            continue
        W = layer.weight.dense(torch.float32).double()
        A, B = (layer.get_parameter(f"lora_{half}.default.weight").double() for half in "AB")
        exact, sizes = W + 1.5 * B @ A, W.abs() + 1.5 * B.abs() @ A.abs()
        assert ((tensor.double() - exact).abs() <= eps / 2 * exact.abs() + (2 + 2) * eps32 * sizes).all(), name


@pytest.mark.parametrize("kind", FORMATS)
def test_the_merged_folder_is_a_plain_model(kind: str, tmp_path: Path) -> None:
    """transformers reads it, with the answers of the adapter merged into the loaded model."""
    base, adapter = save(tmp_path, shard=100, **FORMATS[kind])
    merge_files(base, adapter, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {type(module) for name, module in plain.named_modules() if name.endswith("proj")} == {torch.nn.Linear}
    assert getattr(plain.config, "quantization_config", None) is None and (tmp_path / "merged/tokenizer.json").exists()
    stored = {path.name for path in (tmp_path / "merged").glob("*.safetensors")}
    assert stored < {path.name for path in base.glob("*.safetensors")}
    assert all(next(iter(load_file(tmp_path / "merged" / name)), None) for name in stored)

    model, ids = AutoModelForCausalLM.from_pretrained(base), torch.arange(12).view(2, 6)
    lk.inject(model, lk.LoRAConfig(r=2, target_modules="all-linear"), "nothing")  # bitsandbytes' product is its own
    lk.load_adapter(model, adapter)
    lk.merge(model)
    with torch.no_grad():
        logits = plain.double()(ids).logits, plain.float()(ids).logits, model(ids).logits
    assert_within_budget(logits[2], logits[1], logits[0], torch.float32)


def test_dtype(tmp_path: Path) -> None:
    base, adapter = save(tmp_path, **FORMATS["nf4"])
    merge_files(base, adapter, tmp_path / "merged", dtype=torch.bfloat16)
    merge_files(base, adapter, tmp_path / "same")
    wide = state_of(tmp_path / "same")
    assert all(torch.equal(tensor, wide[name].bfloat16()) for name, tensor in state_of(tmp_path / "merged").items())
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert "quantization_config" not in config and "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))


Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.1.self_attn.k_proj"  # has no adapter
RECORD = f"{K}.weight.quant_state.bitsandbytes__nf4"


def record(**changes: Any) -> torch.Tensor:
    fields = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [8, 16], **changes}
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


FAULTS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "8 bits beside": ({f"{K}.SCB": torch.ones(8)}, rf"{K} is quantised \(it has {K}\.SCB\)"),
    "no record": ({RECORD: None}, rf"{K} is quantised \(it has {K}\.weight\.absmax\)"),
    "no scales": ({f"{K}.weight.absmax": None}, rf"{K}\.weight: the base weight has no absmax"),
    "fewer scales": ({f"{K}.weight.absmax": torch.ones(1)}, r"k_proj\.weight: .* scales \[1\].* expected 64 and \[2\]"),
    "scales packed again": ({f"{K}.weight.absmax": torch.ones(2, 1)}, r"scales \[2, 1\].*packed again in evaluation"),
    "another table": ({f"{K}.weight.quant_map": torch.ones(16)}, "has no nf4 in its quant_map"),
    "no numbers": ({f"{K}.weight": None}, "without numbers"),
    "half of a nesting": ({f"{K}.weight.nested_absmax": torch.ones(1)}, "has no nested_quant_map"),
    "another block size": ({RECORD: record(blocksize=48)}, "nf4 in blocks of 48"),
    "another shape": ({RECORD: record(shape=[8, 32])}, r"64 bytes .* expected 128"),
    "a stack": ({RECORD: record(shape=[2, 4, 16])}, r"\[2, 4, 16\]; expected nf4"),
    "another dtype": ({RECORD: record(dtype="float7")}, "of None"),
    "no float": ({RECORD: record(dtype="int8")}, "of no dtype of F64"),
    "a record that is none": ({RECORD: torch.zeros(9, dtype=torch.uint8)}, rf"base: {K}\.weight: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str, tmp_path: Path) -> None:
    base, adapter = save(tmp_path, **FORMATS["nf4"])
    changes, message = FAULTS[fault]
    tensors = {**load_file(base / "model.safetensors"), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, base / "model.safetensors")
    refused(base, adapter, message)


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq"])
def test_another_method_is_refused(method: str, tmp_path: Path) -> None:
    base, adapter = save(tmp_path, **FORMATS["nf4"])
    edit_config(base, quantization_config={"quant_method": method})
    refused(base, adapter, rf"is quantised \(config\.json says {method}\)")
