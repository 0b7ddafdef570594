"""What each launch becomes on GPUs that are not there: registers, spills, shared memory, instructions."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import rich
import torch
from rich.table import Table
from rich.text import Text
from tqdm import tqdm
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, CompiledKernel, make_backend
from triton.compiler.compiler import compile as triton_compile
from triton.runtime.jit import JITFunction, create_function_from_signature

from lorakernels.kernels.launch import Launch, compile_options
from lorakernels.kernels.shipped import shipped_launches
from lorakernels.tuning.config import KernelConfig
from lorakernels.tuning.device import assume


@dataclass(frozen=True)
class Arch:
    """What one streaming multiprocessor (AMD: compute unit) holds. Memory in bytes, registers of 32 bits."""

    name: str
    target: GPUTarget
    shared_per_block: int
    shared_per_sm: int
    shared_granule: int = 128
    shared_reserved: int = 1024  # taken from shared_per_sm by each block besides its own
    registers_per_sm: int = 65536
    max_warps_per_sm: int = 64
    max_blocks_per_sm: int = 32
    tensor_memory_columns: int = 0


_ARCHS = (
    Arch("sm_80", GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10),
    Arch("sm_90", GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10),
    Arch("sm_100", GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, tensor_memory_columns=512),
    Arch("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 512, 0, 131072, 32),
)
ARCHS: dict[str, Arch] = {arch.name: arch for arch in _ARCHS}


@dataclass(frozen=True)
class CompileRow:
    """One launch on one architecture. What could not be measured, because nothing compiled, is None."""

    kernel: str
    config: KernelConfig
    arch: str
    dtype: str  # of the kernel's first tensor
    registers: int | None = None  # a thread
    spill_bytes: int | None = None  # a thread
    shared_bytes: int | None = None  # a block
    tensor_core: str | None = None
    tma: bool = False
    async_copy: bool = False
    narrowest_load_bytes: int | None = None
    ctas_per_sm: int | None = None
    ok: bool = False
    why: str = ""


class _Task(NamedTuple):
    launch: Launch
    arch: Arch
    source: ASTSource
    options: dict[str, Any]

    @property
    def key(self) -> tuple[Any, ...]:
        source = self.source
        specialisation = (str(source.signature), str(source.constants), str(source.attrs))
        return (self.launch.kernel, *specialisation, str(self.options), self.arch.name)

    def row(self, **measured: Any) -> CompileRow:
        tensors = (a for a in self.launch.args.values() if isinstance(a, torch.Tensor))
        dtype = next((str(t.dtype).removeprefix("torch.") for t in tensors), "")
        return CompileRow(self.source.name, self.launch.config, self.arch.name, dtype, **measured)


class _Code(NamedTuple):
    """What the machine code says."""

    registers: int
    spill_bytes: int
    spills: str
    tensor_core: str | None
    tma: bool
    async_copy: bool
    narrowest_load_bytes: int | None


def _specialise(launch: Launch, arch_name: str) -> _Task:
    """The source as Triton's JIT would specialise it, by Triton's own code: the rules differ by backend and version."""
    if knobs.runtime.interpret or not isinstance(launch.kernel, JITFunction):
        raise RuntimeError(
            f"{launch.kernel} cannot be compiled: the compile report needs kernels made by triton.jit with the "
            "interpreter off. Unset TRITON_INTERPRET before importing lorakernels."
        )
    if arch_name not in ARCHS:
        raise ValueError(f"unknown architecture {arch_name!r}; expected one of {', '.join(ARCHS)}")
    kernel, arch = launch.kernel, ARCHS[arch_name]
    backend = make_backend(arch.target)
    keywords = {**launch.args, **launch.constexprs, **compile_options(launch.config)}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, extra = bind(**keywords)
    options, signature, constexprs, attrs = kernel._pack_args(backend, keywords, bound, specialisation, extra)
    return _Task(launch, arch, ASTSource(kernel, signature, constexprs, attrs), options.__dict__)


def _reason(error: BaseException) -> str:
    """The line that says what went wrong: the innermost error's, or the assembler's first complaint."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    complaints = [line for line in lines if re.search(r"; error\s*:", line)]
    return (complaints or lines[-1:] or [type(error).__name__])[0]


