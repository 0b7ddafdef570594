"""Reading the adapter files of PEFT, kohya and mlx-lm, and writing them as PEFT's."""

from __future__ import annotations

import json
import pickle
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import lorakernels as lk
from lorakernels.files import patterns
from lorakernels.files.convert import convert
from lorakernels.files.formats import read_adapter
from lorakernels.files.peft import PREFIX

Tensors = dict[str, torch.Tensor]
NAN = float("nan")


class Block(nn.Module):
    """Names with underscores, digits and one inside another: what makes kohya's names ambiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 8, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(8, 6), nn.Dropout(0.0)])
        self.conv_in = nn.Conv2d(3, 5, 3)
        self.proj = nn.Conv2d(5, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_out[0](self.to_q(x))


def fresh_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.down_blocks = nn.ModuleList([Block(), Block()])
    model.forward = lambda x: model.down_blocks[1](model.down_blocks[0](x))  # type: ignore[method-assign]
    return model.double()


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(fresh_model().state_dict(), folder / "diffusion_pytorch_model.safetensors")
    return folder


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def kohya_tensors() -> Tensors:
    """Ranks and alphas that differ, alpha as an integer and left out, convolutions of both sizes."""
    torch.manual_seed(1)
    return {
        "lora_unet_down_blocks_0_to_q.lora_down.weight": randn(2, 6),
        "lora_unet_down_blocks_0_to_q.lora_up.weight": randn(8, 2),
        "lora_unet_down_blocks_0_to_q.alpha": torch.tensor(1.5),
        "lora_unet_down_blocks_1_to_q.lora_down.weight": randn(2, 6),
        "lora_unet_down_blocks_1_to_q.lora_up.weight": randn(8, 2),
        "lora_unet_down_blocks_1_to_q.alpha": torch.tensor(1.5),
        "lora_unet_down_blocks_1_to_out_0.lora_down.weight": randn(3, 8),
        "lora_unet_down_blocks_1_to_out_0.lora_up.weight": randn(6, 3),
        "lora_unet_down_blocks_1_conv_in.lora_down.weight": randn(2, 3, 3, 3),
        "lora_unet_down_blocks_1_conv_in.lora_up.weight": randn(5, 2, 1, 1),
        "lora_unet_down_blocks_1_conv_in.alpha": torch.tensor(4),
        "lora_unet_down_blocks_0_proj.lora_down.weight": randn(1, 5, 1, 1),
        "lora_unet_down_blocks_0_proj.lora_up.weight": randn(4, 1, 1, 1),
        "lora_unet_down_blocks_0_proj.alpha": torch.tensor(-2.0),
    }


def write_kohya(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path, metadata={"ss_network_module": "networks.lora"})
    return path


MLX_CONFIG: dict[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 2,
    "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.1, "keys": ["to_q"]},
}


def mlx_tensors(dora: bool = False) -> Tensors:
    torch.manual_seed(2)
    tensors = {}
    for layer in (0, 1):
        tensors[f"down_blocks.{layer}.to_q.lora_a"] = randn(6, 2)
        tensors[f"down_blocks.{layer}.to_q.lora_b"] = randn(2, 8)
        if dora:
            tensors[f"down_blocks.{layer}.to_q.m"] = randn(8).abs()
    return tensors


def write_mlx(folder: Path, tensors: Tensors, config: Mapping[str, Any]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def dora(config: Mapping[str, Any] = MLX_CONFIG) -> dict[str, Any]:
    return {**config, "fine_tune_type": "dora"}


# ------------------------------------------------------------------------------------------- conversion


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


# ------------------------------------------------------------------------------------------- refusals


def changed(tensors: Tensors, **changes: torch.Tensor | None) -> Tensors:
    """With tensors set or, for None, taken out; `__` stands for a dot."""
    result = dict(tensors)
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        if tensor is None:
            del result[key]
        else:
            result[key] = tensor
    return result


Q = "lora_unet_down_blocks_0_to_q"
KOHYA_FAULTS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "no up": ({f"{Q}__lora_up__weight": None}, "no lora_up; expected both"),
    "no down": ({f"{Q}__lora_down__weight": None}, "no lora_down; expected both"),
    "ranks": ({f"{Q}__lora_up__weight": randn(8, 3)}, "one r of at least 1"),
    "transposed": ({f"{Q}__lora_down__weight": randn(6, 2)}, "transposed"),
    "no rank": (
        {f"{Q}__lora_down__weight": randn(0, 6), f"{Q}__lora_up__weight": randn(8, 0)},
        "one r of at least 1",
    ),
    "nan": ({f"{Q}__lora_up__weight": torch.full((8, 2), NAN)}, "NaN or Inf"),
    "inf": ({f"{Q}__lora_up__weight": torch.full((8, 2), float("inf"))}, "NaN or Inf"),
    "integers": ({f"{Q}__lora_up__weight": torch.ones(8, 2, dtype=torch.int8)}, "int8; expected a float"),
    "alpha nan": ({f"{Q}__alpha": torch.tensor(NAN)}, "alpha is nan; expected one finite number"),
    "alpha zero": ({f"{Q}__alpha": torch.tensor(0.0)}, "expected one finite number that is not 0"),
    "alpha of two": ({f"{Q}__alpha": torch.ones(2)}, r"alpha is \[2\]"),
    "vector": ({f"{Q}__lora_up__weight": randn(8)}, "expected two dimensions"),
    "loha": ({f"{Q}__hada_w1_a": randn(2, 2)}, "LoHa"),
    "lokr": ({f"{Q}__lokr_w1": randn(2, 2)}, "LoKr"),
    "dora": ({f"{Q}__dora_scale": randn(8, 1)}, "DoRA of LyCORIS"),
    "tucker": ({f"{Q}__lora_mid__weight": randn(2, 2, 3, 3)}, "Tucker"),
    "unknown": ({f"{Q}__lora_side__weight": randn(2, 2)}, "unknown key"),
    "peft's keys": ({f"{PREFIX}q__lora_A__weight": randn(2, 2)}, "PEFT's keys and no adapter_config.json"),
}


@pytest.mark.parametrize("fault", KOHYA_FAULTS)
def test_kohya_faults(fault: str, tmp_path: Path, model_folder: Path) -> None:
    changes, message = KOHYA_FAULTS[fault]
    file = write_kohya(tmp_path / "k.safetensors", changed(kohya_tensors(), **changes))
    with pytest.raises(lk.AdapterFileError, match=message):
        convert(file, tmp_path / "out", model=model_folder)
    assert not (tmp_path / "out").exists()


def parameters(**changes: Any) -> dict[str, Any]:
    return {**MLX_CONFIG, "lora_parameters": {**MLX_CONFIG["lora_parameters"], **changes}}


V = "down_blocks__0__to_q"
MLX_FAULTS: dict[str, tuple[dict[str, torch.Tensor | None], dict[str, Any], str]] = {
    "no b": ({f"{V}__lora_b": None}, MLX_CONFIG, "no lora_b; expected both"),
    "ranks": ({f"{V}__lora_b": randn(3, 8)}, MLX_CONFIG, "one r of at least 1"),
    "experts": ({f"{V}__lora_a": randn(4, 2, 6), f"{V}__lora_b": randn(4, 8, 2)}, MLX_CONFIG, "two dimensions"),
    "nan": ({f"{V}__lora_b": torch.full((2, 8), NAN)}, MLX_CONFIG, "NaN or Inf"),
    "integers": ({f"{V}__lora_b": torch.ones(2, 8, dtype=torch.int32)}, MLX_CONFIG, "expected a float"),
    "quantised": ({f"{V}__lora_a_scales": randn(2, 2)}, MLX_CONFIG, "quantised adapter"),
    "unknown": ({f"{V}__weight": randn(2, 2)}, MLX_CONFIG, "unknown key"),
    "embedding": (
        {"model__embed_tokens__lora_a": randn(9, 2), "model__embed_tokens__lora_b": randn(2, 6)},
        MLX_CONFIG,
        "is an embedding",
    ),
    "dora without m": ({}, dora(), "lacks DoRA's m"),
    "m without dora": ({f"{V}__m": randn(8)}, MLX_CONFIG, "has DoRA's m"),
    "full": ({}, {**MLX_CONFIG, "fine_tune_type": "full"}, "fine_tune_type is 'full'"),
    "rank": ({}, parameters(rank=4), "rank is 4"),
    "no rank": ({}, parameters(rank=None), "rank is None"),
    "scale nan": ({}, parameters(scale=NAN), "scale is nan"),
    "scale text": ({}, parameters(scale="20"), "expected a finite number"),
    "old alpha": ({}, parameters(alpha=16), "old mlx-lm multiplied scale"),
    "no parameters": ({}, {"fine_tune_type": "lora"}, "lora_parameters is None"),
    "dropout": ({}, parameters(dropout=2), "lora_dropout is 2"),
}


@pytest.mark.parametrize("fault", MLX_FAULTS)
def test_mlx_faults(fault: str, tmp_path: Path) -> None:
    changes, config, message = MLX_FAULTS[fault]
    source = write_mlx(tmp_path / "mlx", changed(mlx_tensors(), **changes), config)
    with pytest.raises(lk.AdapterFileError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def peft_folder(tmp_path: Path) -> Path:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"], init_lora_weights=False)
    get_peft_model(fresh_model(), config).save_pretrained(tmp_path / "peft")
    return tmp_path / "peft"


Edit = Callable[[dict[str, Any], Tensors], object]
P = f"{PREFIX}down_blocks.0.to_q"
PEFT_FAULTS: dict[str, tuple[Edit, str]] = {
    "no B": (lambda c, t: t.__delitem__(f"{P}.lora_B.weight"), r"no lora_B\.weight; expected both"),
    "misnamed": (lambda c, t: t.update({"model.q.lora_A.weight": randn(2, 6)}), "unknown key"),
    "no module": (lambda c, t: t.update({f"{PREFIX}score.weight": randn(2, 6)}), "unknown key"),
    "rank": (lambda c, t: c.update(r=4), "says r=4"),
    "rank_pattern": (lambda c, t: c.update(rank_pattern={"to_q": 3}), "says r=3"),
    "rank of a billion": (lambda c, t: c.update(r=10**9), "says r=1000000000"),
    "alpha": (lambda c, t: c.update(lora_alpha=NAN), "expected a finite number"),
    "alpha null": (lambda c, t: c.update(lora_alpha=None), "lora_alpha is null"),
    "dora without magnitude": (lambda c, t: c.update(use_dora=True), "no lora_magnitude_vector"),
    "magnitude without dora": (
        lambda c, t: t.update({f"{P}.lora_magnitude_vector": randn(8)}),
        "has lora_magnitude_vector too",
    ),
    "lora_bias": (lambda c, t: c.update(lora_bias=True), r"no lora_B\.bias"),
    "unknown field": (lambda c, t: c.update(twist=2), "twist=2 changes what the adapter computes"),
    "bad pattern": (lambda c, t: c.update(alpha_pattern={"(": 2}), "alpha_pattern"),
    "endless pattern": (lambda c, t: c.update(alpha_pattern={"(a|aa)+!": 2}), "takes too long"),
    "loha": (lambda c, t: c.update(peft_type="LOHA"), "expected 'LORA'"),
    "modules_to_save": (
        lambda c, t: [c.update(modules_to_save=5), t.update({f"{PREFIX}score.weight": randn(2, 6)})],
        "modules_to_save is 5; expected a list of names",
    ),
    "groups that do not divide": (
        lambda c, t: t.update({f"{P}.lora_A.weight": randn(2, 6, 3), f"{P}.lora_B.weight": randn(7, 1, 1)}),
        r"lora_B.weight \[7, 1, 1\]; expected",
    ),
    "NaN beside an integer": (
        lambda c, t: [
            c.update(modules_to_save=["norm"]),
            t.update({f"{PREFIX}norm.count": torch.tensor(3), f"{PREFIX}norm.weight": torch.tensor([NAN])}),
        ],
        r"norm\.weight holds NaN or Inf",
    ),
}


@pytest.mark.parametrize("fault", PEFT_FAULTS)
def test_peft_faults(fault: str, peft_folder: Path) -> None:
    edit, message = PEFT_FAULTS[fault]
    config = json.loads((peft_folder / "adapter_config.json").read_text())
    tensors = load_file(peft_folder / "adapter_model.safetensors")
    if fault == "endless pattern":
        tensors = {
            f"{PREFIX}{'a' * 60}b.lora_{half}.weight": t for half, t in zip("AB", tensors.values(), strict=False)
        }
    edit(config, tensors)
    (peft_folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, peft_folder / "adapter_model.safetensors")
    with pytest.raises(lk.AdapterFileError, match=message):
        read_adapter(peft_folder)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("exploded"), "!"))


@pytest.mark.parametrize("content", [b"", b"\xff" * 7 + b"\x3f{}", b"\x02" + b"\0" * 7 + b"[]", pickle.dumps(Bomb())])
def test_broken_files(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k.safetensors").write_bytes(content)
    with pytest.raises(lk.AdapterFileError, match="not a whole safetensors file"):
        read_adapter(tmp_path / "k.safetensors")
    assert not (tmp_path / "exploded").exists()


def test_a_truncated_file(tmp_path: Path) -> None:
    file = write_kohya(tmp_path / "k.safetensors", kohya_tensors())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(lk.AdapterFileError, match="not a whole safetensors file"):
        read_adapter(file)


def test_what_is_no_adapter(tmp_path: Path, peft_folder: Path) -> None:
    with pytest.raises(lk.AdapterFileError, match="does not exist"):
        read_adapter(tmp_path / "nowhere")
    (tmp_path / "adapter.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(lk.AdapterFileError, match="is not read"):
        read_adapter(tmp_path / "adapter.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(lk.AdapterFileError, match="has: nothing"):
        read_adapter(tmp_path / "empty")
    (tmp_path / "empty" / "adapters.npz").write_bytes(b"")
    with pytest.raises(lk.AdapterFileError, match=r"adapters\.npz: a pickle can run any code and is not read"):
        read_adapter(tmp_path / "empty")
    save_file(mlx_tensors(), peft_folder / "adapters.safetensors")
    with pytest.raises(lk.AdapterFileError, match="expected one of them"):
        read_adapter(peft_folder)
    (peft_folder / "adapters.safetensors").unlink()
    (peft_folder / "adapter_config.json").unlink()
    with pytest.raises(lk.AdapterFileError, match=r"no adapter_config.json"):
        read_adapter(peft_folder)


def test_a_hundred_thousand_entries(tmp_path: Path) -> None:
    """A broken file of that size is refused in seconds: nothing is quadratic in the entries."""
    names = [f"lora_unet_{n}.lora_{half}.weight" for n in range(50_000) for half in ("down", "up")][:-1]
    entries = {
        name: {"dtype": "F16", "shape": [1, 1], "data_offsets": [2 * i, 2 * i + 2]} for i, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    (tmp_path / "k.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2 * len(names)))
    start = time.perf_counter()
    with pytest.raises(lk.AdapterFileError, match="'lora_unet_49999' has no lora_up"):
        read_adapter(tmp_path / "k.safetensors")
    assert time.perf_counter() - start < 60


def test_too_many_patterns(peft_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((peft_folder / "adapter_config.json").read_text())
    config["rank_pattern"] = {"to_q": 2, "to_k": 2}
    (peft_folder / "adapter_config.json").write_text(json.dumps(config))
    read_adapter(peft_folder)
    monkeypatch.setattr(patterns, "MAX_MATCHES", 3)
    with pytest.raises(lk.AdapterFileError, match="2 patterns for 2 modules; expected at most 3 pairs"):
        read_adapter(peft_folder)
