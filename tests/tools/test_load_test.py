"""`lorakernels load-test`, with a function in the server's place: what is asked, what is counted, what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from lorakernels import cli
from lorakernels.backend import BackendError
from lorakernels.tools import load_test as tool
from lorakernels.tools import serve
from lorakernels.tools.load_test import command, report, servers
from lorakernels.tools.load_test.traffic import Answer, Request, Traffic, run

NAMES = [f"a{i}" for i in range(8)]


class Server:
    """Answers with the model's name and the prompt's sum; "a1" not as it would alone, and "a2" not at all."""

    def __init__(self, url: str = "", *, cached: bool = False) -> None:
        self.running, self.most, self.asked = 0, 0, 0

    async def models(self) -> tuple[str, list[str]]:
        return "base", NAMES

    async def ask(self, request: Request) -> Answer:
        self.running, self.asked = self.running + 1, self.asked + 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.001)
        self.running -= 1
        text = (request.model, sum(request.prompt), *range(request.tokens))
        if self.most > 1 and request.model == "a1":
            text = text[::-1]
        if self.most > 1 and request.model == "a2":
            return Answer((), error="gone")
        return Answer(text, (0.5, 0.75), (1, len(text) - 1))


def test_popularity_and_arrivals() -> None:
    traffic = Traffic(requests=4000, rate=10.0, zipf=1.0, base_share=0.2, prompt_tokens=(4, 9), output_tokens=(2, 3))
    requests = traffic.requests_to("base", NAMES)
    assert requests == traffic.requests_to("base", NAMES) != Traffic(requests=4000, seed=1).requests_to("base", NAMES)
    share = {name: count / 4000 for name, count in Counter(each.model for each in requests).items()}
    all_adapters = sum(1 / k for k in range(1, 9))
    # Of 4000: three standard errors of a share of 0.2 (0.0063 each), and four of the mean of an exponential (1.6 %) and
    # of its standard deviation (2.2 %).
    assert share["base"] == pytest.approx(0.2, abs=0.02)
    for k, name in enumerate(NAMES, start=1):
        assert share[name] == pytest.approx(0.8 / k / all_adapters, abs=0.02)
    gaps = [b.arrives - a.arrives for a, b in pairwise(requests)]
    assert sum(gaps) / len(gaps) == pytest.approx(0.1, rel=0.06)
    assert torch.tensor(gaps).std().item() == pytest.approx(0.1, rel=0.1)  # of an exponential: its mean
    assert {len(each.prompt) for each in requests} == {4, 9} and {each.tokens for each in requests} == {2, 3}
    assert len({each.prompt for each in requests}) == 4
    assert traffic.requests_to("base", []) == [replace(each, model="base") for each in requests]
    assert {each.arrives for each in Traffic(rate=0).requests_to("base", NAMES)} == {0.0}


def test_no_more_at_once_than_are_allowed_and_waiting_counts() -> None:
    server, seen = Server(), list[Answer]()
    requests = [Request("a0", (1,), 2)] * 8
    answers = asyncio.run(run(server.ask, requests, concurrency=3, answered=seen.append))
    assert server.most == 3 and sorted(seen) == sorted(answers)
    assert all(answer.times[0] >= 0.5 for answer in answers) and max(a.times[0] for a in answers) > 0.501


def test_what_is_counted() -> None:
    found = asyncio.run(tool.measure(Server(), "x", Traffic(requests=100, rate=0), concurrency=50))  # type: ignore[arg-type]
    models = Counter(each.model for each in found.requests)
    row = found.summary
    assert row["requests"] == 100 and row["failed"] == models["a2"] > 0 and row["errors"] == ["gone"]
    assert row["right"] == 100 - models["a1"] - models["a2"] and models["a1"] > 0
    plain = asyncio.run(tool.measure(Server(), "x", Traffic(requests=100, rate=0), concurrency=50, adapted=False))  # type: ignore[arg-type]
    assert plain.summary["right"] == 100 and {each.model for each in plain.requests} == {"base"}


def test_figures_of_times() -> None:
    requests = [Request("a0", (1,), 3, arrives=float(i)) for i in range(3)]
    answers = [Answer((1, 2, 3), (0.1, 0.5), (1, 2)), Answer((1, 2), (0.3, 0.4), (1, 1)), Answer((), error="gone")]
    row = report.summary(requests, answers, {("a0", (1,)): Answer((1, 2, 3))})
    assert row["right"] == 2 and row["failed"] == 1 and row["seconds"] == 1.4
    assert row["tokens_per_second"] == pytest.approx(5 / 1.4)
    assert row["first_ms"]["p50"] == pytest.approx(200) and row["between_ms"]["p50"] == pytest.approx(200)
    assert report.summary(requests[2:], answers[2:], {})["first_ms"] == {"p50": None, "p95": None, "p99": None}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    layer = "model.layers.0"
    sizes = {f"{layer}.self_attn.q_proj": (12, 8), f"{layer}.mlp.down_proj": (8, 20), f"{layer}.norm": (8, 8)}
    tensors = {f"{name}.weight": torch.zeros(size) for name, size in sizes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_random_adapters_fit_the_model(model: Path, tmp_path: Path) -> None:
    from lorakernels.files.peft import read_peft

    for seed in (0, 0, 1):
        servers.write_random_adapter(model, tmp_path / f"{seed}", 4, seed)
    found = read_peft(tmp_path / "0")
    assert sorted(found.config.target_modules or ()) == ["down_proj", "q_proj"]
    other = read_peft(tmp_path / "1")
    assert found != other
    with pytest.raises(ValueError, match="has no"):
        save_file({"norm.weight": torch.zeros(8)}, model / "model.safetensors", metadata={"format": "pt"})
        servers.write_random_adapter(model, tmp_path / "none", 4, 0)


def test_the_command_writes_figures_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(tool, "Client", Server)
    monkeypatch.setattr(command, "print_table", lambda rows: report.print_table(rows, Console(width=160)))
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    load = ["load-test", "--url", "http://localhost:1/", "--requests", "40", "--rate", "0"]
    assert cli.main([*load, "--out", str(out), "--plot", str(picture)]) == 1  # "a2" has failed
    said = capsys.readouterr().out
    assert "/40" in said and "server: gone" in said
    written = json.loads(out.read_text())["servers"]["server"]
    assert len(written["answers"]) == written["requests"] == 40 and written["answers"][0]["prompt"] == 64
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --url or --model"),
        (["--url", "http://127.0.0.1:1", "--model", "m"], "either --url or --model"),
        (["--url", "http://example.com"], "is not on this machine"),
        (["--url", "127.0.0.1:80"], "is not on this machine"),
        (["--url", "http://[::1]:1", "--beside", "none"], "--beside starts servers"),
        (["--model", "m", "--beside", "sglang"], "--beside sglang; expected some of none,vllm"),
        (["--url", "http://127.1.2.3:1", "--concurrency", "0"], "--concurrency is 0"),
        (["--url", "http://127.0.0.1:1", "--requests", "0"], "requests is 0; expected 1 …"),
        (["--url", "http://127.0.0.1:1", "--rate", "-1"], "rate is -1"),
        (["--url", "http://127.0.0.1:1", "--prompt-tokens", "0,5"], "prompt_tokens is"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["load-test", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_server_that_ends_is_told_with_what_it_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    server = serve.Server(command, dict(os.environ), command)
    with (
        pytest.raises(BackendError, match=r"does not answer \(exit status 3\); it said: no such model"),
        servers.running(server, servers.free_port(), tmp_path / "log"),
    ):
        pass
