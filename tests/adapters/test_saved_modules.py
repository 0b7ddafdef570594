"""Modules that train whole beside an adapter, tied ones too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import IDS, PREFIX, WEIGHTS, assert_close, change, net, shake
from safetensors.torch import load_file, save_file
from torch import nn

import lorakernels as lk
from lorakernels.adapters.saved_modules import SavedModule
from lorakernels.nn.layer import LoRALayer

peft = pytest.importorskip("peft")


def test_a_saved_module_switches_with_its_adapter() -> None:
    model = lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj"], modules_to_save=["head"]))
    lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"]), "plain")
    lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"], modules_to_save=["head"]), "third")
    assert model.head.active_adapters == ["default"] and isinstance(model.head, SavedModule)
    shake(model)
    one = model(IDS)
    lk.set_adapter(model, "plain")
    assert_close(model(IDS), net()(IDS))
    assert model.head.running is model.head.original_module
    assert not any(p.requires_grad for p in model.head.parameters())
    lk.set_adapter(model, ["default", "plain"])
    assert model.head.active_adapters == ["default"] and all(p.requires_grad for p in model.head.running.parameters())
    with pytest.raises(ValueError, match=r"\['default', 'third'\] each have a copy of 'head'"):
        lk.set_adapter(model, ["default", "third"])
    assert_close(model(IDS), one)
    lk.delete_adapter(model, "third")
    assert list(model.head.modules_to_save) == ["default"]


def test_a_name_that_only_begins_as_a_saved_ones_is_adapted() -> None:
    model: Any = nn.ModuleDict({"head": nn.Linear(4, 4), "header": nn.Linear(4, 4)})
    lk.inject(model, lk.LoRAConfig(target_modules=["header"], modules_to_save=["head"]))
    assert isinstance(model["header"], lk.LoRALinear) and isinstance(model["head"], SavedModule)


def test_a_second_adapters_copy_waits_for_it() -> None:
    model = lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj"]))
    lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"], modules_to_save=["head"]), "second")
    assert model.head.active_adapters == [] and not any(p.requires_grad for p in model.head.parameters())
    lk.set_adapter(model, "second")
    assert model.head.active_adapters == ["second"]
    assert {id(p) for p in model.head.running.parameters()} <= {id(p) for p in lk.trainable_parameters(model)}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_embeddings_that_were_resized(dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT saves them whole beside the adapter; asked for, they come into the model."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}

    def llama(tokens: int, seed: int = 0) -> Any:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=2, **sizes)).eval()
        torch.manual_seed(seed)
        model.resize_token_embeddings(tokens)
        return model

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(35).to(dtype), config, autocast_adapter_dtype=False)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert len([key for key in load_file(tmp_path / WEIGHTS) if "embed_tokens" in key or "lm_head" in key]) == 2
    other = llama(35, seed=1)
    with pytest.raises(lk.AdapterFileError, match="give the model the size that it was trained with"):
        lk.load_adapter(llama(32), tmp_path, base_weights="file")
    with pytest.raises(lk.AdapterFileError, match=r'load_adapter\(..., base_weights="file"\)'):
        lk.load_adapter(other, tmp_path)
    for fields in ({"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}):
        of_head = peft.get_peft_model(llama(35), peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields}))
        of_head.save_pretrained(tmp_path / "head", save_embedding_layers=False)
        with pytest.raises(lk.AdapterFileError, match=r"lm_head.*(that it was trained with|before it was resized)"):
            lk.load_adapter(llama(32), tmp_path / "head")
    lk.load_adapter(llama(35), tmp_path)  # the same numbers, in the file's dtype
    ours = lk.load_adapter(other, tmp_path, base_weights="file").double()
    own = dict(theirs.base_model.model.named_parameters())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(ours.get_parameter(name), own[name].double())
    if dtype is torch.float32:  # else only what the file holds was rounded to bfloat16, and not the rest of the model
        tokens = torch.arange(35)[None]
        with torch.no_grad():
            assert_close(ours(tokens).logits, theirs.double()(tokens).logits)
    with pytest.raises(ValueError, match="base_weights is 'both'"):
        lk.load_adapter(other, tmp_path, "two", base_weights="both")
    head = f"{PREFIX}lm_head.weight"
    change(lambda t: t.__setitem__(head, t[head] + 1))(tmp_path)
    tied = llama(35)
    tied.lm_head.weight = tied.get_input_embeddings().weight
    with pytest.raises(lk.AdapterFileError, match="one base weight under two names, of which the file has two values"):
        lk.load_adapter(tied, tmp_path, base_weights="file")
    for way in ("file", "model"):
        with pytest.raises(lk.AdapterFileError, match="on the meta device"):
            lk.load_adapter(llama(35).to("meta"), tmp_path, base_weights=way)
