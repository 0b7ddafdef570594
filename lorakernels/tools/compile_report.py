"""What each launch becomes on GPUs that are not there: registers, spills, shared memory, instructions."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import rich
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm
from triton import knobs
from triton.compiler.compiler import ASTSource, CompiledKernel, make_backend
from triton.compiler.compiler import compile as triton_compile
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import cache as triton_cache
from triton.runtime.jit import JITFunction, create_function_from_signature

from lorakernels.backend import BackendError
from lorakernels.configs.config import KernelConfig
from lorakernels.configs.data_sheet import DATA_SHEETS
from lorakernels.configs.device import assume
from lorakernels.configs.table_file import SHIPPED, read_table
from lorakernels.kernels.launch import Launch, compile_options, record_launches
from lorakernels.tools.arch import ARCHS, Arch
from lorakernels.tools.machine_code import (
    Code,
    Tile,
    loop_tiles,
    narrow_loads,
    nvidia_text,
    read_amd,
    read_nvidia,
    split_sass,
)
from lorakernels.tools.processes import in_processes
from lorakernels.tools.steps import shipped_launches
from lorakernels.tools.tune.problem import Problem
from lorakernels.tools.tune.trial import make_inputs, run


@dataclass(frozen=True)
class CompileRow:
    """One launch on one architecture. What could not be measured, because nothing compiled, is None.

    `narrowest_load_bytes` is the least that a thread takes with one load from global memory in the main loop: the
    innermost loop with the most matrix instructions. Copies by TMA have no width. Less than 16 is right where a
    thread's share of a tile is less, and for dropout's mask, which is bytes. `bytes_in_flight` are a set of the loop's
    tiles for each stage but one, of all programs that the architecture's largest device runs at once;
    `issue_per_byte` are the loop's instructions, of all warps, over the bytes that they load.
    """

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
    bytes_in_flight: int | None = None
    issue_per_byte: float | None = None
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

    @property
    def tokens(self) -> int:
        return _tokens(self.launch)

    def row(self, **measured: Any) -> CompileRow:
        dtype = str(self.launch.tensor.dtype).removeprefix("torch.")
        return CompileRow(self.source.name, self.launch.config, self.arch.name, dtype, **measured)


def _tokens(launch: Launch) -> int:
    return launch.args.get("M", launch.args.get("P", 0))


def _specialise(launch: Launch, arch_name: str) -> _Task:
    """The source as Triton's JIT would specialise it, by Triton's own code: the rules differ by backend and version."""
    if knobs.runtime.interpret or not isinstance(launch.kernel, JITFunction):
        raise BackendError(
            f"{launch.kernel} cannot be compiled: the compile report needs kernels made by triton.jit with the "
            "interpreter off. Unset TRITON_INTERPRET before importing lorakernels."
        )
    if arch_name not in ARCHS:
        raise ValueError(f"unknown architecture {arch_name!r}; expected one of {', '.join(ARCHS)}")
    kernel, arch = launch.kernel, ARCHS[arch_name]
    backend = make_backend(arch.target)
    keywords = {**launch.args, **launch.constexprs, **compile_options(launch.config, launch.constexprs)}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, extra = bind(**keywords)
    options, signature, constexprs, attrs = kernel._pack_args(backend, keywords, bound, specialisation, extra)
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return _Task(launch, arch, source(kernel, signature, constexprs, attrs), options.__dict__)


def _reason(error: BaseException) -> str:
    """The line that says what went wrong: the innermost error's, or the assembler's first complaint."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    complaints = [line for line in lines if re.search(r"; error\s*:", line)]
    return (complaints or lines[-1:] or [type(error).__name__])[0]


def _compile(tasks: Sequence[_Task]) -> list[CompileRow]:
    """Of one architecture, whose machine code is read together."""
    made: list[CompiledKernel | str] = []
    for task in tasks:
        try:
            made.append(triton_compile(task.source, target=task.arch.target, options=task.options))
        except Exception as error:
            made.append(f"does not compile: {_reason(error)}")
    kernels = [each for each in made if not isinstance(each, str)]
    nvidia = tasks[0].arch.target.backend == "cuda"
    codes = iter(_read_nvidia(kernels) if nvidia else [read_amd(each.asm["amdgcn"]) for each in kernels])
    pairs = zip(tasks, made, strict=True)
    return [task.row(why=k) if isinstance(k, str) else _row(task, k, next(codes)) for task, k in pairs]


