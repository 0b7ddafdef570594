"""What `accelerate` leaves of a model, and what `restore` brings back; memory, torch.compile, transformers."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

peft = pytest.importorskip("peft")

from accelerated import (
    IN,
    OUT,
    Scaled,
    Two,
    accelerated_copy,
    assert_equal,
    config,
    double_output,
    peft_model,
    randomised,
    values_and_gradients,
)
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from lorakernels.integrations.peft import accelerate, restore

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")


def description(model: Any) -> Any:
    types = [(name, type(module)) for name, module in model.named_modules()]
    return types, repr(model), [(key, value.data_ptr()) for key, value in model.state_dict().items()]


def test_accelerate_and_restore_leave_everything_else(x: torch.Tensor) -> None:
    model = peft_model(config(), config(use_dora=True))
    model.base_model.model.up.register_forward_hook(double_output)
    before, expected = description(model), model(x)
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    first = accelerate(model)
    assert accelerate(model) == first
    assert isinstance(model.base_model.model.up, PeftLinear)
    assert description(model)[2] == before[2]
    torch.testing.assert_close(model(x), expected)
    restore(model)
    restore(model)
    assert description(model) == before
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == state
    assert torch.equal(model(x), expected)


def test_saved_files_are_the_same(tmp_path: Path) -> None:
    plain = peft_model(config(lora_dropout=0.1), config(use_dora=True), dtype=torch.float32)
    # A copy too: PEFT writes its set of target modules in the order it has, which copying may change.
    copy.deepcopy(plain).save_pretrained(tmp_path / "plain")
    accelerated_copy(plain).save_pretrained(tmp_path / "accelerated")

    def files(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    saved = files(tmp_path / "accelerated")
    assert saved == files(tmp_path / "plain")
    assert sum(name.endswith(".safetensors") for name in saved) == 2


def test_on_meta_tensors(x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    for dora in (False, True):
        model = accelerated_copy(peft_model(config(use_dora=dora))).to("meta")
        assert model(x.to("meta")).shape == model.base_model.model(x.to("meta")).shape
    assert fused


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_runs_pefts_forward(x: torch.Tensor, tmp_path: Path) -> None:
    fast = accelerated_copy(peft_model(config()))
    traced = torch.jit.trace(fast, x)
    traced.save(str(tmp_path / "traced.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "traced.pt"))(x), fast(x))


def test_copies_and_pickles_stay_accelerated(x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    model = accelerated_copy(peft_model(config()).base_model.model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        restore(other)
        assert type(other.up) is PeftLinear
    assert len(fused) == 6


def test_injected_adapters_in_any_tree(x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    plain = randomised(inject_adapter_in_model(config(), nn.ModuleDict({"inner": Two().double()})))
    model = copy.deepcopy(plain)
    report = accelerate(model)
    assert [row.name for row in report.rows] == ["inner.up", "inner.down"]
    assert_equal(values_and_gradients(model["inner"], x), values_and_gradients(plain["inner"], x))
    assert len(fused) == 2


def test_report() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, IN)
            self.blocks = nn.ModuleList(Two() for _ in range(3))
            self.conv = nn.Conv2d(3, 4, 1)
            self.slow = Scaled(IN, OUT)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    targets = ["embed", "up", "down", "conv", "slow"]
    model = get_peft_model(Mixed(), LoraConfig(target_modules=targets, modules_to_save=["blocks.2"]))
    report = accelerate(model)
    assert (report.num_layers, report.num_accelerated) == (7, 4)
    reasons = {row.name.rpartition("model.")[2]: row.reason for row in report.not_accelerated}
    assert reasons.keys() == {"embed", "conv", "slow"}
    assert "lora.layer.Embedding over torch.nn.modules.sparse.Embedding" in reasons["embed"]
    assert "Conv2d" in reasons["conv"]
    assert "Scaled" in reasons["slow"]
    text = str(report)
    assert "4 of 7 LoRA layers accelerated" in text
    assert "blocks.*.up" in text
    assert text == "\n".join(line.rstrip() for line in text.splitlines())
    assert "4 of 7" in repr(report)


def test_wrong_arguments() -> None:
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            function("model")
    with pytest.warns(UserWarning, match="no PEFT LoRA layer"):
        assert accelerate(Two()).rows == ()


def test_import_without_peft() -> None:
    code = """
