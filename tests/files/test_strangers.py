"""Files of strangers: what they cannot do to the process, to a terminal, or to the numbers."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import write_kohya
from safetensors.torch import load_file, save_file
from torch import nn

import lorakernels as lk
from lorakernels import cli, patterns
from lorakernels.files.convert import convert
from lorakernels.files.formats import read_adapter
from lorakernels.files.inspect import inspect_adapter
from lorakernels.files.merge import merge_files
from lorakernels.files.weights import TYPES, Weights, open_weights, read_tensors
from lorakernels.printable import printable

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def saved(folder: Path, **fields: Any) -> Path:
    adapted = lk.inject(model(), lk.LoRAConfig(**{"r": 2, "target_modules": ["0"], **fields}))
    for parameter in lk.trainable_parameters(adapted):
        nn.init.normal_(parameter)
    return lk.save_adapter(adapted, folder)


def edit(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


PATTERNS = {
    "repeats": ("a{99999999}", "with repetitions past the 10,000"),
    "repeats of repeats": ("(?:(?:a{100}){100}){100}", "repetitions"),
    "a number without end": ("a{" + "9" * 5000 + "}", "repetitions"),
    "deep": ("(" * 5000 + ")" * 5000, "groups"),
    "deep sets": ("(?V1)" + "[" * 5000 + "a" + "]" * 4000, "groups"),
    "long": ("a|b" * 5000, "with characters past the 10,000"),
    "a long name": ("a." * 10_000, "characters"),
    "recursive": ("(a|(?R))*", "calls a group"),
    "a call": ("((?1))", "calls a group"),
}


@pytest.mark.parametrize("kind", PATTERNS)
def test_patterns_are_bounded_before_they_are_compiled(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern, message = PATTERNS[kind]
    folder = saved(tmp_path / "a")
    monkeypatch.setattr(patterns.regex, "compile", lambda *_: pytest.fail("it was compiled"))
    edit(folder, rank_pattern={pattern: 4})
    for read in (lambda: lk.load_adapter(model(), folder), lambda: inspect_adapter(folder)):
        with pytest.raises(lk.AdapterFileError, match=message):
            read()
    for make in (
        lambda: lk.LoRAConfig(target_modules=pattern),
        lambda: lk.LoRAConfig(alpha_pattern={pattern: 4}),
        lambda: lk.quantize(model(), exclude=pattern),
        lambda: patterns.fullmatch(pattern, "0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_patterns_of_real_adapters_pass() -> None:
    deep = "(" * 100 + "q" + ")" * 100
    layers = "|".join(map(str, range(100)))
    for pattern in (deep, rf"model\.layers\.(?:{layers})\.(?:self_attn|mlp)\.[a-z]{{1,8}}_proj", r"\d{1,3}\.\d{2}"):
        patterns.check_pattern(pattern, "target_modules")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(__import__("inspect").stack()) + 150)
    try:
        with pytest.raises(ValueError, match="not a regular expression"):
            patterns.check_pattern("(" * 250 + "b" + ")" * 250, "target_modules")
    finally:
        sys.setrecursionlimit(limit)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(target: str) -> Callable[[Path], None]:
    return lambda path: (path.unlink(), path.symlink_to(target))[0]


def endless(path: Path) -> None:
    """A hole of a terabyte, whose header asks for all of it."""
    size = 1 << 40
    key = "base_model.model.0.lora_A.weight"
    header = json.dumps({key: {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("what", [fifo, link("/dev/zero"), link("/tmp"), endless], ids=["pipe", "device", "folder", ""])
def test_what_is_no_file_is_refused_at_once(what: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    folder, base = saved(tmp_path / "a"), tmp_path / "base"
    base.mkdir()
    save_file(model().state_dict(), base / "model.safetensors")
    what(folder / name)
    store = lk.AdapterStore(model())
    start = time.monotonic()
    for read in (
        lambda: lk.load_adapter(model(), folder),
        lambda: inspect_adapter(folder),
        lambda: convert(folder, tmp_path / "out"),
        lambda: merge_files(base, folder, tmp_path / "out"),
        lambda: store.load("a", folder),
    ):
        with pytest.raises(lk.AdapterFileError, match=r"not a regular file|bytes"):
            read()
    what(base / "model.safetensors")
    with pytest.raises(lk.AdapterFileError, match=r"not a regular file|bytes"):
        merge_files(base, saved(tmp_path / "b"), tmp_path / "out") if what is not endless else read_adapter(folder)
    assert time.monotonic() - start < 5 and not (tmp_path / "out").exists()


CHANGES: dict[str, Callable[[Path], None]] = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 40),
    "emptied": lambda path: os.truncate(path, 0),
    "overwritten": lambda path: path.write_bytes(bytes(path.stat().st_size)) and None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, base = saved(tmp_path / "a"), tmp_path / "base"
    base.mkdir()
    save_file(model().state_dict(), base / "model.safetensors")
    real = Weights.read

    def read(self: Weights, name: str) -> torch.Tensor:
        tensor = real(self, name)
        if self.path.parent in (folder, base):
            CHANGES[change](self.path)
        return tensor

    monkeypatch.setattr(Weights, "read", read)
    plain, store = model(), lk.AdapterStore(model())
    for act in (
        lambda: lk.load_adapter(plain, folder),
        lambda: store.load("a", folder),
        lambda: merge_files(base, tmp_path / "whole", tmp_path / "out"),
    ):
        saved(folder), saved(tmp_path / "whole")
        with pytest.raises(lk.AdapterFileError, match=r"has changed while it was read|in the middle|is not a whole"):
            act()
    assert type(plain[0]) is nn.Linear and not store.names and not (tmp_path / "out").exists()


HEADERS: dict[str, Any] = {
    "a hole": {"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}},
    "an overlap": {n: {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]} for n in "ab"},
    "too many bytes": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}},
    "backwards": {"a": {"dtype": "U8", "shape": [0], "data_offsets": [8, 0]}},
    "negative": {"a": {"dtype": "U8", "shape": [-8], "data_offsets": [0, 8]}},
    "a text": {"a": {"dtype": "U8", "shape": ["8"], "data_offsets": [0, 8]}},
    "true": {"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 8]}},
    "no shape": {"a": {"dtype": "U8", "data_offsets": [0, 8]}},
    "a list": [1],
    "metadata": {"__metadata__": {"a": 1}},
    "deep": None,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers(kind: str, tmp_path: Path) -> None:
    header = b"[" * 100_000 if kind == "deep" else json.dumps(HEADERS[kind]).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(lk.AdapterFileError, match="is not a whole safetensors file"):
        read_tensors(path)


def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = {name: torch.arange(6).view(2, 3).to(dtype) for name, dtype in TYPES.items() if name != "F8_E8M0"}
    tensors |= {"none": torch.empty(0, 3), "one": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"k": "v"})
    ours, metadata = read_tensors(tmp_path / "a.safetensors")
    theirs = load_file(tmp_path / "a.safetensors")
    assert metadata == {"k": "v"} and ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype is tensor.dtype and ours[name].shape == tensor.shape
        assert torch.equal(ours[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_no_memory_is_not_a_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path)
    for error in (MemoryError(), torch.OutOfMemoryError(), OSError(12, "no memory"), OSError(24, "too many files")):

        def fail(*_: Any, error: BaseException = error, **__: Any) -> None:
            raise error

        for where in ("torch.empty", "os.open"):
            with monkeypatch.context() as patch:
                patch.setattr(where, fail)
                with pytest.raises(type(error)) as caught:
                    lk.load_adapter(model(), folder)
            assert caught.value is error


@pytest.mark.parametrize("alpha", [1e300, -1e300, 10**39], ids=str)
def test_a_scaling_that_float32_cannot_hold(alpha: float, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    for fields in ({"lora_alpha": alpha}, {"lora_alpha": 1, "alpha_pattern": {"0": alpha}}):
        edit(folder, **fields)
        for read in (lambda: lk.load_adapter(model(), folder), lambda: inspect_adapter(folder)):
            with pytest.raises(lk.AdapterFileError, match="alpha"):
                read()
    keys = {f"lora_te_q.{part}.weight": torch.ones(2, 2) for part in ("lora_up", "lora_down")}
    keys["lora_te_q.alpha"] = torch.tensor(float(alpha), dtype=torch.float64)
    with pytest.raises(lk.AdapterFileError, match="alpha"):
        read_adapter(write_kohya(tmp_path / "k.safetensors", keys))
    adapted = lk.load_adapter(model(), saved(tmp_path / "b"))
    with pytest.raises(ValueError, match="scale"):
        lk.set_scale(adapted, "default", 3e38)
    assert adapted[0].scaling == 8.0


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({}, "0.lora_A.weight"),
        ({}, "0.lora_B.weight"),
        ({"lora_bias": True}, "0.lora_B.bias"),
        ({"use_dora": True}, "0.lora_magnitude_vector"),
        ({"bias": "all"}, "2.bias"),
        ({"modules_to_save": ["2"]}, "2.weight"),
    ],
    ids=str,
)
def test_numbers_that_overflow_in_the_models_dtype_change_nothing(fields: Any, key: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, **fields)
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if name.endswith(key):
            tensor.fill_(6e4 if name.endswith("_B.weight") else 1e5)  # which the scaling takes past the end
    save_file(tensors, folder / WEIGHTS)
    half = model(torch.float16)
    before = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    with pytest.raises(lk.AdapterFileError, match=r"torch\.float16 cannot hold"):
        lk.load_adapter(half, folder)
    after = half.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    lk.load_adapter(model(), folder)  # in float32 there is room


EVIL = "a\x1b[2J\x1b]0;title\x07\r\n\x9b31m\u202eb\ud800"


def test_nothing_of_a_file_reaches_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = EVIL.replace("\ud800", "").replace("\r\n", "")
    name = f"base_model.model.{evil}.0.lora_{{}}.weight"
    folder = saved(tmp_path / "a")
    save_file({name.format("A"): torch.ones(2, 4), name.format("B"): torch.ones(4, 2)}, folder / WEIGHTS)
    edit(folder, init_lora_weights=EVIL)
    kohya = write_kohya(tmp_path / "k.safetensors", {f"{evil}.lora_what.weight": torch.ones(2)})
    broken = saved(tmp_path / "b")
    edit(broken, **{EVIL: 1, "peft_type": "LORA"})
    assert cli.main(["inspect", str(folder)]) == 0
    commands = (["inspect", str(kohya)], ["inspect", str(broken)], ["convert", str(kohya), "--to", str(tmp_path / "o")])
    for command in commands:
        assert cli.main(command) == 2
    with pytest.raises(lk.AdapterFileError) as caught:
        lk.load_adapter(model(), folder)
    shown = capsys.readouterr()
    for text in (shown.out, shown.err, str(caught.value)):
        assert text and all(c.isprintable() or c == "\n" for c in text)
    assert printable("é ±\x1b") == "é ±\\x1b" and len(printable("a" * 10**6)) < 3000


def test_a_shard_replaced_between_header_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4)}, path)
    with open_weights(path) as file:
        stamp = file.stamp
    save_file({"a": torch.zeros(4)}, tmp_path / "b.safetensors")
    os.replace(tmp_path / "b.safetensors", path)
    with pytest.raises(lk.AdapterFileError, match="has changed"), open_weights(path, stamp):
        pass
