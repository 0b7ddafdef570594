"""`LoRAConfig.target_parameters`: our adapters on transformers' experts, PEFT's numbers, names and files both ways."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import BOTH, FIRST, LAST, MIXTURES, Mixture, assert_same, shake, step
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorakernels as lk
from lorakernels.files.inspect import inspect_adapter
from lorakernels.files.merge import merge_files
from lorakernels.files.reading import AdapterFileError
from lorakernels.testing.guards import peak_bytes, watch_allocations

CASES = [("qwen3_moe", BOTH), ("gpt_oss", BOTH), ("llama4", BOTH), ("nemotron_h", FIRST), ("gpt_oss", LAST)]
REST = [
    pytest.param(name, BOTH, marks=pytest.mark.slow)
    for name in sorted(set(MIXTURES) - {"qwen3_moe", "gpt_oss", "llama4"})
]


def injected(name: str = "qwen3_moe", which: slice = BOTH, adapter: str = "default", **fields: Any) -> Mixture:
    model = Mixture(name, **{key: fields.pop(key) for key in ("dtype", "experts", "hidden", "inner") if key in fields})
    return with_adapter(model, which, adapter, **fields)


def with_adapter(model: Mixture, which: slice = BOTH, adapter: str = "default", **fields: Any) -> Mixture:
    lk.inject(model, lk.LoRAConfig(**config_of(model, which, fields)), adapter)
    shake(model)
    return model


def config_of(model: Mixture, which: slice, fields: dict[str, Any]) -> dict[str, Any]:
    return {"r": 2, "lora_alpha": 3, "target_parameters": model.targets[which], **fields}


def of_peft(name: str, which: slice = BOTH, **fields: Any) -> nn.Module:
    model = Mixture(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(target_modules=[], **config_of(model, which, fields)))
    shake(model)
    return model


def quietly(load: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(*arguments, **named)


@pytest.mark.parametrize(("name", "which"), [*CASES, *REST], ids=str)
def test_as_peft(name: str, which: slice, tmp_path: Path) -> None:
    """Names, y and every gradient; its file in ours and ours in PEFT, merged, and plain again."""
    theirs = of_peft(name, which)
    ours = injected(name, which)
    inner = theirs.base_model.model  # type: ignore[union-attr]
    shapes = {key: tensor.shape for key, tensor in inner.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == shapes
    assert_same(step(ours), step(inner))  # type: ignore[arg-type]

    lk.save_adapter(ours, tmp_path / "ours")
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    again = quietly(PeftModel.from_pretrained, Mixture(name), tmp_path / "ours", is_trainable=True)
    assert_same(step(again.base_model.model), step(ours))
    loaded = lk.load_adapter(Mixture(name), tmp_path / "theirs", trainable=True)
    assert_same(step(loaded), step(ours), 0)

    loaded.eval()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    y, plain = loaded(x), Mixture(name)
    lk.merge(loaded)
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    assert_same({"y": loaded(x)}, {"y": y}, 1e-13)
    lk.unmerge(loaded)
    assert_same({"y": loaded(x)}, {"y": y}, 1e-13)
    lk.unload(loaded)
    assert type(loaded.block.experts) is type(plain.block.experts)
    assert_same({"y": loaded(x)}, {"y": plain(x)}, 1e-13)


def test_switched_scaled_and_deleted_as_peft() -> None:
    """Two adapters with patterns and rsLoRA, each alone, both, scaled, off, and one gone."""
    fields = {"rank_pattern": {"gate_up_proj": 5}, "alpha_pattern": {"experts.down_proj": 7}, "use_rslora": True}
    theirs, ours = Mixture("qwen3_moe"), Mixture("qwen3_moe")
    for adapter, r in (("a", 2), ("b", 3)):
        config = config_of(ours, BOTH, {"r": r, **fields})
        quietly(inject_adapter_in_model, LoraConfig(target_modules=[], **config), theirs, adapter)
        lk.inject(ours, lk.LoRAConfig(**config), adapter)
    shake(theirs), shake(ours)
    layers = [module for module in theirs.modules() if hasattr(module, "parameter_name")]
    for names in (["a"], ["b"], ["a", "b"]):
        for layer in layers:
            layer.set_adapter(names)
        lk.set_adapter(ours, names)
        assert_same(step(ours), step(theirs))
    for layer in layers:
        layer.set_scale("b", 0.5)
    lk.set_scale(ours, "b", 0.5)
    assert_same(step(ours), step(theirs))
    lk.set_scale(ours, "b", 0)
    lk.delete_adapter(ours, "a")
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert torch.equal(ours(x), Mixture("qwen3_moe")(x))


def test_adapters_of_different_stacks(tmp_path: Path) -> None:
    """One of a stack, then one of both: each file is what PEFT would write of it alone."""
    model = with_adapter(injected(which=LAST, adapter="a"), FIRST, "b")
    with_adapter(model, BOTH, "c")
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for adapter in "abc":
        lk.set_adapter(model, adapter)
        lk.save_adapter(model, tmp_path / adapter, adapter)
        again = quietly(PeftModel.from_pretrained, Mixture("qwen3_moe"), tmp_path / adapter)
        assert_same({"y": again(x)}, {"y": model(x)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(dtype: torch.dtype, tmp_path: Path) -> None:
    """Which PEFT refuses: it acts in training alone, scaled by what stays, and its file says 0."""
    model, still = injected(lora_dropout=0.5, dtype=dtype), injected(dtype=dtype)
    x = torch.randn(1, 6, 16).to(dtype)
    assert torch.equal(model.eval()(x), still(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    torch.manual_seed(3)
    first = model(x)
    torch.manual_seed(3)
    assert torch.equal(first, model(x))
    with pytest.warns(UserWarning, match="lora_dropout=0.5 is written as 0"):
        lk.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0


def test_dropout_is_unbiased() -> None:
    model = injected(which=LAST, lora_dropout=0.3)
    x = torch.randn(1, 3, 16, dtype=torch.float64).repeat(400, 1, 1)
    y, mean = model.eval()(x)[0], model.train()(x).mean(0)
    assert (mean - y).norm() < 0.1 * (y - Mixture("qwen3_moe")(x)[0]).norm()


def test_checkpointed_compiled_and_without_a_copy_of_a_stack() -> None:
    model = injected()
    expected = step(model)
    assert_same(step(model, lambda x: checkpoint(model, x, use_reentrant=False)), expected, 0)
    assert_same(step(model, torch.compile(model, fullgraph=True, backend="eager")), expected)
    large = injected(dtype=torch.float32, experts=64)
    with watch_allocations() as made:
        step(large)
    assert 0 < max(made) < large.block.experts.plain_layer.down_proj.nbytes / 2


def test_peak_of_a_training_step() -> None:
    """Beside weights and adapters it is the frozen block's, the adapters' gradients included."""
    sizes = {"hidden": 64, "inner": 48, "experts": 8, "dtype": torch.float32}
    frozen, ours = Mixture("qwen3_moe", **sizes).requires_grad_(False), injected(**sizes)
    x = torch.randn(1, 1024, 64, requires_grad=True)
    for model in (frozen, ours):
        model(x).sum().backward()
        model.zero_grad()
    peaks = [peak_bytes(lambda model=model: model(x).sum().backward()) for model in (frozen, ours)]
    assert 0 < peaks[1] <= 1.2 * peaks[0], peaks


def test_hot_swapped(tmp_path: Path) -> None:
    other = injected(r=3, lora_alpha=5)
    lk.save_adapter(other, tmp_path)
    model = injected()
    lk.prepare_for_hotswap(model, 4)
    parameters = {name: p.data_ptr() for name, p in model.named_parameters()}
    before = step(model)
    assert_same(before, {**before, **{k: v for k, v in step(injected()).items() if "lora_" not in k}})
    lk.hotswap_adapter(model, tmp_path)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert_same({"y": model(x)}, {"y": other(x)})
    assert parameters == {name: p.data_ptr() for name, p in model.named_parameters()}
    lk.save_adapter(model, tmp_path / "again")
    files = [load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again")]
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())


def as_before_019(folder: Path, which: slice) -> None:
    """The file as PEFT had it then: A over the dimension before the last, the update the same."""
    file = folder / "adapter_model.safetensors"
    tensors, experts, swapped = load_file(file), 4, {}
    for key in [key for key in tensors if "lora_A" in key]:
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        A, B = A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts))
        swapped[key] = B.permute(2, 1, 0).flatten(0, 1).contiguous()
        swapped[key.replace("lora_A", "lora_B")] = A.permute(2, 1, 0).flatten(1).contiguous()
    save_file(swapped, file)


def with_fields(folder: Path, **fields: Any) -> None:
    config = folder / "adapter_config.json"
    kept = json.loads(config.read_text()) | fields
    config.write_text(json.dumps({key: value for key, value in kept.items() if value != "gone"}))


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h", "llama4"])
def test_files_of_peft_before_019(name: str, tmp_path: Path) -> None:
    """Told by their shapes, whatever version they name."""
    model = injected(name)
    lk.save_adapter(model, tmp_path)
    as_before_019(tmp_path, BOTH)
    with_fields(tmp_path, peft_version="gone")
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert_same({"y": lk.load_adapter(Mixture(name), tmp_path)(x)}, {"y": model(x)})


def test_square_stacks_by_the_version(tmp_path: Path) -> None:
    """Of [16, 16] no shape tells; PEFT's own of today is read as it is."""
    model, x = Mixture("qwen3_moe", inner=16), torch.randn(2, 5, 16, dtype=torch.float64)
    with_adapter(model, LAST)
    lk.save_adapter(model, tmp_path)
    assert_same({"y": lk.load_adapter(Mixture("qwen3_moe", inner=16), tmp_path)(x)}, {"y": model(x)})
    as_before_019(tmp_path, LAST)
    with_fields(tmp_path, peft_version="0.18.1")
    assert_same({"y": lk.load_adapter(Mixture("qwen3_moe", inner=16), tmp_path)(x)}, {"y": model(x)})
    with_fields(tmp_path, peft_version="gone")
    with pytest.raises(AdapterFileError, match=r"down_proj: the experts are \[16, 16\].*peft_version"):
        lk.load_adapter(Mixture("qwen3_moe", inner=16), tmp_path)


