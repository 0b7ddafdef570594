"""Merging an adapter into a model's files: the numbers of PEFT's merge, whole folders only, little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lorakernels as lk
from lorakernels.files.checkpoint import Checkpoint
from lorakernels.files.merge import merge_files, merged_weight
from lorakernels.files.peft import PREFIX
from lorakernels.files.update import LINEAR, MAGNITUDE, Update

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


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 7}},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "biases": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "all biases": {"bias": "all", "target_modules": ["q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"], "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_merges_as_peft(kind: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", **KINDS[kind])
    assert len(list(base.glob("*.safetensors"))) > 5
    before = files(base)
    merge_files(base, adapter, tmp_path / "merged")
    expected = PeftModel.from_pretrained(llama(), adapter).merge_and_unload().state_dict()
    merged = state_of(tmp_path / "merged")
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float64 and (tensor - expected[name]).abs().max() < 1e-10, name
    original = state_of(base)
    assert any((tensor - original[name]).abs().max() > 1e-3 for name, tensor in merged.items())
    assert files(base) == before


def test_the_merged_folder_is_a_model(tmp_path: Path) -> None:
    base, adapter = save_model(tmp_path / "base"), save_adapter(tmp_path / "adapter")
    merge_files(base, adapter, tmp_path / "merged")
    assert set(files(tmp_path / "merged")) == set(files(base)) - {"old.bin"}
    for name in ("config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json"):
        assert json.loads(files(tmp_path / "merged")[name]) == json.loads(files(base)[name])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    theirs = PeftModel.from_pretrained(llama(), adapter)
    ids = torch.arange(12).view(2, 6)
    assert (merged(ids).logits - theirs(ids).logits).abs().max() < 1e-10
    for file in (tmp_path / "merged").glob("*.safetensors"):
        with safe_open(file, "pt") as ours, safe_open(base / file.name, "pt") as its:
            assert set(ours.keys()) == set(its.keys()) and ours.metadata() == its.metadata()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    """From W + s B A in float64: half a step of the dtype, beside the float32 sum's own error.

    That is at most (r + 2) float32 roundings of the sum of the products' sizes.
    """
    base = save_model(tmp_path / "base", llama(dtype))
    adapter = save_adapter(tmp_path / "adapter", dtype=dtype)
    merge_files(base, adapter, tmp_path / "merged")
    weights, factors = state_of(base), load_file(adapter / "adapter_model.safetensors")
    merged = state_of(tmp_path / "merged")
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    for path in {key.partition(".lora_")[0] for key in factors}:
        W = weights[f"{path.removeprefix(PREFIX)}.weight"].double()
        A, B = (factors[f"{path}.lora_{half}.weight"].double() for half in "AB")
        exact, sizes = W + 1.5 * B @ A, W.abs() + 1.5 * B.abs() @ A.abs()
        got = merged[f"{path.removeprefix(PREFIX)}.weight"]
        half_a_step = eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal * eps
        assert got.dtype == dtype
        assert ((got.double() - exact).abs() <= half_a_step + (2 + 2) * eps32 * sizes).all()


def test_dtype_of_every_weight(tmp_path: Path) -> None:
    base, adapter = save_model(tmp_path / "base"), save_adapter(tmp_path / "adapter")
    merge_files(base, adapter, tmp_path / "same")
    merge_files(base, adapter, tmp_path / "half", dtype=torch.bfloat16)
    half = state_of(tmp_path / "half")
    # The sum is a float64 weight's, in float64: the one rounding is bfloat16's.
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in state_of(tmp_path / "same").items())
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    index = json.loads((tmp_path / "half" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in half.values())


def test_one_file_without_an_index(tmp_path: Path) -> None:
    base, adapter = save_model(tmp_path / "base", shard="1GB"), save_adapter(tmp_path / "adapter")
    merge_files(base, adapter, tmp_path / "merged")
    expected = PeftModel.from_pretrained(llama(), adapter).merge_and_unload().state_dict()
    assert [path.name for path in (tmp_path / "merged").glob("*.safetensors*")] == ["model.safetensors"]
    for name, tensor in state_of(tmp_path / "merged").items():
        assert (tensor - expected[name]).abs().max() < 1e-10


def test_mlx_is_merged_as_its_conversion(tmp_path: Path) -> None:
    torch.manual_seed(3)
    (tmp_path / "mlx").mkdir()
    fields = {"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 0.3}}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(fields))
    shapes = {"lora_a": (16, 2), "lora_b": (2, 16), "m": (16,)}
    path = "model.layers.1.self_attn.q_proj"
    tensors = {f"{path}.{part}": torch.rand(*shape, dtype=torch.float64) for part, shape in shapes.items()}
    save_file(tensors, tmp_path / "mlx" / "adapters.safetensors")
    base = save_model(tmp_path / "base")
    merge_files(base, tmp_path / "mlx", tmp_path / "merged")
    W = state_of(base)[f"{path}.weight"] + 0.3 * (tensors[f"{path}.lora_a"] @ tensors[f"{path}.lora_b"]).T
    W *= (tensors[f"{path}.m"] / W.norm(dim=1))[:, None]
    assert (state_of(tmp_path / "merged")[f"{path}.weight"] - W).abs().max() < 1e-10


def test_other_tensors_keep_their_bits(tmp_path: Path) -> None:
    base, adapter = save_model(tmp_path / "base", shard="1GB"), save_adapter(tmp_path / "adapter")
    kept = {
        "step": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
        "codes": torch.arange(5, dtype=torch.uint8),
        "small": torch.tensor([0.5, -3.0]).to(torch.float8_e4m3fn),
        "unused": torch.tensor([float("inf"), float("nan")], dtype=torch.bfloat16),
    }
    edit_tensors(base / "model.safetensors", **kept)
    merge_files(base, adapter, tmp_path / "merged")
    merged = state_of(tmp_path / "merged")
    for name, tensor in kept.items():
        assert merged[name].dtype == tensor.dtype and merged[name].shape == tensor.shape
        assert torch.equal(merged[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=2, n_head=2)).double()


def test_fan_in_fan_out(tmp_path: Path) -> None:
    """gpt2's weights are [in, out], and c_proj of its attention is square."""
    base = save_model(tmp_path / "base", gpt2())
    adapter = save_adapter(tmp_path / "adapter", gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    merge_files(base, adapter, tmp_path / "merged")
    expected = PeftModel.from_pretrained(gpt2(), adapter).merge_and_unload().state_dict()
    for name, tensor in state_of(tmp_path / "merged").items():
        assert (tensor - expected[name]).abs().max() < 1e-10, name
    edit_config(adapter, fan_in_fan_out=False)
    refused(base, adapter, r"fan_in_fan_out=False, and config.json model_type='gpt2'")


def test_fan_in_fan_out_of_a_model_without(tmp_path: Path) -> None:
    base, adapter = save_model(tmp_path / "base"), save_adapter(tmp_path / "adapter")
    edit_config(adapter, fan_in_fan_out=True)
    refused(base, adapter, r"model_type='llama', whose weights are taken for \[out, in\]")


@pytest.mark.parametrize("with_dora", [False, True])
def test_convolution(with_dora: bool) -> None:
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3)).double()
    weight = model[0].weight.detach().clone()
    trained = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=with_dora))
    randomise(trained)
    layer = trained.base_model.model[0]
    tensors = dict(zip(LINEAR, (layer.lora_A["default"].weight, layer.lora_B["default"].weight), strict=True))
    if with_dora:
        tensors[MAGNITUDE] = layer.lora_magnitude_vector["default"].weight.detach()
    update = Update(tensors, 3, 1.5)
    with torch.no_grad():
        got = merged_weight(weight, update)
    assert (got - trained.merge_and_unload()[0].weight).abs().max() < 1e-10


