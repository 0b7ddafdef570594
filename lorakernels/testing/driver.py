"""Triton's real way to launch a kernel, on a machine without a GPU: binder, compile cache, C launcher, tensor maps.

`driver.c` is the CUDA driver at its end. It refuses what a driver would refuse, and runs nothing: launches are checked,
numbers are not. Tensors lie on the CPU. What is compiled on the way lands in Triton's compile cache, from which a
machine that has such a GPU takes it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends import nvidia
from triton.runtime import cache as triton_cache
from triton.runtime import driver as triton_driver

from lorakernels import backend
from lorakernels.configs import device as gpu
from lorakernels.configs.data_sheet import speed_of
from lorakernels.kernels.launch import Launch, launch

_SOURCE = Path(__file__).with_name("driver.c")
_INCLUDE = Path(nvidia.__file__).parent / "include"
COMPILED = "LORAKERNELS_COMPILED"  # a file that gets a line for each kernel that Triton compiles, or finds compiled
CACHE_FOR = "LORAKERNELS_CACHE_FOR"  # JSON: another CPython than this one, for which the cache is filled


class Launched(NamedTuple):
    """One launch that the driver has let pass."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int  # a block
    shared: int  # bytes a block
    dependent: bool  # may start before the launch ahead of it has ended
    stream: int
    params: bytes  # what the kernel is given; a tensor map as it was asked for


class _Record(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char * 96),
        ("grid", ctypes.c_uint * 3),
        *((name, ctypes.c_uint) for name in ("threads", "shared", "dependent", "size")),
        ("stream", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
    )


class CheckingDriver:
    """What the driver was asked, since it was installed."""

    def __init__(self, library: ctypes.CDLL, device: gpu.Device) -> None:
        self._library = library
        self._assumed = gpu.assume(device)  # ends when this is collected: `install` keeps it
        self._assumed.__enter__()

    def _number(self, name: str) -> int:
        return ctypes.c_long.in_dll(self._library, name).value

    @property
    def num_launches(self) -> int:
        return self._number("lk_num_launches")

    @property
    def num_maps(self) -> int:
        """Tensor maps that were asked for."""
        return self._number("lk_num_maps")

    @property
    def launches(self) -> list[Launched]:
        records = ctypes.POINTER(_Record).in_dll(self._library, "lk_launches")
        return [
            Launched(
                r.kernel.decode(),
                (r.grid[0], r.grid[1], r.grid[2]),
                r.threads,
                r.shared,
                bool(r.dependent),
                r.stream or 0,
                ctypes.string_at(r.params, r.size),
            )
            for r in (records[i] for i in range(self.num_launches))
        ]

    @property
    def refusals(self) -> list[str]:
        texts = ctypes.POINTER(ctypes.c_char * 160).in_dll(self._library, "lk_refusals")
        return [texts[i].value.decode(errors="replace") for i in range(self._number("lk_num_refusals"))]


@functools.cache
def install(arch: str = "sm_90") -> CheckingDriver:
    """From now on, and to the end of this process, kernels are launched on a GPU of this architecture that only checks.

    Raises:
        ValueError: `arch` is not one of NVIDIA's that are known here.
        BackendError: there is no C compiler, or Triton's interpreter is on.
    """
    device = gpu.example_of(arch)
    if not arch.startswith("sm_"):
        raise ValueError(f"arch is {arch!r}; the driver that checks is CUDA's: expected sm_80, sm_90 or sm_100")
    if backend.interpreter_on():
        raise backend.BackendError("the driver that checks wants compiled kernels: unset TRITON_INTERPRET")
    folder = _built()
    # Of the same name as the system's, so that the dynamic linker takes this one for it.
    library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    capability = int(arch.removeprefix("sm_"))
    library.lk_device(capability, speed_of(arch).shared_per_block, device.processors)
    knobs.nvidia.libcuda_path = str(folder)
    knobs.build.impl = _compile_c
    _fill_for(json.loads(os.environ.get(CACHE_FOR, "{}")))
    log_compilations()

    active: Any = nvidia.driver.CudaDriver()
    active.get_device_capability = lambda *_: divmod(capability, 10)
    active.get_current_device = lambda: 0
    active.set_current_device = lambda *_: None
    active.get_current_stream = lambda *_: 0
    triton_driver.set_active(active)
    backend.launches_are_checked = True
    return CheckingDriver(library, device)


