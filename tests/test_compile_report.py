"""The compile report, on toy kernels whose verdicts are known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from lorakernels.kernels.launch import Launch
from lorakernels.tuning import compile_report
from lorakernels.tuning.compile_report import ARCHS, CompileRow
from lorakernels.tuning.config import KernelConfig

TESTS = Path(__file__).resolve().parent
NVIDIA = ["sm_80", "sm_90", "sm_100"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the toys print. Another process, because this one may run Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), environment.get("PYTHONPATH", "")])
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(TESTS / "compile_report_toys.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Compile report" in done.stderr
    return json.loads(done.stdout)


def rows_of(report: Any, kernel: str, **config: int) -> dict[str, Any]:
    """The rows by architecture of one kernel, with no architecture twice."""
    rows = [r for r in report["rows"] if r["kernel"] == kernel and config.items() <= r["config"].items()]
    by_arch = {row["arch"]: row for row in rows}
    assert len(by_arch) == len(rows)
    return by_arch


def test_arguments_are_specialised_as_a_launch_would(report: Any) -> None:
    signature = report["signature"]
    assert [signature[name] for name in ("x_ptr", "M", "scale")] == ["*bf16", "i32", "fp32"]
    assert {name for name, kind in signature.items() if kind == "constexpr"} == {
        "bias_ptr", "stride_xk", "BLOCK_M", "BLOCK_N", "BLOCK_K",
    }  # fmt: skip


def test_a_good_kernel_is_ok_everywhere(report: Any) -> None:
    rows = rows_of(report, "matmul", BLOCK_M=64)
    assert list(rows) == list(ARCHS)
    cores = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    assert {arch: row["tensor_core"] for arch, row in rows.items()} == cores
    for arch, row in rows.items():
        assert (row["ok"], row["why"], row["dtype"], row["spill_bytes"]) == (True, "", "bfloat16", 0)
        assert 32 <= row["registers"] <= 255
        assert 0 < row["shared_bytes"] <= ARCHS[arch].shared_per_block
        assert row["narrowest_load_bytes"] == 16
        assert row["async_copy"] == (arch != "gfx942") and not row["tma"]
        assert row["ctas_per_sm"] >= 2


def test_too_much_shared_memory_is_told(report: Any) -> None:
    rows = rows_of(report, "matmul", BLOCK_M=128)
    assert list(rows) == list(ARCHS)
    for arch, row in rows.items():
        limit = ARCHS[arch].shared_per_block
        assert not row["ok"] and row["shared_bytes"] > limit and row["ctas_per_sm"] == 0
        assert f"{row['shared_bytes']} bytes of shared memory, over the limit of {limit} a block" in row["why"]


def test_spills_are_told(report: Any) -> None:
    rows = rows_of(report, "spiller")
    assert sorted(rows) == sorted(ARCHS)
    for row in rows.values():
        assert not row["ok"] and row["spill_bytes"] > 0 and row["tensor_core"] is None
        assert row["why"].startswith("spills ")


def test_what_does_not_compile_says_why(report: Any) -> None:
    rows = rows_of(report, "refused")
    assert list(rows) == list(ARCHS)
    for row in rows.values():
        assert (row["ok"], row["registers"], row["why"]) == (False, None, "does not compile: only 32 will do")


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="Unset TRITON_INTERPRET"):
        compile_report.compile_launch(Launch(object(), (1,), {}, {}, KernelConfig()), "sm_90")


def read_sass(monkeypatch: pytest.MonkeyPatch, usage: str, *instructions: str) -> Any:
    sass = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(instructions))
    monkeypatch.setattr(compile_report, "_tool", lambda path, option, file: usage if "usage" in option else sass)
    return compile_report._read_nvidia(SimpleNamespace(asm={"cubin": b""}))


def test_a_stack_frame_alone_is_no_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    code = read_sass(monkeypatch, "REG:40 STACK:16 SHARED:0", "@!P0 LDG.E.U16.CONSTANT R1, desc[UR4][R2.64]", "EXIT")
    assert (code.registers, code.spill_bytes, code.spills, code.narrowest_load_bytes) == (40, 0, "", 2)


def test_sass_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["STL.64 [R1+0x8], R4", "@P1 UTMALDG.2D [UR8], [UR4]", "HMMA.16816.F32 R4, R4", "HGMMA.64x64x16.F32 R4"]
    code = read_sass(monkeypatch, "REG:168 STACK:32 SHARED:1024", *lines)
    assert (code.spill_bytes, code.tensor_core, code.tma, code.async_copy) == (32, "wgmma", True, False)
    assert code.narrowest_load_bytes is None


@pytest.mark.parametrize(
    ("instruction", "size"),
    [("LDG.E", 4), ("LDG.E.U8", 1), ("LDG.E.64.CONSTANT", 8), ("LDGSTS.E.BYPASS.LTC128B.128", 16), ("LDGSTS.E", 4)],
)
def test_width_of_a_sass_load(instruction: str, size: int) -> None:
    assert compile_report._sass_load_bytes(instruction) == size


def test_amdgcn_is_read() -> None:
    numbers = {"vgpr_count": 130, "vgpr_spill_count": 0, "sgpr_spill_count": 3, "private_segment_fixed_size": 8}
    lines = ["\tbuffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen", "\tglobal_load_ushort v1, v[2:3], off"]
    lines += ["\tbuffer_load_dword v1, s[0:3], 0 offen lds", *(f"    .{k}: {v}" for k, v in numbers.items())]
    code = compile_report._read_amd("\n".join(lines))
    assert (code.registers, code.spill_bytes, code.narrowest_load_bytes, code.async_copy) == (130, 8, 2, True)
    assert code.spills == "spills 0 vector and 3 scalar registers (8 bytes a thread)"


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "columns", "warps", "blocks"),
    [
        ("sm_90", 168, 225304, 0, 8, 1),  # shared memory
        ("sm_90", 128, 0, 0, 4, 4),  # registers
        ("sm_90", 129, 0, 0, 4, 3),  # three warps of 136 registers a lane fit a scheduler
        ("sm_80", 32, 0, 0, 1, 32),  # blocks
        ("sm_80", 32, 0, 0, 8, 8),  # warps
        ("sm_100", 64, 0, 129, 4, 2),  # tensor memory: 129 columns take 256
        ("gfx942", 98, 0, 0, 8, 2),  # four waves a SIMD
        ("gfx942", 512, 0, 0, 4, 1),
        ("gfx942", 64, 32768, 0, 4, 2),
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, columns: int, warps: int, blocks: int) -> None:
    assert compile_report._ctas_per_sm(ARCHS[arch], registers, shared, columns, warps) == blocks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_crash_of_the_compiler_costs_its_own_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_or_crash(task: Any) -> CompileRow:
        if task.source.name == "crashes":
            os._exit(1)
        return task.row(ok=True)

    monkeypatch.setattr(compile_report, "_compile", compile_or_crash)
    launch = Launch(object(), (1,), {}, {}, KernelConfig())
    names = ["a", "crashes", "b", "crashes", "c"]
    tasks = [compile_report._Task(launch, ARCHS["sm_90"], SimpleNamespace(name=name), {}) for name in names]
    rows = dict(compile_report._compile_in_processes(tasks, jobs=2))
    assert [rows[index].ok for index in range(len(names))] == [name != "crashes" for name in names]
    assert rows[1].why == "does not compile: the compiler crashed"
