"""Adapter files of every kind of layer and adapter: to PEFT and back, and what is wrong in them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakernels as lk
from lorakernels.adapters.saved_modules import SavedModule
from lorakernels.files.config_file import config_from_fields
from lorakernels.nn.layer import LoRALayer

peft = pytest.importorskip("peft")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
IDS = torch.tensor([[1, 4, 0, 9, 9], [3, 2, 7, 5, 6]])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.picture = nn.Conv2d(1, 4, 3, padding=1, stride=2)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids).transpose(1, 2)
        x = (x + torch.tanh(self.conv(x)) + self.grouped(x)).transpose(1, 2)
        x = x + self.picture(x[:, None]).flatten(1).mean(1)[:, None, None]
        return self.head(self.norm(x + self.v_proj(torch.tanh(self.q_proj(x)))).mean(1))


def net() -> Any:
    """Always the same weights, in float64."""
    torch.manual_seed(5)
    return Net().double().eval()


PLAIN = ["embed", "conv", "picture", "q_proj", "v_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "linear": dict(target_modules=["q_proj", "v_proj"]),
    "embedding": dict(target_modules=["embed"]),
    "conv": dict(target_modules=["conv", "picture"]),
    "grouped conv": dict(target_modules=["grouped"]),
    "all kinds": dict(target_modules=[*PLAIN, "grouped"], use_rslora=True),
    "patterns": dict(target_modules=PLAIN, rank_pattern={"embed": 2, "conv": 6}, alpha_pattern={"q_proj": 3}),
    "DoRA": dict(target_modules=PLAIN, use_dora=True),
    "lora_bias": dict(target_modules=["q_proj", "conv", "picture"], lora_bias=True),
    "modules_to_save": dict(target_modules=PLAIN, modules_to_save=["head"]),
    "a norm to save": dict(target_modules=["q_proj"], modules_to_save=["norm", "head.2"]),
    "biases": dict(target_modules=PLAIN, bias="lora_only"),
    "all biases": dict(target_modules=["embed", "q_proj"], bias="all", modules_to_save=["head"]),
    "all biases, lora_bias": dict(target_modules=["q_proj"], bias="all", lora_bias=True),
}


def arguments(kind: str) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 7, **KINDS[kind]}


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """Every trainable parameter and the buffers of copies, moved by a small step: some are lengths."""
    generator = torch.Generator().manual_seed(11)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.requires_grad or (".modules_to_save." in name and "running" in name):
            tensor += torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.3
    return model


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Without what PEFT repeats of its wrapper's copies when it saves all biases."""
    return {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if ".modules_to_save." not in key}


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_from_peft_and_back(kind: str, tmp_path: Path) -> None:
    theirs = shake(peft.get_peft_model(net(), peft.LoraConfig(**arguments(kind)))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(IDS)
    assert not torch.allclose(expected, net()(IDS))
    ours = lk.load_adapter(net(), tmp_path / "theirs")
    assert_close(ours(IDS), expected)
    assert not lk.trainable_parameters(ours)
    lk.save_adapter(ours, tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    assert_close(again(IDS), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_to_peft_and_back(kind: str, tmp_path: Path) -> None:
    ours = shake(lk.inject(net(), lk.LoRAConfig(**arguments(kind)))).eval()
    lk.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    assert_close(theirs(IDS), ours(IDS))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "theirs", tmp_path / "ours")
    again = lk.load_adapter(net(), tmp_path / "theirs", trainable=True)
    assert torch.equal(again(IDS), ours(IDS))
    assert lk.trainable_parameters(again).num_trainable == lk.trainable_parameters(ours).num_trainable


@pytest.mark.parametrize("kind", KINDS)
def test_what_inject_trains_is_what_peft_trains(kind: str) -> None:
    ours = lk.inject(net(), lk.LoRAConfig(**arguments(kind)))
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**arguments(kind)))
    trained = {name.removeprefix(PREFIX): p.shape for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name: p.shape for name, p in ours.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("kind", KINDS)
def test_switching_scaling_merging_and_deleting(kind: str, tmp_path: Path) -> None:
    model = shake(lk.inject(net(), lk.LoRAConfig(**arguments(kind)))).eval()
    answer, base = model(IDS), net()(IDS)
    lk.set_adapter(model, [])
    if KINDS[kind].get("bias", "none") == "none":
        assert torch.equal(model(IDS), base)
    off = model(IDS)
    lk.set_adapter(model, "default")
    assert torch.equal(model(IDS), answer)
    lk.set_scale(model, "default", 0.5)
    assert not torch.allclose(model(IDS), answer)
    lk.set_scale(model, "default", 1)
    if "grouped" not in KINDS[kind]["target_modules"]:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        lk.merge(model, keep_base=True)
        assert_close(model(IDS), answer)
        lk.unmerge(model)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    lk.delete_adapter(model, "default")
    assert torch.equal(model(IDS), off)
    assert not any(isinstance(module, SavedModule) for module in model.modules())
    with pytest.raises(KeyError, match="no adapter 'default'; its adapters"):
        lk.delete_adapter(model, "default")
    with pytest.raises(KeyError, match="no adapter"):
        lk.save_adapter(model, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_8", "orthogonal", "gaussian"])
@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"rank_pattern": {"embed": 2}, "alpha_pattern": {"conv": 3}}]
)
def test_other_starts_are_saved_for_the_original_base(init: str, fields: dict[str, Any], tmp_path: Path) -> None:
    config = lk.LoRAConfig(
        r=4, lora_alpha=7, target_modules=["embed", "conv", "q_proj"], init_lora_weights=init, **fields
    )
    model = shake(lk.inject(net(), config)).eval()
    lk.save_adapter(model, tmp_path)
    assert_close(lk.load_adapter(net(), tmp_path)(IDS), model(IDS))
    assert_close(peft.PeftModel.from_pretrained(net(), tmp_path).eval()(IDS), model(IDS))


