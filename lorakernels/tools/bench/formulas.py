"""What a training step (forward and backward) of one layer costs, by formula: bytes, operations, launches, time.

A graph is a sequence of passes. A pass counts each of its operands once, as if tiles that several programs read came
out of L2; one that makes more than one round over a tall matrix counts every round. Of the matrix products only the
useful multiplications are counted. A and B are taken to be of x's dtype. See docs/cost-model.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorakernels.configs.data_sheet import DataSheet
from lorakernels.tools.bench.passes import Pass, Sizes, base_products, own_passes, rank_flops, with_more
from lorakernels.tools.bench.registry import Case

# The shares of the data sheet that predictions assume: a large matrix product reaches about 65 % of the dense 16-bit
# peak, a copy 82 to 100 % of the bandwidth. They are assumptions, the same for every device.
GEMM_SHARE = 0.65
MEMORY_SHARES = (0.82, 1.0)
_META = torch.device("meta")


def frozen(case: Case, device: torch.device = _META) -> list[Pass]:
    """x Wᵀ forward, dy W backward."""
    return list(base_products(Sizes(case)))


def plain(case: Case, device: torch.device = _META) -> list[Pass]:
    """base(x) + lora_B(lora_A(dropout(x))) · scaling under autograd, which is PEFT's order."""
    size = Sizes(case)
    y_base, dx_base = base_products(size)
    over_K, over_N = rank_flops(case, case.K), rank_flops(case, case.N)
    forward, backward = [y_base], []
    if case.dropout:
        moved = 2 * size.x + size.byte_mask
        forward.append(Pass("D(x)", moved, moved))
        backward.append(Pass("D'", moved, moved))
    return [
        *forward,
        Pass("S = D(x) Aᵀ", size.x + size.A + size.s, size.x, over_K),
        Pass("S Bᵀ", size.s + size.B + size.y, size.y, over_N),
        Pass("· scaling", 2 * size.y, 2 * size.y),
        Pass("y +=", 3 * size.y, 3 * size.y),
        Pass("dy · scaling", 2 * size.y, 2 * size.y),
        Pass("G = dy B", size.y + size.B + size.s, size.y, over_N),
        Pass("dB", size.y + size.s + size.B, size.y, over_N),
        Pass("G A", size.s + size.A + size.x, size.x, over_K),
        Pass("dA", size.s + size.x + size.A, size.x, over_K),
        *backward,
        dx_base,
        Pass("dx +=", 3 * size.x, 3 * size.x),
    ]


def unsloth(case: Case, device: torch.device = _META) -> list[Pass]:
    """cuBLAS with `addmm_`; S made again for dB, dy B made twice. Has no dropout."""
    size = Sizes(case)
    y_base, dx_base = base_products(size)
    over_K, over_N = rank_flops(case, case.K), rank_flops(case, case.N)
    s = Pass("S = x Aᵀ", size.x + size.A + size.s, size.x, over_K)
    g = Pass("dy B", size.y + size.B + size.s, size.y, over_N)
    return [
        y_base,
        s,
        Pass("y += S Bᵀ", size.s + size.B + 2 * size.y, 2 * size.y, over_N),
        g,
        Pass("dA", size.x + size.s + size.A, size.x, over_K),
        s,
        Pass("dB", size.s + size.y + size.B, size.y, over_N),
        dx_base,
        g,
        Pass("dx += G A", size.s + size.A + 2 * size.x, 2 * size.x, over_K),
    ]


def lorafusion(case: Case, device: torch.device = _META) -> list[Pass]:
    """Split at S, the low-rank term inside the product; writes D(x) and a byte mask when there is dropout."""
    size = Sizes(case)
    y_base, dx_base = base_products(size)
    over_K, over_N = rank_flops(case, case.K), rank_flops(case, case.N)
    mask = size.byte_mask if case.dropout else 0
    dropout = [Pass("D(x)", 2 * size.x + mask, 2 * size.x + mask)] if mask else []
    return [
        *dropout,
        Pass("S = D(x) Aᵀ", size.x + size.A + size.s, size.x, over_K),
        with_more(y_base, "x Wᵀ + S Bᵀ", size.s + size.B, 0, over_N),
        Pass("G and dB", size.y + 2 * size.s + 2 * size.B, size.y, 2 * over_N),
        Pass("dA", size.s + size.x + size.A, size.x, over_K),
        with_more(dx_base, "dy W + D'(G A)", size.s + size.A + mask, mask, over_K),
    ]