import sys
from lorakernels.integrations.peft import accelerate
import torch
assert "peft" not in sys.modules and "transformers" not in sys.modules
sys.modules["peft"] = None
try:
    accelerate(torch.nn.Linear(1, 1))
except ImportError as error:
    assert "pip install peft" in str(error), error
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def kept_bytes(layer: Any, x: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward, those of parameters left out."""
    ours = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = layer(x)
    assert kept.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_bytes_kept_for_the_backward(base: torch.dtype, rate: float) -> None:
    plain = peft_model(config(lora_dropout=rate), dtype=torch.float32).base_model.model.up
    plain.base_layer.to(base)
    x = torch.randn(256, IN, dtype=base, requires_grad=True)
    ours, theirs = kept_bytes(accelerated_copy(plain), x), kept_bytes(plain, x)
    if base is torch.float32 and rate == 0.0:
        assert ours == theirs == 4 * 256 * (IN + 4)  # x and x Aᵀ: there is nothing more to save
    else:
        assert ours < 0.75 * theirs


@contextmanager
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("case", ["plain", "several", "dropout", "autocast"])
def test_compile_has_no_graph_break(case: str) -> None:
    rate = 0.3 if case == "dropout" else 0.0
    model = accelerated_copy(peft_model(config(lora_dropout=rate, lora_bias=True), config(r=3), dtype=torch.float32))
    model.base_model.set_adapter(["first", "second"] if case == "several" else ["first"])
    model = model.base_model.model
    x = torch.randn(6, IN)
    with fresh_dynamo(), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.manual_seed(0)
        ours = values_and_gradients(compiled, x)
        torch.manual_seed(0)
        eager = values_and_gradients(model, x)
    assert_equal({key.removeprefix("_orig_mod."): value for key, value in ours.items()}, eager, tolerance=1e-6)


def test_hot_swap_does_not_recompile(tmp_path: Path) -> None:
    peft_model(config(r=2, lora_alpha=9), dtype=torch.float32).save_pretrained(tmp_path)
    plain = peft_model(config(), dtype=torch.float32)
    prepare_model_for_compiled_hotswap(plain, target_rank=6)
    model = accelerated_copy(plain)
    x = torch.randn(6, IN)
    with fresh_dynamo(), torch.no_grad():
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model.base_model.model, fullgraph=True, backend=counter)
        before = compiled(x)
        torch.testing.assert_close(before, plain(x))
        for m in (plain, model):
            hotswap_adapter(m, str(tmp_path / "first"), adapter_name="first")
        torch.testing.assert_close(compiled(x), plain(x))
        assert not torch.allclose(compiled(x), before)
        assert counter.frame_count == 1
        assert counter.graphs[0].code.count("torch.ops.lorakernels.lora_linear(") == 2


def tiny_llama(**fields: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", **fields)
    return randomised(get_peft_model(transformers.LlamaForCausalLM(llama), lora), std=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_llama(checkpointing: bool, fused: list[dict[str, Any]]) -> None:
    plain = tiny_llama(modules_to_save=["lm_head"], use_rslora=True)
    model = copy.deepcopy(plain)
    report = accelerate(model)
    assert (report.num_layers, report.num_accelerated) == (14, 14)
    tokens = torch.randint(1, 96, (2, 12))
    found = []
    for m in (model, plain):
        if checkpointing:
            m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            m.train()
        out = m(input_ids=tokens, labels=tokens)
        out.loss.backward()
        gradients = {name: p.grad for name, p in m.named_parameters() if p.grad is not None}
        found.append({"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients})
    assert len(found[0]) == 2 + 28 + 1
    assert_equal(found[0], found[1], tolerance=2e-5)
    assert len(fused) == (28 if checkpointing else 14)


def test_llama_generates_the_same(fused: list[dict[str, Any]]) -> None:
    plain = tiny_llama().eval()
    model = accelerated_copy(plain)
    tokens = torch.randint(1, 96, (2, 5))
    ours = model.generate(input_ids=tokens, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, plain.generate(input_ids=tokens, max_new_tokens=8, do_sample=False))
    assert ours.shape == (2, 13)
    assert len(fused) == 8 * 14
    with plain.disable_adapter():
        base = plain.generate(input_ids=tokens, max_new_tokens=8, do_sample=False)
    assert not torch.equal(ours, base), "the adapter changes no token, so the test shows nothing"
