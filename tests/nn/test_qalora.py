"""QA-LoRA: PEFT's formula, its files, and the merge into the zeros of an int4 weight, which is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lorakernels as lk
from lorakernels.files.config_file import config_from_fields, fields_of
from lorakernels.nn.quantized import QuantizedLinear, pack

K, N, L, R = 96, 40, 16, 4


def layer(base: str = "int4", zero: torch.dtype = torch.float32) -> lk.LoRALinear:
    linear: nn.Module = nn.Linear(K, N)
    if base:
        packed = pack(torch.randn(N, K), base, L if base == "int4" else 32)
        linear = QuantizedLinear(packed._replace(zero=packed.zero.to(zero)) if packed.zero is not None else packed)
    made = lk.LoRALinear.from_linear(linear, R, 8, use_qalora=True, qalora_group_size=L)
    nn.init.normal_(made.lora_B["default"].weight)
    return made


def by_pefts_formula(own: lk.LoRALinear, x: torch.Tensor) -> torch.Tensor:
    """peft.tuners.lora.variants.QALoraLinearVariant: the mean of each group times the number of groups, to A."""
    pooled = x.view(*x.shape[:-1], K // L, L).mean(-1) * (K // L)
    A, B = own.lora_A["default"].weight, own.lora_B["default"].weight
    return own.base_layer(x) + (pooled @ A.T) @ B.T * (8 / R)


@pytest.mark.parametrize("base", ["", "int4", "nf4", "int8"])
def test_values_and_gradients(base: str) -> None:
    own = layer(base).double()
    assert own.lora_A["default"].weight.shape == (R, K // L)
    x = torch.randn(3, 5, K, dtype=torch.float64, requires_grad=True)
    wanted = [x, *own.adapter_tensors().values()]
    y, expected = own(x), by_pefts_formula(own, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_merging_into_the_zeros_is_exact() -> None:
    """A hundred layers, merged and back: the bytes stay, the numbers are those of the float32 sum."""
    for seed in range(100):
        torch.manual_seed(seed)
        own = layer().eval()
        base, x = own.base_layer, torch.randn(4, K)
        y, delta, dense = own(x), own.delta_weight(), base.packed.dense()
        own.merge()
        merged = own.base_layer
        assert isinstance(merged, QuantizedLinear) and torch.equal(merged.weight, base.weight)
        assert (merged.packed.dense() - (dense + delta)).norm() <= 1e-6 * dense.norm()
        assert (own(x) - y).norm() <= 1e-6 * y.norm()
        own.unmerge()
        assert own.base_layer is base and torch.equal(own(x), y)


@pytest.mark.parametrize("base", ["", "nf4", "int8"])
def test_elsewhere_it_merges_into_a_plain_weight(base: str) -> None:
    own, x = layer(base).eval(), torch.randn(4, K)
    y = own(x)
    own.merge()
    assert type(own.base_layer) is nn.Linear
    assert (own(x) - y).norm() <= 1e-6 * y.norm()  # float32: the sum is rounded once, to 6e-8


def test_the_file_is_pefts(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(K, N))
    config = lk.LoRAConfig(r=R, target_modules=["0"], use_qalora=True, qalora_group_size=L, init_lora_weights=False)
    lk.inject(model, config)
    lk.save_adapter(model, tmp_path)
    theirs = peft.LoraConfig.from_pretrained(tmp_path)
    assert theirs.use_qalora and theirs.qalora_group_size == L
    other = lk.load_adapter(nn.Sequential(nn.Linear(K, N)), tmp_path)
    own, loaded = (next(m for m in each.modules() if isinstance(m, lk.LoRALinear)) for each in (model, other))
    for name, parameter in own.adapter_tensors().items():
        assert torch.equal(loaded.adapter_tensors()[name], parameter)
    assert own.lora_A["default"].weight.shape == (R, K // L)
    assert config_from_fields(fields_of(config), "a file").pooled == L


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qalora_group_size": 7}, "expected a divisor of the layer's 96"),
        ({"qalora_group_size": 0}, "qalora_group_size is 0"),
        ({"use_dora": True}, "expected no DoRA"),
        ({"init_lora_weights": "pissa"}, "does not read the base weight"),
    ],
    ids=str,
)
def test_what_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lk.LoRALinear.from_linear(nn.Linear(K, N), **{"r": R, "use_qalora": True, **fields})
    with pytest.raises(ValueError, match="linear layers"):
        lk.LoRAEmbedding.from_base(nn.Embedding(10, 8), r=2, use_qalora=True)
