"""DoRA in PEFT's layers accelerated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from accelerated import (
    IN,
    MIDDLE,
    Disguised,
    Two,
    accelerated_copy,
    assert_equal,
    config,
    double_output,
    peft_model,
    values_and_gradients,
)
from peft import get_peft_model

from lorakernels.integrations import peft_terms
from lorakernels.integrations.peft import accelerate, restore

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_new_dora_adapter_changes_nothing_to_the_bit(dtype: torch.dtype, fused: list[dict[str, Any]]) -> None:
    base = Two().to(dtype)
    x = torch.randn(9, IN, dtype=dtype)
    expected = base(x)
    model = get_peft_model(base, config(use_dora=True))
    accelerate(model)
    assert torch.equal(model(x), expected)
    assert len(fused) == 2


def test_dora_with_dropout_draws_what_peft_draws(x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    plain = peft_model(config(use_dora=True, lora_dropout=0.3))
    model = accelerated_copy(plain)

    def drawn(m: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        return values_and_gradients(m, x)

    assert_equal(drawn(model), drawn(plain))
    assert len(fused) == 2
    for m in (plain, model):  # the layer evaluates and its dropout does not know: PEFT asks the layer
        m.eval()
        m.base_model.model.up.lora_dropout["first"].train()
    assert_equal(drawn(model), drawn(plain))


def test_dora_sees_an_edit_of_the_base_weight(x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    plain = peft_model(config(use_dora=True))
    model = accelerated_copy(plain)
    assert_equal(values_and_gradients(model, x), values_and_gradients(plain, x))
    edits = (
        lambda w: w.mul_(1.5),
        lambda w: setattr(w, "data", w.data * 2),
        lambda w: w.data.mul_(0.7),
        lambda w: w.data[-1].mul_(0.7),
    )
    for edit in edits:
        for m in (plain, model):
            with torch.no_grad():
                edit(m.base_model.model.up.base_layer.weight)
        assert_equal(values_and_gradients(model, x), values_and_gradients(plain, x))
    for m in (plain, model):
        m.merge_adapter()
        m.unmerge_adapter()
    assert_equal(values_and_gradients(model, x), values_and_gradients(plain, x))
    assert len(fused) == 12


def test_a_row_of_zeros_stays_one(x: torch.Tensor, fused: list[dict[str, Any]]) -> None:
    """As in checkpoints that have such rows; PEFT divides 0 by 0 there."""
    base = Two().to(x.dtype)
    with torch.no_grad():
        base.up.weight[1] = 0
    expected = base(x)
    model = get_peft_model(base, config(use_dora=True))
    accelerate(model)
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_dora_sees_what_a_new_adapters_start_did_to_the_base_weight(x: torch.Tensor) -> None:
    """OLoRA's edits it through `.data`, which leaves neither a version nor an address behind."""
    plain = peft_model(config(use_dora=True), dtype=torch.float32)
    fast = accelerated_copy(plain)
    x = x.float()
    before = fast(x)
    for model in (plain, fast):
        torch.manual_seed(0)
        model.add_adapter("other", config(init_lora_weights="olora"))
        model.set_adapter("first")
    torch.testing.assert_close(fast(x), plain(x))
    assert not torch.allclose(fast(x), before)
    restore(fast)
    assert not peft_terms._norms


def test_dora_keeps_nothing_of_the_outputs_size() -> None:
    model = peft_model(config(use_dora=True), dtype=torch.float32).base_model.model.up
    x = torch.randn(512, IN)

    def kept(layer: Any) -> int:
        sizes: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), x)}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x).sum()
        return sum(sizes.values())

    # S and a few vectors; PEFT keeps the base result and the adapter's.
    assert kept(accelerated_copy(model)) < 512 * MIDDLE * 4 < kept(model)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda dora: dora.register_forward_hook(double_output), "or has hooks"),
        (
            lambda dora: setattr(dora, "weight", nn.Parameter(dora.weight.detach().as_subclass(Disguised))),
            "plain tensor",
        ),
    ],
)
def test_dora_that_somebody_changed_runs_pefts_forward(
    spoil: Any, reason: str, x: torch.Tensor, fused: list[dict[str, Any]]
) -> None:
    plain = peft_model(config(use_dora=True)).base_model.model.up
    model = accelerated_copy(plain)
    for layer in (plain, model):
        spoil(layer.lora_magnitude_vector["first"])
    report = accelerate(model)
    assert report.num_accelerated == 0 and reason in report.rows[0].reason
    assert_equal(values_and_gradients(model, x), values_and_gradients(plain, x), tolerance=0)
    assert not fused
