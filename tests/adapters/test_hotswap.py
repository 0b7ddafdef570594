"""One adapter in the place of another: same parameters, no new compilation, everything or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakernels as lk
from lorakernels.nn.layer import LoRALayer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.tensor([[1, 4, 0, 9], [3, 2, 7, 5]])
TARGETS = ["embed", "conv", "grouped", "q_proj", "v_proj"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(10, 8), nn.Conv2d(1, 6, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.q_proj, self.v_proj, self.head = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.grouped(x.transpose(1, 2)).transpose(1, 2) + self.conv(x[:, None]).mean(1)
        return self.head(self.v_proj(torch.tanh(self.q_proj(x))))


def net() -> Any:
    torch.manual_seed(5)
    return Net().double().eval()


def folder_of(folder: Path, seed: int, **fields: Any) -> Path:
    """The files of an adapter with random weights."""
    model = lk.inject(net(), lk.LoRAConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **fields}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lk.trainable_parameters(model):
            parameter += torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3
    return lk.save_adapter(model, folder)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def state(model: nn.Module) -> dict[str, Any]:
    tensors = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALayer)}
    return tensors | {name: {n: float(s.scaling) for n, s in layer.adapters.items()} for name, layer in layers.items()}


def is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        a == b if isinstance(a, dict) else a[0] == b[0] and torch.equal(a[1], b[1])
        for a, b in zip(one.values(), other.values(), strict=True)
    )


SWAPS: dict[str, dict[str, Any]] = {
    "another": {},
    "smaller": dict(r=2),
    "other alpha": dict(lora_alpha=1.5, alpha_pattern={"conv": 9}),
    "rslora": dict(use_rslora=True),
    "patterns": dict(rank_pattern={"embed": 1, "v_proj": 3}),
    "fewer layers": dict(target_modules=["q_proj", "grouped"]),
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": dict(use_dora=True, target_modules=["embed", "conv", "q_proj", "v_proj"]),
    "lora_bias": dict(lora_bias=True, target_modules=["conv", "grouped", "q_proj", "v_proj"]),
    "modules_to_save": dict(modules_to_save=["head"]),
}


def swap_fields(kind: str, swap: str) -> dict[str, Any]:
    fields = {**KINDS[kind], **SWAPS[swap]}
    return {
        **fields,
        "target_modules": [t for t in fields.get("target_modules", TARGETS) if kind != "DoRA" or t != "grouped"],
    }


@pytest.mark.filterwarnings("ignore:rank_pattern.'embed':UserWarning")  # not among the targets of every kind
@pytest.mark.parametrize("prepared", [None, 4, 8], ids=["as it is", "same rank", "padded"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("swap", SWAPS)
def test_swaps(kind: str, swap: str, prepared: int | None, tmp_path: Path) -> None:
    first = folder_of(tmp_path / "first", 1, **KINDS[kind])
    second = folder_of(tmp_path / "second", 2, **swap_fields(kind, swap))
    model = lk.load_adapter(net(), first, "slot")
    expected = model(IDS)
    if prepared:
        assert lk.prepare_for_hotswap(model, prepared, "slot") is model
        assert_close(model(IDS), expected)
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for number, folder in enumerate((second, first, second)):
        assert lk.hotswap_adapter(model, folder, "slot") is model
        assert_close(model(IDS), lk.load_adapter(net(), folder)(IDS))
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == places
        lk.set_scale(model, "slot", 0.5)
        lk.set_scale(model, "slot", 1)
        again = lk.save_adapter(model, tmp_path / str(number), "slot")
        ours, original = (load_file(path / WEIGHTS) for path in (again, folder))
        assert ours.keys() == original.keys() and all(torch.equal(ours[key], original[key]) for key in ours)
        assert_close(lk.load_adapter(net(), again)(IDS), model(IDS))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], TARGETS], ids=["linear", "all kinds"])
def test_a_compiled_model_is_compiled_once(targets: list[str], tmp_path: Path) -> None:
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compilations.append(graph)
        return graph.forward

    folders = [
        folder_of(tmp_path / str(r), r, r=r, lora_alpha=alpha, target_modules=targets)
        for r, alpha in ((4, 6), (2, 5), (8, 1.5))
    ]
    model = lk.prepare_for_hotswap(lk.load_adapter(net(), folders[0]), 8)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(IDS)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for folder in [*folders, folders[0]]:
                lk.hotswap_adapter(compiled, folder)
                assert_close(compiled(IDS), lk.load_adapter(net(), folder)(IDS))
            lk.set_scale(model, "default", 0.25)
            assert_close(compiled(IDS), model(IDS))
        lk.save_adapter(compiled, tmp_path / "again")
    assert len(compilations) == 1
    ours, original = (load_file(path / WEIGHTS) for path in (tmp_path / "again", folders[0]))
    assert all(torch.equal(ours[key], original[key]) for key in original)


def edit(**fields: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return apply


def nan_in_the_last(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[sorted(tensors)[-1]].fill_(float("nan"))
    save_file(tensors, folder / WEIGHTS)


FAULTS: list[tuple[dict[str, Any], Callable[[Path], None], str]] = [
    (dict(r=6), edit(), "rank 6 in the file, and adapter 'default' has room for 4; prepare_for_hotswap"),
    (dict(rank_pattern={"v_proj": 6}), edit(), "v_proj has rank 6 in the file"),
    (dict(target_modules=["q_proj", "head"]), edit(), "the file has 'head', where adapter 'default' is not"),
    (dict(use_dora=True, target_modules=["q_proj"]), edit(), "use_dora=True and adapter 'default' False"),
    (dict(lora_bias=True, target_modules=["q_proj"]), edit(), "lora_bias=True and adapter 'default' False"),
    (dict(bias="lora_only"), edit(), "bias='lora_only'"),
    (dict(modules_to_save=["head"]), edit(), r"modules_to_save=\['head'\] and adapter 'default' \[\]"),
    ({}, nan_in_the_last, "holds NaN or Inf"),
    ({}, edit(r=3), "says r=3"),
    ({}, edit(use_magic=True), "use_magic"),
    ({}, lambda folder: (folder / WEIGHTS).write_bytes(b"") and None, "not a whole safetensors file"),
]


@pytest.mark.parametrize("prepared", [False, True], ids=["as it is", "prepared"])
@pytest.mark.parametrize(("fields", "spoil", "message"), FAULTS, ids=[message for *_, message in FAULTS])
def test_a_bad_file_leaves_the_slot_as_it_was(
    fields: dict[str, Any], spoil: Callable[[Path], None], message: str, prepared: bool, tmp_path: Path
) -> None:
    model = lk.load_adapter(net(), folder_of(tmp_path / "first", 1))
    if prepared:
        lk.prepare_for_hotswap(model, 4)
    before, answer = state(model), model(IDS)
    bad = folder_of(tmp_path / "bad", 2, **fields)
    spoil(bad)
    with pytest.raises(lk.AdapterFileError, match=message):
        lk.hotswap_adapter(model, bad)
    assert is_same(state(model), before) and torch.equal(model(IDS), answer)


def test_numbers_that_the_slot_would_round_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "wide", 1)
    narrow = lk.inject(net().float(), lk.LoRAConfig(r=4, target_modules=TARGETS))
    with pytest.raises(lk.AdapterFileError, match=r"is torch\.float64, which the slot's torch\.float32 would round"):
        lk.hotswap_adapter(narrow, folder)


def test_what_cannot_be_prepared_or_swapped(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 1)
    model = lk.load_adapter(net(), folder)
    before = state(model)
    with pytest.raises(KeyError, match="no adapter 'other'"):
        lk.hotswap_adapter(model, folder, "other")
    with pytest.raises(KeyError, match="no adapter 'other'"):
        lk.prepare_for_hotswap(model, 8, "other")
    with pytest.raises(ValueError, match="has rank 4, more than max_rank=2"):
        lk.prepare_for_hotswap(model, 2)
    with pytest.raises(ValueError, match="groups=2; expected r to be a multiple"):
        lk.prepare_for_hotswap(model, 7)
    with pytest.raises(ValueError, match="max_rank is 0"):
        lk.prepare_for_hotswap(model, 0)
    assert is_same(state(model), before)
    lk.prepare_for_hotswap(model, 8)
    with pytest.raises(lk.AdapterFileError, match="use hotswap_adapter"):
        lk.load_adapter(model, folder)
    model.v_proj.merge()
    with pytest.raises(RuntimeError, match="call unmerge first"):
        lk.hotswap_adapter(model, folder)
    model.v_proj.unmerge()
    lk.load_adapter(model, folder, "other")
    lk.delete_adapter(model, "default")
    assert_close(model(IDS), lk.load_adapter(net(), folder)(IDS))


def test_a_kept_norm_follows_the_scaling(tmp_path: Path) -> None:
    model = lk.load_adapter(net(), folder_of(tmp_path, 1, **KINDS["DoRA"]))
    lk.prepare_for_hotswap(model, 4)
    with torch.no_grad():
        model(IDS)
        lk.set_scale(model, "default", 3)
        kept = model(IDS)
    assert_close(kept, model(IDS))


def test_what_is_merged_is_not_the_slots_scaling(tmp_path: Path) -> None:
    model = lk.prepare_for_hotswap(lk.load_adapter(net(), folder_of(tmp_path, 1)), 8)
    model.grouped.set_adapter([])  # no grouped weight does what its adapter does
    weight = model.v_proj.weight.clone()
    lk.merge(model)
    model.v_proj.adapters["default"].scaling.fill_(9)
    lk.unmerge(model)
    assert_close(model.v_proj.weight, weight)


@pytest.mark.parametrize("renewed", [True, False])
def test_moments_of_the_adapter_before(renewed: bool, tmp_path: Path) -> None:
    """They move the ranks that the new adapter does not have, which its files would lose."""
    model = lk.load_adapter(net(), folder_of(tmp_path / "first", 1), trainable=True)
    optimizer = torch.optim.AdamW(lk.trainable_parameters(model))
    for step in range(2):
        if step == 1:
            lk.hotswap_adapter(model, folder_of(tmp_path / "second", 2, r=2))
            optimizer = torch.optim.AdamW(lk.trainable_parameters(model)) if renewed else optimizer
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()
    if renewed:
        again = lk.load_adapter(net(), lk.save_adapter(model, tmp_path / "trained"))
        assert_close(again(IDS), model(IDS))
    else:
        for call in (
            lambda: lk.save_adapter(model, tmp_path / "trained"),
            lambda: lk.add_weighted_adapter(model, ["default"], [1.0], "again", "cat"),
        ):
            with pytest.raises(RuntimeError, match=r"trained past rank 2, .*; make a new optimizer after a hot swap"):
                call()
        assert not (tmp_path / "trained").exists()