def test_dora_keeps_a_row_of_zeros() -> None:
    """0 / 0 in the formula; a row with no direction has no length to bring it to."""
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    factors = zip((*LINEAR, MAGNITUDE), (torch.zeros(1, 2), torch.zeros(2, 1), torch.tensor([10.0, 7.0])), strict=True)
    update = Update(dict(factors), 1, 1.0)
    assert torch.equal(merged_weight(weight, update), torch.tensor([[6.0, 8.0], [0.0, 0.0]]))


def one_layer_model(folder: Path, model: torch.nn.Module) -> Path:
    folder.mkdir()
    save_file({name: t.clone() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def with_head() -> torch.nn.Module:
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    return torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4), "head": head, "score": torch.nn.Linear(4, 2)}).double()


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_biases_beside_modules_to_save(bias: Any, name: str, tmp_path: Path) -> None:
    """With bias="all" PEFT writes those of modules_to_save three times; BatchNorm has a count that is no float."""
    base = one_layer_model(tmp_path / "base", with_head())
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["head", "score"], bias=bias)
    trained = get_peft_model(with_head(), config, adapter_name=name)  # type: ignore[arg-type]
    randomise(trained)
    counter = trained.base_model.model["head"].modules_to_save[name][0].num_batches_tracked
    counter.fill_(7)
    trained.save_pretrained(tmp_path / "adapter")
    adapter = tmp_path / "adapter" if name == "default" else tmp_path / "adapter" / name
    merge_files(base, adapter, tmp_path / "merged")
    expected, merged = trained.merge_and_unload().state_dict(), state_of(tmp_path / "merged")
    assert merged.keys() == expected.keys() and merged["head.0.num_batches_tracked"] == 7
    for key, tensor in merged.items():
        assert tensor.dtype == expected[key].dtype and (tensor - expected[key]).abs().max() < 1e-10, key


def test_a_convolution_with_groups_is_not_merged(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3, groups=2))
    base = one_layer_model(tmp_path / "base", model)
    lk.save_adapter(lk.inject(model, lk.LoRAConfig(r=4, target_modules=["0"])), tmp_path / "adapter")
    refused(base, tmp_path / "adapter", "0 is a convolution with 2 groups, whose adapter reads the channels of all")