def test_nothing_stands_beside_an_adapter_that_changed_the_base(tmp_path: Path) -> None:
    other = lk.save_adapter(lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj"])), tmp_path)
    model = lk.inject(net(), lk.LoRAConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    weight = model.q_proj.weight.clone()
    for call, error in (
        (lambda: lk.inject(model, lk.LoRAConfig(target_modules=["conv"]), "other"), RuntimeError),
        (lambda: lk.load_adapter(model, other, "other"), lk.AdapterFileError),
        (lambda: lk.hotswap_adapter(model, other), RuntimeError),
        (lambda: lk.prepare_for_hotswap(model, 8), RuntimeError),
        (lambda: lk.add_weighted_adapter(model, ["default"], [1.0], "other"), RuntimeError),
    ):
        with pytest.raises(error, match="'default' has changed the base weights"):
            call()
    assert torch.equal(model.q_proj.weight, weight) and not isinstance(model.conv, LoRALayer)
    lk.delete_adapter(model, "default")
    assert_close(model.q_proj.weight, net().q_proj.weight)
    plain = lk.inject(net(), lk.LoRAConfig(target_modules=["conv"]))
    with pytest.raises(RuntimeError, match="expected a model without adapters"):
        lk.inject(plain, lk.LoRAConfig(target_modules=["q_proj"], init_lora_weights="olora"), "other")


# ------------------------------------------------------------------------------------------ faults

Edit = Callable[[Path], None]


def change(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)

    return apply


def drop(key: str) -> Edit:
    return change(lambda tensors: tensors.pop(PREFIX + key))


def put(key: str, *shape: int, value: float = 0.5, dtype: torch.dtype = torch.float64) -> Edit:
    return change(lambda tensors: tensors.update({PREFIX + key: torch.full(shape, value).to(dtype)}))


def fields(**values: Any) -> Edit:
    def apply(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return apply


NAN = float("nan")
FAULTS: list[tuple[str, Edit, str]] = [
    ("embedding", drop("embed.lora_embedding_B"), "'embed' has no lora_embedding_B"),
    ("embedding", drop("embed.lora_embedding_A"), "'embed' has no lora_embedding_A"),
    ("embedding", put("embed.lora_A.weight", 4, 10), "'embed' has lora_A.weight too"),
    ("embedding", put("embed.lora_embedding_A", 10, 4), r"\[10, 4\]; expected \[4, 10\].*transposed"),
    ("embedding", put("embed.lora_embedding_B", 8, 5), r"lora_embedding_B is \[8, 5\]; expected \[8, 4\]"),
    ("embedding", put("embed.lora_embedding_A", 4, 10, value=NAN), "embed.lora_embedding_A holds NaN or Inf"),
    ("embedding", put("embed.lora_embedding_A", 4, 10, dtype=torch.int8), "is torch.int8; expected a float"),
    ("embedding", put("embed.weight", 10, 8), r"embed.weight is another base weight"),
    ("embedding", put("embed.weight", 11, 8), r"another base weight \(\[11, 8\]\) than the model's \(\[10, 8\]\)"),
    ("embedding", fields(lora_bias=True), "module 'embed': lora_bias=True is not for an embedding"),
    ("conv", drop("picture.lora_B.weight"), "'picture' has no lora_B.weight"),
    ("conv", put("conv.lora_A.weight", 4, 8), r"conv.lora_A.weight is \[4, 8\]; expected \[4, 8, 3\]"),
    ("conv", put("conv.lora_B.weight", 8, 4), r"\[8, 4\]; expected \[8, 4, 1\]"),
    ("conv", fields(r=5), r"expected \[5, 8, 3\], as adapter_config.json says r=5"),
    ("grouped conv", fields(r=3), "'grouped': the convolution has groups=2"),
    ("grouped conv", fields(use_dora=True), "'grouped': use_dora=True needs a convolution with groups=1"),
    ("linear", fields(use_dora=True), "'q_proj' has no lora_magnitude_vector"),
    ("linear", fields(lora_bias=True), "'q_proj' has no lora_B.bias"),
    ("linear", fields(use_dora=True, lora_bias=True), "exclude each other"),
    ("linear", fields(use_dora="yes"), "use_dora is 'yes'"),
    ("linear", fields(modules_to_save="head"), "modules_to_save is 'head'"),
    ("linear", fields(modules_to_save=[""]), r"modules_to_save is \[''\]"),
    ("linear", fields(modules_to_save=[3]), r"modules_to_save is \[3\]"),
    ("linear", fields(modules_to_save=["head"]), "'head' has no tensor '0.weight'"),
    (
        "linear",
        fields(modules_to_save=["q_proj"]),
        "'q_proj' has no tensor 'weight'|'q_proj', a LoRALinear with adapters in it",
    ),
    ("linear", fields(trainable_token_indices=[1]), "trainable_token_indices"),
    ("linear", fields(target_parameters=["q_proj.weight"]), "target_parameters"),
    ("linear", fields(r=10**400), "r"),
    ("DoRA", drop("q_proj.lora_magnitude_vector"), "'q_proj' has no lora_magnitude_vector"),
    ("DoRA", drop("embed.lora_magnitude_vector"), "'embed' has no lora_magnitude_vector"),
    ("DoRA", put("q_proj.lora_magnitude_vector", 9), r"lora_magnitude_vector is \[9\]; expected \[8\]"),
    ("DoRA", put("conv.lora_magnitude_vector", 8), r"\[8\]; expected \[1, 8, 1\]"),
    ("DoRA", put("v_proj.lora_magnitude_vector", 8, value=NAN), "holds NaN or Inf"),
    ("DoRA", fields(use_dora=False), "has lora_magnitude_vector too"),
    ("lora_bias", drop("conv.lora_B.bias"), "'conv' has no lora_B.bias"),
    ("lora_bias", put("conv.lora_B.bias", 7), r"conv.lora_B.bias is \[7\]; expected \[8\]"),
    ("lora_bias", fields(lora_bias=False), "has lora_B.bias too"),
    ("modules_to_save", drop("head.2.bias"), "'head' has no tensor '2.bias' in the file"),
    ("modules_to_save", drop("head.1.running_mean"), "'head' has no tensor '1.running_mean'"),
    ("modules_to_save", put("head.0.weight", 8, 6), r"head.0.weight is \[8, 6\], torch.float64; expected \[6, 8\]"),
    ("modules_to_save", put("head.0.weight", 6, 8, value=NAN), "head.0.weight holds NaN or Inf"),
    ("modules_to_save", put("head.0.weight", 6, 8, dtype=torch.int64), "torch.int64; expected .* torch.float64"),
    ("modules_to_save", put("head.3.weight", 2), "unknown key '.*head.3.weight'"),
    ("modules_to_save", fields(modules_to_save=None), "head.* is another base weight"),
    ("modules_to_save", fields(modules_to_save=["nothing"]), "head.* is another base weight"),
    ("all biases", put("head.modules_to_save.other.0.bias", 6), "modules_to_save.other.0.bias is"),
    ("biases", put("q_proj.base_layer.bias", 8, value=NAN), "holds NaN or Inf"),
]


@pytest.mark.parametrize(("kind", "spoil", "message"), FAULTS, ids=[f"{kind}: {m}" for kind, _, m in FAULTS])
def test_faults_are_refused_and_change_nothing(kind: str, spoil: Edit, message: str, tmp_path: Path) -> None:
    lk.save_adapter(shake(lk.inject(net(), lk.LoRAConfig(**arguments(kind)))), tmp_path)
    model = lk.inject(net(), lk.LoRAConfig(**arguments(kind)))
    slot = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spoil(tmp_path)
    plain = net()
    for attempt in (lambda: lk.load_adapter(plain, tmp_path), lambda: lk.load_adapter(model, tmp_path)):
        with pytest.raises(lk.AdapterFileError, match=message):
            attempt()
    assert not any(isinstance(module, (LoRALayer, SavedModule)) for module in plain.modules())
    assert torch.equal(plain(IDS), net()(IDS)) and all(p.requires_grad for p in plain.parameters())
    assert all(torch.equal(tensor, slot[name]) for name, tensor in model.state_dict().items())


def test_a_failure_in_the_middle_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = arguments("modules_to_save")
    lk.save_adapter(shake(lk.inject(net(), lk.LoRAConfig(**kind))), tmp_path)
    model = lk.inject(net(), lk.LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["head"]), "first")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    names = set(model.state_dict())
    original, calls = lk.LoRALinear._add_parameters, []

    def no_memory(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError
        original(self, *args, **kwargs)

    for attempt in (
        lambda: lk.load_adapter(model, tmp_path),
        lambda: lk.inject(model, lk.LoRAConfig(**kind), "second"),
    ):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(lk.LoRALinear, "_add_parameters", no_memory)
            with pytest.raises(MemoryError):
                attempt()
        assert set(model.state_dict()) == names and model.q_proj.active_adapters == ["first"]
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_a_base_weight_that_peft_saves_beside_embeddings_is_read_over(tmp_path: Path) -> None:
    model = shake(lk.inject(net(), lk.LoRAConfig(**arguments("embedding")))).eval()
    lk.save_adapter(model, tmp_path)
    change(lambda t: t.update({f"{PREFIX}embed.base_layer.weight": net().embed.weight.detach()}))(tmp_path)
    assert torch.equal(lk.load_adapter(net(), tmp_path)(IDS), model(IDS))


# ------------------------------------------------------------------------------------------ whole modules


def test_a_saved_module_switches_with_its_adapter() -> None:
    model = lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj"], modules_to_save=["head"]))
    lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"]), "plain")
    lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"], modules_to_save=["head"]), "third")
    assert model.head.active_adapter == "default" and isinstance(model.head, SavedModule)
    shake(model)
    one = model(IDS)
    lk.set_adapter(model, "plain")
    assert_close(model(IDS), net()(IDS))
    assert model.head.running is model.head.original_module
    assert not any(p.requires_grad for p in model.head.parameters())
    lk.set_adapter(model, ["default", "plain"])
    assert model.head.active_adapter == "default" and all(p.requires_grad for p in model.head.running.parameters())
    with pytest.raises(ValueError, match=r"\['default', 'third'\] each have a copy of 'head'"):
        lk.set_adapter(model, ["default", "third"])
    assert_close(model(IDS), one)
    lk.delete_adapter(model, "third")
    assert list(model.head.modules_to_save) == ["default"]


def test_a_second_adapters_copy_waits_for_it() -> None:
    model = lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj"]))
    lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"], modules_to_save=["head"]), "second")
    assert model.head.active_adapter is None and not any(p.requires_grad for p in model.head.parameters())
    lk.set_adapter(model, "second")
    assert model.head.active_adapter == "second"
    assert {id(p) for p in model.head.running.parameters()} <= {id(p) for p in lk.trainable_parameters(model)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_adapters_keep_the_dtype_of_their_file(dtype: torch.dtype, tmp_path: Path) -> None:
    there = lk.save_adapter(shake(lk.inject(net(), lk.LoRAConfig(**arguments("DoRA")))), tmp_path / "there")
    change(lambda tensors: tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()}))(there)
    model = lk.load_adapter(lk.inject(net(), lk.LoRAConfig(**arguments("DoRA"))), there)
    assert_same_tensors(lk.save_adapter(model, tmp_path / "back"), there)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (dict(target_modules=["q_proj"], modules_to_save=["haed"]), ValueError, r"\['haed'\] matches no module of Net"),
        (
            dict(target_modules="all-linear", modules_to_save=["_proj", "head"]),
            ValueError,
            "modules_to_save=.* leaves none",
        ),
        (dict(target_modules=["grouped"], use_dora=True), ValueError, "target 'grouped': use_dora=True needs"),
        (dict(target_modules=["q_proj", "embed"], lora_bias=True), ValueError, "target 'embed': lora_bias"),
        (dict(target_modules=["q_proj"], r=99, init_lora_weights="olora"), ValueError, "target 'q_proj': .* at most 8"),
        (dict(target_modules=["q_proj", "norm"]), TypeError, "'norm' is a torch.nn.modules.normalization.LayerNorm"),
    ],
)
def test_what_inject_refuses_leaves_the_model_alone(config: dict, error: type[Exception], message: str) -> None:
    model = net()
    with pytest.raises(error, match=message):
        lk.inject(model, lk.LoRAConfig(**config))
    assert not any(isinstance(module, (LoRALayer, SavedModule)) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_whole_module_and_an_adapted_one_exclude_each_other() -> None:
    model = lk.inject(net(), lk.LoRAConfig(target_modules=["head.0"]))
    with pytest.raises(TypeError, match="'head', a Sequential with adapters in it"):
        lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"], modules_to_save=["head"]), "other")
    assert not isinstance(model.head, SavedModule) and model.q_proj is not None
    model = lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj"], modules_to_save=["head.2"]))
    with pytest.raises(TypeError, match=r"target 'head.2' is a lorakernels.*SavedModule"):
        lk.inject(model, lk.LoRAConfig(target_modules=["head.2"]), "other")


# ------------------------------------------------------------------------------------------ the hub


def test_the_hub_is_asked_only_when_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shake(lk.inject(net(), lk.LoRAConfig(**arguments("all kinds")))).eval()
    there = lk.save_adapter(model, tmp_path / "there")
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        if name == "org/none":
            raise OSError("404")
        return str(there)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lk.AdapterFileError, match=r"org/name is not a folder; .* hub=True"):
        lk.load_adapter(net(), "org/name")
    assert not asked
    files = [CONFIG, WEIGHTS]
    assert torch.equal(lk.load_adapter(net(), "org/name", hub=True)(IDS), model(IDS))
    assert torch.equal(lk.load_adapter(net(), "org/name", revision="v2")(IDS), model(IDS))
    lk.hotswap_adapter(lk.load_adapter(net(), there), "org/name", revision="v3")
    assert asked == [("org/name", {"revision": v, "allow_patterns": files}) for v in (None, "v2", "v3")]
    with pytest.raises(lk.AdapterFileError, match="org/none cannot be had from the hub: 404"):
        lk.load_adapter(net(), "org/none", hub=True)
    asked.clear()
    lk.load_adapter(net(), "there", hub=True)
    with pytest.raises(ValueError, match="local folder, which has no revision 'v2'"):
        lk.load_adapter(net(), "there", revision="v2")
    assert not asked
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        lk.load_adapter(net(), "org/name", hub=True)


