"""The way back to a plain model: `unload`, and what a state dict and transformers' `save_pretrained` write."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorakernels as lk

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOKENS = torch.arange(12).view(2, 6)


def llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    sizes |= fields
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=2, **sizes)).double().eval()


def adapted(model: Any, **fields: Any) -> Any:
    fields = {"r": 2, "target_modules": ["q_proj", "k_proj", "down_proj"], "init_lora_weights": False} | fields
    return lk.inject(model, lk.LoRAConfig(**fields)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def again(folder: Path) -> Any:
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float64
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    return model.eval()


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("merge", [False, True], ids=["without", "merged"])
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_unload(fields: dict[str, Any], merge: bool) -> None:
    """Types, names and answers of the plain model; merged, its answers are those with the adapter."""
    plain = llama()
    model = adapted(copy.deepcopy(plain), **fields)
    if "modules_to_save" in fields:
        nn.init.normal_(model.lm_head.modules_to_save["default"].weight)
    expected = logits(model if merge else plain)
    assert lk.unload(model, merge=merge) is model
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    torch.testing.assert_close(logits(model), expected)
    assert vars(model).keys() == vars(plain).keys()


def test_unload_of_a_merged_and_of_a_quantised_model() -> None:
    model = adapted(lk.quantize(llama(), "nf4"))
    before = {name: tensor.clone() for name, tensor in lk.unload(copy.deepcopy(model)).state_dict().items()}
    expected = logits(model)
    lk.merge(model)
    for merge in (True, False):
        twin = lk.unload(copy.deepcopy(model), merge=merge)
        assert not any(isinstance(module, lk.LoRALinear) for module in twin.modules())
        if merge:
            torch.testing.assert_close(logits(twin), expected)
        else:
            assert all(torch.equal(tensor, before[name]) for name, tensor in twin.state_dict().items())


def test_unload_of_one_layer_and_of_a_model_without_adapters() -> None:
    base = nn.Linear(4, 3)
    assert lk.unload(lk.LoRALinear.from_linear(base, r=2)) is base
    assert lk.unload(base) is base and lk.unload(base, merge=True) is base


def test_a_merge_that_cannot_be_changes_nothing() -> None:
    model = adapted(llama())
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.lora_A["default"].weight.fill_(torch.inf)
    before = model.state_dict()
    with pytest.raises(ValueError, match="not finite"):
        lk.unload(model, merge=True)
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize(
    "fields", [KINDS["plain"], KINDS["head"], KINDS["embedding"]], ids=["plain", "head", "embedding"]
)
def test_a_merged_state_dict_is_the_plain_models(fields: dict[str, Any], tmp_path: Path) -> None:
    """Strictly loaded, and through transformers: the adapter counts once."""
    model = adapted(llama(), **fields)
    if "modules_to_save" in fields:
        nn.init.normal_(model.lm_head.modules_to_save["default"].weight)
    expected, unmerged = logits(model), model.state_dict()
    lk.merge(model)
    plain = llama()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(plain), expected)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(again(tmp_path)), expected)
    with pytest.raises(RuntimeError, match="Missing key"):
        adapted(llama(), **fields).load_state_dict(model.state_dict())
    lk.unmerge(model)
    assert model.state_dict().keys() == unmerged.keys()


def test_a_tied_head() -> None:
    """transformers leaves out one of two names of a tensor; both are the merged one's."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    config = transformers.LlamaConfig(num_attention_heads=2, tie_word_embeddings=True, **sizes)
    model = adapted(transformers.LlamaForCausalLM(config).double().eval())
    expected = logits(model)
    lk.merge(model)
    plain = transformers.LlamaForCausalLM(config).double().eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(plain), expected)


def test_what_an_adapted_model_saves_through_transformers(tmp_path: Path) -> None:
    """As PEFT's: the adapters' files, which transformers puts on the base model that they name."""
    llama().save_pretrained(tmp_path / "base")
    model = adapted(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64))
    expected = logits(model)
    twins = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for number, twin in enumerate(twins):
        folder = tmp_path / str(number)
        twin.save_pretrained(folder)
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        torch.testing.assert_close(logits(loaded), expected)
        twin.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data.zero_()  # the others keep their own
    lk.inject(model, lk.LoRAConfig(r=2, target_modules=["v_proj"]), "other")
    model.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "other" / "adapter_config.json").exists()
    assert (tmp_path / "two" / "adapter_config.json").exists()
    with pytest.raises(ValueError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "half", push_to_hub=True)
    model.model.layers[0].self_attn.q_proj.merge()
    with pytest.raises(RuntimeError, match="call unmerge first"):
        model.save_pretrained(tmp_path / "half")


def encoder_decoder() -> tuple[Any, str]:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    encoder = transformers.BertConfig(num_attention_heads=2, **sizes)
    decoder = transformers.BertConfig(num_attention_heads=2, is_decoder=True, add_cross_attention=True, **sizes)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 0, 0
    return transformers.EncoderDecoderModel(config), "decoder"


def llava() -> tuple[Any, str]:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    text = transformers.LlamaConfig(num_attention_heads=2, vocab_size=32, **sizes)
    vision = transformers.CLIPVisionConfig(num_attention_heads=2, image_size=4, patch_size=2, **sizes)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=31)
    return transformers.LlavaForConditionalGeneration(config), "model.language_model"


