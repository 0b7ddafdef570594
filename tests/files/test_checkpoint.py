"""Merging an adapter into a model's files: the numbers of PEFT's merge, and the names."""

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
from checkpoints import (
    edit_config,
    edit_tensors,
    files,
    gpt2,
    llama,
    one_layer_model,
    randomise,
    refused,
    rename,
    save_adapter,
    save_model,
    state_of,
    with_head,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorakernels as lk
from lorakernels.files.convert import convert
from lorakernels.files.merge import merge_files
from lorakernels.files.peft import PREFIX
from lorakernels.files.update import LINEAR, MAGNITUDE, Update, merged_weight
from lorakernels.quant.packed import CODES

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 7}},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "biases": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "biases_and_lora_bias": {"bias": "lora_only", "lora_bias": True, "target_modules": ["q_proj"]},
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


def test_another_format_into_gpt2(tmp_path: Path) -> None:
    """It does not say how the weights lie, and config.json does."""
    base, path = save_model(tmp_path / "base", gpt2()), "transformer.h.1.attn.c_attn"
    torch.manual_seed(1)
    A, B = torch.randn(2, 16).double(), torch.randn(48, 2).double()
    file = tmp_path / "d.safetensors"
    save_file({f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B, f"{path}.alpha": torch.tensor(6.0)}, file)
    merge_files(base, file, tmp_path / "merged")
    difference = state_of(tmp_path / "merged")[f"{path}.weight"] - gpt2().state_dict()[f"{path}.weight"]
    assert (difference - 3 * (B @ A).T).abs().max() < 1e-10
    theirs = PeftModel.from_pretrained(gpt2(), convert(file, tmp_path / "converted", model=base))
    assert theirs.peft_config["default"].fan_in_fan_out
    layer = theirs.base_model.model.get_submodule(path)
    assert (layer.get_delta_weight("default") - difference).abs().max() < 1e-10


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


def ones(name: str, side: int, packed: bool) -> dict[str, torch.Tensor]:
    """A weight of ones [side, side] as it is saved, plain or as bitsandbytes packs it."""
    if not packed:
        return {name: torch.ones(side, side)}
    fields = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [side, side]}
    parts = {"absmax": torch.ones(side * side // 64), "quant_map": torch.tensor(CODES["nf4"])}
    parts["quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
    numbers = torch.full((side * side // 2, 1), 0xFF, dtype=torch.uint8)
    return {name: numbers} | {f"{name}.{part}": tensor for part, tensor in parts.items()}


def write_ones(folder: Path, shards: int, side: int, packed: bool) -> list[str]:
    """A model of ones, an adapter of ones, and where to merge them."""
    model, adapter = folder / "model", folder / "adapter"
    model.mkdir(parents=True)
    adapter.mkdir()
    names, factors = {}, {}
    for n in range(shards):
        tensors, file = ones(f"layers.{n}.q.weight", side, packed), f"model-{n}.safetensors"
        save_file(tensors, model / file)
        names |= dict.fromkeys(tensors, file)
        factors[f"{PREFIX}layers.{n}.q.lora_A.weight"] = torch.ones(2, side)
        factors[f"{PREFIX}layers.{n}.q.lora_B.weight"] = torch.ones(side, 2)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    return [str(model), str(adapter), str(folder / "merged")]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_memory_is_that_of_a_shard(packed: bool, tmp_path: Path) -> None:
    """A changed tensor of T bytes is read (T, the mapped shard; or unpacked) and copied and summed into (T).

    The limit is twice that; a merge that held the model would need 12 T.
    """
    small, large = write_ones(tmp_path / "small", 1, 8, packed), write_ones(tmp_path / "large", SHARDS, SIDE, packed)
    # glibc else takes tensors from its heap once one was freed, and what the heap keeps is by chance: 2 to 4 tensors.
    fixed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run([sys.executable, "-c", MEASURE, *small, *large], capture_output=True, text=True, env=fixed)
    assert done.returncode == 0, done.stderr
    tensor = SIDE * SIDE * 4
    assert tensor < int(done.stdout) < 4 * tensor, f"{int(done.stdout) / tensor:.1f} tensors"
    assert load_file(tmp_path / "large" / "merged" / "model-7.safetensors")["layers.7.q.weight"][0, 0] == 3