def test_fields_that_are_not_there_are_pefts_defaults() -> None:
    config = config_from_fields({"peft_type": "LORA", "target_modules": ["q_proj"]}, "a file")
    assert (config.r, config.lora_alpha) == (peft.LoraConfig().r, peft.LoraConfig().lora_alpha) == (8, 8)


@pytest.mark.parametrize("field", ["use_rslora", "use_dora", "lora_bias"])
def test_flags_and_patterns_have_their_types(field: str) -> None:
    with pytest.raises(TypeError, match=f"{field} is 'false'"):
        lk.LoRAConfig(**{field: "false"})
    with pytest.raises(lk.AdapterFileError, match=f"{field} is 'false'"):
        config_from_fields({field: "false"}, "a file")
    for pattern in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(TypeError, match=f"{pattern} is .*; expected a mapping"):
            lk.LoRAConfig(**{pattern: [1]})


def test_a_null_start_is_the_default() -> None:
    assert config_from_fields({"init_lora_weights": None}, "a file").init_lora_weights is True


@pytest.mark.parametrize(
    "fields",
    [
        dict(alpha_pattern={"v_proj": 8, "0.v_proj": 64}),
        dict(rank_pattern={"v_proj": 8, "0.v_proj": 2}),
        dict(alpha_pattern={"q_proj": 3, r".*q_proj": 64}, init_lora_weights="pissa"),
        dict(alpha_pattern={".*q_proj": 64}, init_lora_weights="pissa"),
    ],
    ids=str,
)
def test_the_first_pattern_that_matches_counts_in_a_file_too(fields: dict[str, Any], tmp_path: Path) -> None:
    def two() -> nn.Module:
        torch.manual_seed(1)
        blocks = [nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8)}) for _ in range(2)]
        return nn.Sequential(*blocks).double()

    model = lk.inject(two(), lk.LoRAConfig(r=4, target_modules=["q_proj", "v_proj"], **fields))
    shake(model)
    again = lk.load_adapter(two(), lk.save_adapter(model, tmp_path))
    for one, other in zip(model, again, strict=True):
        for name in ("q_proj", "v_proj"):
            x = torch.eye(8, dtype=torch.float64)
            assert torch.allclose(one[name](x), other[name](x), atol=1e-12)
    written = json.loads((tmp_path / CONFIG).read_text())
    pattern = next(iter(fields))
    assert list(written[pattern])[-len(fields[pattern]) :] == list(fields[pattern])


