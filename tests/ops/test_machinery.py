"""What torch does around the layer that a plain linear layer takes without a word."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import lorakernels as lk
from lorakernels.ops import linear as ops_linear


@pytest.fixture(autouse=True, params=[0, ops_linear.SMALL], ids=["operator", "small"])
def _both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_linear, "SMALL", request.param)


def layer(**fields: object) -> lk.LoRALinear:
    torch.manual_seed(0)
    made = lk.LoRALinear(8, 6, r=2, **fields)  # type: ignore[arg-type]
    nn.init.normal_(made.lora_B["default"].weight)
    return made


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 0, 8)])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.1}], ids=str)
@pytest.mark.parametrize("scaling", [8.0, 0.0])
def test_the_output_may_be_edited_in_place(
    shape: tuple[int, ...], grad: bool, fields: dict[str, object], scaling: float
) -> None:
    def run(*then: nn.Module) -> torch.Tensor:
        made = layer(**fields)
        made.scaling = scaling
        torch.manual_seed(1)
        return nn.Sequential(made, *then)(x)

    x = torch.randn(shape)
    with torch.set_grad_enabled(grad):
        expected = run() * 1
        assert torch.equal(run(nn.ReLU(inplace=True)), expected.relu())
        run().detach_()
        added = run()
    added += torch.ones(6, requires_grad=True)
    torch.testing.assert_close(added, expected + 1)


@pytest.mark.parametrize("member", [0, 1])
def test_the_outputs_of_a_group_may_be_edited_in_place(member: int) -> None:
    x, weight, bias = torch.randn(2, 3, 8, requires_grad=True), torch.randn(6, 8), torch.randn(6)
    A, B = torch.randn(2, 8, requires_grad=True), torch.randn(6, 2)
    ys = lk.lora_linear_group(x, [weight] * 2, [A] * 2, [B] * 2, biases=[bias] * 2, scalings=[1.0, 0.0])
    ys[member] += 1
    ys[member].sum().backward()


def test_forward_mode_raises_and_gives_no_wrong_tangent() -> None:
    weight, A, B = torch.randn(256, 256), torch.randn(4, 256), torch.randn(256, 4)
    x = torch.randn(512, 256)
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        lk.lora_linear(forward_ad.make_dual(x, torch.ones_like(x)), weight, A, B)


def test_jit_trace_of_the_kernels(device: str) -> None:
    x, weight, A, B = (torch.randn(size, device=device) for size in ((5, 8), (6, 8), (2, 8), (6, 2)))
    traced = torch.jit.trace(lambda x: lk.lora_linear(x, weight, A, B, impl="triton"), x)
    torch.testing.assert_close(traced(x), lk.lora_linear(x, weight, A, B))


def test_probing_for_a_module_does_not_spend_the_hook() -> None:
    script = (
        "import importlib.util, torch, lorakernels as lk\n"
        "x, w, a, b = torch.randn(3, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)\n"
        "lk.lora_linear(x, w, a, b)\n"
        "importlib.util.find_spec('torch.utils.flop_counter')\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    lk.lora_linear(x, w, a, b)\n"
        "print(counter.get_total_flops())\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) == 2 * 3 * (6 * 8 + 2 * (6 + 8))
    assert importlib.util.find_spec("torch.utils.flop_counter") is not None


def test_dora_after_a_step_past_the_version_counter() -> None:
    made = layer(use_dora=True)
    x = torch.randn(5, 8)
    with torch.no_grad():
        made.eval()(x)
    made(x).sum().backward()  # a step in evaluation mode, of an optimizer that edits `.data`
    made.lora_A["default"].weight.data.add_(1.0)
    with torch.no_grad():
        found = made(x)
    merged = layer(use_dora=True)
    merged.load_state_dict(made.state_dict())
    torch.testing.assert_close(found, merged(x).detach())


def test_dora_with_parameters_that_are_swapped() -> None:
    made = layer(use_dora=True).eval()
    x = torch.randn(5, 8)
    with torch.no_grad():
        expected = made(x)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        made.double()
        made.load_state_dict(made.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    torch.testing.assert_close(made(x.double()).float().detach(), expected)


def test_loading_into_a_merged_layer_is_refused() -> None:
    made = layer()
    state = {name: value.clone() for name, value in made.state_dict().items()}
    made.merge()
    with pytest.raises(RuntimeError, match=r"unmerge\(\) first"):
        made.load_state_dict(state)
