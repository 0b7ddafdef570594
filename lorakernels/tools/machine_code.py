"""What a kernel's machine code says, read from its text: NVIDIA's SASS and AMD's assembly."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import networkx


@dataclass(frozen=True)
class Code:
    """`loads` are the bytes a thread takes with each global load of the main loop, which has `loop` instructions.

    `waits` are those of them that wait for wgmma.
    """

    registers: int
    spill_bytes: int
    spills: str
    tensor_core: str | None
    tma: bool
    async_copy: bool
    loads: tuple[int, ...]
    loop: int
    waits: int = 0


class Instruction(NamedTuple):
    """One line of code: a label, or an operation and the label that it may jump to."""

    label: str | None
    name: str = ""
    target: str | None = None
    falls_through: bool = True


_CORES = {"tcgen05": r"UTC\w*MMA", "wgmma": r"[A-Z]GMMA", "mma": r"[A-Z]MMA"}
_SASS_MMA = re.compile("|".join(rf"{name}\b" for name in _CORES.values()))
_SASS_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_AMD_MMA = re.compile(r"v_s?mfma")
_AMD_LOAD = re.compile(r"(?:global|buffer|flat)_load_(?:lds_)?[us]?(byte|short|dword)(?:x(\d))?")
_AMD_UNITS = {"byte": 1, "short": 2, "dword": 4}


def read_nvidia(usage: str, sass: str) -> Code:
    """`usage` is of cuobjdump --dump-resource-usage, `sass` of nvdisasm --binary: jumps are to addresses."""
    registers, stack = (max(map(int, re.findall(rf"\b{key}:(\d+)", usage))) for key in ("REG", "STACK"))
    lines = _sass_lines(sass)
    instructions = [line.name for line in lines if line.name]
    names = {instruction.partition(".")[0] for instruction in instructions}
    spilled = sum(instruction.startswith(("STL", "LDL")) for instruction in instructions)
    loop = main_loop(lines, _SASS_MMA, re.compile(r"LDG\.|LDGSTS\.|UTMALDG"))
    return Code(
        registers=registers,
        spill_bytes=stack if spilled else 0,
        spills=f"spills {stack} bytes a thread ({spilled} STL and LDL)" if spilled else "",
        tensor_core=next((core for core, name in _CORES.items() if any(re.fullmatch(name, n) for n in names)), None),
        tma="UTMALDG" in names,
        async_copy="LDGSTS" in names,
        loads=tuple(sass_load_bytes(name) for name in loop if name.startswith(("LDG.", "LDGSTS."))),
        loop=len(loop),
        waits=sum(name.startswith("WARPGROUP.DEPBAR") for name in loop),
    )


def sass_load_bytes(instruction: str) -> int:
    return next((_SASS_WIDTHS[part] for part in instruction.split(".") if part in _SASS_WIDTHS), 4)


def read_amd(amdgcn: str) -> Code:
    """Of the compiler's assembly, with its metadata."""

    def number(key: str) -> int:
        return max(map(int, re.findall(rf"^\s+(?:- )?\.{key}:\s+(\d+)", amdgcn, re.MULTILINE)))

    vector, scalar = number("vgpr_spill_count"), number("sgpr_spill_count")
    scratch = number("private_segment_fixed_size") if vector or scalar else 0
    spills = f"spills {vector} vector and {scalar} scalar registers ({scratch} bytes a thread)"
    lines = _amd_lines(amdgcn)
    loop = main_loop(lines, _AMD_MMA, _AMD_LOAD)
    loads = map(_AMD_LOAD.match, loop)
    to_lds = r"^\s+(?:global_load_lds|buffer_load_.*\blds\b)"
    return Code(
        registers=number("vgpr_count"),
        spill_bytes=scratch,
        # Scalar registers spill into lanes of vector registers; only scratch is memory.
        spills=spills if scratch else "",
        tensor_core="mfma" if any(_AMD_MMA.match(line.name) for line in lines) else None,
        tma=False,
        async_copy=bool(re.search(to_lds, amdgcn, re.MULTILINE)),
        loads=tuple(_AMD_UNITS[load[1]] * int(load[2] or 1) for load in loads if load),
        loop=len(loop),
    )


