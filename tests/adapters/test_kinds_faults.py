"""What is wrong with a file of any kind, or fails in the middle, changes nothing; the hub."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kinds import CONFIG, IDS, PREFIX, WEIGHTS, Edit, arguments, change, drop, fields, net, put, shake

import lorakernels as lk
from lorakernels.adapters.saved_modules import SavedModule
from lorakernels.nn.layer import LoRALayer

peft = pytest.importorskip("peft")
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
    (
        "embedding",
        put("embed.weight", 11, 8),
        r"a base weight \[11, 8\], the model's \[10, 8\]; give the model",
    ),
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
    plain = net()
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(lk.LoRALinear, "_add_parameters", no_memory)
        with pytest.raises(MemoryError):
            lk.inject(plain, lk.LoRAConfig(**kind))
    assert len(calls) == 2 and plain.state_dict().keys() == net().state_dict().keys()
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_a_base_weight_that_peft_saves_beside_embeddings_is_read_over(tmp_path: Path) -> None:
    model = shake(lk.inject(net(), lk.LoRAConfig(**arguments("embedding")))).eval()
    lk.save_adapter(model, tmp_path)
    change(lambda t: t.update({f"{PREFIX}embed.base_layer.weight": net().embed.weight.detach()}))(tmp_path)
    assert torch.equal(lk.load_adapter(net(), tmp_path)(IDS), model(IDS))


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
    files = [CONFIG, "adapter_model*.safetensors", f"{WEIGHTS}.index.json", "pytorch_lora_weights.safetensors"]
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


def test_nothing_partial_stays_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    model = lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj"]))
    (tmp_path / "old").mkdir()
    monkeypatch.setattr("lorakernels.files.saving.save_file", full)
    for name in ("new", "old"):
        with pytest.raises(OSError, match="No space left"):
            lk.save_adapter(model, tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
