"""Weighted sums of adapters, against PEFT's and against the sum of the updates."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorakernels as lk
from lorakernels.nn.layer import LoRALayer

peft = pytest.importorskip("peft")
IDS = torch.tensor([[1, 4, 0, 9], [3, 2, 7, 5]])
# PEFT rounds the weights to float32, so those of the parity test times the scalings have exact roots.
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": dict(r=4, lora_alpha=4, target_modules=["embed", "conv", "q_proj"]),
    "two": dict(r=4, lora_alpha=16, target_modules=["embed", "conv", "q_proj", "v_proj"]),
    "three": dict(r=2, lora_alpha=2, target_modules=["conv", "q_proj"]),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(10, 8), nn.Conv2d(1, 6, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 1, groups=2)
        self.q_proj, self.v_proj = nn.Linear(8, 12), nn.Linear(12, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.grouped(x.transpose(1, 2)).transpose(1, 2) + self.conv(x[:, None]).mean(1)
        return self.v_proj(torch.tanh(self.q_proj(x)))


def net() -> Any:
    torch.manual_seed(5)
    return Net().double().eval()


def pair(tmp_path: Path, **fields: Any) -> tuple[Any, Any]:
    """The same adapters in a model of ours and in PEFT's."""
    ours, theirs = net(), None
    for number, (name, config) in enumerate(ADAPTERS.items()):
        model = lk.inject(net(), lk.LoRAConfig(**config, **fields))
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in lk.trainable_parameters(model):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        folder = lk.save_adapter(model, tmp_path / name)
        lk.load_adapter(ours, folder, name)
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(net(), folder, name)
        else:
            theirs.load_adapter(folder, name)
    return ours, theirs


def deltas(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALayer)}
    return {path: layer.delta_weight(name) for path, layer in layers.items() if name in layer.adapters}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("combination_type", "names", "weights", "svd_rank"),
    [
        ("linear", ["one", "two"], [0.25, 1.0], None),
        ("linear", ["one", "two"], [4.0, -0.25], None),
        ("linear", ["one"], [0.25], None),
        ("linear", ["two", "two"], [1.0, 0.0], None),
        ("cat", ["one", "two"], [0.5, 1.0], None),
        ("cat", ["one", "two", "three"], [0.5, -1.0, 2.0], None),
        ("svd", ["one", "two"], [0.5, 1.0], None),
        ("svd", ["one", "two", "three"], [0.5, -1.0, 2.0], None),
        ("svd", ["one", "two"], [0.5, 1.0], 2),
    ],
)
def test_the_updates_are_pefts(
    combination_type: str, names: list[str], weights: list[float], svd_rank: int | None, tmp_path: Path
) -> None:
    ours, theirs = pair(tmp_path)
    assert lk.add_weighted_adapter(ours, names, weights, "sum", combination_type, svd_rank) is ours
    theirs.add_weighted_adapter(names, weights, "sum", combination_type=combination_type, svd_rank=svd_rank)
    found = deltas(ours, "sum")
    for path, delta in found.items():
        assert_close(delta, theirs.base_model.model.get_submodule(path).get_delta_weight("sum"))
    assert found.keys() == {path for name in names for path in deltas(ours, name)}
    lk.set_adapter(ours, "sum")
    theirs.set_adapter("sum")
    assert_close(ours(IDS), theirs(IDS))


