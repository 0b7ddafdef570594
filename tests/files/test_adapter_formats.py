"""Reading the adapter files of PEFT, kohya and mlx-lm: what is wrong with them is refused."""

from __future__ import annotations

import json
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import (
    MLX_CONFIG,
    NAN,
    Tensors,
    changed,
    dora,
    fresh_model,
    kohya_tensors,
    mlx_tensors,
    randn,
    write_kohya,
    write_mlx,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import lorakernels as lk
from lorakernels import patterns
from lorakernels.files.convert import convert
from lorakernels.files.formats import read_adapter
from lorakernels.files.peft import PREFIX

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
    "dora": ({f"{Q}__dora_scale": randn(8, 1)}, "1 of 5 modules have lora_magnitude_vector; expected all or none"),
    "dora of columns": (
        {f"{Q}__dora_scale": randn(1, 6)},
        r"a length for each column of the weight; expected \[8, 1\]",
    ),
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
    "unknown field": (lambda c, t: c.update(twist=2), "twist=2 is a field that is not known"),
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


def test_twenty_thousand_entries(tmp_path: Path) -> None:
    """A broken file of that size is refused in seconds: nothing is quadratic in the entries."""
    names = [f"lora_unet_{n}.lora_{half}.weight" for n in range(10_000) for half in ("down", "up")][:-1]
    entries = {
        name: {"dtype": "F16", "shape": [1, 1], "data_offsets": [2 * i, 2 * i + 2]} for i, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    (tmp_path / "k.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2 * len(names)))
    start = time.perf_counter()
    with pytest.raises(lk.AdapterFileError, match="'lora_unet_9999' has no lora_up"):
        read_adapter(tmp_path / "k.safetensors")
    assert time.perf_counter() - start < 12


def test_too_many_patterns(peft_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((peft_folder / "adapter_config.json").read_text())
    config["rank_pattern"] = {"to_q": 2, "to_k": 2}
    (peft_folder / "adapter_config.json").write_text(json.dumps(config))
    read_adapter(peft_folder)
    monkeypatch.setattr(patterns, "MAX_MATCHES", 3)
    with pytest.raises(lk.AdapterFileError, match="2 patterns for 2 modules; expected at most 3 pairs"):
        read_adapter(peft_folder)
