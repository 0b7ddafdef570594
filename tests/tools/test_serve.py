"""`lorakernels serve`: what it starts vLLM with, and what it refuses before."""

from __future__ import annotations

import atexit
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lorakernels import cli
from lorakernels.integrations import vllm, vllm_metrics, vllm_versions
from lorakernels.integrations.vllm_sources import MISSING
from lorakernels.tools import serve

Started = list[tuple[list[str], dict[str, str]]]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Started:
    """What would have been started, by a vLLM that fits; in a folder with a model and two adapters."""
    commands: Started = []
    for module in (vllm, vllm_versions):
        monkeypatch.setattr(module, "why_left_off", lambda: None)
    monkeypatch.setattr(serve, "installed_version", lambda: "0.32.0")
    monkeypatch.setattr(os, "execve", lambda path, command, environment: commands.append((command, environment)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(vllm_metrics.FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    for name, rank in (("alice", {"r": 4}), ("bob", {"r": 8, "rank_pattern": {"q_proj": 20}})):
        Path(name).mkdir()
        Path(name, "adapter_config.json").write_text(json.dumps(rank))
    Path("model").mkdir()
    Path("model", "config.json").write_text("{}")
    return commands


def test_vllms_server_takes_the_place_of_the_command(
    started: Started, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    adapters = ["--adapter", "a=alice", "--adapter", "b=bob"]
    assert cli.main(["serve", "--model", "model", *adapters, "--port", "8001", "--", "--max-model-len", "512"]) == 0
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "model", "--enable-lora"]
    sizes = ["--max-loras", "2", "--max-lora-rank", "32", "--lora-modules", "a=alice", "b=bob"]
    [(command, environment)] = started
    assert command == [*server, *sizes, "--port", "8001", "--max-model-len", "512"]
    assert "vLLM 0.32.0 with LoRA by lorakernels" in capsys.readouterr().out
    assert environment["VLLM_PLUGINS"] == "another,lorakernels" and vllm_versions.ROOT not in environment
    assert (
        cli.main(["serve", "--model", "hub/name", "--max-adapters", "3", "--max-rank", "64", "--dtype", "float32"]) == 0
    )
    assert started[1][0][4:] == [
        "hub/name", "--enable-lora", "--max-loras", "3", "--max-lora-rank", "64", "--dtype", "float32"
    ]  # fmt: skip


def test_all_of_its_processes_count_in_one_folder_that_goes_with_them(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit: list[tuple[Any, ...]] = []
    monkeypatch.setattr(atexit, "register", lambda *call, **options: at_exit.append(call))
    for own in (None, "mine"):
        if own:
            monkeypatch.setenv(vllm_metrics.FOLDER, own)
        assert cli.main(["serve", "--model", "model"]) == 0
    folder, other = (environment[vllm_metrics.FOLDER] for _, environment in started)
    assert Path(folder).is_dir() and Path(folder).parent == tmp_path and other == "mine"
    for each in (folder, other):
        monkeypatch.setenv(vllm_metrics.FOLDER, each)
        vllm_metrics.clear_at_exit()
    assert [call[1] for call in at_exit] == [folder]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "alice"], "--model alice has no config.json"),
        (["--model", "model", "--adapter", "alice"], "expected NAME=DIR"),
        (["--model", "model", "--adapter", "a=alice", "--adapter", "a=bob"], "a name of its own"),
        (["--model", "model", "--adapter", "a=nobody"], "nobody/adapter_config.json"),
        (["--model", "model", "--adapter", "a=broken"], "has no rank"),
        (
            ["--model", "model", "--adapter", "b=bob", "--max-rank", "16"],
            "rank 20, over --max-rank 16: give",
        ),
        (["--model", "model", "--max-rank", "1000"], "vLLM takes 1 … 512"),
        (["--model", "model", "--max-adapters", "0"], "expected at least 1"),
        (["--model", "model", "--adapter-root", ".", "--", "--enable-tower-connector-lora"], "does not know versions"),
        (["--model", "model", "--adapter-root", ""], "--adapter-root '' is no folder"),
        (["--model", "model", "--adapter-root", "model", "--adapter", "a=alice"], "leads out of the root"),
    ],
)
def test_what_is_refused(
    started: Started, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken").mkdir()
    Path("broken", "adapter_config.json").write_text('{"r": "four"}')
    assert cli.main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err and not started


def test_adapters_from_under_a_root(started: Started, tmp_path: Path) -> None:
    Path("root").symlink_to(".")
    assert cli.main(["serve", "--model", "model", "--adapter", "a=alice", "--adapter-root", "root"]) == 0
    [(command, environment)] = started
    assert command[6:] == ["--max-loras", "8", "--max-lora-rank", "8", "--lora-modules", f"a={tmp_path / 'alice'}"]
    assert environment[vllm_versions.ROOT] == str(tmp_path) and environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


@pytest.mark.parametrize(
    ("module", "reason", "root"),
    [(vllm, MISSING, []), (vllm, "another vLLM", []), (vllm_versions, "another vLLM", ["--adapter-root", "."])],
)
def test_without_a_vllm_that_fits(
    started: Started,
    module: ModuleType,
    reason: str,
    root: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "why_left_off", lambda: reason)
    assert cli.main(["serve", "--model", "model", *root]) == 2
    assert capsys.readouterr().err == f"lorakernels: {reason}\n" and not started
