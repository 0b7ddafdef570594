"""The tuner: candidates, and the whole loop with a timer that times nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import UNKNOWN, assume, example_of
from lorakernels.configs.heuristic import MULTI_OPERATIONS, OPERATIONS, Batch, heuristic
from lorakernels.configs.table import misfit
from lorakernels.configs.table_file import Entry, Table, read_table, write_table
from lorakernels.tools.compile_report import CompileRow, table_launches
from lorakernels.tools.tune import tuner
from lorakernels.tools.tune.candidates import candidates, read_list
from lorakernels.tools.tune.problem import Problem, problems_of

H100 = example_of("sm_90")
CPU = torch.device("cpu")
TUNED = KernelConfig(BLOCK_M=32, BLOCK_K=128, BLOCK_R=16, SPLIT=2, num_warps=4, num_stages=3)
SHRINK = Entry("shrink", 4096, 512, 512, 16, 2, TUNED, {"microseconds": 1.0})
TMA = KernelConfig(128, 128, 64, 16, num_warps=8, num_stages=3, tma=True)

pytestmark = pytest.mark.usefixtures("own_tables")


def written(path: Path, *entries: Entry) -> Path:
    write_table(path, Table("", H100.name, H100.arch, list(entries)))
    return path


# ------------------------------------------------------------------------------------------- candidates

PROBLEMS = [
    Problem(operation, M, 4096, 1024, r, dtype, 0.0)
    for operation in OPERATIONS
    for M, r, dtype in ((16, 16, torch.bfloat16), (8192, 64, torch.bfloat16), (100, 8, torch.float32))
] + [
    Problem(operation, M, 4096, 4096, 16, dtype, dropout, 32)
    for operation in MULTI_OPERATIONS
    for M, dtype, dropout in ((64, torch.bfloat16, 0.0), (2048, torch.bfloat16, 0.1), (256, torch.float32, 0.0))
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_candidates_fit_and_begin_with_the_heuristic(problem: Problem, arch: str) -> None:
    p, device = problem, example_of(arch)
    configs = candidates(p, device)
    assert configs[0] == heuristic(p.operation, p.M, p.N, p.K, p.r, p.itemsize, arch, p.tma, p.batch)
    tokens_form = p.operation in ("multi_shrink", "multi_expand") and p.dropout == 0.0
    assert any(c.BLOCK_M == 1 for c in configs) == tokens_form
    assert len(set(configs)) == len(configs) >= 8
    tiles = p.batch is not None and p.batch.tiles
    assert all(misfit(p.operation, c, p.r, p.itemsize, p.tma, arch, tiles) is None for c in configs)
    assert any(c.tma for c in configs) == (p.operation == "linear_expand" and arch == "sm_90")
    likeliest = candidates(p, device, neighbours=False)
    assert configs[: len(likeliest)] == likeliest and len(likeliest) <= 15
    fields = configs[0].to_fields()
    for config in configs[len(likeliest) :]:
        ((name, value),) = config.to_fields().items() - fields.items()
        assert value in (fields[name] * 2, fields[name] // 2, fields[name] + 1, fields[name] - 1)


def test_a_split_is_at_most_the_tiles_there_are() -> None:
    for config in candidates(Problem("shrink", 64, 64, 64, 8, torch.float32, 0.0), H100)[1:]:
        assert config.SPLIT <= -(-64 // config.BLOCK_K)


def test_problems_of_shapes() -> None:
    wide, few = (512, 64, 32, 8, torch.bfloat16, 0.1), (16, 64, 32, 8, torch.bfloat16, 0.0)
    names = [(p.operation, p.M, p.N, p.K) for p in problems_of([wide, few, (*wide[:4], torch.float16, 0.0)])]
    assert names == [
        ("shrink", 512, 32, 32), ("linear_expand", 512, 64, 32), ("outer", 512, 64, 64),
        ("linear_expand", 512, 32, 64), ("outer", 512, 32, 32), ("shrink", 512, 64, 64),
        ("few_tokens", 16, 64, 32), ("few_tokens", 16, 32, 64), ("outer", 16, 64, 64), ("outer", 16, 32, 32),
    ]  # fmt: skip
    for wrong in ((0, 1, 1, 1, torch.float32, 0.0), (1, 1, 1, 1, torch.float64, 0.0), (1, 1, 1, 1, torch.float32, 1.0)):
        with pytest.raises(ValueError):
            problems_of([wrong])


def test_problems_of_a_group() -> None:
    """One pass over x for all its ranks, a product a member, and one dx over all columns together."""
    found = [(p.operation, p.N, p.K, p.r) for p in problems_of([(512, (64, 32), 48, 8, torch.bfloat16, 0.0)])]
    assert found[:3] == [("shrink", 48, 48, 16), ("linear_expand", 64, 48, 8), ("linear_expand", 32, 48, 8)]
    assert ("linear_expand", 48, 96, 16) in found and ("outer", 48, 48, 16) in found


def test_candidates_of_a_file_come_first(tmp_path: Path) -> None:
    own = KernelConfig(BLOCK_M=32, BLOCK_K=32, num_warps=2)
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"shrink": [own.to_fields()]}))
    problem = Problem("shrink", 512, 64, 64, 8, torch.bfloat16, 0.0)
    assert candidates(problem, H100, listed=read_list(path))[1] == own
    for content, why in (
        ("[", "is not JSON"), ("[]", "is no list of candidates"), ('{"shrunk": []}', "has an operation 'shrunk'"),
        ('{"shrink": [{}, {"BLOCK_K": 3}]}', "shrink, number 1: config's BLOCK_K is 3"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(ValueError, match=why):
            read_list(path)


def test_after_its_time_no_launch_is_begun(tmp_path: Path) -> None:
    result = tune(tmp_path / "table.json", limit=-1.0)
    assert result.tuned == [] and len(result.postponed) == len(problems_of(TINY)) and result.ok


def test_problems_of_many_adapters() -> None:
    problems = problems_of([(64, 48, 32, 8, torch.bfloat16, 0.1)], slots=16)
    assert [(p.operation, p.N, p.K, p.slots) for p in problems] == [
        ("multi_shrink", 32, 32, 16), ("multi_expand", 48, 48, 16), ("multi_shrink", 48, 48, 16),
        ("multi_expand", 32, 32, 16), ("multi_outer", 32, 32, 16), ("multi_outer", 48, 48, 16),
    ]  # fmt: skip
    assert [p.batch for p in problems[1::2]] == [Batch(16, tiles=True), Batch(16, tiles=True), Batch(16)]
    with pytest.raises(ValueError, match="slots is 0"):
        problems_of([], slots=0)


# ------------------------------------------------------------------------------------------- the tuner

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the fake timer is for the interpreter")
TINY = [(20, 32, 48, 3, torch.float32, 0.1), (300, 32, 32, 4, torch.float16, 0.0)]
NOT_TIMED = "nothing was timed on a GPU: a fake"


def fake_timer(steps: Sequence[Sequence[Callable[[], object]]]) -> np.ndarray:
    """Times nothing: every config is made out to be slower than the next."""
    assert all(len(each) == 1 for each in steps)
    return np.linspace(2e-6, 1e-6, len(steps))[:, None].repeat(3, axis=1)


def tune(out: Path, shapes: Any = TINY, **options: Any) -> tuner.Result:
    options = {"timed_by": NOT_TIMED, "short": True} | options
    return tuner.tune(shapes, out, CPU, options.pop("timer", fake_timer), **options)


@interpreted
def test_the_whole_loop_and_resuming(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    result = tune(out)
    problems = problems_of(TINY)
    assert len(result.tuned) == len(problems) and not result.dropped and result.ok
    read, faults = read_table(out)
    assert not faults and (read.device, read.entries) == ("unknown", result.table.entries)
    for entry, problem in zip(read.entries, problems, strict=True):
        assert (entry.key, entry.M) == (problem.key, problem.M)
        assert entry.measured["timed_by"] == NOT_TIMED
        fastest = 1.0 if entry.measured["configs"] > 1 else 2.0
        assert (entry.measured["microseconds"], entry.measured["slowest_microseconds"]) == (fastest, 2.0)
        assert (
            entry.config == candidates(problem, UNKNOWN, neighbours=False)[-1]
        )  # the last measured, as the fake has it
    again = tune(out, resume=True, timer=lambda steps: pytest.fail("timed again"))
    assert (again.tuned, again.skipped) == ([], len(problems))
    del read.entries[1:]
    write_table(out, read)
    assert (tune(out, resume=True).skipped, len(read_table(out)[0].entries)) == (1, len(problems))


@interpreted
def test_the_whole_loop_for_many_adapters(tmp_path: Path) -> None:
    shapes = [(20, 32, 32, 3, torch.float32, 0.1), (9, 40, 40, 5, torch.float16, 0.0)]
    result = tune(tmp_path / "t.json", shapes, slots=4)
    problems = problems_of(shapes, slots=4)
    assert len(result.tuned) == len(problems) == 6 and not result.dropped and result.ok
    entries = read_table(tmp_path / "t.json")[0].entries
    assert [(e.key, e.M, e.slots) for e in entries] == [(p.key, p.M, 4) for p in problems]
    assert tune(tmp_path / "t.json", shapes, slots=4, resume=True).skipped == 6
    assert not tune(tmp_path / "t.json", shapes[1:], slots=3, resume=True).skipped


@interpreted
@pytest.mark.parametrize("operation", MULTI_OPERATIONS)
def test_what_is_wrong_with_many_adapters_is_seen(operation: str) -> None:
    problem = Problem(operation, 20, 32, 32, 4, torch.float32, 0.5, 3)
    inputs = tuner.make_inputs(problem, CPU)
    config = KernelConfig(16, 16, 16, 16)
    outputs = tuner.run(problem, config, inputs)
    check = tuner.Check(problem, inputs, outputs)
    assert check.fault(outputs) == ""
    assert check.fault(tuner.run(problem, dataclasses.replace(config, num_warps=8), inputs)) == ""
    for i in range(2):
        wrong = [output.clone() for output in outputs]
        wrong[i].view(-1)[-1] += 1
        assert check.fault(tuple(wrong)).startswith(f"wrong: output {i}")
    if operation == "multi_shrink":
        assert check.fault((*outputs[:-1], outputs[-1] ^ 1)) == "wrong: dropout's mask differs"


@interpreted
def test_a_wrong_config_is_dropped_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [KernelConfig(16, 16, 16, 16), KernelConfig(16, 16, 16, 16, GROUP_M=1), KernelConfig(32, 16, 16, 16)]
    monkeypatch.setattr(tuner, "candidates", lambda problem, gpu, **_: list(configs))  # of all, not of a short run
    real = tuner.run

    def run(problem: Problem, config: KernelConfig, inputs: Any) -> Any:
        if config == configs[2]:
            raise RuntimeError("out of\nresources")
        outputs = real(problem, config, inputs)
        return outputs if config == configs[0] else (outputs[0] * 1.01, *outputs[1:])

    monkeypatch.setattr(tuner, "run", run)
    result = tune(tmp_path / "t.json", [(20, 32, 48, 3, torch.float32, 0.0)], short=False)
    assert {entry.config for entry in result.tuned} == {configs[0]}
    reasons = {config: why for _, config, why in result.dropped}
    assert reasons[configs[1]].startswith("wrong: output 0 has error 0.0")
    assert reasons[configs[2]] == "does not run: RuntimeError: out of resources"
    assert not result.ok and not result.left


@interpreted
def test_a_launch_that_no_config_is_right_for_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tuner.run
    monkeypatch.setattr(tuner, "run", lambda *arguments: tuple(t * 2 for t in real(*arguments)))
    result = tune(tmp_path / "t.json", [(20, 32, 48, 3, torch.float32, 0.0)])
    assert not result.ok and result.left == problems_of([(20, 32, 48, 3, torch.float32, 0.0)])
    assert not (tmp_path / "t.json").exists()


@interpreted
@pytest.mark.parametrize("operation", ["shrink", "few_tokens"])
def test_another_mask_is_wrong(operation: str, tmp_path: Path) -> None:
    problem = Problem(operation, 20, 32, 32, 4, torch.float32, 0.5)
    inputs = tuner.make_inputs(problem, CPU)
    outputs = tuner.run(problem, KernelConfig(16, 16, 16, 16), inputs)
    check = tuner.Check(problem, inputs, outputs)
    assert check.fault(outputs) == ""
    assert check.fault((*outputs[:-1], outputs[-1] ^ 1)) == "wrong: dropout's mask differs"
    assert "error inf" in check.fault((outputs[0] * math.nan, *outputs[1:]))


@interpreted
def test_few_tokens_with_too_small_a_rank_block_is_wrong() -> None:
    problem = Problem("few_tokens", 16, 32, 32, 20, torch.float32, 0.0)
    inputs = tuner.make_inputs(problem, CPU)
    check = tuner.Check(problem, inputs, tuner.run(problem, KernelConfig(16, 16, 16, 32), inputs))
    assert check.fault(tuner.run(problem, KernelConfig(16, 16, 16, 16), inputs)).startswith("wrong")


@interpreted
def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    calls = []

    def interrupt(steps: Sequence[Sequence[Callable[[], object]]]) -> np.ndarray:
        calls.append(steps)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fake_timer(steps)

    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "t.json", timer=interrupt)
    assert len(read_table(tmp_path / "t.json")[0].entries) == 2


def test_the_table_of_another_device_is_not_written_over(tmp_path: Path) -> None:
    path = written(tmp_path / "t.json", SHRINK)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is the table of NVIDIA H100"):
        tune(path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        tune(tmp_path / "bad.json")
    assert path.read_bytes() == before and (tmp_path / "bad.json").read_text() == "{"


def test_what_the_compiler_says_prunes(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("linear_expand", 8192, 4096, 4096, 16, torch.bfloat16, 0.0)
    first = heuristic("linear_expand", 8192, 4096, 4096, 16, 2, "sm_90", True)
    seen: list[KernelConfig] = []

    def report(launches: Any, archs: Sequence[str], jobs: int, progress: bool) -> list[CompileRow]:
        assert list(archs) == ["sm_90"]
        configs = list(dict.fromkeys(launch.config for launch in launches))
        seen.extend(configs)
        rows = []
        for c in configs:
            row = CompileRow("k", c, "sm_90", "bfloat16", 168, 0, 1, tma=c.tma, ctas_per_sm=1, ok=True)
            if c.num_warps == 4:
                row = dataclasses.replace(row, spill_bytes=8, why="spills 8 bytes a thread", ok=False)
            rows.append(row)
        return rows

    monkeypatch.setattr(tuner, "interpreter_on", lambda: False)
    monkeypatch.setattr(tuner, "compile_report", report)
    right, faults = tuner.shortlist(problem, H100)
    assert seen == candidates(problem, H100) and {*right, *faults} == {*seen} and right[0] == first
    assert all(c.num_warps > 4 and c.PROGRAMS_PER_SM == 1 for c in right)
    assert {*faults.values()} == {"spills 8 bytes a thread", "2 programs a multiprocessor, where 1 fits"}


def test_launches_of_the_tables_that_ship(tmp_path: Path) -> None:
    config = dataclasses.replace(TMA, num_stages=4)
    by_token = KernelConfig(1, BLOCK_K=128, BLOCK_R=16, SPLIT=2)
    multi = Entry("multi_shrink", 64, 512, 512, 16, 2, by_token, slots=64)
    written(tmp_path / "a.json", Entry("linear_expand", 8192, 512, 512, 16, 2, config), SHRINK, multi)
    with assume("sm_90"):
        launches = table_launches("sm_90", tmp_path)
    names = {(launch.kernel.__name__, launch.config) for launch in launches}
    assert ("linear_expand_tma_kernel", config) in names and ("shrink_kernel", TUNED) in names
    assert ("multi_shrink_token_kernel", by_token) in names
    assert {launch.args["seed_ptr"] is None for launch in launches if "seed_ptr" in launch.args} == {True, False}
    assert table_launches("sm_80", tmp_path) == []
