"""The tables of docs/cost-model.md, made from what each order of products asks for.

python bench/cost_model.py docs/cost-model.md

An order ("graph") is counted on meta tensors; those of other projects are written out as they are published. A and B
are taken to be of x's dtype. Of the matrix products only the useful multiplications are counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pages
import torch

from lorakernels.configs.data_sheet import DATA_SHEETS, DataSheet
from lorakernels.configs.device import assume
from lorakernels.configs.table import record_choices
from lorakernels.dropout import drop_threshold
from lorakernels.eager import lora_linear as eager
from lorakernels.kernels import lora_linear as kernels
from lorakernels.tools.bench.counting import Counted, count
from lorakernels.tools.bench.peer import base_product, make_tensors
from lorakernels.tools.bench.peers import PEERS
from lorakernels.tools.bench.registry import HEADLINE, Case
from lorakernels.tools.steps import MIXTURES, expert_step, layer_step

# The shares of the data sheet that predictions assume: a large matrix product reaches about 65 % of the dense 16-bit
# peak, a copy 82 to 100 % of the bandwidth. They are assumptions, the same for every device.
GEMM_SHARE = 0.65
MEMORY_SHARES = (0.82, 1.0)
_MIB = 1 << 20
_NOT_MEASURED = "not measured"
_CASE = Case(*HEADLINE)
# The configs that the counts depend on are those of this architecture.
_ARCH = "sm_90"


def _of_peer(name: str, case: Case) -> list[Counted]:
    step = PEERS[name].make(make_tensors(case, "meta", 0))
    with count() as counted:
        step()
    return counted


def of_layer(implementation: ModuleType, case: Case, device: str = "meta") -> list[Counted]:
    """Past the operators and past what is made for a call, such as dropout's seed."""
    sizes, threshold = (case.M, case.K, [(case.N, case.r)]), drop_threshold(case.dropout)
    with count() as counted:
        layer_step(implementation, case.torch_dtype, *sizes, threshold, device=device)
    return counted


def _of_kernels(cublas: bool, case: Case) -> list[Counted]:
    with base_product(case, torch.device("meta"), cublas):
        return of_layer(kernels, case)


def _published(passes: Sequence[str], case: Case) -> list[Counted]:
    """A pass a line: its operands, of one letter each; m is a byte an element of x."""
    e, (M, N, K, r) = case.itemsize, (case.M, case.N, case.K, case.r)
    shapes = {"x": (M, K), "y": (M, N), "s": (M, r), "W": (N, K), "A": (r, K), "B": (N, r), "m": (M, K)}
    moved = {name: (shape, shape[0] * shape[1] * (1 if name == "m" else e)) for name, shape in shapes.items()}
    return [Counted(line, tuple(moved[operand] for operand in line)) for line in passes]


def _lorafusion(case: Case) -> list[Counted]:
    """Split at S, the low-rank term inside the product; with dropout D(x) and a byte mask are kept."""
    drop, dropped = (["xxm"], "m") if case.dropout else ([], "")
    # S = D(x) Aᵀ; x Wᵀ + S Bᵀ; G and dB; dA; dy W + D'(G A)
    return _published([*drop, "xAs", "xWsBy", "yBssB", "sxA", f"yWsA{dropped}x"], case)


# S; x Wᵀ; y += S Bᵀ; dy B for dA, and dA; S again for dB, and dB; dy W; dy B again for dx, which is added to.
_UNSLOTH = ("xAs", "xWy", "sByy", "yBs", "sxA", "xAs", "ysB", "yWx", "yBs", "sAxx")


@dataclass(frozen=True)
class Graph:
    """An order of products: what a table calls it, what it asks for, and its products of rank r."""

    label: str
    counted: Callable[[Case], list[Counted]]
    products: int = 6
    dropout: bool = True  # whether it has any


