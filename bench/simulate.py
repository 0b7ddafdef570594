"""What each kernel should take on devices that are not here, from its machine code: the tables of docs/cost-model.md.

python bench/simulate.py compile              compiles the kernels of a training step and of decoding, and
                                              writes bench/results/kernels.json
python bench/simulate.py docs/cost-model.md   writes the tables from it

A pass takes what its bytes, or its instructions, take: bytes in flight over the latency are the bandwidth that it can
have (Little's law). A product takes what its tiles' loops take, a wave after the other, and the ends that nothing
hides.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pages

from lorakernels.configs.data_sheet import DATA_SHEETS, DataSheet

KERNELS = Path(__file__).parent / "results" / "kernels.json"
_M, _N, _K, _R = 8192, 4096, 4096, 16
_TILES = ((128, 256), (256, 128), (128, 128))  # of which the library's product takes the best
# Of what is not read off the machine code, all of it assumed: seconds, shares of a peak, and cycles.
LATENCY = 500e-9  # of a load from memory under load
GAP = 1e-6  # from the end of a launch to the start of the next
COPY = 0.9  # of the bandwidth
LOOP = 0.8  # of the matrix units' peak, in the loop of a large product: cuBLAS reaches 0.78 of an H100's with its ends
ENDS = 3300  # cycles of a tile before and after its loop, read off sm_90's: the first load, S and B, the store
HIDDEN = 0.75  # of a tile's ends, where two programs share a multiprocessor
# Dependent loads before a program of decoding has all that it needs: slot beside rank (and S, y), then A or B.
CHAIN = {"multi_shrink_token_kernel": 2, "multi_expand_token_kernel": 2}
# Multiprocessors, and 16-bit operations of each a cycle: the makers' white papers. Four warps issue at once.
_UNITS = {"H200": (132, 4096), "H100": (132, 4096), "A100": (108, 2048), "B200": (148, 8192), "MI300X": (304, 2048)}
_UNITS["RTX 4090"] = (128, 512)
_COMPILED = {"sm_89": "sm_80"}  # for the one that nothing is compiled for, what is compiled for the other


@dataclass(frozen=True)
class Kernel:
    """A launch of a step, as it was compiled. Sizes in bytes, registers a thread."""

    part: str
    name: str
    programs: int
    bytes: int
    tile: tuple[int, int]
    registers: int
    threads: int
    shared: int
    ctas: int
    in_flight: int | None
    issue_per_byte: float | None
    dependent: bool  # starts while the launch before it still runs
    beside: bool  # runs beside the product

    @property
    def is_product(self) -> bool:
        return self.name.startswith("linear_expand")


@dataclass(frozen=True)
class Step:
    """One design on one device: seconds of each term that is not hidden."""

    terms: dict[str, float]
    floor: float

    @property
    def total(self) -> float:
        return sum(self.terms.values())


def compile_all() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By architecture and design, every launch of the headline's training step and of a layer that decodes.

    The latter has 64 adapters, or one: as one kernel, and as in a CUDA graph.
    """
    import torch

    from lorakernels.configs.config import KernelConfig
    from lorakernels.configs.device import assume
    from lorakernels.configs.table import forced_configs
    from lorakernels.kernels import lora_linear
    from lorakernels.kernels.launch import as_if_captured, record_launches
    from lorakernels.member import Member
    from lorakernels.tools.arch import ARCHS
    from lorakernels.tools.bench.counting import _of_launch
    from lorakernels.tools.compile_report import compile_report
    from lorakernels.tools.steps import layer_step, multi_step

    former = {
        "shrink": KernelConfig(64, BLOCK_K=64, num_warps=8),
        "outer": KernelConfig(64, 128, SPLIT=4, num_warps=8),
        "linear_expand": KernelConfig(128, 256, num_warps=8, num_stages=3, tma=True),
        "multi_shrink": KernelConfig(1, BLOCK_K=128, SPLIT=2),
    }
    x, W, A, B = (
        torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((64, _K), (_N, _K), (_R, _K), (_N, _R))
    )
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for arch in ARCHS:
        for design, forced in (("former", former), ("now", {})) if arch == "sm_90" else (("now", {}),):
            rows = []
            for part in ("train", "decode", *(("few", "forked") if design == "now" else ())):
                captured = as_if_captured() if part == "forked" else nullcontext()
                with assume(arch), forced_configs(forced), record_launches() as launches, captured:
                    if part == "train":
                        layer_step(lora_linear, torch.bfloat16, _M, _K, [(_N, _R)])
                    elif part == "decode":
                        multi_step(torch.bfloat16, 64, 64, _R, _K, (_N,), train=False)
                    else:
                        lora_linear.forward(x, [Member(W, A, B)], None, 0)
                for launch in launches:
                    (row,) = compile_report([launch], [arch], jobs=1, progress=False)
                    c = row.config
                    # What adds S Bᵀ has one turn of its loop, over the ranks: all that it reads is asked for at once.
                    flight = None if launch.constexprs.get("HAS_BASE") else row.bytes_in_flight
                    kernel = Kernel(
                        part, row.kernel, math.prod(launch.grid), _of_launch(launch).bytes, (c.BLOCK_M, c.BLOCK_N),
                        row.registers or 0, c.num_warps * ARCHS[arch].target.warp_size, row.shared_bytes or 0,
                        row.ctas_per_sm or 1, flight, row.issue_per_byte, c.dependent, c.side_stream,
                    )  # fmt: skip
                    rows.append(asdict(kernel))
            found.setdefault(arch, {})[design] = rows
    return found


