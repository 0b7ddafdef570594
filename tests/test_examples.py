"""Every example runs; of the trainers the loss falls, each layer took the fused path, files and curves are PEFT's."""

from __future__ import annotations

import copy
import importlib
import json
import runpy
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import lorakernels as lk
from lorakernels.backend import ENVIRONMENT
from lorakernels.integrations import peft as integration
from lorakernels.nn.quantized import pack
from lorakernels.testing.budget import assert_within_budget

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
# Those that other tests run.
ELSEWHERE = {
    "trainer_llama.py": "tests/test_examples.py",
    "sft_llama.py": "tests/test_examples.py",
    "minilm.py": "tests/test_examples.py",
    "torchrun_ddp.py": "tests/integrations/test_distributed.py",
    "ray_serve.py": "tests/integrations/test_ray.py",
    "serve_and_query.py": "tests/integrations/test_vllm_server.py",
}
ARGUMENTS = {"world_plus_one.py": ["picture.svg"]}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", sorted({path.name for path in EXAMPLES.glob("*.py")} - set(ELSEWHERE)))
def test_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS.get(name, [])])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.usefixtures("elsewhere")
def test_the_notebook_runs_from_top_to_bottom() -> None:
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code), "strip the outputs"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code):
        exec(compile("".join(cell["source"]), f"tour.ipynb, code cell {number}", "exec"), namespace)
    assert len(pyplot.get_fignums()) == len(code)
    pyplot.close("all")


def test_the_others_run_elsewhere() -> None:
    for name, file in ELSEWHERE.items():
        assert name.removesuffix(".py") in (ROOT / file).read_text(), f"{file} does not run {name}"


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[nn.Module]:
    """Calls by layer, all of which must take the fused path, with the implementation that a user would get."""
    counts: Counter[nn.Module] = Counter()
    fused_forward = integration._fused_forward

    def counting(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        y = fused_forward(layer, x)
        assert y is not None
        counts[layer] += 1
        return y

    monkeypatch.setattr(integration, "_fused_forward", counting)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    return counts


def example(name: str) -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


TRAINERS: dict[str, dict[str, Any]] = {"trainer_llama": {}, "sft_llama": {}, "sft_llama --nf4": {"nf4": True}}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers(name: str, tmp_path: Path, fused_calls: Counter[nn.Module]) -> None:
    from peft import PeftConfig
    from safetensors.torch import load_file

    report, losses = example(name.split()[0]).main(str(tmp_path), steps=30, **TRAINERS[name])
    assert losses[-1] < 0.75 * losses[0], losses
    assert len(report.rows) == 14  # 7 projections of 2 layers
    assert not report.not_accelerated
    assert len(fused_calls) == 14
    packed = {getattr(layer.get_base_layer().weight, "quant_type", "") for layer in fused_calls}
    assert packed == ({"nf4"} if TRAINERS[name] else {""})
    assert set(fused_calls.values()) <= {30, 60}  # SFTConfig's activation checkpointing runs the forward again

    assert PeftConfig.from_pretrained(tmp_path).r == 8
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 28
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)


STEPS = 5


def minilm(**arguments: Any) -> torch.Tensor:
    """Losses [2, STEPS] of PEFT and of the accelerated model, in float64."""
    return torch.tensor(example("minilm").main(STEPS, **arguments)[0])


def test_minilm_has_the_curve_of_peft(fused_calls: Counter[nn.Module]) -> None:
    """In float64 the same to 1e-10; in float32 PEFT's and ours are as far from that as the rounding budget allows."""
    exact = minilm(dtype=torch.float64)
    torch.testing.assert_close(exact[1], exact[0], rtol=0, atol=1e-10)
    assert exact[1, -1] < 0.5 * exact[1, 0], exact

    assert list(fused_calls.values()) == [STEPS + 1] * 37  # 6 of 6 layers and the pooler; the steps, and the unseen
    plain, ours = minilm()
    worst = (plain - exact[0]).abs().max()
    rounding = torch.finfo(torch.float32).eps * exact[0].max()
    assert (ours - exact[0]).abs().max() <= 2 * worst + rounding


def test_minilm_learns_with_dropout(fused_calls: Counter[nn.Module]) -> None:
    plain, ours = minilm(dropout=0.1)
    assert not torch.equal(plain, ours)  # masks of their own
    assert ours[-1] < 0.5 * ours[0], ours
    assert len(fused_calls) == 37


def test_minilm_on_nf4_keeps_what_it_learned_when_merged() -> None:
    """Into the dequantised weights; packed again, which is refused, nearly all of it would be lost."""
    from transformers import BertModel

    steps = example("minilm")
    torch.manual_seed(0)
    model = BertModel.from_pretrained(steps.MODEL_DIR, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    lk.inject(lk.quantize(model, "nf4"), lk.LoRAConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    layers = [module for module in model.modules() if isinstance(module, lk.LoRALinear)]
    assert len(layers) == 37

    def unseen() -> torch.Tensor:
        with torch.no_grad():
            return steps.margins(model.eval(), steps.TEST)

    assert (unseen() > 0).double().mean() < 0.1
    optimizer = torch.optim.AdamW(lk.trainable_parameters(model), lr=5e-4)
    for step in range(7):
        margins = steps.margins(model.train(), steps.TRAIN[step % 7 :: 7])
        nn.functional.softplus(-10 * margins).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    learned = unseen()
    assert (learned > 0).all()
    with pytest.raises(ValueError, match=r"packed again .* expected at most"):
        lk.merge(model, requantize=True)
    assert torch.equal(unseen(), learned)
    lk.merge(model)
    merged = unseen()
    assert (merged > 0).all()
    with torch.no_grad():
        exact = steps.margins(copy.deepcopy(model).double(), steps.TEST)
        assert_within_budget(learned, merged, exact, torch.float32)
        for layer in layers:
            layer.weight.copy_(pack(layer.weight, "nf4").dense())
    assert (unseen() > 0).double().mean() < 0.5