def _row(task: _Task, compiled: CompiledKernel, code: Code) -> CompileRow:
    arch, meta = task.arch, compiled.metadata
    columns = getattr(meta, "tmem_size", None) or 0
    faults = [code.spills]
    if meta.shared > arch.shared_per_block:
        faults.append(f"{meta.shared} bytes of shared memory, over the limit of {arch.shared_per_block} a block")
    if columns > arch.tensor_memory_columns:
        faults.append(f"{columns} columns of tensor memory, over the limit of {arch.tensor_memory_columns}")
    faults += _product_faults(task.launch, task.source.name, arch.name, code)
    if task.options.get("launch_pdl") and "griddepcontrol.wait" not in compiled.asm["ptx"]:
        faults.append("may start before the launch ahead of it has ended, and never waits for it")
    # Not the config's num_warps: warp specialisation adds some.
    threads = meta.num_warps * arch.target.warp_size
    ctas = arch.blocks_per_sm(code.registers, meta.shared, columns, meta.num_warps)
    in_flight = _bytes_in_flight(task.launch, arch, ctas, loop_tiles(compiled.asm["ttgir"]))
    faults.append(_starves(task, in_flight))
    # A kernel without a loop has none to judge. What float16 meets in float32 is loaded as tf32's operands lie.
    has_float16 = "*fp16" in str(task.source.signature)
    judged = _aligned(task.launch) and not has_float16 and task.source.name not in _SEARCHES
    if code.loads and judged:
        faults.append(narrow_loads(code.loads, loop_tiles(compiled.asm["ttgir"]), threads))
    return task.row(
        registers=code.registers,
        spill_bytes=code.spill_bytes,
        shared_bytes=meta.shared,
        tensor_core=code.tensor_core,
        tma=code.tma,
        async_copy=code.async_copy,
        narrowest_load_bytes=min(code.loads, default=None),
        ctas_per_sm=ctas,
        bytes_in_flight=in_flight,
        issue_per_byte=round(code.loop * meta.num_warps / (sum(code.loads) * threads), 4) if code.loads else None,
        ok=not any(faults),
        why="; ".join(filter(None, faults)),
    )


def _bytes_in_flight(launch: Launch, arch: Arch, ctas_per_sm: int, tiles: Sequence[Tile]) -> int | None:
    """Of a launch whose loop loads tiles; those that descriptors copy are not among them."""
    tile = sum(tile.elements * tile.element_bytes for tile in tiles)
    programs = min(math.prod(launch.grid), ctas_per_sm * arch.sms)
    return programs * max(1, launch.config.num_stages - 1) * tile or None


# By Little's law a device has its bandwidth where bytes for some 500 ns are on their way.
_LATENCY = 500e-9
# Passes over a matrix of so many tokens take the device for themselves.
_TALL = 8192


def _starves(task: _Task, in_flight: int | None) -> str:
    """What is wrong with a pass over a tall matrix of 16 bits that cannot have the device's bandwidth.

    Of float32, multiplied exactly, arithmetic is the limit.
    """
    passes = task.source.name in ("shrink_kernel", "outer_kernel") and task.launch.tensor.element_size() == 2
    if not (passes and _aligned(task.launch)) or task.tokens < _TALL or task.arch.target.backend != "cuda":
        return ""
    needed = max(sheet.bandwidth for sheet in DATA_SHEETS if sheet.arch == task.arch.name) * _LATENCY
    if in_flight is None or in_flight < needed:
        return f"{in_flight} bytes in flight, where the device's bandwidth asks for {needed:.0f}"
    return ""


