"""Launches on a driver that only checks: what is shipped is taken, what a driver would refuse is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from lorakernels.backend import BackendError

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
PREPARE = """
    import collections, ctypes, json, sys
    import torch
    from lorakernels.testing import driver
    checked = driver.install(ARCH)
"""


def in_a_process(code: str, arch: str = "sm_90") -> Any:
    """What `code` prints as JSON. In a process of its own: kernels are compiled there, and the driver stays."""
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "cc", "clang")))):
        pytest.skip("the driver that checks is built with a C compiler, and there is none")
    script = textwrap.dedent(PREPARE.replace("ARCH", repr(arch))) + textwrap.dedent(code)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_every_shipped_launch_is_taken(arch: str) -> None:
    found = in_a_process(
        """
        from lorakernels.tools.steps import shipped_launches
        launches = shipped_launches()
        driver.replay(launches)
        names = collections.Counter(launched.kernel for launched in checked.launches)
        asked = collections.Counter(launch.kernel.__name__ for launch in launches)
        dependent = [sum(launched.dependent for launched in checked.launches)]
        dependent += [sum(launch.constexprs.get("DEPENDENT", False) for launch in launches)]
        print(json.dumps([names, asked, checked.num_maps, checked.refusals, dependent]))
        """,
        arch,
    )
    names, asked, num_maps, refusals, dependent = found
    assert dependent[0] == dependent[1] and (dependent[0] > 0) == (arch == "sm_90")
    assert refusals == [] and names == asked and sum(names.values()) > 500
    assert (num_maps > 0) == ("linear_expand_tma_kernel" in names) == (arch == "sm_90")
    assert names.get("linear_expand_gluon_kernel", 0) == (2 if arch == "sm_90" else 0)  # y and dx


def test_headline_and_decode_are_taken() -> None:
    """Through the public functions, on the CPU's tensors: TMA and wgmma, tuples of three slices, pages and stacks."""
    found = in_a_process(
        """
        import lorakernels as lk

        def empty(*shape):
            return torch.empty(shape, dtype=torch.bfloat16)

        x, weight = empty(8192, 4096).requires_grad_(), empty(4096, 4096)
        A, B = empty(16, 4096).requires_grad_(), empty(4096, 16).requires_grad_()
        y = lk.lora_linear(x, weight, A, B, dropout_p=0.1, impl="triton")
        y.backward(empty(8192, 4096))
        for paged in (True, False):
            plan = lk.BatchPlan(64, 64, max_rank=16, num_pages=1024 if paged else None)
            table = torch.arange(1024).view(64, 16).int() if paged else None
            plan.update(torch.arange(64), torch.full((64,), 16), torch.full((64,), 2.0), table)
            sizes = (4096, 1024, 1024)
            As = [empty(1024, 4096) if paged else empty(64, 16, 4096) for _ in sizes]
            Bs = [empty(1024, N) if paged else empty(64, N, 16) for N in sizes]
            lk.multi_lora_linear(empty(64, 4096), [empty(N, 4096) for N in sizes], As, Bs, plan, impl="triton")
        launched = [[each.kernel, each.grid, each.threads, each.shared] for each in checked.launches]
        print(json.dumps([launched, checked.num_maps, checked.refusals]))
        """
    )
    launched, num_maps, refusals = found
    assert refusals == []
    kernels = [kernel for kernel, *_ in launched]
    assert kernels.count("linear_expand_tma_kernel") == 2  # y and dx
    assert kernels.count("multi_shrink_token_kernel") == kernels.count("multi_expand_token_kernel") == 2
    assert num_maps == 6  # x, W and y, and the same of dx
    expand = next(rest for kernel, *rest in launched if kernel == "linear_expand_tma_kernel")
    assert expand[0] == [132, 1, 1] and expand[1] == 256 and expand[2] > 170_000


