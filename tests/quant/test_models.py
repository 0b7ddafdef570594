"""Models that transformers quantises with bitsandbytes while it loads them: they train, generate, copy and save."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorakernels as lk
from lorakernels.quant.layers import kind_of, read
from lorakernels.testing.budget import assert_within_budget

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

TARGETS = {"every layer": "all-linear", "few layers": ["q_proj", "v_proj"]}
TOKENS = torch.arange(24).view(2, 12)
PROMPT: dict[str, Any] = {"inputs": TOKENS, "attention_mask": torch.ones_like(TOKENS), "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama's files; nothing is downloaded."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=40, num_hidden_layers=2, initializer_range=0.1, **sizes)
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(folder: Path, nested: bool) -> Any:
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=torch.float32, quantization_config=config)


def dense(model: Any, dtype: torch.dtype) -> Any:
    """The same model with its packed weights as plain ones, computed by the formula in this dtype."""
    plain = transformers.LlamaForCausalLM(model.config).to(dtype)
    weights = {f"{n}.weight": read(m).dense(dtype) for n, m in model.named_modules() if kind_of(m) == "bitsandbytes"}
    assert len(weights) == 14
    state = {name: tensor for name, tensor in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict({**state, **weights})
    return plain


def adapted(model: Any, targets: Any = "all-linear", **fields: Any) -> Any:
    """With the same adapter in every dtype."""
    lk.inject(model, lk.LoRAConfig(r=4, target_modules=targets, **fields))
    torch.manual_seed(1)
    for parameter in lk.trainable_parameters(model):
        parameter.data.copy_(torch.randn(parameter.shape) * 0.1)
    return model.train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(2)
    model(TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) >= 8
    for name, tensor in found.items():
        assert tensor.any() and torch.equal(tensor, expected[name]), name


both = pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])


@both
def test_gradients_and_training(nested: bool, folder: Path) -> None:
    """Every layer is adapted, so that bitsandbytes' own product has no part in it."""
    model = load(folder, nested)
    twins = [adapted(dense(model, dtype)) for dtype in (torch.float32, torch.float64)]
    eager, exact = (gradients(twin) for twin in twins)
    model = adapted(model)
    for name, gradient in gradients(model).items():
        assert_within_budget(gradient, eager[name], exact[name], torch.float32, name)
    optimizer = torch.optim.AdamW(lk.trainable_parameters(model), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


@both
def test_generates_as_dequantised(nested: bool, folder: Path) -> None:
    model = load(folder, nested)
    twin, model = adapted(dense(model, torch.float64)), adapted(model)
    found, expected = (m.eval().generate(**PROMPT, max_new_tokens=8) for m in (model, twin))
    assert found.shape == (2, 20) and torch.equal(found, expected)


@pytest.mark.parametrize("targets", TARGETS)
@both
def test_training_after_an_evaluation(nested: bool, targets: str, folder: Path) -> None:
    """A layer without an adapter runs bitsandbytes' forward, which would pack its weight again, and lose dx."""
    model = adapted(load(folder, nested), TARGETS[targets])
    expected = gradients(model)
    with torch.no_grad():
        model.eval()(TOKENS)
        model.generate(**PROMPT, max_new_tokens=2)
    assert_equal(gradients(model.train()), expected)


@pytest.mark.parametrize("targets", TARGETS)
@both
def test_files_into_a_fresh_model(nested: bool, targets: str, folder: Path, tmp_path: Path) -> None:
    model = adapted(load(folder, nested), TARGETS[targets])
    lk.save_adapter(model, tmp_path)
    again = load(folder, nested)
    lk.load_adapter(again, tmp_path, trainable=True)
    with torch.no_grad():
        expected = model.eval()(TOKENS).logits
        assert not torch.equal(load(folder, nested)(TOKENS).logits, expected)
        assert torch.equal(again.eval()(TOKENS).logits, expected)
    assert_equal(gradients(again.train()), gradients(model.train()))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@both
def test_gradient_checkpointing(nested: bool, use_reentrant: bool, folder: Path) -> None:
    model = adapted(load(folder, nested), lora_dropout=0.2)
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # what use_reentrant=True needs where the embedding is frozen
    calls: list[int] = []
    layer: nn.Module = model.model.layers[0].self_attn.o_proj
    layer.register_forward_hook(lambda *_: calls.append(1))
    assert_equal(gradients(model), expected)
    assert len(calls) == 2


@both
def test_deepcopy(nested: bool, folder: Path) -> None:
    model = adapted(load(folder, nested))
    expected = gradients(model)
    copied = copy.deepcopy(model)
    for parameter in lk.trainable_parameters(model):
        parameter.data += 1
    assert_equal(gradients(copied), expected)
    pairs = zip(copied.named_parameters(), model.named_parameters(), strict=True)
    assert not any(mine.data_ptr() == theirs.data_ptr() for (_, mine), (_, theirs) in pairs)