def dual_encoder() -> tuple[Any, str]:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    text = transformers.BertConfig(num_attention_heads=2, vocab_size=32, **sizes)
    vision = transformers.CLIPVisionConfig(num_attention_heads=2, image_size=4, patch_size=2, **sizes)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=8)
    return transformers.VisionTextDualEncoderModel(config), "vision_model"


@pytest.mark.parametrize("made", [encoder_decoder, llava, dual_encoder])
def test_a_model_in_whose_part_adapters_are(made: Any, tmp_path: Path) -> None:
    """transformers knows nothing of them: its save_pretrained is refused, and writes nothing, until they are merged."""
    torch.manual_seed(0)
    model, path = made()
    part = lk.inject(
        model.get_submodule(path), lk.LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    trainer = transformers.Trainer(model, transformers.TrainingArguments(tmp_path / "trainer", use_cpu=True))
    for save in (model.save_pretrained, copy.deepcopy(model).save_pretrained, trainer.save_model):
        with pytest.raises(RuntimeError, match=rf"lorakernels.save_adapter\(model\.{path}, folder\)"):
            save(tmp_path / "whole")
        assert not list((tmp_path / "whole").glob("*.safetensors"))
    # torch's own ways are as they were.
    again = made()[0]
    lk.inject(again.get_submodule(path), lk.LoRAConfig(r=2, target_modules="all-linear"))
    again.load_state_dict(model.state_dict())
    lk.save_adapter(part, tmp_path / "part")
    lk.merge(part)
    model.save_pretrained(tmp_path / "whole")
    loaded, told = type(model).from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    expected = lk.unload(part, merge=True).state_dict()
    assert loaded.get_submodule(path).state_dict().keys() == expected.keys()
    for name, value in loaded.get_submodule(path).state_dict().items():
        assert torch.equal(value, expected[name]), name
    model.save_pretrained(tmp_path / "plain")


def test_a_trainers_checkpoint(tmp_path: Path) -> None:
    model = adapted(llama())
    model.config._name_or_path = ""
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=1, save_steps=1, report_to="none", disable_tqdm=True, use_cpu=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(tmp_path / "last")
    for folder in (tmp_path / "checkpoint-1", tmp_path / "last"):
        loaded = lk.load_adapter(llama(), folder).eval()
        assert torch.equal(logits(loaded), logits(model.eval()))


def test_an_adapter_that_is_not_merged_is_no_part_of_a_merged_model(tmp_path: Path) -> None:
    model = adapted(llama())
    lk.inject(model, lk.LoRAConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]), "other")
    unmerged, expected = set(model.state_dict()), logits(model)
    lk.merge(model)
    assert model.state_dict().keys() == llama().state_dict().keys()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(again(tmp_path)), expected)
    lk.unmerge(model)
    assert set(model.state_dict()) == unmerged
    lk.set_adapter(model, [])
    lk.merge(model)  # of nothing
    assert set(model.state_dict()) == unmerged


def test_other_processes_and_whole_values(tmp_path: Path) -> None:
    """As accelerate's `save_pretrained(folder, is_main_process=…, state_dict=…)` has it."""
    model = adapted(llama())
    model.save_pretrained(tmp_path / "second", False)
    assert not (tmp_path / "second").exists()
    whole = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=whole)
    name = "model.layers.0.self_attn.q_proj.lora_A"
    found = load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{name}.weight"]
    assert torch.equal(found, whole[f"{name}.default.weight"])


def test_a_save_pretrained_of_its_own_stays(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained = own = lambda *args: None
    adapted(model)
    assert model.save_pretrained is own
    assert lk.unload(model).save_pretrained is own


def test_unload_gives_an_encoder_its_fast_path_back() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1)
    lk.unload(lk.inject(encoder, lk.LoRAConfig(target_modules=["linear1"])))
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_what_was_put_into_a_part(tmp_path: Path) -> None:
    """As trainers of vision models do with the language model: merged, the whole is saved as a plain model."""
    model = llama()
    adapted(model.model, target_modules=["q_proj"])
    expected = logits(model)
    lk.merge(model.model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(again(tmp_path)), expected)
    lk.unload(model)
    assert not any("_lora_configs" in vars(module) or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_tying_and_resizing(fields: dict[str, Any], tied: bool) -> None:
    """The base weights are tied and nothing else; sizes are refused before anything changes."""
    model = adapted(llama(tie_word_embeddings=tied), **fields)
    with torch.no_grad():
        for parameter in lk.trainable_parameters(model):
            parameter.add_(0.1)
    before, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    model.tie_weights()
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(40\) with adapters on .*; resize before inject"):
        model.resize_token_embeddings(40)
    assert torch.equal(logits(model), before)
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], value) for name, value in state.items())
    assert model.get_input_embeddings().weight.shape[0] == model.resize_token_embeddings().weight.shape[0] == 32
    lk.unload(model)
    model.resize_token_embeddings(40)
    assert logits(model).shape[-1] == 40


def test_embeddings_without_adapters_are_resized() -> None:
    model = adapted(llama(tie_word_embeddings=True))
    before = logits(model)
    model.resize_token_embeddings(40)
    torch.testing.assert_close(logits(model)[..., :32], before)
    assert model.lm_head.weight is model.get_input_embeddings().weight
