"""A store over packed weights: each row has its own adapter's answer, as over the same weights dequantised."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import lorakernels as lk
from lorakernels.quant.layers import kind_of, read

K = 64


def four_bits(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")._quantize("cpu")
    layer.bias = linear.bias
    return layer


def models(kind: str) -> tuple[nn.Module, nn.Module]:
    """Of packed weights, and of the same as plain ones."""
    torch.manual_seed(0)
    packed = nn.Sequential(nn.Linear(K, 96), nn.Tanh(), nn.Linear(96, 32, bias=False)).requires_grad_(False)
    if kind == "bitsandbytes":
        packed[0], packed[2] = four_bits(packed[0]), four_bits(packed[2])
    else:
        lk.quantize(packed, kind, block=32)
    plain = nn.Sequential(nn.Linear(K, 96), nn.Tanh(), nn.Linear(96, 32, bias=False)).requires_grad_(False)
    for i in (0, 2):
        plain[i].weight.copy_(read(packed[i]).dense())
    plain[0].bias.copy_(packed[0].bias)
    return packed, plain


@pytest.mark.parametrize("kind", ["bitsandbytes", "nf4", "int4", "int8"])
def test_rows_have_their_own_answers(kind: str, tmp_path: Path) -> None:
    packed, plain = models(kind)
    names = ["alice", "bob"]
    for number, name in enumerate(names):
        torch.manual_seed(number)
        trained = copy.deepcopy(plain)
        lk.inject(trained, lk.LoRAConfig(r=4 * (number + 1), target_modules=["0", "2"], init_lora_weights=False))
        lk.save_adapter(trained, tmp_path / name)
    x = torch.randn(5, 3, K)
    rows = ["alice", None, "bob", "alice", "bob"]
    answers = []
    for model in (packed, plain):
        store = lk.AdapterStore(model, max_adapters=4, max_rank=8)
        for name in names:
            store.load(name, tmp_path / name)
        with torch.no_grad(), store.batch(rows):
            answers.append(model(x))
        with torch.no_grad():
            answers.append(model(x))
        assert bool(kind_of(model[0])) == (model is packed)
        store.close()
    for ours, theirs in ((answers[0], answers[2]), (answers[1], answers[3])):  # float32, in another order
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    assert type(packed[0]).__name__ in ("Linear4bit", "QuantizedLinear")
