"""The command line: help, exit statuses, messages, and the doctor."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakernels import __version__, cli
from lorakernels.backend import ENVIRONMENT, BackendError
from lorakernels.tools import doctor

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = not torch.cuda.is_available()
CHECKS = 2 * (1 + torch.cuda.device_count())


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", ENVIRONMENT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that ends with status 2."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\n") and err.count("\n") == 1 and err.startswith("lorakernels: ")
    return err.removeprefix("lorakernels: ").rstrip("\n")


# ------------------------------------------------------------------------------------------- the command itself


def test_help_names_every_command_and_starts_no_torch() -> None:
    code = "import sys\nfrom lorakernels.cli import main\n"
    done = run_python("-c", code + "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr
    for command in cli.COMMANDS:
        assert command.name in done.stdout and (command.run.__doc__ or "-").split(",")[0] in done.stdout


def test_version_of_the_module() -> None:
    done = run_python("-m", "lorakernels", "--version")
    assert (done.returncode, done.stdout) == (0, f"lorakernels {__version__}\n")


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["demo", "--impl", "cuda"], ["doctor", "extra"]])
def test_wrong_arguments_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2
    assert "usage: lorakernels" in capsys.readouterr().err


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(cli, "COMMANDS", [cli.Command("fail", (), run)])


@pytest.mark.parametrize(
    "error", [ValueError("said so"), KeyError("said so"), OSError("said\nso"), BackendError("said so")], ids=repr
)
def test_a_mistake_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(error, monkeypatch)
    assert mistake(capsys, "fail") == "said so"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(TypeError("a bug"), monkeypatch)
    with pytest.raises(TypeError, match="a bug"):
        cli.main(["fail"])


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raising(KeyboardInterrupt(), monkeypatch)
    assert cli.main(["fail"]) == 130
    assert capsys.readouterr().err == "lorakernels: interrupted\n"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise there")
@pytest.mark.parametrize("unbuffered", [[], ["-u"]], ids=["", "unbuffered"])
@pytest.mark.parametrize(
    "arguments", [["tune", "--dry-run", "--shapes", "64x64x64x8", "--jobs", "1"], ["bench", "list"]], ids=" ".join
)
def test_a_reader_that_has_gone_is_no_mistake(arguments: list[str], unbuffered: list[str]) -> None:
    """As `head` does: nobody reads what is printed."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, *unbuffered, "-m", "lorakernels", *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_broken_pipe_is_a_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raising(BrokenPipeError("of a process that died"), monkeypatch)
    assert cli.main(["fail"]) == 2
    assert capsys.readouterr().err == "lorakernels: of a process that died\n"


# ------------------------------------------------------------------------------------------- demo


def test_demo_with_wrong_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected at least 1" in mistake(capsys, "demo", "--out", str(tmp_path), "--steps", "0")
    assert "seed is -1" in mistake(capsys, "demo", "--out", str(tmp_path), "--seed", "-1")


