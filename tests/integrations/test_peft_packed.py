"""PEFT's layers over bitsandbytes' 4 bits, accelerated: PEFT's numbers, and never bitsandbytes' own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorakernels as lk
from lorakernels.quant.layers import read

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")

WIDTH = 64


def four_bits(in_features: int, out_features: int, nested: bool, dtype: torch.dtype) -> nn.Module:
    layer = bnb.nn.Linear4bit(in_features, out_features, quant_type="nf4", compute_dtype=dtype)
    weight = torch.randn(out_features, in_features, dtype=dtype) / in_features**0.5
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=nested)
    layer.weight = layer.weight._quantize("cpu")
    return layer


class Attention(nn.Module):
    """Projections of one x, and one after them."""

    def __init__(self, nested: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (four_bits(WIDTH, WIDTH, nested, dtype) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(x) * torch.sigmoid(self.k_proj(x)) + self.v_proj(x))


def models(nested: bool = True, dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[nn.Module, nn.Module]:
    """PEFT's model twice, with the same numbers; the second accelerated."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **fields)
        made.append(peft.get_peft_model(Attention(nested, dtype), config))
    report = lk.accelerate(made[1])
    assert report.num_accelerated == report.num_layers == 4
    return made[0], made[1]


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_values_and_gradients(nested: bool, fields: dict[str, Any]) -> None:
    theirs, ours = models(nested, **fields)
    x = torch.randn(2, 5, WIDTH)
    results = []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        results.append([y, leaf.grad, *[p.grad for p in model.parameters() if p.grad is not None]])
    assert len(results[0]) == len(results[1]) > 8
    for expected, found in zip(*results, strict=True):
        # bitsandbytes has no float64. float32 sums of 64 in another order, through two layers: 2e-6.
        assert (found - expected).norm() <= 2e-6 * expected.norm()


def test_training_after_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward in evaluation on a CPU packs the weight again, and gradients are lost: it is never called."""
    _, ours = models()
    x = torch.randn(3, WIDTH, requires_grad=True)
    ours(x).sum().backward()
    expected, x.grad = x.grad, None
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda *args: pytest.fail("bitsandbytes' forward was called"))
    with torch.no_grad():
        ours.eval()(x)
    ours.train()(x).sum().backward()
    assert torch.equal(x.grad, expected)


def test_training_through_layers_without_an_adapter() -> None:
    """They run bitsandbytes' forward, in evaluation too, and keep their weights as they were packed."""
    model = peft.get_peft_model(Attention(True, torch.float32), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    lk.accelerate(model)
    x, found = torch.randn(3, WIDTH, requires_grad=True), []
    for _ in range(2):
        model.train()(x).sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
        x.grad = None
        model.zero_grad()
        with torch.no_grad():
            model.eval()(x.detach())
    assert len(found[0]) == 3 and all(map(torch.equal, *found))


def test_a_weight_that_was_packed_again_is_left_alone() -> None:
    theirs, _ = models()
    theirs.base_model.model.q_proj.base_layer.weight.quant_state.packing_format_for_cpu = True
    report = lk.accelerate(theirs)
    (row,) = report.not_accelerated
    assert row.name.endswith("q_proj") and "packed again by bitsandbytes" in row.reason


def test_restore_gives_pefts_own_class() -> None:
    theirs, ours = models()
    lk.restore(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize(
    "names", [["default", "b", "__base__", "b"], ["__base__"] * 4, ["b"] * 4], ids=["mixed", "base", "one"]
)
def test_mixed_batches(names: list[str], grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own fail over bitsandbytes, in place on a view, where a gradient is kept: beside PEFT on plain weights."""
    made = models()
    for model in made:
        torch.manual_seed(1)
        model.add_adapter("b", peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        model.base_model.model.q_proj.base_layer.bias = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
    plain, ours = made
    for name, module in list(plain.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            dense = nn.Linear(WIDTH, WIDTH, bias=module.bias is not None)
            dense.weight = nn.Parameter(read(module).dense(), requires_grad=False)
            dense.bias = module.bias
            plain.set_submodule(name, dense)
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda *args: pytest.fail("bitsandbytes' forward was called"))
    x = torch.randn(4, 5, WIDTH)
    for model in made:
        model.eval()
    for _ in range(2):
        with torch.set_grad_enabled(grad):
            expected, found = plain(x, adapter_names=names), ours(x, adapter_names=names)
        assert (found - expected).norm() <= 2e-6 * expected.norm()


def test_a_mixed_batch_over_a_weight_of_another_kind_is_pefts() -> None:
    """A tensor subclass in a plain linear layer, as DTensor is."""

    class Other(nn.Parameter):
        pass

    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(target_modules=["0"], r=2)).eval()
    layer = model.base_model.model[0]
    layer.base_layer.weight = Other(layer.base_layer.weight.detach(), requires_grad=False)
    x, names = torch.randn(2, 8), ["default", "__base__"]
    expected = model(x, adapter_names=names)
    lk.accelerate(model)
    assert torch.equal(model(x, adapter_names=names), expected)


def test_mixed_batches_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from lorakernels.kernels.launch import record_launches

    monkeypatch.setenv("LORAKERNELS_IMPL", "triton")
    _, model = models()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model.eval()
    x, names, found = torch.randn(3, 2, WIDTH), ["default", "__base__", "other"], []
    for group, expected in ((None, 2 * 2), (False, 2 * 4)):
        lk.accelerate(model, group=group)
        with torch.no_grad(), record_launches() as launches:
            model(x, adapter_names=names)
        assert sum(launch.kernel.__name__.startswith("multi_") for launch in launches) == expected
        with torch.no_grad():
            found.append(model(x, adapter_names=names))
    assert torch.equal(*found)