def test_a_loaded_adapter_is_no_view_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lk.inject(net().float(), lk.LoRAConfig(target_modules=["q_proj"]))
    folder = lk.save_adapter(model, tmp_path)
    held = {key: tensor.half() for key, tensor in load_file(folder / WEIGHTS).items()}
    monkeypatch.setattr("lorakernels.files.peft.read_tensors", lambda path: (dict(held), {}))
    layer = lk.load_adapter(net().float(), folder).q_proj
    places = {parameter.data_ptr() for parameter in layer.adapter_tensors().values()}
    assert not places & {tensor.data_ptr() for tensor in held.values()}


def test_nothing_partial_stays_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    model = lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj"]))
    monkeypatch.setattr("lorakernels.files.peft.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        lk.save_adapter(model, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("name", ["default", "other"])
def test_a_saved_leaf_beside_all_biases_of_peft(name: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all", modules_to_save=["head.2"])
    theirs = shake(peft.get_peft_model(net(), config, adapter_name=name)).eval()
    theirs.save_pretrained(tmp_path)
    ours = lk.load_adapter(net(), tmp_path if name == "default" else tmp_path / name)
    assert torch.allclose(ours(IDS), theirs(IDS), rtol=0, atol=1e-10)


@pytest.mark.parametrize("to_save", [["head"], ["dec.head"]])
def test_a_shared_module_to_save_goes_by_any_of_its_names(to_save: list[str], tmp_path: Path) -> None:
    def shared() -> nn.Module:
        torch.manual_seed(2)
        one = nn.Linear(4, 4)
        parts = {"enc": nn.ModuleDict({"head": one}), "dec": nn.ModuleDict({"head": one}), "q": nn.Linear(4, 4)}
        return nn.ModuleDict(parts)

    model = shake(lk.inject(shared(), lk.LoRAConfig(r=2, target_modules=["q"], modules_to_save=to_save)))
    lk.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for first, second in (("enc", "enc"), ("enc", "dec")):
        renamed = {key.replace(f".{first}.", f".{second}."): tensor for key, tensor in tensors.items()}
        save_file(renamed, tmp_path / WEIGHTS)
        again: Any = lk.load_adapter(shared(), tmp_path)
        assert torch.equal(again["dec"]["head"].weight, model["dec"]["head"].weight)  # type: ignore[index,union-attr]
        assert again["enc"]["head"] is again["dec"]["head"]
    other = {key.replace(".enc.", ".dec."): tensor + 1 for key, tensor in tensors.items() if ".enc." in key}
    save_file(tensors | other, tmp_path / WEIGHTS)
    with pytest.raises(lk.AdapterFileError, match="are one module"):
        lk.load_adapter(shared(), tmp_path)


class Tied(nn.Module):
    """A head with the weight of the embedding, and a bias that has a second name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed_tokens, self.lm_head = nn.Embedding(10, 6), nn.Linear(6, 10)
        self.lm_head.weight = self.embed_tokens.weight  # type: ignore[assignment]
        self.bias = self.lm_head.bias

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.embed_tokens(ids))


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_tied_parameters_go_by_any_of_their_names(targets: list[str], bias: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, bias=bias)
    theirs = shake(peft.get_peft_model(Tied().double(), config, autocast_adapter_dtype=False)).eval()
    theirs.save_pretrained(tmp_path)
    assert f"{PREFIX}lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    for ours in (lk.load_adapter(Tied().double(), tmp_path), Tied().double()):
        lk.load_adapter(ours, tmp_path)  # into one that has it, too
        assert_close(ours(IDS), theirs(IDS))
        assert ours.lm_head.bias is ours.bias
    saved = [load_file(folder / WEIGHTS) for folder in (tmp_path, lk.save_adapter(ours, tmp_path / "again"))]
    theirs_saved, ours_saved = ({name for name in each if name.endswith("bias")} for each in saved)
    assert ours_saved == theirs_saved or bias == "none"  # of which PEFT saves an output layer whole
    if bias == "none":
        store = lk.AdapterStore(model := Tied().double())
        store.load("one", tmp_path)
        with store.batch(["one", None]):
            assert_close(model(IDS), torch.stack([theirs(IDS)[0], Tied().double()(IDS)[1]]))
    if bias == "all":
        change(lambda t: t[f"{PREFIX}bias"].add_(1))(tmp_path)
        with pytest.raises(lk.AdapterFileError, match="are one bias of the model, of which the file has two values"):
            lk.load_adapter(Tied().double(), tmp_path)