def test_a_tape_launches_what_the_launchers_do() -> None:
    """The same kernels with the same bytes, but that each tensor's address is another's: of arguments the new one's."""
    found = in_a_process(
        """
        import contextlib
        from types import SimpleNamespace
        from triton.backends.nvidia.driver import CudaLauncher
        from lorakernels.configs import table
        from lorakernels.kernels import launch as launches, lora_linear, recording, tape
        from lorakernels.member import Member, training_step
        from lorakernels.tools import steps

        def stream(number):
            wait = lambda other: waits.append((number, checked.num_launches - started[0]))
            return SimpleNamespace(cuda_stream=number, wait_stream=wait)

        started = [0]
        current, side = stream(0), stream(7)
        fork = lambda device: (side.wait_stream(current), (current, side))[1]
        launches.fork = recording.fork = fork
        torch.cuda.stream = lambda stream: contextlib.nullcontext()
        own_side_stream = launches.side_stream
        lora_linear.side_stream = lambda device, on: own_side_stream(torch.device("cuda", 0), on)

        def empty(*shape):
            return torch.empty(shape, dtype=torch.bfloat16)

        def step(M, n, K):
            x, *dys = empty(M, K), *(empty(M, 64) for _ in range(n))
            members = [Member(empty(64, K), empty(8, K), empty(64, 8), scaling=2.0) for _ in range(n)]
            arguments = [t for t in (x, *dys, *(t for m in members for t in m)) if isinstance(t, torch.Tensor)]
            started[0] = checked.num_launches
            waits.clear()
            try:
                training_step(lora_linear, x, dys, members)
            finally:
                kept.append(arguments)
            return checked.launches[started[0] :], [t.data_ptr() for t in arguments], list(waits)

        kept, ran, waits = [], [], []
        run = tape.Tape.run
        tape.Tape.run = lambda self, tensors: (ran.append(1), kept.append(tensors), run(self, tensors))[2]
        taped = recording.Recording.tape
        recording.Recording.tape = lambda self, *result: (kept.append(self), taped(self, *result))[1]
        lora_linear._forks = lambda x, members: True
        passes = {"outer_kernel", "sum_planes_kernel"}
        gluon = {"linear_expand": steps._GLUON}
        for M, n, K, in_graph, forced, forked in (
            (16, 1, 64, False, {}, set()),
            (1024, 3, 64, False, {}, set()),
            (1024, 1, 1024, False, gluon, set()),
            (1 << 17, 2, 64, False, {}, passes),
            (1 << 17, 1, 64, False, {}, passes),
            *((16, n, 64, True, {}, {"shrink_kernel"}) for n in (1, 2)),
        ):
            again = lambda: step(M, n, K)
            with launches.as_if_captured() if in_graph else contextlib.nullcontext(), table.forced_configs(forced):
                again()
                (first, old, old_waits), (second, new, new_waits) = again(), again()
                if (M, n) == (1 << 17, 1):  # where the last step raises, the streams meet too
                    launcher, left = CudaLauncher.__call__, iter(range(len(first) - 1))
                    CudaLauncher.__call__ = lambda *args: (next(left), launcher(*args))
                    try:
                        again()
                        assert False
                    except (RuntimeError, StopIteration):
                        assert waits == [old_waits[0], (0, len(first) - 1)]
                    CudaLauncher.__call__ = launcher
            assert old_waits == new_waits and [number for number, _ in new_waits] == ([7, 0] if forked else [])
            assert any("gluon" in each.kernel for each in second) == bool(forced)
            renamed = {}
            for one, other in zip(first, second, strict=True):
                assert one[:5] == other[:5] and len(one.params) == len(other.params) > 0
                for i in range(0, len(one.params), 8):
                    a, b = (int.from_bytes(each.params[i : i + 8], "little") for each in (one, other))
                    assert a == b or renamed.setdefault(a, b) == b
            assert len(set(renamed.values())) == len(renamed)
            assert all(renamed.get(a, b if n > 1 else None) == b for a, b in zip(old, new, strict=True))
            beside = {each.kernel for each in second if each.stream == 7}
            assert beside == forked
        print(json.dumps([len(ran), checked.refusals]))
        """
    )
    assert found == [16, []]