def _clock(sheet: DataSheet) -> float:
    sms, per_cycle = _UNITS[sheet.name]
    return sheet.half / sms / per_cycle


def pass_seconds(kernel: Kernel, sheet: DataSheet, ctas: int | None = None) -> tuple[float, float]:
    """Of a pass over memory: by its bytes, and by its instructions. `ctas` are fewer programs a multiprocessor."""
    sms, _ = _UNITS[sheet.name]
    flight = kernel.in_flight or kernel.bytes  # without a loop all of it is asked for at once
    if ctas is not None:
        flight = flight * min(kernel.programs, ctas * sms) // min(kernel.programs, kernel.ctas * sms)
    moved = kernel.bytes / min(COPY * sheet.bandwidth, flight / LATENCY)
    issued = (kernel.issue_per_byte or 0) * kernel.bytes / (4 * sms * _clock(sheet))
    return moved + CHAIN.get(kernel.name, 1) * LATENCY, issued


def product_seconds(sheet: DataSheet, columns: int, summed: int, tile: tuple[int, int], ctas: int, ends: int) -> float:
    sms, per_cycle = _UNITS[sheet.name]
    rows, cols = tile
    tiles = math.ceil(_M / rows) * math.ceil(columns / cols)
    loop = 2 * rows * cols * summed / per_cycle / LOOP
    shown = ends * (1 - HIDDEN if ctas > 1 else 1)
    return math.ceil(tiles / sms) * (loop + shown) / _clock(sheet)


def fits_beside(product: Kernel, other: Kernel) -> bool:
    """Whether a multiprocessor of sm_90 has room for a program of each: registers by eight, 1 KiB a block reserved."""
    registers = sum(math.ceil(k.registers / 8) * 8 * k.threads for k in (product, other))
    return registers <= 65536 and product.shared + other.shared + 2048 <= 228 << 10


def train(kernels: Sequence[Kernel], sheet: DataSheet) -> Step:
    """The headline's step: what is left of each pass beside the products."""
    sizes = ((_N, _K), (_K, _N))  # of y and of dx
    frozen = sum(min(product_seconds(sheet, *size, tile, 1, 0) for tile in _TILES) for size in sizes)
    y, dx = (kernel for kernel in kernels if kernel.is_product)
    own = [product_seconds(sheet, *size, p.tile, p.ctas, ENDS) for p, size in zip((y, dx), sizes, strict=True)]
    terms = {"products": frozen, "their ends": sum(own) - frozen, "before a product": 0.0, "after or beside": 0.0}
    beside = any(kernel.beside for kernel in kernels)
    hidden = 0.0
    for kernel in kernels:
        alone = GAP + max(pass_seconds(kernel, sheet))
        if kernel.is_product:
            terms["before a product"] += 0 if kernel.dependent else GAP
        elif kernel is kernels[0] and y.dependent and fits_beside(y, kernel):
            terms["before a product"] += LATENCY  # y starts when all of this pass's programs have
        elif kernel.name == "shrink_kernel":  # G: whether dx overlaps it, across the fork between them, is not known
            terms["before a product"] += alone
        elif beside and fits_beside(dx, kernel):
            hidden += GAP + max(pass_seconds(kernel, sheet, ctas=1))
        else:
            terms["after or beside"] += alone
    terms["after or beside"] += max(0.0, hidden - own[1])
    return Step(terms, frozen)


_FROZEN_BYTES = 2 * (_N * _K + 64 * (_N + _K))  # of a layer that decodes: W, x and y


def decode(kernels: Sequence[Kernel], sheet: DataSheet, forked: bool) -> Step:
    """A layer that decodes in a graph, over the bytes that it has to read once."""
    *first, expand = kernels
    floor = (_FROZEN_BYTES + 64 * 2 * _R * (_N + _K)) / sheet.bandwidth
    base = _FROZEN_BYTES / (COPY * sheet.bandwidth) + LATENCY
    beside = _in_a_row(first, sheet)
    if forked:  # both wait for the same memory
        moved = _FROZEN_BYTES + sum(kernel.bytes for kernel in first)
        shared = max(base, beside - GAP, moved / (COPY * sheet.bandwidth) + LATENCY)
        terms = {"base": base, "A": shared - base}
    else:
        terms = {"base": base, "A": beside}
    terms["B"] = _in_a_row([expand], sheet)
    return Step(terms, floor)


