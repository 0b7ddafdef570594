"""`bench/gpu.sh`: its commands are right, what fails or is late shows in its exit status, all results are one file."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from lorakernels import cli
from lorakernels.bench import registry
from lorakernels.bench.operations import OPERATIONS, choose_peers

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TOOLS = "bash date tr id mkdir tar gzip mv rm timeout tail grep tee env nproc sleep dirname"
STANDS_FOR = {
    "python3": 'case " $* " in\n'
    '*get_device_name*) echo "Fake GPU 1" ;;\n'
    '*"${FAILS-none}"*) exit 3 ;;\n'
    '*"${SLOW-none}"*) sleep 30 ;;\n'
    '*" tune "*) mkdir -p "$LORAKERNELS_CACHE" && echo "{}" >"$LORAKERNELS_CACHE/table.json" ;;\n'
    '*" --set headline "*) echo "1.0 of frozen" ;;\n'
    "esac",
    "ncu": 'exit "${NCU-0}"',
    "compute-sanitizer": "exit 0",
    "nvidia-smi": "exit 0",
}
KERNELS = ["tests-linear", "tests-multi", "tests-group", "tests-norm", "sanitizer-linear", "sanitizer-multi"]
BENCH = ["headline-heuristic", "headline", "multi", "others", "compare", "pictures", "profile"]

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS.split()), reason="bash or one of its tools is not there"
)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with all that the script may call, where python3 and the profilers are others that do nothing."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for tool in TOOLS.split():
        (folder / tool).symlink_to(str(shutil.which(tool)))
    for name, script in STANDS_FOR.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


def gpu_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """With `PATH` it has these variables alone, else PYTHON and all of this process's."""
    if "PATH" not in environment:
        environment = {**os.environ, "PYTHON": sys.executable, **environment}
    command = [str(shutil.which("bash")), str(ROOT / "bench" / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.mark.parametrize("arguments", [(), ("--cpu",)], ids=["gpu", "cpu"])
def test_every_command(arguments: tuple[str, ...], tools: Path, tmp_path: Path) -> None:
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    done = gpu_script(*arguments, "--dry", PATH=path, PYTHON=sys.executable, OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
    ours = [line[line.index("lorakernels") + 1 :] for line in lines if "lorakernels" in line]
    assert {command[0] for command in ours} == {"bench", "tune"} and len(ours) >= 5
    for command in ours:
        parsed = cli.parser().parse_args(command)  # SystemExit, if an option is not there
        if command[0] == "bench" and parsed.action == "run":
            registry.cases_of(parsed.set)
            for operation in OPERATIONS.values():
                choose_peers(parsed.impl, operation, CPU)
    # The heuristic is measured, and tests run, without the table that a run before has left.
    untuned = [line for line in lines if any(word.startswith("LORAKERNELS_CACHE=work/no-cache") for word in line)]
    assert untuned == [
        line for line in lines if "pytest" in line or (line[-1].endswith("headline-heuristic.json") and "--out" in line)
    ]
    for line in lines:
        assert all((ROOT / word).exists() for word in line if word.startswith("tests/"))
    assert any("lorakernels.bench.profile" in line for line in lines)
    # Tests take several processes, but under the sanitizer one.
    for line in (line for line in lines if "pytest" in line):
        assert ("worksteal" in line) != ("compute-sanitizer" in line)
    assert not (tmp_path / "out").exists()


def test_the_sanitizer_has_tests_to_run(tools: Path) -> None:
    done = gpu_script("kernels", "--dry", PATH=f"{tools}{os.pathsep}{os.environ['PATH']}", PYTHON=sys.executable)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    chosen = [line[line.index("pytest") + 1 :] for line in lines if "compute-sanitizer" in line]
    assert [line[-3] for line in chosen] == ["tests/test_lora_linear.py", "tests/test_multi_lora.py"]
    for arguments in chosen:
        command = [sys.executable, "-m", "pytest", "--collect-only", *arguments]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert found.returncode == 0 and "triton" in found.stdout, found.stdout


@pytest.mark.parametrize(
    ("groups", "environment", "status", "states"),
    [
        ([], {}, 0, {}),
        (["tune", "kernels"], {}, 0, {}),
        (["bench"], {"FAILS": " plot "}, 1, {"pictures": "FAILED (3)"}),
        (["bench"], {"NCU": "1"}, 0, {"profile": "skipped: ncu: FAILED (1)", "profile-torch": "ok"}),
        (
            ["bench"],
            {"NCU": "1", "FAILS": "bench.profile"},
            1,
            {"profile": "skipped: ncu: FAILED (1)", "profile-torch": "FAILED (3)"},
        ),
        (["kernels"], {"LIMIT": "3"}, 1, dict.fromkeys(KERNELS, "no time left")),
        (["tune"], {"LIMIT": "6", "SLOW": " tune "}, 1, {"tune": "time limit"}),
        (["suite"], {"FAILS": "import xdist"}, 0, {}),
    ],
    ids=["all", "two", "fails", "no_counters", "no_profile", "no_time", "late", "no_xdist"],
)
def test_status_and_results(
    groups: list[str], environment: dict[str, str], status: int, states: dict[str, str], tools: Path, tmp_path: Path
) -> None:
    fixed = {"PATH": str(tools), "TMPDIR": str(tmp_path), "OUT": str(tmp_path / "out")}
    done = gpu_script(*groups, **fixed, **environment)
    assert done.returncode == status and not done.stderr, (done.stdout, done.stderr)
    run = groups or ["kernels", "suite", "tune", "bench"]
    parts = {"kernels": KERNELS, "suite": ["tests-others"], "tune": ["tune"], "bench": BENCH}
    expected = {part: "ok" for group in parts if group in run for part in parts[group]} | states
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.tar.gz"]
    files = unpacked(tmp_path / "out" / "results.tar.gz")
    assert {part["part"]: part["status"] for part in json.loads(files[f"summary-{'-'.join(run)}.json"])} == expected
    ran = {part for part, state in expected.items() if state != "no time left"}
    assert {f"{part}.log" for part in ran} | {"doctor.json"} <= files.keys()
    assert ("cache/table.json" in files) == ("tune" in ran and "SLOW" not in environment)


def test_what_an_earlier_run_left_is_used_and_comes_back(tools: Path, tmp_path: Path) -> None:
    for group in ("tune", "bench", "tune"):
        environment = {"PATH": str(tools), "TMPDIR": str(tmp_path), "OUT": str(tmp_path / group)}
        assert gpu_script(group, **environment).returncode == 0
    assert {"cache/table.json", "tune.log", "headline.log"} <= unpacked(tmp_path / "bench" / "results.tar.gz").keys()
    files = unpacked(tmp_path / "tune" / "results.tar.gz")
    assert b"of frozen" in files["summary-bench.txt"] and b"of frozen" not in files["summary-tune.txt"]


def unpacked(archive: Path) -> dict[str, bytes]:
    """What is in its only folder, which is named after the day and the device."""
    with tarfile.open(archive) as tar:
        files = {member.name: tar.extractfile(member) for member in tar.getmembers() if member.isfile()}
        (folder,) = {name.partition("/")[0] for name in files}
        assert folder.endswith("-Fake-GPU-1")
        return {name.partition("/")[2]: file.read() for name, file in files.items() if file is not None}


def test_no_python(tools: Path) -> None:
    (tools / "python3").unlink()
    done = gpu_script(PATH=str(tools))
    assert done.returncode == 2 and done.stderr == "there is no python on the path: name one with PYTHON=\n"


def test_wrong_argument(tmp_path: Path) -> None:
    done = gpu_script("--fast", OUT=str(tmp_path / "out"))
    assert done.returncode == 2 and done.stderr.startswith("usage:")