@pytest.mark.slow
def test_sizes_of_one_are_taken() -> None:
    """Triton makes constants of them: Triton 3.6 then lost strides within tuples, and did not compile rank 1."""
    found = in_a_process(
        """
        from lorakernels.testing.multi_cases import MultiCase, make_multi_inputs
        import lorakernels as lk

        for tokens, N, K, r in ((37, 40, 48, 1), (400, 40, 48, 1), (400, 1, 1, 1), (400, 48, 1, 3), (400, 1, 48, 3)):
            x, weight, row_scale = torch.randn(tokens, K), torch.randn(N, K), torch.ones(N, requires_grad=True)
            A, B = torch.randn(r, K, requires_grad=True), torch.randn(N, r, requires_grad=True)
            y = lk.lora_linear(x.requires_grad_(), weight, A, B, row_scale=row_scale, dropout_p=0.1, impl="triton")
            y.backward(torch.randn(tokens, N))
        for T, R, K, N, paged in ((9, 1, 1, 1, False), (80, 1, 48, 40, True), (80, 8, 1, 40, False)):
            case = MultiCase("one", T=T, ranks=(R, R), R=R, K=K, Ns=(N,), paged=paged, needs=("x", "lora_A", "lora_B"))
            inputs = make_multi_inputs(case, torch.float32)
            leaves = [tensor.detach().requires_grad_() for tensor in (inputs.x, inputs.lora_A[0], inputs.lora_B[0])]
            y = lk.multi_lora_linear(leaves[0], inputs.weight[0], *leaves[1:], inputs.plan, impl="triton")
            y.backward(inputs.dys[0])
        print(json.dumps([checked.num_launches, checked.refusals]))
        """
    )
    launches, refusals = found
    assert launches > 50 and refusals == []


