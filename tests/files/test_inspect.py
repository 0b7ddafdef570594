"""What `inspect` says of an adapter: the singular values of its updates, the table and the plot."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import lorakernels as lk
from lorakernels.cli import main
from lorakernels.files.inspect import (
    effective_rank,
    group_name,
    inspect_adapter,
    plot_spectra,
    print_report,
    singular_values,
)
from lorakernels.files.update import LINEAR, Update


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def write_kohya(path: Path, zero: bool = False) -> Path:
    """More kinds of module than there are colours, of ranks that differ."""
    torch.manual_seed(1)
    tensors = {}
    for layer in (0, 1):
        for kind in range(10):
            name = f"lora_unet_blocks_{layer}_to_{chr(ord('a') + kind)}"
            tensors[f"{name}.lora_down.weight"] = randn(1 + kind % 3, 6)
            tensors[f"{name}.lora_up.weight"] = randn(8, 1 + kind % 3) * (not zero)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize(("r", "K", "N"), [(3, 12, 9), (1, 5, 7), (8, 4, 6), (4, 16, 2)])
def test_singular_values_are_those_of_the_product(r: int, K: int, N: int, kernel: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    A, B = randn(r, K, *kernel), randn(N, r, *[1] * len(kernel))
    update = Update(dict(zip(LINEAR, (A, B), strict=True)), alpha=-3.0, scaling=-3.0 / r)
    delta = update.scaling * torch.einsum("nr,rk->nk", B.flatten(1), A.flatten(1))
    expected = torch.linalg.svdvals(delta)
    values = singular_values(update)
    assert (values[: len(expected)] - expected[: len(values)]).abs().max() < 1e-10
    assert abs(values.norm() - delta.norm()) < 1e-10
    p = expected[expected > 1e-12] / expected.sum()
    assert abs(effective_rank(values) - (-(p * p.log()).sum()).exp()) < 1e-10


def test_singular_values_with_groups(tmp_path: Path) -> None:
    """The product's, from the layer's own two convolutions: one of A on all channels, one of B by group."""
    torch.manual_seed(4)
    model = torch.nn.Sequential(torch.nn.Conv1d(8, 6, 1, groups=2, bias=False)).double()
    config = lk.LoRAConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
    lk.save_adapter(lk.inject(model, config), tmp_path / "adapter")
    with torch.no_grad():
        model[0].base_layer.weight.zero_()
        delta = model(torch.eye(8, dtype=torch.float64)[..., None]).squeeze(-1).T
    (row,) = inspect_adapter(tmp_path / "adapter").updates
    values = torch.tensor(row.singular_values, dtype=torch.float64)
    assert row.shape == (6, 8, 1) and (values - torch.linalg.svdvals(delta)[:4]).abs().max() < 1e-10


def test_effective_rank_at_its_ends() -> None:
    assert effective_rank(torch.zeros(4)) == 0.0
    assert effective_rank(torch.tensor([2.0, 0.0])) == 1.0
    assert abs(effective_rank(torch.ones(5, dtype=torch.float64)) - 5) < 1e-12


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.11.q_proj", "model.layers.*.q_proj"),
        ("h.0.mlp.c1", "h.*.mlp.c1"),
        ("lora_unet_down_blocks_0_to_out_10", "lora_unet_down_blocks_*_to_out_*"),
    ],
)
def test_numbers_are_grouped(name: str, group: str) -> None:
    assert group_name(name) == group


def test_inspect_says_what_the_files_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"to_q": torch.nn.Linear(6, 8)}) for _ in range(2)).double()
    model = torch.nn.ModuleDict({"down_blocks": blocks})
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"], init_lora_weights=False)
    peft_folder = tmp_path / "peft"
    get_peft_model(model, config).save_pretrained(peft_folder)
    report = inspect_adapter(peft_folder)
    assert (report.format, report.init, report.use_rslora, report.use_dora) == ("peft", "False", False, False)
    assert report.parameters == 2 * 2 * (6 + 8) and report.bytes == 8 * report.parameters
    assert report.dtypes == ("float64",)
    assert [row.name for row in report.updates] == ["down_blocks.0.to_q", "down_blocks.1.to_q"]
    assert {(row.r, row.alpha, row.scaling, row.shape) for row in report.updates} == {(2, 3, 1.5, (8, 6))}
    assert main(["inspect", str(peft_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["updates"][1]["singular_values"] == [*report.updates[1].singular_values]
    print_report(report)
    out = capsys.readouterr().out
    assert "down_blocks.*" in out and "8×6" in out and "plain LoRA, init_lora_weights=False" in out


@pytest.mark.parametrize("zero", [False, True])
def test_the_plot(zero: bool, tmp_path: Path) -> None:
    report = inspect_adapter(write_kohya(tmp_path / "k.safetensors", zero))
    assert {row.spectral == 0 for row in report.updates} == {zero}
    picture = plot_spectra(report, tmp_path / "spectrum.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_plot_without_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = inspect_adapter(write_kohya(tmp_path / "k.safetensors"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lorakernels\[demo\]"'):
        plot_spectra(report, tmp_path / "spectrum.png")