def _compile(task: _Task) -> CompileRow:
    try:
        compiled = triton_compile(task.source, target=task.arch.target, options=task.options)
    except Exception as error:
        return task.row(why=f"does not compile: {_reason(error)}")
    arch, meta = task.arch, compiled.metadata
    code = _read_nvidia(compiled) if arch.target.backend == "cuda" else _read_amd(compiled.asm["amdgcn"])
    columns = getattr(meta, "tmem_size", None) or 0
    faults = [code.spills] if code.spills else []
    if meta.shared > arch.shared_per_block:
        faults.append(f"{meta.shared} bytes of shared memory, over the limit of {arch.shared_per_block} a block")
    if columns > arch.tensor_memory_columns:
        faults.append(f"{columns} columns of tensor memory, over the limit of {arch.tensor_memory_columns}")
    # Not the config's num_warps: warp specialisation adds some.
    ctas = _ctas_per_sm(arch, code.registers, meta.shared, columns, meta.num_warps)
    measured = {name: value for name, value in code._asdict().items() if name != "spills"}
    return task.row(**measured, shared_bytes=meta.shared, ctas_per_sm=ctas, ok=not faults, why="; ".join(faults))


def _tool(path: str, option: str, file: str) -> str:
    return subprocess.run([path, option, file], capture_output=True, text=True, check=True).stdout


def _read_nvidia(compiled: CompiledKernel) -> _Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _tool(knobs.nvidia.nvdisasm.path, "--no-dataflow", file.name)
    registers, stack = (max(map(int, re.findall(rf"\b{key}:(\d+)", usage))) for key in ("REG", "STACK"))
    instructions = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    names = {instruction.partition(".")[0] for instruction in instructions}
    spilled = sum(instruction.startswith(("STL", "LDL")) for instruction in instructions)
    cores = {"tcgen05": r"UTC\w*MMA", "wgmma": r"[A-Z]GMMA", "mma": r"[A-Z]MMA"}
    loads = [_sass_load_bytes(i) for i in instructions if i.startswith(("LDG.", "LDGSTS."))]
    return _Code(
        registers=registers,
        spill_bytes=stack if spilled else 0,
        spills=f"spills {stack} bytes a thread ({spilled} STL and LDL)" if spilled else "",
        tensor_core=next((core for core, name in cores.items() if any(re.fullmatch(name, n) for n in names)), None),
        tma="UTMALDG" in names,
        async_copy="LDGSTS" in names,
        narrowest_load_bytes=min(loads, default=None),
    )


def _sass_load_bytes(instruction: str) -> int:
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((widths[part] for part in instruction.split(".") if part in widths), 4)


def _read_amd(amdgcn: str) -> _Code:
    def number(key: str) -> int:
        return max(map(int, re.findall(rf"^\s+(?:- )?\.{key}:\s+(\d+)", amdgcn, re.MULTILINE)))

    vector, scalar = number("vgpr_spill_count"), number("sgpr_spill_count")
    scratch = number("private_segment_fixed_size") if vector or scalar else 0
    spills = f"spills {vector} vector and {scalar} scalar registers ({scratch} bytes a thread)"
    units = {"byte": 1, "short": 2, "dword": 4}
    load = r"^\s+(?:global|buffer|flat)_load_(?:lds_)?[us]?(byte|short|dword)(?:x(\d))?"
    loads = [units[unit] * int(count or 1) for unit, count in re.findall(load, amdgcn, re.MULTILINE)]
    to_lds = r"^\s+(?:global_load_lds|buffer_load_.*\blds\b)"
    return _Code(
        registers=number("vgpr_count"),
        spill_bytes=scratch,
        # Scalar registers spill into lanes of vector registers; only scratch is memory.
        spills=spills if scratch else "",
        tensor_core="mfma" if re.search(r"^\s+v_s?mfma", amdgcn, re.MULTILINE) else None,
        tma=False,
        async_copy=bool(re.search(to_lds, amdgcn, re.MULTILINE)),
        narrowest_load_bytes=min(loads, default=None),
    )