def test_demo_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    assert "taken" in mistake(capsys, "demo", "--out", str(tmp_path / "taken"))


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_demo_without_its_extra(
    module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = mistake(capsys, "demo", "--out", str(tmp_path / "out"))
    assert package in message and 'pip install "lorakernels[demo]"' in message
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_demo_with_triton_and_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    message = mistake(capsys, "demo", "--out", str(tmp_path / "out"), "--impl", "triton")
    assert message.startswith('impl="triton" cannot run')
    assert ENVIRONMENT not in os.environ and not (tmp_path / "out").exists()


def test_demo_exits_with_1_when_a_claim_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakernels.tools import demo

    monkeypatch.setattr(demo, "BASE_STEPS", 1)
    assert cli.main(["demo", "--out", str(tmp_path), "--steps", "1", "--impl", "torch"]) == 1
    assert "FAILED: 1 of" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- doctor


def doctor_json(capsys: pytest.CaptureFixture[str], status: int) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert cli.main(["doctor", "--json"]) == status
    return json.loads(capsys.readouterr().out, parse_constant=refuse)


@pytest.mark.parametrize("interpreter", [True, False])
def test_doctor_json(interpreter: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreter)))
    found = doctor_json(capsys, 0)
    assert found["ok"] is True
    assert found["interpreter"] is interpreter and found["environment_valid"] is True
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["lorakernels"] == __version__
    assert found["devices"][0]["name"] == "cpu" and found["devices"][0]["threads"] == torch.get_num_threads()
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    cpu = [choice for choice in found["choices"] if choice["device"] == "cpu"]
    assert {choice["impl"] for choice in cpu} == {"torch"} and all(choice["why"] for choice in cpu)
    assert len(found["checks"]) == CHECKS
    vllm = found["versions"]["vllm"]
    assert "not installed" in found["vllm_plugin"] if vllm is None else str(vllm) in found["vllm_plugin"]
    assert all(check["ok"] and 0 < check["error"] <= check["limit"] for check in found["checks"])
    assert all(problem["what"] and problem["mend"] for problem in found["problems"])


def test_doctor_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in (torch.__version__, "Devices", "threads", "Self-check", "✓ cpu float32 torch: error"):
        assert word in out
    assert "FAILED" not in out


def test_doctor_checks_the_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv(ENVIRONMENT, "triton")
    if NO_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        found = doctor_json(capsys, 0)
        assert {check["impl"] for check in found["checks"]} == {"triton"}
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        found = doctor_json(capsys, 1)
        assert all(check["ok"] is check["device"].startswith("cuda") for check in found["checks"])