def nvidia_text(cubin: bytes) -> bytes:
    """The instructions of a cubin of one kernel: its section .text.NAME (ELF-64, System V ABI)."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + size * i) for i in range(count)]  # name, …, offset, size
    texts = [s for s in sections if cubin.startswith(b".text.", sections[names][4] + s[0])]
    if len(texts) != 1:
        raise ValueError(f"a cubin has {len(texts)} sections of instructions; expected one")
    return cubin[texts[0][4] : texts[0][4] + texts[0][5]]


def split_sass(sass: str, sizes: Sequence[int]) -> list[str]:
    """The lines of each of several kernels of so many bytes that were disassembled one behind the other."""
    lines = re.findall(r"^\s*/\*([0-9a-f]+)\*/(.*)$", sass, re.MULTILINE)
    kernels: list[list[str]] = []
    end = 0
    for address, code in lines:
        if int(address, 16) >= end:
            end += sizes[len(kernels)]
            kernels.append([])
        kernels[-1].append(f"/*{address}*/{code}")
    return ["\n".join(kernel) for kernel in kernels]


def _sass_lines(sass: str) -> list[Instruction]:
    found = re.findall(r"^\s*/\*([0-9a-f]+)\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*([^;]*)", sass, re.MULTILINE)
    jumps = [
        re.search(r"\b0x([0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None for *_, name, operands in found
    ]
    targets = {int(jump[1], 16) for jump in jumps if jump}
    lines = []
    for (address, predicate, name, operands), jump in zip(found, jumps, strict=True):
        if int(address, 16) in targets:
            lines.append(Instruction(f"{int(address, 16):x}"))
        # A branch has its condition in front, or among its operands.
        ends = name in ("EXIT", "RET") or (name == "BRA" and operands.startswith("0x"))
        lines.append(Instruction(None, name, jump and jump[1], bool(predicate) or not ends))
    return lines


def _amd_lines(amdgcn: str) -> list[Instruction]:
    lines = []
    for line in amdgcn.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            lines.append(Instruction(label[1]))
        elif code := re.match(r"\s+([a-z]\w+)\s*(\.LBB\w+)?", line):
            lines.append(Instruction(None, code[1], code[2], code[1] not in ("s_branch", "s_endpgm")))
    return lines


def main_loop(lines: Sequence[Instruction], mma: re.Pattern[str], load: re.Pattern[str]) -> list[str]:
    """The operations of the innermost loop with the most matrix instructions; without any, of the one with most code.

    Of loops that neither multiply nor load, such as the wait for a barrier, none counts.
    """
    blocks: list[list[Instruction]] = [[]]
    for line in lines:
        if line.label or (blocks[-1] and (blocks[-1][-1].target or not blocks[-1][-1].falls_through)):
            blocks.append([])
        blocks[-1].append(line)
    starts = {block[0].label: index for index, block in enumerate(blocks) if block and block[0].label}
    flow = networkx.DiGraph([(-1, 0)])
    for index, block in enumerate(blocks):
        if block and block[-1].target in starts:
            flow.add_edge(index, starts[block[-1].target])
        if index + 1 < len(blocks) and (not block or block[-1].falls_through):
            flow.add_edge(index, index + 1)

    def count(loop: frozenset[int], pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.match(name)) for name in code[loop])

    found = _loops(flow, networkx.descendants(flow, -1))
    code = {loop: [line.name for block in sorted(loop) for line in blocks[block] if line.name] for loop in found}
    working = [loop for loop in code if count(loop, mma)] or [loop for loop in code if count(loop, load)]
    innermost = [loop for loop in working if not any(other < loop for other in working)]
    return code[max(innermost, key=lambda loop: (count(loop, mma), len(code[loop])))] if innermost else []


def _loops(flow: networkx.DiGraph, among: Set[int]) -> Iterator[frozenset[int]]:
    """The loops among these blocks of a flow graph, and within each those that do not pass its entry.

    A jump backwards alone makes no loop: waits for barriers are moved behind the code and jump back into it.
    """
    for loop in networkx.strongly_connected_components(flow.subgraph(among)):
        if any(flow.has_edge(block, other) for block in loop for other in loop):
            yield frozenset(loop)
            entries = {block for block in loop if any(before not in loop for before in flow.predecessors(block))}
            yield from _loops(flow, loop - entries)


class Tile(NamedTuple):
    """What one load of Triton's own intermediate code takes: the whole tile, all threads together."""

    elements: int
    element_bytes: int