def _round_up(number: int, granule: int) -> int:
    return -(-number // granule) * granule


def _ctas_per_sm(arch: Arch, registers: int, shared: int, columns: int, warps: int) -> int:
    """How many blocks an SM holds at once."""
    # Registers are handed out eight a lane, and a warp's come from one of the SM's four schedulers.
    warp_registers = _round_up(max(registers, 1), 8) * arch.target.warp_size
    warps_by_registers = arch.registers_per_sm // 4 // warp_registers * 4
    block_shared = _round_up(max(shared + arch.shared_reserved, 1), arch.shared_granule)
    limits = [arch.max_blocks_per_sm, min(arch.max_warps_per_sm, warps_by_registers) // warps]
    limits.append(arch.shared_per_sm // block_shared)
    if columns:
        # Tensor memory comes in powers of two, from 32 columns.
        limits.append(arch.tensor_memory_columns // max(32, 1 << (columns - 1).bit_length()))
    return min(limits)


def compile_launch(launch: Launch, arch: str) -> CompileRow:
    """Compile one launch for one architecture of `ARCHS`, in this process."""
    return _compile(_specialise(launch, arch))


def compile_report(launches: Iterable[Launch], archs: Sequence[str] = tuple(ARCHS), jobs: int = 2) -> list[CompileRow]:
    """A row for each different launch and each architecture; `jobs` processes compile."""
    return _report([_specialise(launch, arch) for launch in launches for arch in archs], jobs)


def shipped_report(archs: Sequence[str] = tuple(ARCHS), jobs: int = 2) -> list[CompileRow]:
    """A row for each launch that the shipped configurations make on each architecture."""
    tasks = []
    for arch in archs:
        if arch not in ARCHS:
            raise ValueError(f"unknown architecture {arch!r}; expected one of {', '.join(ARCHS)}")
        with assume(arch):
            tasks += [_specialise(launch, arch) for launch in shipped_launches()]
    return _report(tasks, jobs)


def _report(every: Iterable[_Task], jobs: int) -> list[CompileRow]:
    tasks = list({task.key: task for task in every}.values())
    jobs = min(jobs, len(tasks)) if "fork" in multiprocessing.get_all_start_methods() else 1
    results = _compile_in_processes(tasks, jobs) if jobs > 1 else ((i, _compile(task)) for i, task in enumerate(tasks))
    rows = dict(tqdm(results, total=len(tasks), desc="compile", unit="kernel", disable=None))
    return [rows[index] for index in range(len(tasks))]


def _serve(tasks: Sequence[_Task], connection: Connection) -> None:
    for index in iter(connection.recv, None):
        try:
            connection.send(_compile(tasks[index]))
        except Exception as error:
            connection.send(error)


def _compile_in_processes(tasks: Sequence[_Task], jobs: int) -> Iterator[tuple[int, CompileRow]]:
    """Rows as they come. A compiler that crashes costs its own row only: no pool of the standard library does that."""
    fork = multiprocessing.get_context("fork")  # kernels do not pickle: the children inherit the tasks

    def start() -> Connection:
        ours, theirs = fork.Pipe()
        fork.Process(target=_serve, args=(tasks, theirs), daemon=True).start()
        theirs.close()
        return ours

    waiting = iter(range(len(tasks)))
    running: dict[Connection, int] = {}

    def give(connection: Connection) -> None:
        index = next(waiting, None)
        connection.send(index)
        if index is not None:
            running[connection] = index

    for _ in range(jobs):
        give(start())
    while running:
        ready: Any = wait(list(running))
        for connection in ready:
            index = running.pop(connection)
            try:
                answer = connection.recv()
            except EOFError:
                answer = tasks[index].row(why="does not compile: the compiler crashed")
                connection = start()
            if isinstance(answer, Exception):
                raise answer
            yield index, answer
            give(connection)


def report_table(rows: Iterable[CompileRow]) -> Table:
    """The rows for a terminal."""
    table = Table(title="Compile report")
    for name in ("kernel", "dtype", "arch", "M×N×K×R", "split", "warps", "stages"):
        table.add_column(name)
    for name in ("registers", "spill B", "shared B", "load B", "blocks/SM"):
        table.add_column(name, justify="right")
    for name in ("matrix", "copy", "verdict"):
        table.add_column(name)
    for row in rows:
        c = row.config
        tiles = f"{c.BLOCK_M}×{c.BLOCK_N}×{c.BLOCK_K}×{c.BLOCK_R}"
        chosen = (row.kernel, row.dtype, row.arch, tiles, c.SPLIT, c.num_warps, c.num_stages)
        numbers = (row.registers, row.spill_bytes, row.shared_bytes, row.narrowest_load_bytes, row.ctas_per_sm)
        copies = " ".join(name for name, used in (("tma", row.tma), ("async", row.async_copy)) if used)
        cells = ("-" if cell is None else str(cell) for cell in (*chosen, *numbers, row.tensor_core, copies))
        table.add_row(*cells, Text("ok", "green") if row.ok else Text(row.why, "red"))
    return table


def main() -> int:
    """Compile every shipped launch for every architecture; print what is not ok, or how many are."""
    rows = shipped_report()
    faults = [row for row in rows if not row.ok]
    if faults:
        rich.print(report_table(faults))
    print(f"compile gate: {len(rows)} kernels compiled for {', '.join(ARCHS)}; {len(faults)} not ok")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