GRAPHS = {
    "frozen": Graph("frozen layer", partial(_of_peer, "frozen"), products=0),
    "fused": Graph("ours, fused", partial(_of_kernels, False)),
    "split": Graph("ours, split (cuBLAS base)", partial(_of_kernels, True)),
    "addmm": Graph("ours, torch (cuBLAS, `addmm_`)", partial(of_layer, eager)),
    "lorafusion": Graph("LoRAFusion's order", _lorafusion),
    "unsloth": Graph("Unsloth's order", partial(_published, _UNSLOTH), products=8, dropout=False),
    "plain": Graph("plain torch, PEFT's order", partial(_of_peer, "eager")),
}


def tall(counted: Sequence[Counted], case: Case) -> int:
    """The bytes that are moved of matrices with a row a token, those of a few columns left out."""
    operands = [(shape[-2:], moved) for each in counted for shape, moved in each.operands if len(shape) > 1]
    return sum(n for s, n in operands if case.M in s and s[s[0] == case.M] >= case.K // 8)


@dataclass(frozen=True)
class Cost:
    """The sums over what a graph asks for; `extra` is what the frozen layer does not move."""

    bytes: int
    flops: int
    launches: int
    extra: int
    extra_tall: int
    configs: dict[str, str]  # where each kernel's config comes from: the tuning table, or the heuristic


def cost(graph: str, case: Case) -> Cost:
    """What one step of `graph` costs; the blocks and splits of our kernels are those of the device assumed.

    Raises:
        ValueError: the graph has no dropout, and the case has.
    """
    own = GRAPHS[graph]
    if case.dropout and not own.dropout:
        raise ValueError(f"{own.label} has no dropout; the case has p = {case.dropout}")
    with record_choices() as asked:
        counted = own.counted(case)
    moved = sum(each.bytes for each in counted)
    return Cost(
        bytes=moved,
        flops=case.frozen_flops + case.low_rank_flops * own.products // 6,
        launches=len(counted),
        extra=moved - case.frozen_bytes,
        extra_tall=tall(counted, case) - 2 * case.M * (case.K + case.N) * case.itemsize,
        configs={each.operation: each.choice.source for each in reversed(asked)},
    )


def predict(own: Cost, case: Case, sheet: DataSheet, memory_share: float, extra: int | None = None) -> float:
    """Time over the frozen layer's: low-rank products as fast as the base's, and no extra byte hidden.

    The base runs at GEMM_SHARE of the peak, or at `memory_share` of the bandwidth where that is slower. `extra` bytes
    stand in for the graph's own.
    """
    compute, memory = GEMM_SHARE * sheet.peak(case.dtype), memory_share * sheet.bandwidth
    base_seconds = max(case.frozen_flops / compute, case.frozen_bytes / memory)
    more = (own.flops - case.frozen_flops) / compute + (own.extra if extra is None else extra) / memory
    return 1 + more / base_seconds


# ------------------------------------------------------------------------------------------- tables


def _costs() -> list[tuple[str, float, Cost | None]]:
    """Label, dropout and cost of every graph; None where it has no dropout."""
    rows: list[tuple[str, float, Cost | None]] = []
    with assume(_ARCH):
        for name, graph in GRAPHS.items():
            for dropout in (0.0,) if name == "frozen" else (0.0, 0.1):
                applies = graph.dropout or not dropout
                rows.append((graph.label, dropout, cost(name, replace(_CASE, dropout=dropout)) if applies else None))
    return rows


def graphs() -> str:
    """Extra traffic, operations and launches of every graph."""
    rows = []
    for label, dropout, own in _costs():
        numbers = ["no dropout", "", "", ""]
        if own is not None:
            extra = (f"{moved / _MIB:.0f}" for moved in (own.extra_tall, own.extra))
            numbers = [*extra, f"{own.flops / 1e9:.1f}", str(own.launches)]
        rows.append([label, f"{dropout:g}", *numbers, _NOT_MEASURED])
    head = ["graph", "p", "extra MiB in matrices of a row a token", "extra MiB, all", "GFLOP", "launches", "measured"]
    return pages.table(head, rows)


def predictions() -> str:
    """Time over the frozen layer's on every device, for memory at its best and at its usual share."""
    rows = []
    for label, dropout, own in _costs()[1:]:
        if own is not None:
            low, high = ([predict(own, _CASE, sheet, at) for sheet in DATA_SHEETS] for at in reversed(MEMORY_SHARES))
            cells = (f"{a:.2f} to {b:.2f}; {_NOT_MEASURED}" for a, b in zip(low, high, strict=True))
            rows.append([label, f"{dropout:g}", *cells])
    return pages.table(["graph", "p", *(sheet.name for sheet in DATA_SHEETS)], rows)


# What a mixture of this name is: the tokens and sizes of `steps.MIXTURES`, or so many tokens of it.
_MIXTURES = {
    "Qwen3-30B-A3B": MIXTURES[0],
    "Qwen3-30B-A3B, 512 tokens": MIXTURES[1],
    "gpt-oss-20b": MIXTURES[3],
    "small": (4096, 4, 32, 1024, 512, False),
}


def experts() -> str:
    """A mixture's two projections, forward and backward with rank 16, over the frozen ones' grouped products."""
    rows = []
    for name, (T, top_k, E, hidden, inner, transposed) in _MIXTURES.items():
        pairs, sizes = T * top_k, ((2 * inner, hidden), (hidden, inner))
        with assume(_ARCH), count() as counted:
            expert_step(torch.bfloat16, T, top_k, E, hidden, inner, transposed)
        frozen_bytes = sum(2 * 2 * (pairs * (N + K) + E * N * K) for N, K in sizes)
        frozen_flops = sum(4 * pairs * N * K for N, K in sizes)
        low_rank_flops = sum(6 * pairs * 16 * (N + K) for N, K in sizes)
        extra = sum(each.bytes for each in counted) - frozen_bytes
        cells = []
        for sheet in DATA_SHEETS[:2]:
            compute, memory = GEMM_SHARE * sheet.half, MEMORY_SHARES[0] * sheet.bandwidth
            base = max(frozen_flops / compute, frozen_bytes / memory)
            cells.append(f"{1 + (low_rank_flops / compute + extra / memory) / base:.2f}; {_NOT_MEASURED}")
        stack = sum(2 * E * N * K for N, K in sizes)
        numbers = (frozen_bytes, extra, stack)
        rows.append([name, f"{T} × {top_k} of {E}", *(f"{n / _MIB:.0f}" for n in numbers), *cells])
    head = ["mixture", "tokens × experts", "frozen, MiB", "ours beyond, MiB", "its stacks, MiB", "H200", "H100"]
    return pages.table(head, rows)


def floors() -> str:
    """The floor by tokens and rank, over all devices."""
    rows = []
    for M, r in ((1, 16), (64, 16), (1024, 16), (8192, 4), (8192, 16), (8192, 64), (8192, 256)):
        found = sorted({f"{replace(_CASE, M=M, r=r).floor(sheet):.3f}" for sheet in DATA_SHEETS})
        rows.append([str(M), str(r), found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"])
    return pages.table(["tokens", "r", "floor"], rows)


def devices() -> str:
    """The data sheets."""
    rows = [
        [
            sheet.name,
            *(f"{number / 1e12:g}" for number in (sheet.half, sheet.single, sheet.bandwidth)),
            f"{sheet.l2_bytes >> 20}",
            sheet.source,
        ]
        for sheet in DATA_SHEETS
    ]
    return pages.table(["device", "16-bit TFLOP/s", "float32 TFLOP/s", "TB/s", "last-level cache, MiB", "source"], rows)


def assumptions() -> str:
    """The shares of the data sheet that predictions assume, in words."""
    low, high = (f"{100 * share:.0f} %" for share in MEMORY_SHARES)
    return (
        f"A matrix product runs at {100 * GEMM_SHARE:.0f} % of the dense peak; "
        f"memory at {high} of the bandwidth (the first figure) or {low} (the second)."
    )


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table for table in (graphs, assumptions, predictions, experts, floors, devices)
}


if __name__ == "__main__":
    pages.write(Path(sys.argv[1]), {name: table() for name, table in TABLES.items()})