def _in_a_row(kernels: Sequence[Kernel], sheet: DataSheet) -> float:
    """Seconds of launches behind another."""
    return sum(GAP + max(pass_seconds(kernel, sheet)) for kernel in kernels)


# ------------------------------------------------------------------------------------------- tables


def designs(part: str) -> list[tuple[DataSheet, str, list[Kernel]]]:
    """The launches of one part of each design on each device."""
    found = json.loads(KERNELS.read_text(encoding="utf-8"))["archs"]
    return [
        (sheet, design, [Kernel(**row | {"tile": tuple(row["tile"])}) for row in rows if row["part"] == part])
        for sheet in DATA_SHEETS
        for design, rows in found[_COMPILED.get(sheet.arch, sheet.arch)].items()
    ]


def _microseconds(step: Step) -> list[str]:
    return [f"{1e6 * seconds:.1f}" for seconds in step.terms.values()]


def simulated_training() -> str:
    """Microseconds of each term, and the ratio to the frozen layer's products."""
    rows = []
    for sheet, design, kernels in designs("train"):
        step = train(kernels, sheet)
        rows.append(
            [sheet.name, design, *_microseconds(step), f"{step.total / step.floor:.3f}", "1.05", "not measured"]
        )
    head = [
        "device",
        "design",
        "products",
        "their ends",
        "before a product",
        "after or beside",
        "ratio",
        "aim",
        "measured",
    ]
    return pages.table(head, rows)


def simulated_decoding() -> str:
    """Microseconds of each term, and the share of the memory floor."""
    rows = []
    for sheet, design, kernels in designs("decode"):
        step = decode(kernels, sheet, forked=design == "now")
        share = f"{step.floor / step.total:.2f}"
        rows.append([sheet.name, design, f"{1e6 * step.floor:.1f}", *_microseconds(step), share, "0.8", "not measured"])
    return pages.table(["device", "design", "floor", "base", "A", "B", "share", "aim", "measured"], rows)


def simulated_few_tokens() -> str:
    """Of one adapter: microseconds of the frozen layer, of the one kernel, and of what a graph has."""
    rows = []
    for (sheet, design, few), (_, _, forked) in zip(designs("few"), designs("forked"), strict=True):
        if design != "now":
            continue
        step = decode(forked, sheet, forked=True)
        base, *more = step.terms.values()
        one, sums = max(pass_seconds(few[0], sheet)), _in_a_row(few[1:], sheet)
        micros = [f"{1e6 * seconds:.1f}" for seconds in (base, one, sums, *more)]
        ratios = [f"{seconds / base:.2f}" for seconds in (one + sums, step.total)]
        rows.append([sheet.name, *micros[:3], ratios[0], *micros[3:], ratios[1], "not measured"])
    head = ["device", "frozen", "one kernel", "its sums", "ratio", "in a graph: A", "B", "ratio", "measured"]
    return pages.table(head, rows)


def simulated_kernels() -> str:
    """Each launch on an H200: what it moves, what it keeps in flight, and what that and its instructions take."""
    rows, sheet = [], DATA_SHEETS[0]
    for part in ("train", "decode"):
        launches = [
            (design, kernel) for on, design, kernels in designs(part) if on is DATA_SHEETS[0] for kernel in kernels
        ]
        for design, kernel in launches:
            if kernel.is_product:
                took = ["", "", f"{1e6 * product_seconds(sheet, _N, _K, kernel.tile, kernel.ctas, ENDS):.0f}"]
            else:
                moved, issued = pass_seconds(kernel, sheet)
                flight = "" if kernel.in_flight is None else f"{kernel.in_flight / 1e6:.1f}"
                took = [flight, f"{1e6 * issued:.1f}", f"{1e6 * max(moved, issued):.1f}"]
            shape = [str(kernel.registers), f"{kernel.shared / 1024:.0f}", str(kernel.ctas)]
            name = kernel.name.removesuffix("_kernel")
            rows.append([design, part, f"`{name}`", f"{kernel.bytes / 1e6:.1f}", *shape, *took, "not measured"])
    head = ["design", "step", "kernel", "MB", "registers", "KiB", "programs an SM", "MB in flight", "µs to issue", "µs"]
    return pages.table([*head, "measured"], rows)


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table for table in (simulated_training, simulated_decoding, simulated_few_tokens, simulated_kernels)
}


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        import triton

        made = {"triton": triton.__version__, "archs": compile_all()}
        KERNELS.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    else:
        pages.write(Path(sys.argv[1]), {name: table() for name, table in TABLES.items()})