@pytest.mark.parametrize("of_updates", [False, True], ids=["factors", "svd"])
@pytest.mark.parametrize("density", [0.3, 0.7, 1])
@pytest.mark.parametrize(
    ("method", "signs"),
    [
        ("ties", "total"),
        ("ties", "frequency"),
        ("dare_ties", "total"),
        ("dare_ties", "frequency"),
        ("dare_linear", "total"),
        ("magnitude_prune", "total"),
    ],
)
@pytest.mark.filterwarnings("ignore:The density 1 is greater")
def test_what_leaves_numbers_out_is_pefts(
    method: str, density: float, signs: Any, of_updates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair(tmp_path)
    names, weights = (["one", "two", "three"], [0.5, -1.0, 2.0]) if of_updates else (["one", "two"], [4.0, -0.25])
    arguments: dict[str, Any] = {"combination_type": f"{method}_svd" if of_updates else method, "density": density}
    for model in (ours, theirs):
        calls = itertools.count()  # PEFT draws for the new adapter's start in between

        def drawn(shares: torch.Tensor, calls: Iterator[int] = calls) -> torch.Tensor:
            numbers = torch.rand(shares.shape, generator=torch.Generator().manual_seed(next(calls)))
            return (numbers < shares).to(shares.dtype)

        monkeypatch.setattr(torch, "bernoulli", drawn)
        add = theirs.add_weighted_adapter if model is theirs else partial(lk.add_weighted_adapter, ours)
        add(names, weights, "sum", **arguments, majority_sign_method=signs)
    for path, delta in deltas(ours, "sum").items():
        assert_close(delta, theirs.base_model.model.get_submodule(path).get_delta_weight("sum"))


@pytest.mark.parametrize(("combination_type", "svd_rank"), [("cat", None), ("svd", 12)])
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}])
def test_the_sum_is_exact_for_any_weights(
    combination_type: str, svd_rank: int | None, fields: dict[str, Any], tmp_path: Path
) -> None:
    ours, _ = pair(tmp_path, **fields)
    lk.set_scale(ours, "two", 0.3)
    weights = {"one": 0.7, "two": -1.3, "three": 0.1}
    lk.add_weighted_adapter(ours, list(weights), list(weights.values()), "sum", combination_type, svd_rank)
    for path, delta in deltas(ours, "sum").items():
        parts = {name: deltas(ours, name).get(path) for name in weights}
        assert_close(delta, sum(part * weights[name] for name, part in parts.items() if part is not None))


def test_the_new_adapter_is_off_and_frozen_and_goes_into_files(tmp_path: Path) -> None:
    ours, _ = pair(tmp_path)
    for active in ("three", []):
        lk.set_adapter(ours, active)
        answer = ours(IDS)
        trained = {name for name, p in ours.named_parameters() if p.requires_grad}
        name = f"sum-{len(active)}"
        lk.add_weighted_adapter(ours, ["one", "three"], [0.5, 2.0], name, "cat")
        assert torch.equal(ours(IDS), answer)
        assert {name for name, p in ours.named_parameters() if p.requires_grad} == trained
    lk.set_adapter(ours, name)
    folder = lk.save_adapter(ours, tmp_path / "sum", name)
    assert torch.equal(lk.load_adapter(net(), folder)(IDS), ours(IDS))
    assert_close(peft.PeftModel.from_pretrained(net(), folder)(IDS), ours(IDS))
    assert (
        ours.q_proj.adapters[name].r == 6
        and ours.embed.adapters[name].r == 4
        and ours.embed.adapters[name].scaling == 1
    )


@pytest.mark.parametrize("fields", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}], ids=str)
def test_one_adapter_alone_stays_what_it_is(fields: dict[str, Any], tmp_path: Path) -> None:
    """With every type, and its file is PEFT's too, whose own of these are wrong or cannot be read back."""
    ours, _ = pair(tmp_path, **fields)
    for kind in ("linear", "cat", "svd", "ties", "magnitude_prune_svd"):
        density = None if kind in ("linear", "cat", "svd") else 1.0
        lk.add_weighted_adapter(ours, ["two"], [1.0], kind, kind, density=density)
        for path, delta in deltas(ours, kind).items():
            assert_close(delta, deltas(ours, "two")[path])
        lk.set_adapter(ours, kind)
        folder = lk.save_adapter(ours, tmp_path / kind, kind)
        assert_close(peft.PeftModel.from_pretrained(net(), folder)(IDS), ours(IDS))