def log_compilations() -> None:
    """Write "hit KERNEL" or "miss KERNEL" to the file that LORAKERNELS_COMPILED names, at each look into the cache."""
    path = os.environ.get(COMPILED)

    def listen(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        with open(str(path), "a", encoding="utf-8") as file:
            file.write(f"{'hit' if cache_hit else 'miss'} {src.name}\n")

    if path:
        knobs.compilation.listener = listen


def replay(launches: Iterable[Launch]) -> None:
    """Launch what was recorded on meta tensors, on tensors of the CPU whose memory nobody touches."""
    for recorded in launches:
        args = {name: _on_host(value) for name, value in recorded.args.items()}
        launch(recorded.kernel, recorded.grid, args, recorded.constexprs, recorded.config)


def _on_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    if isinstance(value, tuple):
        values = map(_on_host, value)
        return type(value)(*values) if hasattr(value, "_fields") else tuple(values)
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return dataclasses.replace(value, base=_on_host(value.base))
    return value


def _built() -> Path:
    """The folder of libcuda.so.1, in which it is built once for a version of its source."""
    source = _SOURCE.read_bytes()
    of = hashlib.sha256(source + str(_INCLUDE).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"lorakernels-driver-{os.getuid()}-{of}"
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / library.name
            _run_compiler(_SOURCE, built, [_INCLUDE], ["-Wl,-soname,libcuda.so.1", "-lpthread"])
            built.replace(library)  # whole at once: several processes may build it
    return folder


def _run_compiler(source: str | Path, out: str | Path, include: Iterable[str | Path], more: Iterable[str] = ()) -> None:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        raise backend.BackendError("the driver that checks is built with a C compiler, and there is none: install gcc")
    # -O1: a launcher of Triton 3.6 takes 0.5 s, with its own -O3 1.4.
    options = ["-O1", "-shared", "-fPIC", "-w", "-Wno-psabi", *(f"-I{folder}" for folder in include)]
    subprocess.run([compiler, str(source), *options, "-o", str(out), *more], check=True)


def _compile_c(
    name: str,
    source: str,
    folder: str,
    library_dirs: Any,
    include_dirs: Any,
    libraries: Any,
    *,
    include: str = sysconfig.get_path("include"),
    suffix: str = str(sysconfig.get_config_var("EXT_SUFFIX")),
) -> str:
    """In place of Triton's own call of the compiler, for its C modules; `include` and `suffix` are a CPython's."""
    out = os.path.join(folder, name + suffix)
    link = [*(f"-L{directory}" for directory in library_dirs), *(f"-l:{library}" for library in libraries)]
    _run_compiler(source, out, [*include_dirs, include], link)
    return out


def _fill_for(target: dict[str, str]) -> None:
    """Let what is compiled here be found by another CPython's Triton of the same version.

    The C launchers of Triton 3.6 are built a second time, with that CPython's headers (`include`, none where there are
    none here, and its `suffix`), and lie beside this one's.
    """
    key = _key(target)
    triton_cache.triton_key = lambda: key
    if target.get("include"):
        from triton.runtime.build import platform_key

        def compile_twice(name: str, source: str, folder: str, *rest: Any) -> str:
            of = hashlib.sha256((Path(source).read_text() + platform_key()).encode("utf-8")).hexdigest()
            out = Path(_compile_c(name, source, folder, *rest, include=target["include"], suffix=target["suffix"]))
            triton_cache.get_cache_manager(of).put(out.read_bytes(), out.name, binary=True)
            return _compile_c(name, source, folder, *rest)

        knobs.build.impl = compile_twice


def _key(target: dict[str, str]) -> str:
    """Triton's own part of a kernel's key, as the CPython `target` has it.

    It has the hash of libtriton.so, which alone differs with the CPython that a wheel of Triton was built for.
    """
    import triton._C.libtriton as libtriton

    own, key = hashlib.sha256(Path(libtriton.__file__).read_bytes()).hexdigest(), str(triton_cache.triton_key())
    if own not in key:
        raise backend.BackendError("Triton's key has no hash of libtriton.so: a cache for another Python needs it")
    return key.replace(own, target.get("libtriton", own))


def key_of_cache() -> str:
    """A hash of what the Triton for which the cache is filled looks its kernels up by."""
    return hashlib.sha256(_key(json.loads(os.environ.get(CACHE_FOR, "{}"))).encode()).hexdigest()
