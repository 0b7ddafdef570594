"""What a training step of one layer costs: bytes, operations, launches, as counted from what it asks for; and time.

A graph is an order of products. Of the matrix products only the useful multiplications are counted. A and B are taken
to be of x's dtype. See docs/cost-model.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorakernels.configs.data_sheet import DataSheet
from lorakernels.configs.table import record_choices
from lorakernels.dropout import drop_threshold
from lorakernels.ops.flops import lora_linear_flops
from lorakernels.tools.bench.counting import Counted, count, torch_step
from lorakernels.tools.bench.peers import PEERS, base_product, make_tensors
from lorakernels.tools.bench.registry import Case
from lorakernels.tools.steps import layer_step

# The shares of the data sheet that predictions assume: a large matrix product reaches about 65 % of the dense 16-bit
# peak, a copy 82 to 100 % of the bandwidth. They are assumptions, the same for every device.
GEMM_SHARE = 0.65
MEMORY_SHARES = (0.82, 1.0)
_META = torch.device("meta")


def _of_peer(name: str) -> Callable[[Case, torch.device], list[Counted]]:
    return lambda case, device: torch_step(PEERS[name].make(case, make_tensors(case, _META, 0)))


def _of_kernels(cublas: bool) -> Callable[[Case, torch.device], list[Counted]]:
    def counted(case: Case, device: torch.device) -> list[Counted]:
        from lorakernels.kernels import lora_linear

        with base_product(case, _META, cublas), count() as found:
            layer_step(lora_linear, case.torch_dtype, case.M, case.K, [(case.N, case.r)], drop_threshold(case.dropout))
        return found

    return counted


def _of_torch(case: Case, device: torch.device) -> list[Counted]:
    """Past the operators, inside which torch shows nothing. Dropout's bits are drawn in another way on a CPU."""
    from lorakernels.eager import lora_linear

    on, threshold = "cpu" if case.dropout and device.type == "cpu" else "meta", drop_threshold(case.dropout)
    with count() as found:
        layer_step(lora_linear, case.torch_dtype, case.M, case.K, [(case.N, case.r)], threshold, device=on)
    return found


def _of_lorafusion(case: Case, device: torch.device) -> list[Counted]:
    """As its kernels are published: split at S, the low-rank term inside the product, D(x) and a byte mask kept.

    Nobody here can record them; its order in plain torch makes more passes.
    """
    e, (M, N, K, r) = case.itemsize, (case.M, case.N, case.K, case.r)
    shapes = ((M, K), (M, N), (M, r), (N, K), (r, K), (N, r))
    x, y, s, W, A, B = (((rows, cols), rows * cols * e) for rows, cols in shapes)
    mask = [((M, K), M * K)] if case.dropout else []
    passes = {
        **({"D(x)": (x, x, *mask)} if mask else {}),
        "S = D(x) Aᵀ": (x, A, s),
        "x Wᵀ + S Bᵀ": (x, W, s, B, y),
        "G and dB": (y, B, s, s, B),
        "dA": (s, x, A),
        "dy W + D'(G A)": (y, W, s, A, *mask, x),
    }
    return [Counted(name, operands) for name, operands in passes.items()]


@dataclass(frozen=True)
class Graph:
    """An order of products: what it asks for, and what a table calls it."""

    label: str
    counted: Callable[[Case, torch.device], list[Counted]]
    dropout: bool = True  # whether it has any


GRAPHS = {
    "frozen": Graph("frozen layer", _of_peer("frozen")),
    "fused": Graph("ours, fused", _of_kernels(cublas=False)),
    "split": Graph("ours, split (cuBLAS base)", _of_kernels(cublas=True)),
    "addmm": Graph("ours, torch (cuBLAS, `addmm_`)", _of_torch),
    "lorafusion": Graph("LoRAFusion's order", _of_lorafusion),
    "unsloth": Graph("Unsloth's order", _of_peer("unsloth-order"), dropout=False),
    "plain": Graph("plain torch, PEFT's order", _of_peer("eager")),
}


@dataclass(frozen=True)
class Cost:
    """The sums over what a graph asks for; `extra` is what the frozen layer does not move."""

    bytes: int
    flops: int
    launches: int
    extra: int
    extra_tall: int
    configs: dict[str, str]  # where each kernel's config comes from: the tuning table, or the heuristic


def cost(graph: str, case: Case, device: torch.device = _META) -> Cost:
    """What one step of `graph` costs; the blocks and splits of our kernels are those of the device assumed.

    Raises:
        ValueError: the graph has no dropout, and the case has.
    """
    if case.dropout and not GRAPHS[graph].dropout:
        raise ValueError(f"{GRAPHS[graph].label} has no dropout; the case has p = {case.dropout}")
    with record_choices() as asked:
        counted = GRAPHS[graph].counted(case, device)
    total = sum(each.bytes for each in counted)
    # Kernels do not say what they multiply, but it is what the layer needs.
    flops = sum(each.flops for each in counted)
    if graph in ("fused", "split", "lorafusion"):
        flops = frozen_flops(case) + low_rank_flops(case)
    tall = 2 * case.M * (case.K + case.N) * case.itemsize  # the frozen layer's
    return Cost(
        bytes=total,
        flops=flops,
        launches=len(counted),
        extra=total - frozen_bytes(case),
        extra_tall=sum(each.tall(case.M, case.K // 8) for each in counted) - tall,
        configs={each.operation: each.choice.source for each in reversed(asked)},
    )


def frozen_bytes(case: Case) -> int:
    """Two products, each of x's or dy's, W and y or dx."""
    return 2 * (case.M * (case.K + case.N) + case.N * case.K) * case.itemsize


def frozen_flops(case: Case) -> int:
    return 4 * case.M * case.N * case.K


def low_rank_flops(case: Case) -> int:
    """The six products of rank r: S, S Bᵀ, G, dB, dA, G A; the forward has two of them."""
    M, N, K = case.M, case.N, case.K
    return 3 * (lora_linear_flops((M, K), (N, K), (case.r, K)) - 2 * M * N * K)


def floor(case: Case, sheet: DataSheet | None = None) -> float:
    """The least (adapted layer) / (frozen layer): operations alone, or on a device that is known, its roofline.

    Of orders that keep W and B A apart. They read A and B twice and write their gradients; the rest could be hidden.
    """
    flops, more_flops = frozen_flops(case), low_rank_flops(case)
    if sheet is None:
        return 1 + more_flops / flops
    moved, more_moved = frozen_bytes(case), 3 * case.r * (case.K + case.N) * case.itemsize
    return sheet.seconds(flops + more_flops, moved + more_moved, case.dtype) / sheet.seconds(flops, moved, case.dtype)


def predict(own: Cost, case: Case, sheet: DataSheet, memory_share: float, extra: int | None = None) -> float:
    """Time over the frozen layer's: low-rank products as fast as the base's, and no extra byte hidden.

    The base runs at GEMM_SHARE of the peak, or at `memory_share` of the bandwidth where that is slower. `extra` bytes
    stand in for the graph's own.
    """
    compute, memory = GEMM_SHARE * sheet.peak(case.dtype), memory_share * sheet.bandwidth
    base_seconds = max(frozen_flops(case) / compute, frozen_bytes(case) / memory)
    more = (own.flops - frozen_flops(case)) / compute + (own.extra if extra is None else extra) / memory
    return 1 + more / base_seconds
