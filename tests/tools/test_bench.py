"""`lorakernels bench`: the registry, a run end to end, pictures, comparisons, and the tables of the documentation."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from lorakernels import cli
from lorakernels.backend import ENVIRONMENT, interpreter_on
from lorakernels.configs.data_sheet import data_sheet
from lorakernels.tools.bench import environment, plot, registry, run
from lorakernels.tools.bench.compare import compare, print_comparison
from lorakernels.tools.bench.peer import SCALING, Layer, Peer, Results, Step, Tensors, checker, make_tensors
from lorakernels.tools.bench.peers import PEERS, choose_peers
from lorakernels.tools.bench.registry import Case, case_of
from lorakernels.tools.bench.report import write_report
from lorakernels.tools.tune import tuner

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import cost_model
import pages
import simulate

TINY = (
    Case(9, 24, 40, 4, 0.0, "float32"),
    Case(33, 24, 40, 4, 0.0, "float32"),
    Case(33, 24, 40, 8, 0.0, "float32"),
    Case(33, 24, 40, 4, 0.1, "bfloat16"),
)
TINY_MULTI = (
    Case(12, 24, 40, 4, dtype="float32", adapters=3),
    Case(12, 24, 40, 4, dtype="float32", adapters=6),
    Case(12, 24, 40, 32, dtype="float32", adapters=4, mixed=True),
)
CPU = torch.device("cpu")
TORCH_PEERS = ("frozen", "ours-torch", "eager", "peft")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return run.run((*TINY, *TINY_MULTI), device=CPU, rounds=3)


def of_layer(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["operation"] == "lora_linear"]


# ------------------------------------------------------------------------------------------- the registry


def test_every_set_has_cases_once() -> None:
    for name, cases in registry.SETS.items():
        assert cases and len(set(cases)) == len(cases), name
        for case in cases:
            assert case.torch_dtype.is_floating_point
            if case.adapters is not None:
                assert case.adapters <= case.M and len(case.slots().unique()) == case.adapters
            else:
                assert 0 <= case.dropout < 1
    assert registry.SETS["headline"] == (Case(8192, 4096, 4096), Case(8192, 4096, 4096, dropout=0.1))
    assert {case.M for case in registry.SETS["tokens"]} == set(registry.TOKENS)
    assert registry.cases_of("headline,headline,ranks")[:2] == registry.SETS["headline"]
    assert len(registry.SETS["lorafusion"]) == 9 and {case.dropout for case in registry.SETS["lorafusion"]} == {0.1}


def test_models_have_their_layers() -> None:
    for name, blocks, parameters in (("llama3-8b", 32, 7.0e9), ("llama3-70b", 80, 68.5e9), ("qwen2.5-32b", 64, 31.2e9)):
        hidden, inner, key_value = registry.MODELS[name]
        sizes = {(case.N, case.K) for case in registry.SETS[name]}
        assert sizes == {(hidden, hidden), (key_value, hidden), (inner, hidden), (hidden, inner)}
        # The seven of a block, times the number of blocks: what the models are named after, less the embeddings.
        block = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner
        assert block * blocks == pytest.approx(parameters, rel=0.01)


def test_the_tuner_takes_the_training_steps_of_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(tuner, "print_shortlists", lambda shapes, *_, **__: found.extend(shapes))
    assert cli.main(["tune", "--dry-run", "--arch", "sm_90", "--set", "headline,small-multi"]) == 0
    assert found == [(8192, 4096, 4096, 16, torch.bfloat16, p) for p in (0.0, 0.1)]


# ------------------------------------------------------------------------------------------- a run


def test_run_end_to_end(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    by_peer = {row["peer"]: row for row in of_layer(rows) if case_of(row) == TINY[0]}
    assert set(by_peer) == {peer.name for peer in choose_peers(None, False, CPU)}
    for name in TORCH_PEERS:
        row = by_peer[name]
        assert row["status"] == "ok" and row["error_over_budget"] <= 1, row
        low, middle, high = row["seconds"]
        assert 0 < low <= middle <= high and row["timing"] == "perf_counter"
        assert row["launches"] > 0 and row["rounds"] == 3 and row["share_of_floor"] > 0
    assert by_peer["frozen"]["ratio"] == [1.0, 1.0, 1.0] and by_peer["frozen"]["kept_bytes"] == 0
    # x and S, in float32.
    assert by_peer["ours-torch"]["kept_bytes"] == 4 * (9 * 40 + 9 * 4)
    assert by_peer["eager"]["launches"] == 12 and by_peer["ours-torch"]["extra_bytes"] > 0
    for row in rows:
        assert row["schema"] == run.SCHEMA and row["environment"]["versions"]["torch"] == torch.__version__
        assert row["status"] == "ok" or row["reason"]
    host = {(row["operation"], row["peer"]) for row in rows if row["operation"].startswith("host")}
    assert {("host, many adapters", "ours-auto"), ("host, training", "eager"), ("host, inference", "ours-auto")} <= host
    assert run.read_rows(run.write_rows(rows, tmp_path / "new" / "rows.json")) == rows


def test_the_build_of_torch_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which CUDA a wheel is for is in torch's own version, and not always in the package's."""
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    assert environment.describe(CPU)["versions"]["torch"] == "2.14.1+cu130"