def test_a_grouped_convolution_is_added_group_by_group() -> None:
    model = net()
    for name, r in (("one", 4), ("two", 2)):
        config = lk.LoRAConfig(r=r, target_modules=["grouped"], init_lora_weights=False)
        lk.inject(model, config, name)
    lk.add_weighted_adapter(model, ["one", "two"], [0.5, -2.0], "sum", "cat")
    x, outputs = torch.randn(2, 8, 5, dtype=torch.float64), {}
    for name in ("one", "two", "sum"):
        lk.set_adapter(model, name)
        outputs[name] = model.grouped(x) - model.grouped.base_layer(x)
    assert_close(outputs["sum"], 0.5 * outputs["one"] - 2.0 * outputs["two"])
    with pytest.raises(ValueError, match="grouped: the base convolution has groups=2"):
        lk.add_weighted_adapter(model, ["one", "two"], [1.0, 1.0], "other", "svd")


Arguments = dict[str, Any]
CASES: list[tuple[Arguments, type[Exception], str]] = [
    (
        dict(adapters=["one", "three"], combination_type="linear"),
        ValueError,
        r"conv: the ranks are .* expect one rank",
    ),
    (dict(adapters=["one", "nine"]), KeyError, "no adapter 'nine'; its adapters"),
    (dict(adapter_name="one"), ValueError, "'one' is taken"),
    (dict(adapter_name="a.b"), ValueError, "adapter name 'a.b'"),
    (dict(combination_type="tie"), ValueError, r"'tie'; expected one of \['svd', 'cat', 'linear', 'ties'"),
    (dict(combination_type="ties"), ValueError, r"density is None; combination_type='ties' expects a number in"),
    (dict(combination_type="dare_ties_svd", density=1.5), ValueError, "density is 1.5"),
    (dict(combination_type="cat", density=0.5), ValueError, "density=0.5 goes with"),
    (
        dict(combination_type="linear", majority_sign_method="frequency"),
        ValueError,
        "goes with a combination_type of ties",
    ),
    (dict(combination_type="ties", density=0.5, majority_sign_method="most"), ValueError, "is 'most'; expected"),
    (dict(weights=[1.0]), ValueError, "expected a weight for each"),
    (dict(adapters=[], weights=[]), ValueError, "expected a weight for each"),
    (dict(weights=[1.0, float("nan")]), ValueError, "a weight is nan"),
    (dict(weights=[1.0, "2"]), TypeError, "a weight is '2'"),
    (dict(svd_rank=0), ValueError, "svd_rank is 0"),
    (dict(svd_rank=3, combination_type="cat"), ValueError, "svd_rank=3 goes with"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), CASES)
def test_what_cannot_be_combined_changes_nothing(
    arguments: Arguments, error: type[Exception], message: str, tmp_path: Path
) -> None:
    ours, _ = pair(tmp_path)
    names = set(ours.state_dict())
    with pytest.raises(error, match=message):
        lk.add_weighted_adapter(
            ours, **{"adapters": ["one", "two"], "weights": [1.0, 2.0], "adapter_name": "sum", **arguments}
        )
    assert set(ours.state_dict()) == names


@pytest.mark.parametrize(
    "fields", [dict(use_dora=True), dict(lora_bias=True), dict(bias="lora_only"), dict(modules_to_save=["v_proj"])]
)
def test_kinds_that_have_no_weighted_sum(fields: dict[str, Any]) -> None:
    model = lk.inject(net(), lk.LoRAConfig(r=4, target_modules=["q_proj"], **fields))
    with pytest.raises(ValueError, match=f"'default' has {next(iter(fields))}=.*no weighted sum"):
        lk.add_weighted_adapter(model, ["default"], [1.0], "sum")


def test_merged_adapters_are_not_combined(tmp_path: Path) -> None:
    ours, _ = pair(tmp_path)
    lk.merge(ours, "one")
    with pytest.raises(RuntimeError, match="call unmerge first"):
        lk.add_weighted_adapter(ours, ["one", "two"], [1.0, 1.0], "sum")