_TILE = re.compile(r"\btensor<((?:\d+x)+)(?:!tt\.ptr<)?[a-z]+(\d+)")
_SHAPE = re.compile(r"<((?:\d+x)+)")
# The group is the pointers, or the offsets from one.
_LOAD = re.compile(
    r"= (?:tt\.load|ttg\.async_copy_global_to_local|amd\w*\.buffer_load(?:_to_local)?) (?:%[\w.]+\[)?(%\w+)"
)
_DOT = re.compile(r"= (?:tt\.dot|ttng\.\w*(?:dot|mma)\w*)\b|ttng\.tc_gen5_mma\b")


def loop_tiles(ttgir: str) -> tuple[Tile, ...]:
    """The tiles that the innermost loop with the largest products loads.

    Without those that go through descriptors, and without one row spread over a tile: it comes from L1.
    """

    def multiplied(body: list[str]) -> int:
        return sum(_product(shape) for line in body if _DOT.search(line) for shape in _SHAPE.findall(line))

    loops = _ttgir_loops(ttgir.splitlines())
    best = max(loops, key=lambda body: (multiplied(body), len(body)), default=[])
    spread = {name for line in best for name in re.findall(r"(%\w+) = tt\.broadcast", line)}
    loads = [(line, load) for line in best if (load := _LOAD.search(line))]
    tiles = (_TILE.search(line) for line, load in loads if load[1] not in spread)
    return tuple(Tile(_product(tile[1]), int(tile[2]) // 8) for tile in tiles if tile)


def narrow_loads(loads: Sequence[int], tiles: Sequence[Tile], threads: int) -> str:
    """What is wrong with the loads of a main loop; empty where each takes 16 bytes, or all that there is to take.

    Where a thread's share of a tile is less than 16 bytes (64 × 16 of bfloat16 over 256 threads: 8), one load of the
    share is right, and a small tile of bytes (dropout's mask) may be loaded byte by byte.
    """
    shares = [(tile.elements * tile.element_bytes / threads, tile.element_bytes) for tile in tiles]
    allowed = min((max(1, element if element == 1 else share) for share, element in shares if share < 16), default=16)
    if loads and min(loads) < allowed:
        return f"loads {min(loads)} bytes at a time in its main loop, where {allowed:g} would do"
    wide, due = sum(load for load in loads if load >= 16), sum(share for share, _ in shares if share >= 16)
    if wide < due:
        return f"loads {wide} bytes a thread by 16 in its main loop, where {due:g} could be"
    return ""


def _ttgir_loops(lines: Sequence[str]) -> Iterator[list[str]]:
    """The bodies of the loops that hold no other. Indentation tells where one ends."""
    for start, line in enumerate(lines):
        if " scf.for " in line or " scf.while " in line:
            indent = len(line) - len(line.lstrip())
            end = next(i for i in range(start + 1, len(lines)) if re.match(rf" {{{indent}}}}}", lines[i]))
            body = list(lines[start + 1 : end])
            if not any(" scf.for " in inner or " scf.while " in inner for inner in body):
                yield body


def _product(shape: str) -> int:
    return math.prod(map(int, shape.rstrip("x").split("x")))