def _read_nvidia(kernels: Sequence[CompiledKernel]) -> list[Code]:
    """Of one architecture: the disassembler takes 0.4 s to start, and no time for a kernel's instructions."""
    if not kernels:
        return []
    texts = [nvidia_text(kernel.asm["cubin"]) for kernel in kernels]
    usages = [_tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", kernel.asm["cubin"]) for kernel in kernels]
    (sm,) = re.findall(r"^\.target sm_(\w+)", kernels[0].asm["ptx"], re.MULTILINE)
    sass = _tool(knobs.nvidia.nvdisasm.path, f"--binary=SM{sm}", b"".join(texts))
    return [read_nvidia(*each) for each in zip(usages, split_sass(sass, list(map(len, texts))), strict=True)]


def _tool(path: str, option: str, content: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


# Their loops load where a binary search goes, or each number and the next.
_SEARCHES = ("expert_starts_kernel", "expert_tiles_kernel", "expert_ends_kernel")
# What a matrix product of 16-bit operands must come to where it is large: these units do most of the device's work.
_LARGE = 1024
_LARGE_MUST_USE = {"sm_90": "wgmma", "sm_100": "tcgen05"}


def _product_faults(launch: Launch, name: str, arch: str, code: Code) -> list[str]:
    """What is wrong with how a GEMM is multiplied, and its operands copied."""
    if not name.startswith(("linear_expand", "few_tokens", "expert_expand")) or launch.tensor.element_size() != 2:
        return []
    if code.tensor_core is None:
        return ["a 16-bit matrix product without the matrix units"]
    unit = _LARGE_MUST_USE.get(arch)
    if unit is None or name.startswith("few_tokens") or launch.constexprs.get("HAS_BASE") or launch.config.BLOCK_M < 64:
        return []
    # Of pairs of x and w. Descriptors ask for as much by themselves.
    weights = [w for _, w in launch.args.get("pairs", ())] + [
        launch.args[name] for name in ("w",) if name in launch.args
    ]
    odd = any(n % 16 for w in weights for n in (w.rows, w.cols))
    if _tokens(launch) < _LARGE or odd:
        return []
    faults = [] if code.tensor_core == unit else [f"a large product by {code.tensor_core} instead of {unit}"]
    if code.tma and code.waits > 1:
        faults.append(f"a main loop that waits {code.waits} times for its products, where once would do")
    if code.tma or launch.constexprs.get("W_FORM"):  # of a packed weight come words, which registers unpack
        return faults
    return [*faults, "a large aligned product that does not load by TMA"]


def _aligned(launch: Launch) -> bool:
    """Whether sizes and strides are multiples of 16, so that every row can be loaded 16 bytes at a time."""
    free = {parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize}
    numbers = (number for name, value in launch.args.items() if name not in free for number in _numbers(name, value))
    return all(n % 16 == 0 or (n == 1 and name.startswith("stride")) for name, n in numbers)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, int]]:
    """The integers in an argument, each with the name of the innermost field that holds it."""
    if isinstance(value, tuple):
        names = getattr(value, "_fields", (name,) * len(value))
        for field, each in zip(names, value, strict=True):
            yield from _numbers(field, each)
    elif type(value) is int:
        yield name, value


def compile_report(
    launches: Iterable[Launch], archs: Sequence[str] = tuple(ARCHS), jobs: int = 2, progress: bool = True
) -> list[CompileRow]:
    """A row for each different launch and each architecture; `jobs` processes compile.

    Launches whose configs differ only in what is not part of the code, such as the grid, are compiled once, and each
    has its row.
    """
    tasks = [_specialise(launch, arch) for launch in launches for arch in archs]
    rows = _report(tasks, jobs, progress)
    each = dict.fromkeys((task.key, task.launch.config) for task in tasks)
    return [dataclasses.replace(rows[key], config=config) for key, config in each]


def table_launches(arch: str, folder: Path = SHIPPED) -> list[Launch]:
    """The launches of every entry of the tables that ship for this architecture, with and without dropout.

    Raises:
        ValueError: a table, or an entry, is not right.
    """
    with record_launches() as launches:
        for path in sorted(folder.glob("*.json")):
            table, problems = read_table(path)
            if problems:
                raise ValueError(f"{path}: {problems[0]}")
            for entry in table.entries if table.arch == arch else ():
                dtype = torch.float32 if entry.itemsize == 4 else torch.bfloat16
                for dropout in (0.0, 0.1):
                    problem = Problem(entry.operation, entry.M, entry.N, entry.K, entry.r, dtype, dropout, entry.slots)
                    run(problem, entry.config, make_inputs(problem, torch.device("meta")))
    return launches


_BATCH = 8  # kernels whose machine code is read together, at most
_CRASHED = "does not compile: the compiler crashed"


