"""`bench/gpu.sh`: what a step gives is in the folder at once, and no step takes the others along."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import gpu
import gpu_steps

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not there")


def command(*arguments: str) -> list[str]:
    return [str(shutil.which("bash")), str(ROOT / "bench" / "gpu.sh"), *arguments]


def settings(out: Path, **environment: str) -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "TMPDIR": str(out.parent), **environment}


def gpu_script(*arguments: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = settings(out, **environment)
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=env, timeout=900, check=False)


def rows(out: Path, part: str = "A") -> list[dict[str, Any]]:
    path = out / f"{part}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def states(out: Path, part: str = "A") -> dict[str, str]:
    return {row["step"]: row["state"] for row in rows(out, part) if row["kind"] == "step"}


def test_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gpu_script("A", "B", "--cpu", "--only", "environment,ceilings,sanitizer,sweep", out=out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(out) == {"environment": "ok", "ceilings": "ok", "sanitizer": "skipped: it watches a GPU"}
    assert states(out, "B")["sweep"].startswith("skipped: ")
    assert [row["name"] for row in rows(out) if row["kind"] == "ceiling"] == ["copy", "mm 8192", "mm 64"]
    (described,) = (row for row in rows(out) if row["kind"] == "environment")
    assert described["versions"]["torch"] and described["date"]
    assert len(list(out.iterdir())) <= 8  # all that comes back from some machines
    summary = (out / "summary.txt").read_text()
    assert all(step in summary for part in gpu_steps.PARTS.values() for step, *_ in part)
    assert "ceilings: ok" in (out / "A.log").read_text()


def test_killed_in_the_middle(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = command("A", "--cpu", "--only", "environment,ceilings,first-times")
    process = subprocess.Popen(arguments, env=settings(out), start_new_session=True, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while "ceilings" not in states(out) and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert states(out) == {"environment": "ok", "ceilings": "ok"}
    with (out / "A.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # a line that was cut
    assert gpu.summary(out) == 0
    assert "first-times" in (out / "summary.txt").read_text()


@pytest.mark.parametrize(
    ("act", "state"),
    [
        (lambda run, seconds: None, "ok"),
        (lambda run, seconds: 1 / 0, "FAILED: ZeroDivisionError: division by zero"),
        (lambda run, seconds: time.sleep(60), "time limit"),
        (lambda run, seconds: run.command("sleep", "60", seconds=2), "time limit"),
        (lambda run, seconds: run.command("false", seconds=2), "FAILED: CalledProcessError: "),
    ],
    ids=["right", "wrong", "late", "late_program", "wrong_program"],
)
def test_how_a_step_ends(act: Any, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run = gpu_steps.Run("A", "cpu", tmp_path)
    before = time.monotonic()
    try:
        ended = gpu.carry_out(run, "step", 4, act, None)
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert ended.startswith(state) and states(tmp_path)["step"] == ended
    assert time.monotonic() - before < 20
    assert gpu.summary(tmp_path) == int(state != "ok")


def test_no_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    run = gpu_steps.Run("B", "cpu", tmp_path)
    ended = gpu.carry_out(run, "sweep", 1, lambda run, seconds: 1 / 0, None)
    assert ended == "no time left"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_sizes_on_the_driver_that_checks(tmp_path: Path) -> None:
    """What is launched at the headline and for decode; whole parts take minutes of compiling."""
    out = tmp_path / "out"
    done = gpu_script("A", "B", "--stub", "--only", "environment,profile,counters", out=out, LIMIT="800")
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(out) == {"environment": "ok", "profile": "skipped: nothing runs there"}
    assert states(out, "B") == {"environment": "ok", "counters": "ok"}
    assert "linear_expand_tma_kernel" in (out / "compiled.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((), "usage:"), (("C",), "usage:"), (("A", "--fast"), "usage:"), (("A", "--cpu", "--only", "lunch"), "ceilings")],
)
def test_wrong_arguments(arguments: tuple[str, ...], text: str, tmp_path: Path) -> None:
    done = gpu_script(*arguments, out=tmp_path / "out")
    assert done.returncode != 0 and text in done.stdout + done.stderr


def test_no_python(tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to(str(shutil.which("dirname")))
    environment = {"PATH": str(tmp_path), "OUT": str(tmp_path)}
    done = subprocess.run(command("A"), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2 and done.stderr == "there is no python on the path: name one with PYTHON=\n"