def test_what_cannot_run_says_why(rows: list[dict[str, Any]]) -> None:
    skipped = {row["peer"]: row["reason"] for row in of_layer(rows) if row["status"] == "skipped"}
    assert "not installed" in skipped["lorafusion"] and "dropout" in skipped["unsloth"]
    assert "one kernel" in skipped["ours-fused"]
    assert not any("seconds" in row for row in rows if row["status"] == "skipped")
    assert skipped["ours-triton"]  # no GPU, or the interpreter


@pytest.mark.parametrize("result", ["y", "x", "lora_A", "lora_B"])
@pytest.mark.parametrize("fault", ["off by a thousandth", "NaN", "transposed"])
def test_a_wrong_result_gets_no_time(result: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Peer.make

    def make(peer: Peer, tensors: Tensors) -> Step:
        step = right(peer, tensors)

        def broken() -> Results:
            results = step()
            value = results[result]
            wrong = {"off by a thousandth": value * 1.001, "NaN": value / 0, "transposed": value.t()}
            return results | {result: wrong[fault]}

        return broken if peer.name == "eager" else step

    monkeypatch.setattr(Peer, "make", make)
    frozen, broken = run.run(TINY[:1], impl="eager", device=CPU, rounds=1)[:2]
    assert frozen["status"] == "ok" and "seconds" in frozen
    assert broken["status"] == "wrong" and result in broken["reason"]
    assert not {"seconds", "ratio", "tflops"} & set(broken)


def test_a_wrong_mask_is_found() -> None:
    """Twice the probability, another mask in the backward, a forgotten scale."""
    case = TINY[3]
    tensors = make_tensors(case, CPU, 0)
    check, eager = checker(tensors), PEERS["eager"]
    assert check(eager)[1] is None

    def often(t: Tensors) -> Layer:
        return eager.layer(dataclasses.replace(t, case=dataclasses.replace(case, dropout=0.2)))

    class TwoMasks(Peer):
        def make(self, t: Tensors) -> Step:
            first, second = eager.make(t), eager.make(t)
            return lambda: second() | {"y": first()["y"]}

    def unscaled(t: Tensors) -> Layer:
        def layer() -> torch.Tensor:
            dropped = torch.native_dropout(t.x, case.dropout, True)[0] * (1 - case.dropout)
            A, B = t.adapters[0]
            return torch.nn.functional.linear(t.x, t.weight) + SCALING * (dropped @ A.mT) @ B.mT

        return layer

    for wrong in (Peer("often", "", often), TwoMasks("two", "", eager.layer), Peer("unscaled", "", unscaled)):
        assert check(wrong)[1] is not None


def test_a_broken_peer_takes_no_other_along(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(tensors: Tensors) -> Layer:
        raise RuntimeError("out\nof order")

    monkeypatch.setitem(PEERS, "peft", dataclasses.replace(PEERS["peft"], layer=layer))
    found = {row["peer"]: row for row in run.run(TINY[:1], impl="peft,torch", device=CPU, rounds=1)[:3]}
    assert found["peft"]["status"] == "error" and found["peft"]["reason"] == "RuntimeError: out of order"
    assert found["ours-torch"]["status"] == "ok"


@pytest.mark.skipif(not interpreter_on(), reason="the kernels are not interpreted here")
@pytest.mark.parametrize("case", [Case(9, 24, 40, 4, 0.1, "float32"), Case(9, 24, 40, 40, 0.1, "float32")], ids=str)
def test_the_kernels_as_peers(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, which says nothing of time: so only where it is asked for like this."""
    few = case.r == 4
    names = ["ours-triton", "ours-in-order"] if few else ["ours-fused", "ours-in-order", "ours-split"]
    for name in names:
        assert "interpreter" in str(PEERS[name].why_not(case, CPU))
        monkeypatch.setitem(PEERS, name, dataclasses.replace(PEERS[name], why_not=lambda case, device: None))
    frozen, *own = run.run([case], impl=",".join(names), device=CPU, rounds=1)[: 1 + len(names)]
    assert [row["status"] for row in (frozen, *own)] == ["ok"] * (1 + len(names)), own
    operations = {"few_tokens", "outer"} if few else {"shrink", "linear_expand", "outer"}
    for row, graph in zip(own, ("fused", "fused", "split"), strict=False):
        assert set(row["configs"]) == operations and all(isinstance(s, str) for s in row["configs"].values())
        assert row["launches"] == 1 + cost_model.cost(graph, case).launches  # with the dropout's seed
        # x, S and a mask of a bit an element.
        assert row["kept_bytes"] == 4 * (9 * 40 + 9 * case.r) + 9 * 5


@pytest.mark.parametrize("base", ["nf4", "int4", "int8", "fp8"])
def test_over_a_packed_weight(base: str) -> None:
    """The frozen layer has the same weight, and every result is held against its numbers."""
    case, many = (Case(9, 24, 64, 4, dtype="float32", base=base, adapters=adapters) for adapters in (None, 3))
    found = run.run([case, many], impl="torch,eager,peft,loop", device=CPU, rounds=1)
    status = {
        (row["operation"], row["peer"]): row["status"] for row in found if not row["operation"].startswith("host")
    }
    both = [
        (operation, peer) for operation in ("lora_linear", "multi_lora_linear") for peer in ("frozen", "ours-torch")
    ]
    peft = [("lora_linear", "peft")] if base == "nf4" else []
    assert [name for name, each in status.items() if each == "ok"] == sorted(both + peft)
    assert set(status.values()) == {"ok", "skipped"}
    bits = {"nf4": 4.5, "int4": 5, "int8": 8.5, "fp8": 8.5}[base]
    assert many.frozen_bytes == 9 * (24 + 64) * 4 + 24 * 64 * bits / 8


def test_time_limit() -> None:
    found = run.run((TINY[0], TINY_MULTI[0]), device=CPU, rounds=1, limit_s=0)
    assert {row["status"] for row in found if not row["operation"].startswith("host")} == {"skipped"}
    assert "time limit" in found[0]["reason"]


# ------------------------------------------------------------------------------------------- pictures and comparisons


def test_pictures(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    on_a_gpu = copy.deepcopy(rows)
    for row in on_a_gpu:  # the pictures of a GPU have limits, and peaks of memory
        row["environment"]["device"] = "NVIDIA H200"
        if "kept_bytes" in row:
            row["peak_bytes"] = row["kept_bytes"] + 1000
    names = ["ratio_by_tokens.png", "ratio_by_rank.png", "roofline.png", "memory.png"]
    names += ["ratio_by_adapters.png", "adapter_memory.png"]
    for kind, some in (("cpu", rows), ("gpu", on_a_gpu)):
        paths = plot.plot(some, tmp_path / kind)
        assert [path.name for path in paths] == names
        assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)
    assert list(plot.STYLES) == list(PEERS) and len(set(plot.STYLES.values())) == len(PEERS)
    only_layers = [path.name for path in plot.plot(of_layer(rows), tmp_path / "layers")]
    assert only_layers == names[:4]
    with pytest.raises(ValueError, match="2 devices"):
        plot.plot([*rows, *on_a_gpu], tmp_path)
    with pytest.raises(ValueError, match="no row has a time"):
        plot.plot([row for row in rows if row["status"] == "skipped"], tmp_path)


def scaled(rows: list[dict[str, Any]], factor: float, half_spread: float) -> list[dict[str, Any]]:
    changed = copy.deepcopy(rows)
    for row in changed:
        if "ratio" in row:
            middle = 2.0 * factor
            row["ratio"] = [middle * (1 - half_spread), middle, middle * (1 + half_spread)]
    return changed


@pytest.mark.parametrize(
    ("factor", "half_spread", "verdict"),
    [
        (1.0, 0.01, "within the spread"),
        (1.05, 0.04, "within the spread"),
        (1.05, 0.01, "slower"),
        (0.9, 0.02, "faster"),
    ],
)
def test_compare(rows: list[dict[str, Any]], factor: float, half_spread: float, verdict: str) -> None:
    found = compare(scaled(rows, 1.0, half_spread), scaled(rows, factor, half_spread))
    assert {change.verdict for change in found} == {verdict}
    assert all(change.change == pytest.approx(factor - 1) for change in found)
    assert not any(change.peer == "frozen" for change in found)


def test_compare_what_is_in_one_only(rows: list[dict[str, Any]]) -> None:
    wrong = [row | {"status": "wrong", "reason": "y"} if row["peer"] == "peft" else row for row in copy.deepcopy(rows)]
    for row in wrong:
        if row["peer"] == "peft":
            row.pop("ratio", None)
    verdicts = {change.peer: change.verdict for change in compare(rows, wrong)}
    assert verdicts["peft"] == "after: wrong, y"
    fewer = [row for row in rows if row["peer"] != "eager"]
    verdicts = {change.peer: change.verdict for change in compare(rows, fewer)}
    assert verdicts["eager"] == "not in both"
    elsewhere = [row | {"environment": row["environment"] | {"device": "another"}} for row in rows]
    verdict = compare(rows, elsewhere)[0].verdict
    assert verdict.startswith("timed by perf_counter on ") and verdict.endswith(", by perf_counter on another after")


def test_what_is_timed_by_events_stands_apart(
    rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the pictures a line of its own, and no verdict against a CUDA graph."""
    captured = [row | {"timing": "cuda graph"} if "timing" in row else row for row in rows]
    events = "events (no CUDA graph: RuntimeError)"
    some = [row | {"timing": events} if row["peer"] == "peft" and "timing" in row else row for row in captured]
    console = Console(width=250, record=True, file=io.StringIO())
    changes = compare(captured, some)
    print_comparison(changes, console)
    printed = console.export_text()
    for change in changes:
        apart = change.peer == "peft" and change.before is not None
        device = rows[0]["environment"]["device"]
        timed = f"timed by cuda graph on {device} before, by events on {device} after"
        assert (change.verdict == timed) is apart
        assert not apart or change.change is None
    assert "), events" in printed
    labels: list[str] = []
    save = Figure.savefig

    def watched(figure: Any, path: Path) -> None:
        labels.extend(figure.axes[0].get_legend_handles_labels()[1])
        save(figure, path)

    monkeypatch.setattr(Figure, "savefig", watched)
    label = PEERS["peft"].label
    assert plot.plot(some, tmp_path) and f"{label} (events)" in labels and label not in labels


def test_report(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """One file that asks for nothing; what is wrong stands first, then what is furthest from its floor."""
    rows = of_layer(rows)
    found = copy.deepcopy(rows)
    wrong, slow, *_ = [row for row in found if row["peer"] == "ours-torch"]
    wrong |= {"status": "wrong", "reason": "dA is <off>"}
    wrong.pop("ratio")
    slow["ratio"] = [99.0, 99.5, 99.9]
    text = write_report(found, tmp_path / "a" / "report.html", former=scaled(rows, 0.5, 0.01)).read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text) and "http" not in text and "<off>" not in text
    assert text.count("data:image/png;base64,") == 4
    assert 0 < text.index("wrong: dA is &lt;off&gt;") < text.index("99.500 (99.000 … 99.900)")
    first, rest = text.split("<h2>Since the former run</h2>")
    assert all(str(case_of(row)) in first for row in rows if row["peer"] == "ours-torch")
    assert rest.index("slower") < rest.index("<h2>") and rows[0]["environment"]["platform"] in rest


# ------------------------------------------------------------------------------------------- the command


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(registry.SETS, "tiny", TINY[:2])
    first, second = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    base = ["bench", "--set", "tiny", "--device", "cpu", "--rounds", "2"]
    assert cli.main([*base, "--impl", "torch,eager", "--out", first]) == 0
    assert cli.main(["bench", "run", *base[1:], "--impl", "torch", "--out", second]) == 0
    out = capsys.readouterr().out
    assert "of frozen" in out and "beyond torch's own linear" in out and out.endswith(f"{second}\n")
    written = json.loads(Path(first).read_text())
    assert sum(not row["operation"].startswith("host") for row in written) == 2 * 3
    assert cli.main(["bench", "compare", first, second]) == 0
    assert "within the spread" in capsys.readouterr().out
    assert cli.main(["bench", "plot", first, second, "--out", str(tmp_path / "pictures")]) == 0
    assert "ratio_by_tokens.png" in capsys.readouterr().out
    report = tmp_path / "report.html"
    assert cli.main(["bench", "report", first, second, "--out", str(report)]) == 0
    assert capsys.readouterr().out == f"{report}\n"
    assert "Since the former run" in report.read_text()
    assert cli.main(["bench", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*registry.SETS, *PEERS))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--set", "tiny"], "there is no set 'tiny'; sets: small, small-layer"),
        (["--impl", "peftt"], "there is no implementation 'peftt'"),
        (["--rounds", "0"], "expected at least 1"),
        (["run", "a.json"], "takes no files"),
        (["plot"], "at least one file"),
        (["compare", "a.json"], "two files, before and after; got 1"),
        (["report"], "a file, or two, a former run first; got 0"),
        (["plot", __file__], "is not JSON"),
    ],
)
def test_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_failing_result_is_a_failing_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(registry.SETS, "tiny", TINY[:1])
    broken = dataclasses.replace(PEERS["ours-torch"], layer=lambda t: lambda: 2 * PEERS["frozen"].layer(t)())
    monkeypatch.setitem(PEERS, "ours-torch", broken)
    argv = ["bench", "--set", "tiny", "--device", "cpu", "--rounds", "1", "--impl", "torch"]
    assert cli.main(argv) == 1


# ------------------------------------------------------------------------------------------- the documentation


@pytest.mark.parametrize("name", [*cost_model.TABLES, *simulate.TABLES])
def test_tables_of_the_cost_model(name: str) -> None:
    """To write them anew: python bench/cost_model.py docs/cost-model.md, and python bench/simulate.py the same page."""
    tables = cost_model.TABLES | simulate.TABLES
    assert pages.read(ROOT / "docs" / "cost-model.md")[name] == tables[name]().strip()


def test_the_simulation_by_hand() -> None:
    """A pass that is fed, one that starves, one that issues too much; and a product of one wave and a bit."""
    h200 = data_sheet("NVIDIA H200")
    assert h200 is not None
    fed = simulate.Kernel(
        "train", "shrink_kernel", 132, 432_000_000, (64, 64), 32, 256, 40 << 10, 5, 10**7, 0.1, False, False
    )
    bandwidth, clock = 0.9 * 4.8e12, 989.4e12 / 132 / 4096
    assert simulate.pass_seconds(fed, h200) == pytest.approx((432e6 / bandwidth + 500e-9, 43.2e6 / (4 * 132 * clock)))
    starved = dataclasses.replace(fed, in_flight=10**6)
    assert simulate.pass_seconds(starved, h200)[0] == pytest.approx(432e6 / 2e12 + 500e-9)
    assert simulate.pass_seconds(dataclasses.replace(fed, programs=528), h200, ctas=1)[0] == pytest.approx(
        432e6 / min(bandwidth, 10**7 / 4 / 500e-9) + 500e-9
    )
    # 64 × 34 tiles of 128 × 128 are 17 waves of 132; of 64 cycles a step of 64 at the peak, 80 in the loop.
    cycles = 17 * (4096 / 64 * 512 / 0.8 + 3300)
    assert simulate.product_seconds(h200, 34 * 128, 4096, (128, 128), 1, 3300) == pytest.approx(cycles / clock)
    product = dataclasses.replace(fed, registers=172, shared=180248)
    assert simulate.fits_beside(product, dataclasses.replace(fed, registers=80, shared=49 << 10))
    assert not simulate.fits_beside(product, dataclasses.replace(fed, registers=81, shared=49 << 10))
    assert not simulate.fits_beside(product, dataclasses.replace(fed, shared=50 << 10))


def test_data_sheets() -> None:
    found = data_sheet("NVIDIA H200 141GB HBM3e")
    assert found is not None and found.name == "H200" and found.bandwidth == 4.8e12
    assert data_sheet("NVIDIA GeForce RTX 4090") is not None and data_sheet("AMD EPYC") is None


# ------------------------------------------------------------------------------------------- the host


def test_the_hosts_part_of_a_launch_is_measured_without_a_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "launch_host.py"), "--rounds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "adapters, q k v" in done.stdout