def test_what_a_driver_refuses_is_refused() -> None:
    found = in_a_process(
        """
        from lorakernels.kernels.launch import launch
        from lorakernels.kernels.tiles import _SUM_CONFIG, sum_planes_kernel

        library, seen = checked._library, {}

        class Config(ctypes.Structure):
            _fields_ = (("sizes", ctypes.c_uint * 7), ("stream", ctypes.c_void_p), ("attrs", ctypes.c_void_p),
                        ("num_attrs", ctypes.c_uint))

        def tell(name, code):
            seen[name] = [code, checked.refusals[-1] if code else ""]

        def encode(name, address=1 << 20, stride=8192, box=(64, 128), swizzle=3):
            sizes, strides = (ctypes.c_ulonglong * 2)(4096, 8192), (ctypes.c_ulonglong * 1)(stride)
            box, steps = (ctypes.c_uint * 2)(*box), (ctypes.c_uint * 2)(1, 1)
            made = torch.empty(128, dtype=torch.uint8)  # which a map is written into, from a multiple of 64 on
            code = library.cuTensorMapEncodeTiled(ctypes.c_void_p(made.data_ptr()), 9, 2, ctypes.c_void_p(address),
                                                  sizes, strides, box, steps, 0, swizzle, 0, 0)
            tell(name, code)

        for name, options in MAPS.items():
            encode(name, **options)

        planes, out = torch.empty(2, 4096), torch.empty(4096)
        arguments = {"planes_ptr": planes, "out_ptr": out, "num_planes": 2, "numel": 4096}
        launch(sum_planes_kernel, (4,), arguments, {"BLOCK": 1024}, _SUM_CONFIG)
        before = checked.num_launches
        try:
            launch(sum_planes_kernel, (4, 70_000), arguments, {"BLOCK": 1024}, _SUM_CONFIG)
        except RuntimeError as error:
            seen["a grid's y of 70,000"] = [1, str(error)]

        (compiled,) = {kernel for caches in sum_planes_kernel.device_caches.values() for kernel in caches[0].values()}
        cubin, module, function = compiled.asm["cubin"], ctypes.c_void_p(), ctypes.c_void_p()
        tell("a cubin", library.cuModuleLoadData(ctypes.byref(module), cubin))
        kernel = b"sum_planes_kernel"
        tell("its kernel", library.cuModuleGetFunction(ctypes.byref(function), module, kernel))
        other = ctypes.c_void_p()
        tell("another's kernel", library.cuModuleGetFunction(ctypes.byref(other), module, b"shrink_kernel"))
        tell("a cubin that is none", library.cuModuleLoadData(ctypes.byref(other), b"PTX, say" * 100))
        library.lk_device(100, 232448, 148)
        tell("a cubin for another device", library.cuModuleLoadData(ctypes.byref(other), cubin))
        library.lk_device(90, 232448, 132)

        def start(name, *sizes):
            config = Config((ctypes.c_uint * 7)(*sizes), None, None, 0)
            tell(name, library.cuLaunchKernelEx(ctypes.byref(config), function, None, None))

        start("a launch", 1 << 30, 65_535, 1, 128, 1, 1, 48 << 10)
        start("no programs", 0, 1, 1, 128, 1, 1, 0)
        start("2,048 threads", 1, 1, 1, 2048, 1, 1, 0)
        start("shared memory not asked for", 1, 1, 1, 128, 1, 1, 100 << 10)
        tell("shared memory of 100 KB", library.cuFuncSetAttribute(function, 8, 100 << 10))
        start("a launch with it", 1, 1, 1, 128, 1, 1, 100 << 10)
        tell("shared memory of 300 KB", library.cuFuncSetAttribute(function, 8, 300 << 10))
        start("a launch with 300 KB", 1, 1, 1, 128, 1, 1, 300 << 10)
        print(json.dumps([seen, checked.num_launches - before]))
        """.replace("MAPS", repr(MAPS))
    )
    seen, launches = found
    right = {"a map", "a cubin", "its kernel", "a launch", "shared memory of 100 KB", "a launch with it"}
    assert {name for name, (code, _) in seen.items() if code == 0} == right
    assert launches == 2
    for name, part in WHY.items():
        assert part in seen[name][1], (name, seen[name])


MAPS: dict[str, dict[str, Any]] = {
    "a map": {},
    "a base address off by 2": {"address": (1 << 20) + 2},
    "an odd stride": {"stride": 8190},
    "a box of 512": {"box": (64, 512)},
    "a box over its swizzle": {"box": (128, 64)},
    "a box of 6 bytes": {"box": (3, 64), "swizzle": 0},
}
WHY = {
    "a base address off by 2": "no multiple of 16",
    "an odd stride": "a stride of 8190 bytes",
    "a box of 512": "a box of 512, and 256 is the most",
    "a box over its swizzle": "rows of a box are 256 bytes, and the swizzle spans 128",
    "a box of 6 bytes": "rows of a box are 6 bytes",
    "a grid's y of 70,000": "a grid of 4 × 70000 × 1",
    "another's kernel": "it has no kernel shrink_kernel",
    "a cubin that is none": "this is no cubin",
    "a cubin for another device": "a cubin for sm_90, and the device is sm_100",
    "no programs": "a grid of 0 × 1 × 1",
    "2,048 threads": "2048 threads a block",
    "shared memory not asked for": "102400 bytes of shared memory, over 49152",
    "shared memory of 300 KB": "307200 bytes of shared memory, and a block has 232448",
    "a launch with 300 KB": "307200 bytes of shared memory, over 102400",
}


def test_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lorakernels.testing import driver

    with pytest.raises(ValueError, match=r"arch is 'gfx942'"):
        driver.install("gfx942")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="unset TRITON_INTERPRET"):
        driver.install("sm_90")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(BackendError, match="there is none: install gcc"):
        driver.install("sm_90")