def _report(every: Iterable[_Task], jobs: int, progress: bool = True) -> dict[tuple[Any, ...], CompileRow]:
    """By the key of what is compiled."""
    largest: dict[tuple[Any, ...], _Task] = {}  # of launches that make the same code, for what large ones must be
    for task in every:
        if task.key not in largest or task.tokens > largest[task.key].tokens:
            largest[task.key] = task
    tasks = list(largest.values())
    triton_cache.triton_key()  # kept for all processes: it reads the whole of Triton
    rows: dict[int, CompileRow] = {}
    with tqdm(total=len(tasks), desc="compile", unit="kernel", disable=None if progress else True) as bar:

        def compile_batches(batches: list[list[int]]) -> None:
            results = in_processes(lambda index: _compile([tasks[i] for i in batches[index]]), len(batches), jobs)
            crashed = []
            for index, made in results:
                batch = batches[index]
                if made is None and len(batch) > 1:
                    crashed += [[i] for i in batch]  # by which of them?
                    continue
                rows.update(zip(batch, made or [tasks[batch[0]].row(why=_CRASHED)], strict=True))
                bar.update(len(batch))
            if crashed:
                compile_batches(crashed)

        size = max(1, min(_BATCH, len(tasks) // (2 * jobs)))
        by_arch = [[i for i, task in enumerate(tasks) if task.arch is arch] for arch in ARCHS.values()]
        compile_batches([each[i : i + size] for each in by_arch for i in range(0, len(each), size)])
    return {key: rows[index] for index, key in enumerate(largest)}


def report_table(rows: Iterable[CompileRow]) -> Table:
    """The rows for a terminal."""
    table = Table(title="Compile report")
    for name in ("kernel", "dtype", "arch", "M×N×K×R", "split", "warps", "stages"):
        table.add_column(name)
    for name in ("registers", "spill B", "shared B", "load B", "blocks/SM", "in flight", "issue/B"):
        table.add_column(name, justify="right")
    for name in ("matrix", "copy", "verdict"):
        table.add_column(name)
    for row in rows:
        c = row.config
        tiles = f"{c.BLOCK_M}×{c.BLOCK_N}×{c.BLOCK_K}×{c.BLOCK_R}"
        chosen = (row.kernel, row.dtype, row.arch, tiles, c.SPLIT, c.num_warps, c.num_stages)
        numbers = (
            row.registers, row.spill_bytes, row.shared_bytes, row.narrowest_load_bytes, row.ctas_per_sm,
            row.bytes_in_flight, row.issue_per_byte,
        )  # fmt: skip
        copies = " ".join(name for name, used in (("tma", row.tma), ("async", row.async_copy)) if used)
        cells = ("-" if cell is None else str(cell) for cell in (*chosen, *numbers, row.tensor_core, copies))
        table.add_row(*cells, Text("ok", "green") if row.ok else Text(row.why, "red"))
    return table


def main(archs: Sequence[str] = (), kernels: Sequence[str] = (), as_json: bool = False, jobs: int = 2) -> int:
    """Compile each launch of the shipped configs, for the named architectures and kernels or for all.

    Prints every row if they are named, or those that are not ok; returns 1 if there is one.

    Raises:
        ValueError: an architecture, or one of `kernels`, is not known.
        BackendError: Triton's interpreter is on.
    """
    tasks = []
    for arch in archs or ARCHS:
        with assume(arch):
            each = [_specialise(launch, arch) for launch in shipped_launches() + table_launches(arch)]
        # float32 is multiplied exactly, by the same instructions as on sm_90, with as much memory.
        tasks += [
            task for task in each if archs or arch != "sm_100" or re.search("bf16|fp16", str(task.source.signature))
        ]
    names = sorted({task.source.name for task in tasks})
    if unknown := [name for name in kernels if name not in names]:
        raise ValueError(f"there is no kernel {unknown[0]!r}; kernels: {', '.join(names)}")
    rows = list(_report([task for task in tasks if task.source.name in (kernels or names)], jobs).values())
    faults = [row for row in rows if not row.ok]
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return 1 if faults else 0
    if shown := rows if archs or kernels else faults:
        wide = not rich.get_console().is_terminal  # a file has no width
        Console(width=200 if wide else None).print(report_table(shown))
    print(f"compile gate: {len(rows)} kernels compiled for {', '.join(archs or ARCHS)}; {len(faults)} not ok")
    return 1 if faults else 0