def files_of(model: nn.Module, folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def apart(model: Mixture, mixture: str, gate: str, up: str, down: str) -> dict[str, torch.Tensor]:
    """A model's tensors as its files have them: each expert's own."""
    tensors = {}
    for key, tensor in model.state_dict().items():
        if ".experts." not in key:
            tensors[key] = tensor
            continue
        for e, own in enumerate(tensor):
            parts = {gate: own.chunk(2)[0], up: own.chunk(2)[1]} if "gate_up" in key else {down: own}
            tensors |= {f"{mixture}.experts.{e}.{part}.weight": part_of for part, part_of in parts.items()}
    return tensors


@pytest.mark.parametrize("old", [False, True], ids=["today", "before 0.19"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [("qwen3_moe", ("block", "gate_proj", "up_proj", "down_proj")), ("qwen3_moe", ("block", "w1", "w3", "w2"))]
    + [(name, None) for name in ("qwen3_moe", "gpt_oss", "llama4")],
    ids=str,
)
def test_merged_into_files_and_inspected(name: str, layout: tuple[str, ...] | None, old: bool, tmp_path: Path) -> None:
    model = injected(name)
    lk.save_adapter(model, tmp_path / "adapter")
    if old and name != "gpt_oss":
        as_before_019(tmp_path / "adapter", BOTH)
    report = inspect_adapter(tmp_path / "adapter")
    plain = Mixture(name)
    tensors = apart(plain, *layout) if layout else dict(plain.state_dict())
    folder = files_of(plain, tmp_path / "model", {"model_type": name}, tensors)
    merged = load_file(merge_files(folder, tmp_path / "adapter", tmp_path / "out").folder / "model.safetensors")
    lk.merge(model)
    expected = apart(model, *layout) if layout else model.state_dict()
    assert_same(merged, dict(expected))
    changed = sum(not torch.equal(tensor, merged[key]) for key, tensor in tensors.items())
    assert changed == (12 if layout else 2)

    lk.unmerge(model)
    for one in report.updates:
        layer = dict(zip(("down_proj", "gate_up_proj"), model.block.experts.around(), strict=True))
        update = layer[one.name.rpartition(".")[2]].delta_weight()
        assert one.r == 2 and len(one.singular_values) == 8 and one.shape[0] == 4
        torch.testing.assert_close(one.frobenius, float(update.norm()))
        torch.testing.assert_close(one.spectral, float(torch.linalg.matrix_norm(update, 2).max()))


def hooked(model: Mixture) -> None:
    model.block.experts.register_forward_hook(lambda *_: None)


def of_another_kind(model: Mixture) -> None:
    base = model.block.experts
    base.__class__ = type("Other", (type(base),), {"forward": lambda self, x, *_: x})


WRONG: list[tuple[Callable[[Mixture], None] | None, dict[str, Any], type[Exception], str]] = [
    (
        hooked,
        {},
        TypeError,
        "target 'block.experts.gate_up_proj': experts that cannot be adapted: the experts have hooks",
    ),
    (of_another_kind, {}, TypeError, "Other is not a mixture whose experts transformers dispatches"),
    (None, {"target_parameters": ["gate.weight"]}, TypeError, "target 'block.gate.weight': experts that cannot be"),
    (None, {"target_parameters": ["experts.gate_proj"]}, ValueError, "near names: experts.gate_up_proj"),
    (None, {"target_parameters": "experts.down_proj"}, TypeError, "target_parameters is 'experts.down_proj'"),
    (None, {"use_dora": True}, ValueError, "use_dora=True is not for the experts"),
    (None, {"lora_bias": True}, ValueError, "lora_bias=True is not for the experts"),
    (None, {"init_lora_weights": "pissa"}, ValueError, "init_lora_weights='pissa' is not for the experts"),
    (None, {"target_parameters": None, "target_modules": []}, ValueError, "matches 0 modules"),
]


@pytest.mark.parametrize(("change", "fields", "error", "message"), WRONG, ids=[case[3] for case in WRONG])
def test_refused_by_inject(
    change: Callable[[Mixture], None] | None, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Mixture("qwen3_moe")
    if change is not None:
        change(model)
    names = list(model.state_dict())
    with pytest.raises(error, match=re.escape(message)):
        lk.inject(model, lk.LoRAConfig(**config_of(model, BOTH, fields)))
    assert list(model.state_dict()) == names


def drop_a_pair(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "base_layer" not in key}, file)


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (drop_a_pair, "block.experts has 1 pairs of lora_A and lora_B, and target_parameters="),
    (
        lambda folder: with_fields(folder, target_parameters=["experts.w1"]),
        "'experts.w1', which is no stack of experts",
    ),
    (lambda folder: with_fields(folder, target_parameters=["other.gate_up_proj"]), "means none of its parameters"),
    (lambda folder: with_fields(folder, target_parameters=None), "the model has no module 'block.experts.base_layer'"),
    (lambda folder: with_fields(folder, r=3), "lora_A.weight has 8 rows; expected r · experts of them"),
    (lambda folder: with_fields(folder, use_dora=True), "use_dora=True is not for the experts"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_faulty_files_are_refused(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    lk.save_adapter(injected(), tmp_path)
    spoil(tmp_path)
    with pytest.raises(AdapterFileError, match=re.escape(message)):
        lk.load_adapter(Mixture("qwen3_moe"), tmp_path)


def test_files_of_another_model_are_refused(tmp_path: Path) -> None:
    """Of other experts, another number of them, or none; and by what does not take experts."""
    model = injected()
    lk.save_adapter(model, tmp_path / "a")
    for other, message in (
        (Mixture("qwen3_moe", experts=8), r"lora_A.weight is \[8, 16\]; expected \[16, 16\]"),
        (Mixture("nemotron_h"), "gate_up_proj'; near names"),
        (nn.Sequential(nn.Linear(3, 3)), "the model has no module 'block.experts"),
    ):
        with pytest.raises(AdapterFileError, match=message):
            lk.load_adapter(other, tmp_path / "a")
    more = Mixture("qwen3_moe", experts=5)
    folder = files_of(more, tmp_path / "more", {}, apart(more, "block", "gate_proj", "up_proj", "down_proj"))
    with pytest.raises(AdapterFileError, match="has 4 experts, and the model more"):
        merge_files(folder, tmp_path / "a", tmp_path / "out")
    with pytest.raises(ValueError, match="target_parameters="):
        lk.add_weighted_adapter(model, ["default"], [1.0], "sum")


def test_hooks_that_come_later_are_refused() -> None:
    """They would not run; never an adapter without effect."""
    model = injected()
    model.block.experts.plain_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="the adapters of these experts cannot be run: the experts have hooks"):
        model(torch.randn(1, 2, 16, dtype=torch.float64))