def test_doctor_with_an_unknown_implementation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENVIRONMENT, "tritn")
    found = doctor_json(capsys, 1)
    assert found["ok"] is found["environment_valid"] is False
    assert found["problems"][0]["what"] == f"{ENVIRONMENT} is 'tritn'"
    assert all(choice["impl"] is None and "tritn" in choice["why"] for choice in found["choices"])
    assert all(not check["ok"] and "tritn" in check["why"] for check in found["checks"])
    assert cli.main(["doctor"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_doctor_finds_wrong_results(
    factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = doctor.lora_linear
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr(doctor, "lora_linear", lambda *args, **kwargs: factor * sound(*args, **kwargs))
    checks = doctor_json(capsys, 1)["checks"]
    assert not any(check["ok"] for check in checks if check["dtype"] == "float32")


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda package: None if package in ("peft", "numpy") else real(package))
    monkeypatch.setitem(doctor.OLDEST, "triton", (999, 0))
    mends = [problem["mend"] for problem in doctor.examine()["problems"]]
    assert "pip install numpy" in mends and 'pip install "lorakernels[peft]"' in mends
    assert ('pip install --upgrade "triton>=999.0"' in mends) is (real("triton") is not None)


# ------------------------------------------------------------------------------------------- inspect, convert, merge

MLX_SHAPES = (("a", (3, 2)), ("b", (2, 4)))


@pytest.fixture
def mlx_adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "mlx"
    folder.mkdir()
    tensors = {f"layers.{n}.q.lora_{half}": torch.ones(*shape) for n in (0, 1) for half, shape in MLX_SHAPES}
    save_file(tensors, folder / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 0.5}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_convert_inspect_and_merge(mlx_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, model, merged = (str(tmp_path / name) for name in ("peft", "model", "merged"))
    os.mkdir(model)
    weights = {f"layers.{n}.q.weight": torch.zeros(4, 3, dtype=torch.bfloat16) for n in (0, 1)}
    save_file(weights, tmp_path / "model" / "model.safetensors")

    assert cli.main(["convert", str(mlx_adapter), "--to", adapter]) == 0
    assert capsys.readouterr().out == f"{adapter}\n"
    assert cli.main(["inspect", adapter, "--plot", str(tmp_path / "spectrum.png")]) == 0
    out = capsys.readouterr().out
    assert "layers.*.q" in out and "format: peft" in out and "28 (112 bytes, float32)" in out
    assert (tmp_path / "spectrum.png").stat().st_size > 0
    assert cli.main(["inspect", adapter, "--json"]) == 0
    # All ones: B A is 2 everywhere, and 0.5 · 2 · √(4 · 3) is its one singular value.
    update = json.loads(capsys.readouterr().out)["updates"][0]
    assert abs(update["spectral"] - 12**0.5) < 1e-9 and abs(update["effective_rank"] - 1) < 1e-6
    assert cli.main(["merge", "--model", model, "--adapter", adapter, "--out", merged, "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == f"{merged}\n"
    assert torch.equal(load_file(f"{merged}/model.safetensors")["layers.1.q.weight"], torch.ones(4, 3))


def test_mistakes_with_files(mlx_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert "does not exist" in mistake(capsys, "inspect", nowhere)
    assert "does not exist" in mistake(capsys, "convert", nowhere, "--to", str(tmp_path / "out"))
    assert "is what is read" in mistake(capsys, "convert", str(mlx_adapter), "--to", str(mlx_adapter))
    merge = ("merge", "--adapter", str(mlx_adapter), "--out", str(tmp_path / "out"), "--model")
    assert "is not a folder" in mistake(capsys, *merge, nowhere)
    assert "png" in mistake(capsys, "inspect", str(mlx_adapter), "--plot", str(tmp_path / "spectrum.txt"))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- tune, compile-report


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_tune_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.json"
    message = mistake(capsys, "tune", "--shapes", "64x64x64x8", "--out", str(out))
    assert "no GPU here" in message and "--dry-run" in message and not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "64x64x64"), "shape '64x64x64'; expected four numbers, MxNxKxr"),
        (("--shapes", "64x64x-1x8"), "expected four numbers"),
        (("--shapes", "0x64x64x8"), "expected numbers of at least 1"),
        (("--shapes", "8x64x64x8", "--dropout", "1"), "dropout is 1.0"),
        (("--shapes", "8x64x64x8", "--arch", "sm_12"), "unknown architecture 'sm_12'; expected one of sm_80"),
        (("--set", "huge"), "there is no set 'huge'"),
    ],
)
def test_tune_with_wrong_arguments(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in mistake(capsys, "tune", "--dry-run", *arguments)


@pytest.mark.skipif(not NO_GPU, reason="the candidates would be compiled")
def test_tune_dry_run_prints_the_candidates(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--dry-run", "--shapes", "4096x512x512x16", "--arch", "sm_90"]) == 0
    out = capsys.readouterr().out
    for operation in ("shrink", "outer", "linear_expand"):
        assert f"{operation} M=4096 N=512 K=512 r=16 bfloat16 on NVIDIA H100 80GB HBM3: " in out
    assert "tma, 1 programs\n" in out and "cublas\n" in out and " candidates, " in out and "to be measured\n" in out


@pytest.mark.skipif(not NO_GPU, reason="kernels are not interpreted")
def test_compile_report_in_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Unset TRITON_INTERPRET" in mistake(capsys, "compile-report", "--arch", "sm_90")
    assert "unknown architecture 'sm_1'" in mistake(capsys, "compile-report", "--arch", "sm_1")


def test_compile_report() -> None:
    only = ("-m", "lorakernels", "compile-report", "--arch", "sm_80", "--kernel")
    done = run_python(*only, "sum_planes_kernel", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {(row["kernel"], row["arch"], row["ok"]) for row in rows} == {("sum_planes_kernel", "sm_80", True)}
    assert max(row["narrowest_load_bytes"] for row in rows) == 8
    done = run_python(*only, "no_such_kernel")
    assert (
        done.returncode == 2 and "there is no kernel 'no_such_kernel'; kernels: expert_adapters_kernel" in done.stderr
    )
