"""Merging into packed weights: nothing is lost unless asked for, and then it is said; the bytes come back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakernels as lk
from lorakernels.nn.quantized import FORMATS


def model(kind: str, size: float) -> nn.Module:
    torch.manual_seed(0)
    net = lk.quantize(nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)), kind, block=32)
    lk.inject(net, lk.LoRAConfig(r=8, target_modules=["0", "2"], init_lora_weights=False))
    for layer in (net[0], net[2]):
        layer.lora_B["default"].weight.data *= size
    return net.eval()


@pytest.mark.parametrize("kind", FORMATS)
def test_ten_cycles_give_the_bytes_back(kind: str) -> None:
    net, x = model(kind, 1.0), torch.randn(5, 64)
    before, y = {name: tensor.clone() for name, tensor in net.state_dict().items()}, net(x)
    for _ in range(10):
        lk.merge(net)
        assert (net(x) - y).norm() <= 1e-6 * y.norm()  # float32: the sum is rounded once, to 6e-8
        lk.unmerge(net)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(net(x), y)


@pytest.mark.parametrize("kind", FORMATS)
def test_packing_again_is_refused_where_little_would_survive(kind: str) -> None:
    net, x = model(kind, 1e-4), torch.randn(5, 64)
    y = net(x)
    with pytest.raises(ValueError, match=r"expected at most 0\.5: merge without requantize"):
        lk.merge(net, requantize=True)
    assert torch.equal(net(x), y) and not net[0].merged


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_packing_again_says_what_it_loses(kind: str) -> None:
    net, x = model(kind, 3.0), torch.randn(5, 64)
    y, base = net(x), net[0].base_layer
    with pytest.warns(UserWarning, match=r"packing again loses up to 0\.0"):
        lk.merge(net, requantize=True)
    assert net[0].base_layer.packed.form == base.packed.form
    assert (net(x) - y).norm() <= 0.1 * y.norm()
    lk.unmerge(net)
    assert net[0].base_layer is base and torch.equal(net(x), y)
