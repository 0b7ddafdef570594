"""The demo, once in full; then that it is repeatable, leaves the process as it was, and notices what is wrong."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import lorakernels as lk
from lorakernels.backend import ENVIRONMENT
from lorakernels.tools import demo
from lorakernels.tools.demo import DemoResult, digits, run_demo
from lorakernels.tools.demo.report import print_report

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("demo") / "made" / "on demand", seed=0)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "BASE_STEPS", 100)
    monkeypatch.setattr(demo, "ADAPTER_STEPS", 5)


def report(result: DemoResult) -> str:
    console = Console(width=80, record=True, highlight=False, file=io.StringIO())
    print_report(result, console)
    return console.export_text()


def test_every_claim_holds(result: DemoResult) -> None:
    assert [claim.text for claim in result.claims if not claim.held] == []
    assert all(claim.enforced for claim in result.claims)
    assert result.failures == []


def test_adapters_bring_the_accuracy_back(result: DemoResult) -> None:
    assert [world.name for world in result.worlds] == ["rotated", "inverted", "mirrored"]
    assert result.upright > 0.95
    for world in result.worlds:
        assert world.before < 0.6
        assert world.after > 0.9
        assert world.reloaded == world.merged == world.after
        # Rank 4 on 64-256-256-10: 4 · (64 + 256 + 256 + 256 + 256 + 10) beside 85,002.
        assert world.trainable == 4392
        assert world.share == pytest.approx(4392 / (85002 + 4392))
        assert world.seconds > 0


def test_it_says_what_ran(result: DemoResult) -> None:
    expected = "triton" if result.device == "cuda" else "torch"
    assert result.explanation.impl == expected
    assert result.explanation.why


def test_files(result: DemoResult) -> None:
    assert result.picture == result.folder / "digits.png"
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    assert result.picture.stat().st_size > 20_000
    for world in result.worlds:
        files = sorted(file.name for file in (result.folder / world.name).iterdir())
        assert files == ["adapter_config.json", "adapter_model.safetensors"]
        model = lk.load_adapter(digits.network(torch.device("cpu")), result.folder / world.name)
        assert model(torch.zeros(2, 8, 8)).shape == (2, 10)


def test_report_fits_80_columns(result: DemoResult) -> None:
    text = report(result)
    assert "…" not in text
    for world in result.worlds:
        assert world.name in text and f"{world.after:.1%}" in text
    assert f"impl={result.explanation.impl}" in text and result.explanation.why in text
    assert "FAILED" not in text


@pytest.mark.usefixtures("short")
def test_same_seed_same_numbers(tmp_path: Path) -> None:
    runs = {name: run_demo(tmp_path / name, seed=seed, steps=3) for name, seed in (("a", 7), ("b", 7), ("c", 8))}
    files = {name: (run.folder / "rotated" / "adapter_model.safetensors").read_bytes() for name, run in runs.items()}
    assert files["a"] == files["b"] != files["c"]
    assert [claim.text for claim in runs["a"].claims] == [claim.text for claim in runs["b"].claims]


@pytest.mark.usefixtures("short")
def test_few_steps_report_the_accuracy_and_do_not_enforce_it(tmp_path: Path) -> None:
    result = run_demo(tmp_path, steps=3)
    assert result.steps == 3
    open_claims = [claim for claim in result.claims if not claim.enforced]
    assert len(open_claims) == 3 and not any(claim.held for claim in open_claims)
    assert "reported, not enforced" in " ".join(report(result).split())


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("value", [None, "auto"])
def test_the_process_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    if value is not None:
        monkeypatch.setenv(ENVIRONMENT, value)
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert run_demo(tmp_path, impl="torch", steps=1).explanation.impl == "torch"
    assert os.environ.get(ENVIRONMENT) == value
    assert torch.get_rng_state().equal(random_state)
    assert torch.get_num_threads() == threads


def failed(tmp_path: Path) -> list[str]:
    result = run_demo(tmp_path)
    assert report(result).count("FAILED") == bool(result.failures)
    return [claim.text for claim in result.failures]


def add_to_a_weight(model: nn.Module, part: str) -> None:
    weight = next(p for name, p in model.named_parameters() if part in name)
    with torch.no_grad():
        weight.add_(0.1)


@pytest.mark.usefixtures("short")
def test_it_notices_an_accuracy_that_is_not_regained(tmp_path: Path) -> None:
    texts = failed(tmp_path)
    assert len(texts) == 3 and all("its adapter reaches" in text for text in texts)


Spoil = Callable[[nn.Module], None]
SPOILT: list[tuple[str, Spoil, str]] = [
    ("load_adapter", lambda model: add_to_a_weight(model, "lora_B"), "loaded into a fresh copy"),
    ("merge", lambda model: add_to_a_weight(model, "base_layer.weight"), "merged, it predicts"),
    ("unmerge", lambda model: add_to_a_weight(model, "base_layer.weight"), "unmerged, it answers"),
    ("inject", lambda model: add_to_a_weight(model, "base_layer.bias"), "with no adapter active"),
]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("function", "spoil", "text"), SPOILT, ids=[row[0] for row in SPOILT])
def test_it_notices_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, spoil: Spoil, text: str
) -> None:
    monkeypatch.setattr(demo, "REGAINED", 0.0)
    sound = getattr(lk, function)

    def unsound(model: nn.Module, *args: object, **kwargs: object) -> None:
        sound(model, *args, **kwargs)
        spoil(model)

    monkeypatch.setattr(lk, function, unsound)
    assert any(text in found for found in failed(tmp_path))


class Unsound(lk.AdapterStore):
    """Gives each row the adapter of the next one."""

    def batch(self, rows: Any, **kwargs: Any) -> Any:
        return super().batch([*rows[1:], rows[0]], **kwargs)


class Changing(lk.AdapterStore):
    """Changes the base when it serves."""

    def load(self, *args: Any) -> None:
        super().load(*args)
        add_to_a_weight(self.model, "head.weight")


class Leaking(lk.AdapterStore):
    """Lets a broken adapter reach the others."""

    def replace(self, *args: Any) -> None:
        super().replace(*args)
        add_to_a_weight(self.model, "head.weight")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("store", "texts"),
    [
        (Unsound, ["each row as alone", "rows without an adapter"]),
        (Changing, ["each row as alone", "rows without an adapter"]),
        (Leaking, ["leaves all other rows"]),
    ],
)
def test_it_notices_a_wrong_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: type[lk.AdapterStore], texts: list[str]
) -> None:
    monkeypatch.setattr(demo, "REGAINED", 0.0)
    monkeypatch.setattr(lk, "AdapterStore", store)
    found = failed(tmp_path)
    assert len([text for text in found if text.startswith("mixed: ")]) >= len(texts)
    assert all(any(text in claim for claim in found) for text in texts)


@pytest.mark.usefixtures("short")
def test_a_sound_run_with_low_aims_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "REGAINED", 0.0)
    assert failed(tmp_path) == []


@pytest.mark.parametrize(("arguments", "message"), [({"seed": -1}, "seed is -1"), ({"steps": 0}, "steps is 0")])
def test_wrong_numbers(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_demo(tmp_path, **arguments)  # type: ignore[arg-type]