# ------------------------------------------------------------------------------------------- names


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    """Give the tensors of a one-file checkpoint other names."""
    tensors = load_file(folder / "model.safetensors")
    save_file({new_name(name): t for name, t in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "new_name",
    [lambda name: name.removeprefix("model."), lambda name: f"wrapped.{name}"],
    ids=["one part less", "one part more"],
)
def test_prefixes(new_name: Callable[[str], str], tmp_path: Path) -> None:
    base, adapter = save_model(tmp_path / "base", shard="1GB"), save_adapter(tmp_path / "adapter")
    rename(base, new_name)
    merge_files(base, adapter, tmp_path / "merged")
    expected = PeftModel.from_pretrained(llama(), adapter).merge_and_unload().state_dict()
    merged = state_of(tmp_path / "merged")
    assert merged.keys() == {new_name(name) for name in expected}
    for name, tensor in expected.items():
        assert (merged[new_name(name)] - tensor).abs().max() < 1e-10


def test_a_prefix_that_can_be_two(tmp_path: Path) -> None:
    base, adapter = save_model(tmp_path / "base", shard="1GB"), save_adapter(tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    twice = {f"{side}.{name}": t.clone() for name, t in tensors.items() for side in ("draft", "main")}
    save_file(twice, base / "model.safetensors")
    refused(base, adapter, r"can mean draft\.model\.layers.* or main\.model")
    # The names as they are leave no doubt.
    save_file({**tensors, **twice}, base / "model.safetensors")
    merge_files(base, adapter, tmp_path / "merged")
    merged = state_of(tmp_path / "merged")
    assert all(torch.equal(merged[name], tensor) for name, tensor in twice.items())


# ------------------------------------------------------------------------------------------- refusals


def refused(base: Path, adapter: Path, message: str, **options: Any) -> None:
    """Refused before anything is written: the folders stay as they are and no other appears."""
    parent = base.parent
    before = files(parent)
    with pytest.raises(lk.AdapterFileError, match=message):
        merge_files(base, adapter, parent / "refused", **options)
    assert files(parent) == before and not (parent / "refused").exists()
    assert not [path.name for path in parent.iterdir() if "partial" in path.name]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / ("adapter_config.json" if (folder / "adapter_config.json").exists() else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(file: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(file), **{name.replace("__", "."): t for name, t in changes.items()}}
    save_file({name: t for name, t in tensors.items() if t is not None}, file)


Q = "model__layers__0__self_attn__q_proj"
Edit = Callable[[Path, Path], object]
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
    "a pickle": (lambda base, adapter: (base / "model.safetensors").rename(base / "model.bin"), "pickles are"),
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


def test_kohya_is_sent_to_convert(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    half = torch.ones(16, 2)
    save_file(
        {"lora_te_q.lora_up.weight": half, "lora_te_q.lora_down.weight": torch.ones(2, 16)}, tmp_path / "k.safetensors"
    )
    refused(base, tmp_path / "k.safetensors", "convert it first")


# ------------------------------------------------------------------------------------------- memory

SHARDS, SIDE = 12, 2048  # 16 MiB a tensor, one tensor a shard: 192 MiB
MEASURE = """
import re, sys
from pathlib import Path
import torch
from lorakernels.files.merge import merge_files

def peak():  # not ru_maxrss, which a process inherits from the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
merge_files(*sys.argv[1:4])  # loads what libraries load late
before = peak()
merge_files(*sys.argv[4:])
after = peak()
held = torch.ones((after - before) // 4 + 2**24)  # the measure itself can fail: this must move it
assert peak() > after, (before, after, peak())
print(after - before)
"""


def write_ones(folder: Path, shards: int, side: int) -> list[str]:
    """A model of ones, an adapter of ones, and where to merge them."""
    model, adapter = folder / "model", folder / "adapter"
    model.mkdir(parents=True)
    adapter.mkdir()
    names = {f"layers.{n}.q.weight": f"model-{n}.safetensors" for n in range(shards)}
    factors = {}
    for n, (name, file) in enumerate(names.items()):
        save_file({name: torch.ones(side, side)}, model / file)
        factors[f"{PREFIX}layers.{n}.q.lora_A.weight"] = torch.ones(2, side)
        factors[f"{PREFIX}layers.{n}.q.lora_B.weight"] = torch.ones(side, 2)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    return [str(model), str(adapter), str(folder / "merged")]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_memory_is_that_of_a_shard(tmp_path: Path) -> None:
    """A changed tensor of T bytes is read (T, the mapped shard) and copied and summed into (T).

    The limit is twice that; a merge that held the model would need 12 T.
    """
    small, large = write_ones(tmp_path / "small", 1, 8), write_ones(tmp_path / "large", SHARDS, SIDE)
    # glibc else takes tensors from its heap once one was freed, and what the heap keeps is by chance: 2 to 4 tensors.
    fixed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run([sys.executable, "-c", MEASURE, *small, *large], capture_output=True, text=True, env=fixed)
    assert done.returncode == 0, done.stderr
    tensor = SIDE * SIDE * 4
    assert tensor < int(done.stdout) < 4 * tensor, f"{int(done.stdout) / tensor:.1f} tensors"
    assert load_file(tmp_path / "large" / "merged" / "model-7.safetensors")["layers.7.q.weight"][0, 0] == 3
