"""Adapter files with mistakes of every kind: read or refused, and what is refused changes nothing.

`pytest tests/files/test_fuzzed.py --hypothesis-profile long` tries many more.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import lorakernels as lk
from lorakernels.files import inspect

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIELDS = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["0", "2"], "lora_dropout": 0.0, "bias": "none",
    "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
    "init_lora_weights": True, "fan_in_fan_out": False, "layers_to_transform": None, "exclude_modules": None,
}  # fmt: skip
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    plain | st.sampled_from(["0", ".*", "(a+)+$"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "2", "a{9}"]), inner, max_size=2),
    max_leaves=4,
)
field_names = st.sampled_from([*FIELDS, "note", "use_qalora", "loftq_config"])
changes_of_config = st.tuples(st.just("field"), field_names, values)
kinds = ["drop", "rename", "copy", "transpose", "cut", "nan", "huge", "integer", "half", "float8", "empty", "base"]
changes_of_tensors = st.tuples(st.sampled_from(kinds), st.integers(0, 3), st.text("AB012._xlora", max_size=12))
OF_BYTES = ("flip", "truncate", "insert")
changes_of_bytes = st.tuples(st.sampled_from(OF_BYTES), st.integers(0, 2000), st.binary(max_size=9))
changes = st.lists(changes_of_config | changes_of_tensors | changes_of_bytes, min_size=1, max_size=3)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def state(model: nn.Module) -> list[tuple[str, str, Any]]:
    modules = [(path, type(module).__name__, module.training) for path, module in model.named_modules()]
    return [*modules, *((name, str(t.dtype), t.tolist()) for name, t in model.state_dict().items())]


def changed(tensors: dict[str, torch.Tensor], kind: str, which: int, text: str) -> None:
    key = sorted(tensors)[which % len(tensors)]
    tensor = tensors[key]
    if kind == "drop":
        del tensors[key]
    elif kind == "rename":
        tensors[text] = tensors.pop(key)
    elif kind == "copy":
        tensors[f"base_model.model.{text}"] = tensor.clone()
    elif kind == "base":
        tensors["base_model.model.0.weight"] = torch.ones(3, 4)
    else:
        change = {
            "transpose": lambda: tensor.T.contiguous(),
            "cut": lambda: tensor[:1].clone(),
            "nan": lambda: tensor * float("nan"),
            "huge": lambda: tensor.double() * 1e300,
            "integer": lambda: tensor.int(),
            "half": lambda: tensor.half(),
            "float8": lambda: tensor.to(torch.float8_e4m3fn),
            "empty": lambda: tensor[:0].clone(),
        }
        tensors[key] = change[kind]()


def write(folder: Path, made: list[Any]) -> None:
    torch.manual_seed(1)
    fields: dict[str, Any] = dict(FIELDS)
    sizes = {"0": (4, 3), "2": (3, 2)}
    tensors = {}
    for path, (K, N) in sizes.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(2, K)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(N, 2)
    for change in made:
        if change[0] == "field":
            fields[change[1]] = change[2]
        elif change[0] in kinds and tensors:
            changed(tensors, *change)
    (folder / CONFIG).write_text(json.dumps(fields))
    save_file(tensors, folder / WEIGHTS)
    for kind, at, given_bytes in (change for change in made if change[0] in OF_BYTES):
        file = folder / (WEIGHTS if at % 2 else CONFIG)
        data = bytearray(file.read_bytes())
        at %= len(data) + 1
        if kind == "flip":
            data[at : at + len(given_bytes)] = given_bytes
        else:
            data[at:] = b"" if kind == "truncate" else given_bytes + data[at:]
        file.write_bytes(data)


@given(changes)
def test_read_or_refused(made: list[Any]) -> None:
    model = net()
    before = state(model)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        write(folder, made)
        refused = False
        try:
            lk.load_adapter(model, folder)
        except lk.AdapterFileError as error:
            refused = True
            assert state(model) == before
            assert str(error) and all(c.isprintable() or c == "\n" for c in str(error))
        store = lk.AdapterStore(net(), max_adapters=1, max_rank=4)
        try:
            store.load("one", folder)
        except (lk.AdapterFileError, lk.serving.errors.CapacityError):
            assert not store.names  # it takes 8-bit floats, which `load_adapter` does not
        store.close()
        if not refused:
            assert model(torch.ones(2, 4, dtype=torch.float64)).isfinite().all()
            lk.save_adapter(model, folder / "again")
            again = lk.load_adapter(net(), folder / "again")
            x = torch.ones(2, 4, dtype=torch.float64)
            torch.testing.assert_close(again(x), model(x))
            lk.unload(model)
        try:
            inspect.inspect_adapter(folder)
        except lk.AdapterFileError:
            assert refused