def addmm(case: Case, device: torch.device = _META) -> list[Pass]:
    """The package's plain torch: base product, then `addmm_`; S is kept, dy is read for G and for dB.

    With dropout the mask is a byte an element, and drawing it counts as writing it.
    """
    size = Sizes(case)
    y_base, dx_base = base_products(size)
    over_K, over_N = rank_flops(case, case.K), rank_flops(case, case.N)
    forward, backward, dx = [], [], []
    if case.dropout:
        convert = Pass("mask in x's dtype", size.byte_mask + size.x, size.byte_mask + size.x)
        multiply = Pass("D(x)", 3 * size.x, 3 * size.x)
        forward = [Pass("mask", size.byte_mask, size.byte_mask), convert, multiply]
        rescale = [Pass("S / (1 - p)", 2 * size.s, 0)]
        backward = [convert, multiply]
        dx = [
            Pass("G A", size.s + size.A + size.x, size.x, over_K),
            Pass("D'", 3 * size.x, 3 * size.x),
            Pass("dx +=", 3 * size.x, 3 * size.x),
        ]
    else:
        rescale = []
        dx = [Pass("dx += G A", size.s + size.A + 2 * size.x, 2 * size.x, over_K)]
    return [
        *forward,
        Pass("S = D(x) Aᵀ", size.x + size.A + size.s, size.x, over_K),
        *rescale,
        y_base,
        Pass("y += S Bᵀ", size.s + size.B + 2 * size.y, 2 * size.y, over_N),
        *backward,
        Pass("G = dy B", size.y + size.B + size.s, size.y, over_N),
        Pass("G · scaling", 2 * size.s, 0),
        Pass("dA", size.s + size.x + size.A, size.x, over_K),
        Pass("dB", size.s + size.y + size.B, size.y, over_N),
        Pass("dB · scaling", 2 * size.B, 0),
        Pass("dB in [N, r]", 2 * size.B, 0),
        dx_base,
        *dx,
    ]


def fused(case: Case, device: torch.device = _META) -> list[Pass]:
    """The package's kernels, low-rank term inside the base product (or the whole layer in one, for few tokens)."""
    return own_passes(case, device, cublas=False)


def split(case: Case, device: torch.device = _META) -> list[Pass]:
    """The package's kernels beside cuBLAS: the low-rank term is added to y and dx in a pass of its own."""
    return own_passes(case, device, cublas=True)


@dataclass(frozen=True)
class Graph:
    """An order of products: its passes, and what a table calls it."""

    label: str
    passes: Callable[[Case, torch.device], list[Pass]]
    dropout: bool = True  # whether it has any


GRAPHS = {
    "frozen": Graph("frozen layer", frozen),
    "fused": Graph("ours, fused", fused),
    "split": Graph("ours, split (cuBLAS base)", split),
    "addmm": Graph("ours, torch (cuBLAS, `addmm_`)", addmm),
    "lorafusion": Graph("LoRAFusion's order", lorafusion),
    "unsloth": Graph("Unsloth's order", unsloth, dropout=False),
    "plain": Graph("plain torch, PEFT's order", plain),
}


@dataclass(frozen=True)
class Cost:
    """The sums over a graph's passes; `extra` is what the frozen layer does not move."""

    bytes: int
    flops: int
    launches: int
    extra: int
    extra_tall: int


def cost(graph: str, case: Case, device: torch.device = _META) -> Cost:
    """What one step of `graph` costs; the blocks and splits of our kernels are those of `device`.

    Raises:
        ValueError: the graph has no dropout, and the case has.
    """
    if case.dropout and not GRAPHS[graph].dropout:
        raise ValueError(f"{GRAPHS[graph].label} has no dropout; the case has p = {case.dropout}")
    passes, base = GRAPHS[graph].passes(case, device), frozen(case)
    total = sum(p.bytes for p in passes)
    return Cost(
        bytes=total,
        flops=sum(p.flops for p in passes),
        launches=len(passes),
        extra=total - sum(p.bytes for p in base),
        extra_tall=sum(p.tall for p in passes) - sum(p.tall for p in base),
    )


def low_rank_flops(case: Case) -> int:
    """The six products of rank r: S, S Bᵀ, G, dB, dA, G A."""
    return 3 * (rank_flops(case, case.K) + rank_flops(case, case.N))


def floor(case: Case, sheet: DataSheet | None = None) -> float:
    """The least (adapted layer) / (frozen layer): operations alone, or on a device that is known, its roofline.

    Of orders that keep W and B A apart. They read A and B twice and write their gradients; the rest could be hidden.
    """
    base_flops = cost("frozen", case).flops
    flops = base_flops + low_rank_flops(case)
    if sheet is None:
        return flops / base_flops
    size = Sizes(case)
    base_bytes = cost("frozen", case).bytes
    peak = sheet.peak(case.dtype)

    def seconds(operations: int, moved: int) -> float:
        return max(operations / peak, moved / sheet.bandwidth)

    return seconds(flops, base_bytes + 3 * (size.A + size.B)) / seconds(base_flops, base_bytes)


def predict(graph: str, case: Case, sheet: DataSheet, memory_share: float, extra: int | None = None) -> float:
    """Time over the frozen layer's: low-rank products as fast as the base's, and no extra byte hidden.

    The base runs at GEMM_SHARE of the peak, or at `memory_share` of the bandwidth where that is slower. `extra` bytes
    stand in for the graph's own.
    """
    base, own = cost("frozen", case), cost(graph, case)
    compute = GEMM_SHARE * sheet.peak(case.dtype)
    memory = memory_share * sheet.bandwidth
    base_seconds = max(base.flops / compute, base.bytes / memory)
    more = (own.flops - base.flops) / compute + (own.extra if extra is None else extra) / memory
    return 1 + more / base_seconds
