"""The compile report, on toy kernels whose verdicts are known."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lorakernels.backend import BackendError
from lorakernels.configs.config import KernelConfig
from lorakernels.kernels.launch import Launch
from lorakernels.kernels.tiles import Matrix
from lorakernels.tools import compile_report
from lorakernels.tools.arch import ARCHS
from lorakernels.tools.compile_report import CompileRow
from lorakernels.tools.machine_code import Tile, loop_tiles, narrow_loads, read_amd, read_nvidia, sass_load_bytes
from lorakernels.tools.processes import in_processes

TESTS = Path(__file__).resolve().parent
BOTH = ["sm_90", "gfx942"]  # of each compiler one


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the toys print. Another process, because this one may run Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parents[1]), environment.get("PYTHONPATH", "")])
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
        assert row["bytes_in_flight"] == 64 * 2 * 2 * 64 * 64 * 2  # programs, two of three stages, two tiles
        assert 0.001 < row["issue_per_byte"] < 0.1


def test_too_much_shared_memory_is_told(report: Any) -> None:
    rows = rows_of(report, "matmul", BLOCK_M=128)
    assert list(rows) == BOTH
    for arch, row in rows.items():
        limit = ARCHS[arch].shared_per_block
        assert not row["ok"] and row["shared_bytes"] > limit and row["ctas_per_sm"] == 0
        assert f"{row['shared_bytes']} bytes of shared memory, over the limit of {limit} a block" in row["why"]


def test_narrow_loads_in_the_main_loop_are_told(report: Any) -> None:
    rows = rows_of(report, "narrow", BLOCK_M=1024)
    assert list(rows) == BOTH
    for row in rows.values():
        assert not row["ok"] and row["narrowest_load_bytes"] == 2
        assert row["why"] == "loads 2 bytes at a time in its main loop, where 16 would do"


def test_narrow_loads_of_what_is_not_aligned_are_no_fault(report: Any) -> None:
    (row,) = rows_of(report, "narrow", BLOCK_M=1000).values()
    assert row["ok"] and row["narrowest_load_bytes"] == 2


@pytest.mark.parametrize(
    ("args", "aligned"),
    [
        ({"N": 64, "stride_n": 1, "M": 7}, True),
        ({"N": 64, "stride_n": 3}, False),
        ({"cols": (64, 128), "strides_col": (1, 1), "strides_rank": (64, 128)}, True),
        ({"cols": (64, 100)}, False),
        ({"cols": (1, 64)}, False),
        ({"pairs": ((Matrix(None, None, 64, (64, 1)), Matrix(None, 64, 32, (1, 64))),)}, True),
        ({"x": Matrix(None, 1, 64, (64, 1))}, False),
    ],
)
def test_sizes_of_several_tensors_are_aligned_if_each_is(args: dict[str, Any], aligned: bool) -> None:
    free = [SimpleNamespace(name="M", do_not_specialize=True)]
    launch = Launch(SimpleNamespace(params=free), (1,), args, {}, KernelConfig())
    assert compile_report._aligned(launch) == aligned


def test_a_product_off_the_matrix_units_is_told(report: Any) -> None:
    rows = rows_of(report, "linear_expand_toy", BLOCK_N=16)
    assert list(rows) == BOTH
    for row in rows.values():
        assert not row["ok"] and row["tensor_core"] is None
        assert "a 16-bit matrix product without the matrix units" in row["why"]


@pytest.mark.parametrize("waits", [1, 4])
def test_a_large_product_waits_once(waits: int) -> None:
    """Where halves of an accumulator were accumulators, ptxas waited for each matrix instruction."""
    loop = [line for n in range(4) for line in ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24", f"IADD3 R{n}, R1, R2")]
    loop[-waits:] = ["WARPGROUP.DEPBAR gsb0, 0x1"] * waits
    code = read_nvidia("REG:168 STACK:0", sass(".L_x_0:", "UTMALDG.2D [UR8]", *loop, "@P1 BRA .L_x_0", "EXIT"))
    launch = Launch(None, (1,), {"x": torch.empty(1024, 64, dtype=torch.bfloat16), "M": 1024}, {}, KernelConfig())
    faults = compile_report._product_faults(launch, "linear_expand_tma_kernel", "sm_90", code)
    assert code.waits == waits and bool(faults) == (waits > 1)


def test_a_large_product_must_load_by_tma(report: Any) -> None:
    (large,) = rows_of(report, "linear_expand_toy", BLOCK_M=1024).values()
    (twin,) = rows_of(report, "linear_expand_toy", BLOCK_M=512).values()  # the same code under another config
    assert twin == large | {"config": twin["config"]}
    assert (large["tensor_core"], large["tma"], large["ok"]) == ("wgmma", False, False)
    assert large["why"] == "a large aligned product that does not load by TMA"
    (small,) = rows_of(report, "linear_expand_toy", BLOCK_M=1008).values()
    assert small["ok"]


def test_spills_are_told(report: Any) -> None:
    rows = rows_of(report, "spiller")
    assert list(rows) == BOTH
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
    with pytest.raises(BackendError, match="Unset TRITON_INTERPRET"):
        compile_report.compile_report([Launch(object(), (1,), {}, {}, KernelConfig())], ["sm_90"])


def sass(*lines: str) -> str:
    """As nvdisasm prints the instructions among these lines; the others are labels that they jump to."""
    code, labels = [], {}
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = f"0x{16 * len(code):x}"
        else:
            code.append(line)
    text = "\n".join(f"        /*{16 * n:04x}*/   {line} ;" for n, line in enumerate(code))
    return re.sub(r"\.L\w+", lambda label: labels[label[0]], text)


def test_a_stack_frame_alone_is_no_spill() -> None:
    code = read_nvidia("REG:40 STACK:16 SHARED:0", sass("@!P0 LDG.E.U16.CONSTANT R1, desc[UR4][R2.64]", "EXIT"))
    assert (code.registers, code.spill_bytes, code.spills, code.loads) == (40, 0, "", ())


def test_sass_is_read() -> None:
    lines = ["STL.64 [R1+0x8], R4", "@P1 UTMALDG.2D [UR8], [UR4]", "HMMA.16816.F32 R4, R4", "HGMMA.64x64x16.F32 R4"]
    code = read_nvidia("REG:168 STACK:32 SHARED:1024", sass(*lines))
    assert (code.spill_bytes, code.tensor_core, code.tma, code.async_copy) == (32, "wgmma", True, False)


def test_the_main_loop_of_sass() -> None:
    """Of a prologue, a loop over the rank, the main loop with a wait that lies behind the code, and an epilogue."""
    code = sass(
        "LDG.E.U16 R0",
        ".L_x_0:", "LDG.E.64 R1", "HMMA.16816.F32 R4", "@P0 BRA .L_x_0",
        ".L_x_1:", "LDGSTS.E.BYPASS.128 [R1]", "SYNCS.PHASECHK P1", "@!P1 BRA .L_x_9",
        ".L_x_2:", "HMMA.16816.F32 R4", "HMMA.16816.F32 R8", "LDG.E.64 R2", "@P0 BRA .L_x_1",
        "LDG.E R3", "HMMA.16816.F32 R4", "HMMA.16816.F32 R5", "HMMA.16816.F32 R6", "EXIT",
        ".L_x_9:", "SYNCS.PHASECHK P1", "@!P1 BRA .L_x_9", "BRA .L_x_2",
        ".L_x_10:", "BRA .L_x_10",
    )  # fmt: skip
    assert read_nvidia("REG:1 STACK:0", code).loads == (16, 8)


def test_without_products_the_largest_loop_that_loads_counts() -> None:
    code = sass(
        ".L_x_0:", "LDG.E R1", "@P0 BRA .L_x_0", ".L_x_1:", "LDG.E.128 R1", "FADD R2", "@P0 BRA .L_x_1",
        ".L_x_2:", "FADD R2", "FADD R2", "FADD R2", "FADD R2", "FADD R2", "@P0 BRA .L_x_2", "EXIT",
    )  # fmt: skip
    assert read_nvidia("REG:1 STACK:0", code).loads == (16,)


@pytest.mark.parametrize(
    ("instruction", "size"),
    [("LDG.E", 4), ("LDG.E.U8", 1), ("LDG.E.64.CONSTANT", 8), ("LDGSTS.E.BYPASS.LTC128B.128", 16), ("LDGSTS.E", 4)],
)
def test_width_of_a_sass_load(instruction: str, size: int) -> None:
    assert sass_load_bytes(instruction) == size


def test_amdgcn_is_read() -> None:
    numbers = {"vgpr_count": 130, "vgpr_spill_count": 0, "sgpr_spill_count": 3, "private_segment_fixed_size": 8}
    lines = ["\tglobal_load_ubyte v1, v[2:3], off", ".LBB0_1:"]
    lines += ["\tbuffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen", "\tglobal_load_ushort v1, v[2:3], off"]
    lines += ["\tbuffer_load_dword v1, s[0:3], 0 offen lds", "\ts_cbranch_scc1 .LBB0_1", "\ts_endpgm"]
    code = read_amd("\n".join([*lines, *(f"    .{k}: {v}" for k, v in numbers.items())]))
    assert (code.registers, code.spill_bytes, code.loads, code.async_copy) == (130, 8, (16, 2, 4), True)
    assert code.spills == "spills 0 vector and 3 scalar registers (8 bytes a thread)"


TTGIR = """
    %s = scf.for %k = %0 to %R step %1 iter_args(%a = %b) -> (tensor<64x64xf32, #mma>)  : i32 {
      %t = tt.load %p, %m : tensor<64x16x!tt.ptr<bf16>, #blocked> loc(#loc)
      %d = tt.dot %t, %u, %a : tensor<64x16xbf16, #l> * tensor<16x64xbf16, #r> -> tensor<64x64xf32, #mma>
    } loc(#loc)
    %y = scf.for %k = %0 to %K step %1 iter_args(%a = %b) -> (tensor<64x64xf32, #mma>)  : i32 {
      %x = ttg.async_copy_global_to_local %p, %q mask %m : tensor<64x32x!tt.ptr<bf16>, #b> -> <64x32xbf16, #shared>
      %w = amdg.buffer_load %p[%o], %m stride = %s : !tt.ptr<i8> -> tensor<64x8xi8, #blocked>
      %row = tt.broadcast %q : tensor<1x32x!tt.ptr<bf16>, #b> -> tensor<64x32x!tt.ptr<bf16>, #b>
      %v = tt.load %row, %m : tensor<64x32x!tt.ptr<bf16>, #b>
      %d = tt.dot %t, %u, %a : tensor<64x32xbf16, #l> * tensor<32x64xbf16, #r> -> tensor<64x64xf32, #mma>
      scf.if %c {
      }
    } loc(#loc)
"""


def test_tiles_of_the_loop_with_the_largest_product() -> None:
    assert loop_tiles(TTGIR) == (Tile(64 * 32, 2), Tile(64 * 8, 1))
    assert loop_tiles("") == ()


@pytest.mark.parametrize(
    ("loads", "tiles", "fault"),
    [
        # By 128 threads: 64 bytes a thread, then 16.
        ([16] * 5, [(4096, 2), (1024, 2)], ""),
        ([16] * 4 + [8, 8], [(4096, 2), (1024, 2)], "loads 8 bytes at a time in its main loop, where 16 would do"),
        ([16] * 4 + [8], [(4096, 2), (512, 2)], ""),  # 8 bytes are all that a thread has of the second
        ([16] * 4 + [4, 4], [(4096, 2), (512, 2)], "loads 4 bytes at a time in its main loop, where 8 would do"),
        ([8] * 8 + [8], [(4096, 2), (512, 2)], "loads 0 bytes a thread by 16 in its main loop, where 64 could be"),
        ([16] * 4 + [1] * 4, [(4096, 2), (512, 1)], ""),  # dropout's mask
        ([2], [], "loads 2 bytes at a time in its main loop, where 16 would do"),
        ([], [], ""),  # all by TMA
    ],
)
def test_narrow_loads(loads: list[int], tiles: list[tuple[int, int]], fault: str) -> None:
    assert narrow_loads(loads, [Tile(*tile) for tile in tiles], 128) == fault


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
    assert ARCHS[arch].blocks_per_sm(registers, shared, columns, warps) == blocks


@pytest.mark.parametrize(
    ("name", "dtype", "tokens", "cols", "in_flight", "starves"),
    [
        ("shrink_kernel", torch.bfloat16, 8192, 4096, 1 << 20, True),
        ("shrink_kernel", torch.bfloat16, 8192, 4096, 3 << 20, False),  # an H200's 4.8 TB/s for 500 ns are 2.4 MB
        ("shrink_kernel", torch.bfloat16, 64, 4096, 1 << 20, False),
        ("shrink_kernel", torch.bfloat16, 8192, 97, 1 << 20, False),
        ("shrink_kernel", torch.float32, 8192, 4096, 1 << 20, False),
        ("outer_kernel", torch.bfloat16, 8192, 4096, None, True),
        ("multi_expand_kernel", torch.bfloat16, 8192, 4096, 1 << 20, False),
    ],
)
def test_a_pass_that_starves_is_told(
    name: str, dtype: torch.dtype, tokens: int, cols: int, in_flight: int | None, starves: bool
) -> None:
    args = {"x_ptr": torch.empty(0, dtype=dtype), "M": tokens, "cols": cols}
    free = [SimpleNamespace(name="M", do_not_specialize=True)]
    launch = Launch(SimpleNamespace(params=free), (1,), args, {}, KernelConfig())
    task = compile_report._Task(launch, ARCHS["sm_90"], SimpleNamespace(name=name), {})
    assert bool(compile_report._starves(task, in_flight)) == starves


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_crash_of_the_compiler_costs_its_own_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_or_crash(tasks: Any) -> list[CompileRow]:
        if any(task.source.name == "crashes" for task in tasks):
            os._exit(1)
        return [task.row(ok=True) for task in tasks]

    monkeypatch.setattr(compile_report, "_compile", compile_or_crash)
    launch = Launch(object(), (1,), {"x_ptr": torch.empty(0)}, {}, KernelConfig())
    names = ["a", "crashes", "b", "crashes", "c"]
    kernels = [compile_report._Task(launch, ARCHS["sm_90"], SimpleNamespace(name=name), {}) for name in names]
    monkeypatch.setattr(compile_report._Task, "key", property(lambda task: id(task)))
    rows = list(compile_report._report(kernels, jobs=2).values())
    assert [row.ok for row in rows] == [name != "crashes" for name in names]
    assert rows[1].why == "does not compile: the compiler crashed"


def test_what_goes_wrong_in_a_process_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_processes(lambda index: 1 // index, 3, jobs=2))
    assert sorted(in_processes(lambda index: index * index, 4, jobs=2)) == [(0, 0), (1, 1), (2, 4), (3, 9)]
    assert list(in_processes(lambda index: index * index, 3, jobs=1)) == [(0, 0), (1, 1), (2, 4)]
    assert list(in_processes(lambda index: index, 0, jobs=2)) == []
