"""Bytes, operations and launches as they are counted, against figures by hand."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.data_sheet import DATA_SHEETS, data_sheet
from lorakernels.configs.device import assume
from lorakernels.configs.table import choose, forced_configs, takes_few_tokens_form
from lorakernels.eager import lora_linear as eager_lora_linear
from lorakernels.kernels import lora_linear, multi_lora
from lorakernels.tools.bench.counting import Counted, count
from lorakernels.tools.bench.peer import make_tensors
from lorakernels.tools.bench.peers import PEERS
from lorakernels.tools.bench.registry import Case
from lorakernels.tools.steps import layer_step

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import cost_model as costs

MIB = 1 << 20
HEADLINE = Case(8192, 4096, 4096)
H200 = data_sheet("NVIDIA H200")
assert H200 is not None
ONE = KernelConfig(BLOCK_M=64, BLOCK_N=512, BLOCK_K=64, BLOCK_R=64)  # a block of columns and ranks, no split


def group_step(Ns: tuple[int, ...], M: int, K: int, r: int) -> list[Counted]:
    with count() as counted:
        layer_step(lora_linear, torch.bfloat16, M, K, [(N, r) for N in Ns])
    return counted


@pytest.mark.parametrize(("few", "graph"), [(False, "fused"), (False, "split"), (True, "fused")])
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("dropout", "dtype"), [(0.0, "bfloat16"), (0.1, "bfloat16"), (0.1, "float32")])
def test_kernels(few: bool, graph: str, split: int, dropout: float, dtype: str) -> None:
    """Every operand once; y and dx twice more beside cuBLAS; a split sum as float32 planes that are added."""
    M, N, K, r = 200 if few else 2048, 384, 512, 16
    case = Case(M, N, K, r, dropout, dtype)
    assert takes_few_tokens_form(M, r, case.itemsize) is few
    e = case.itemsize
    x, y, s, W, A, B = (rows * cols * e for rows, cols in ((M, K), (M, N), (M, r), (N, K), (r, K), (N, r)))
    mask, seed = (M * K // 8, 8) if dropout else (0, 0)

    def summed(numbytes: int, planes: int = split) -> int:
        """Written; or float32 planes written, read, and their sum written."""
        return numbytes if planes == 1 else numbytes // e * 4 * planes * 2 + numbytes

    config = dataclasses.replace(ONE, SPLIT=split)
    names = ("shrink", "few_tokens", "outer")
    with forced_configs(
        dict.fromkeys(names, config) | {"linear_expand": dataclasses.replace(ONE, cublas=graph == "split")}
    ):
        found = costs.cost(graph, case)
    outer_x = x + s + mask + summed(A)
    if few:
        layer = x + W + A + B + mask + seed + summed(y) + summed(s)
        dx_and_g = y + W + A + B + mask + summed(x) + summed(s)
        expected = layer + dx_and_g + y + s + summed(B) + outer_x
        launches = 4 if split == 1 else 4 + 2 + 2 + 1 + 1
    else:
        base = {"fused": W + x + y, "split": W + x + 3 * y}[graph], {"fused": W + x + y, "split": W + y + 3 * x}[graph]
        expected = x + A + mask + seed + summed(s) + base[0] + s + B  # S, y
        expected += y + B + s + s + summed(B) + outer_x  # G and dB, dA
        expected += base[1] + s + A + mask  # dx
        launches = 5 + 2 * (graph == "split") + (3 if split > 1 else 0)
    assert (found.bytes, found.launches) == (expected, launches)
    assert found.extra == expected - 2 * (x + y + W)


def test_rounds() -> None:
    """A block of 16 of 64 ranks goes over x and dy four times; what is written stays."""
    case = Case(2048, 384, 512, 64)
    found = []
    for block in (64, 16):
        config = dataclasses.replace(ONE, BLOCK_R=block)
        with forced_configs(dict.fromkeys(("shrink", "outer", "linear_expand"), config)):
            found.append(costs.cost("fused", case).bytes)
    x, y = 2048 * 512 * 2, 2048 * 384 * 2
    assert found[1] - found[0] == 3 * (2 * x + y)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("graph", ["fused", "split"])
@pytest.mark.parametrize(
    "shape", [(8192, 1024, 4096, 16), (2048, 131, 97, 5), (4096, 4096, 1024, 256), (200, 512, 384, 128), (1, 96, 64, 8)]
)
def test_shipped_configs(shape: tuple[int, ...], graph: str, arch: str) -> None:
    """Beyond the least, which reads every operand once: what there is of planes and rounds."""
    case = Case(*shape)
    with assume(arch):
        found = costs.cost(graph, case)
    M, N, K, r = shape
    few = takes_few_tokens_form(M, r, 2)
    least = 2 * (2 * M * K + M * N + 3 * r * (K + N)) if not few else 2 * (M * K + M * N + 3 * r * (K + N))
    assert found.extra >= least and set(found.configs) == (
        {"few_tokens", "outer"} if few else {"shrink", "linear_expand", "outer"}
    )
    sources = {name for name, source in found.configs.items() if source == "forced"}
    assert sources <= {"linear_expand"}


@pytest.mark.parametrize(("graph", "dropouts"), [("frozen", (0.0, 0.1)), ("plain", (0.0, 0.1)), ("unsloth", (0.0,))])
def test_torch_graphs(graph: str, dropouts: tuple[float, ...]) -> None:
    """What autograd adds is counted too."""
    for dropout, (M, N, K, r) in itertools.product(dropouts, ((40, 24, 56, 4), (3, 64, 32, 8))):
        case = Case(M, N, K, r, dropout)
        x, y, s, A, B = (2 * size for size in (M * K, M * N, M * r, r * K, N * r))
        extra = {
            "frozen": 0,
            # S, S Bᵀ, G, dB, dA, G A; two scalings, two additions; the mask a byte an element.
            "plain": 3 * (x + y + A + B) + 6 * s + 7 * y + 3 * x + (2 * (2 * x + M * K) if dropout else 0),
            "unsloth": 4 * (x + A) + 4 * (y + B) + 8 * s + x + y,
        }[graph]
        found = costs.cost(graph, case)
        assert found.extra == extra
        assert found.launches == {"frozen": 2, "plain": 14 if dropout else 12, "unsloth": 10}[graph]


def test_torch_path() -> None:
    """`addmm_`; with dropout the bits are drawn as the device draws them, on a CPU by torch's own generator."""
    case = Case(300, 64, 48, 8)
    x, y, s, A, B = (2 * size for size in (300 * 48, 300 * 64, 300 * 8, 8 * 48, 64 * 8))
    found = costs.cost("addmm", case)
    # Six products; y and dx read and written once more; G and dB scaled, and dB written as it lies in [N, r].
    products = 3 * (x + y + A + B) + 6 * s
    assert (found.extra, found.launches) == (products + x + y + 2 * s + 4 * B, 11)
    dropped = dataclasses.replace(case, dropout=0.1)
    on_cpu = len(costs.of_layer(eager_lora_linear, dropped, "cpu"))
    assert found.launches < on_cpu < 25 < costs.cost("addmm", dropped).launches


@pytest.mark.parametrize(("Ns", "r"), [((4096, 1024, 1024), 16), ((14336, 14336), 64), ((131, 97, 33), 5)])
@pytest.mark.parametrize("cublas", [False, True])
def test_a_group_reads_x_once(Ns: tuple[int, ...], r: int, cublas: bool) -> None:
    """x for S and for dA, whatever the number of members; dx is written once, or by cuBLAS for every member."""
    M, K, n = 2048, 2048 if r > 5 else 89, len(Ns)
    config = choose("linear_expand", M, Ns[0], K, r, 2, torch.device("meta"))
    forced = {name: dataclasses.replace(ONE, BLOCK_R=256, BLOCK_N=512) for name in ("shrink", "outer")}
    with forced_configs(forced | {"linear_expand": dataclasses.replace(config, cublas=cublas)}):
        counted = group_step(Ns, M, K, r)
    of_x = [moved for each in counted for shape, moved in each.operands if shape == (M, K)]
    x = M * K * 2
    # S, a product a member, dA, dx; beside cuBLAS dx is read and written for every further member, and once at the end.
    assert sum(of_x) == x * (1 + n + 1 + 1 + (2 * (n - 1) + 2 if cublas else 0))


def test_known_figures_of_a_group() -> None:
    """q, k, v of 8192 tokens: less than the frozen layers move, whose dx are written one by one and added."""
    with assume("sm_90"):
        counted = group_step((4096, 1024, 1024), 8192, 4096, 16)
    ours = costs.tall(counted, HEADLINE)
    frozen = 6 * 64 + 2 * 96 + 6 * 64  # MiB: the two products of each, and two additions of dx
    # x for S and for dA; every dy for G, and again beside dx for dB.
    assert ours == (frozen + 2 * 64 + 2 * 96 - 2 * 64 - 6 * 64) * MIB


# The figures of a layer of 8192 tokens, 4096 → 4096, r = 16, bfloat16: extra MiB in matrices of a row a token, then the
# ratio to the frozen layer at the whole bandwidth and at 82 % of it.
TABLE = [
    ("fused", 0.0, 192, 1.06, 1.07),
    ("split", 0.0, 448, 1.13, 1.15),
    ("addmm", 0.0, 512, 1.14, 1.17),
    ("lorafusion", 0.0, 192, 1.06, 1.07),
    ("lorafusion", 0.1, 384, 1.11, 1.13),
    ("unsloth", 0.0, 640, 1.18, 1.21),
    ("plain", 0.0, 1024, 1.27, 1.33),
]


@pytest.mark.parametrize(("graph", "dropout", "extra_mib", "low", "high"), TABLE)
def test_known_figures(graph: str, dropout: float, extra_mib: int, low: float, high: float) -> None:
    case = dataclasses.replace(HEADLINE, dropout=dropout)
    own = costs.cost(graph, case)
    assert own.extra_tall == extra_mib * MIB
    assert costs.predict(own, case, H200, 1.0, own.extra_tall) == pytest.approx(low, abs=0.006)
    assert costs.predict(own, case, H200, 0.82, own.extra_tall) == pytest.approx(high, abs=0.006)


def test_known_operations() -> None:
    assert costs.cost("frozen", HEADLINE).flops == HEADLINE.frozen_flops == pytest.approx(549.8e9, rel=1e-4)
    assert HEADLINE.low_rank_flops == 6 * 8192 * 16 * (4096 + 4096) == pytest.approx(6.44e9, rel=1e-3)
    for sheet in (None, *DATA_SHEETS):
        assert HEADLINE.floor(sheet) == pytest.approx(1.012, abs=5e-4)
    # One token: reading A and B beside W, three times each.
    assert Case(1, 4096, 4096).floor(H200) == pytest.approx(1 + 3 * 2 * 16 / (2 * 4096), rel=1e-3)


@pytest.mark.parametrize("name", ["frozen", "ours-torch", "eager"])
def test_every_product_is_made(name: str) -> None:
    step = PEERS[name].make(make_tensors(HEADLINE, "meta", 0))
    with FlopCounterMode(display=False) as flops:
        step()
    assert flops.get_total_flops() == HEADLINE.frozen_flops + (name != "frozen") * HEADLINE.low_rank_flops


def test_no_dropout_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="has no dropout"):
        costs.cost("unsloth", dataclasses.replace(HEADLINE, dropout=0.1))


MULTI = [
    Case(48, 96, 64, 16, adapters=6),
    Case(48, 96, 64, 32, adapters=8, mixed=True),
    Case(1024, 64, 96, 40, adapters=4),
]


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("height", [1, 16])
@pytest.mark.parametrize("case", MULTI, ids=str)
def test_kernels_of_many_adapters(case: Case, height: int, split: int) -> None:
    """Beyond the frozen layer: x for each block of ranks, y and S's planes twice, each adapter once, and the plan."""
    tensors = make_tensors(case, "cpu", 0)
    plan = tensors.plan(paged=True).tensors
    (A, B), rest = tensors.pages, {"keep_s": False, "seed": None, "thresholds": None}
    config = KernelConfig(BLOCK_M=height, BLOCK_N=32, BLOCK_K=32, BLOCK_R=16, SPLIT=split)
    with forced_configs(dict.fromkeys(("multi_shrink", "multi_expand"), config)), count() as counted:
        multi_lora.forward(tensors.x, [tensors.weight], [None], [A], [B], plan, **rest)
    base, shrink, expand = counted
    assert base.bytes == case.frozen_bytes
    S = split * case.M * case.r * 4
    assert plan.page_table is not None
    routes = [t.numel() * t.element_size() for t in (plan.buffer, plan.scales, plan.page_table)]
    blocks = -(-case.r // 16)
    adapters_of = {"A": sum(case.ranks) * case.K * 2, "B": sum(case.ranks) * case.N * 2}
    assert shrink.bytes == blocks * case.M * case.K * 2 + adapters_of["A"] + S + sum(routes)
    assert expand.bytes == S + adapters_of["B"] + 2 * case.M * case.N * 2 + routes[0] + routes[2]


@pytest.mark.parametrize("case", MULTI, ids=str)
def test_loop_over_adapters(case: Case) -> None:
    """A gather, two products and an addition for each adapter; of x and y only the rows that it has."""

    def added(y: Any, a: Any, b: Any, **_: Any) -> int:  # addmm_ has no formula
        return 2 * a[0] * a[1] * b[1]

    step = PEERS["loop"].make(make_tensors(case, "cpu", 0))
    with (
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as flops,
        count() as counted,
    ):
        step()
    x, y, s = (case.M * columns * case.itemsize for columns in (case.K, case.N, 0))
    s = 2 * sum(case.ranks[slot] for slot in case.slots().tolist())
    least = case.frozen_bytes + case.adapter_bytes()
    if case.together:
        assert len(counted) == 1 + 2 * case.adapters
        assert sum(row.bytes for row in counted) == least + x + 2 * y + 2 * s
    else:
        assert len(counted) == 1 + 4 * case.adapters
        # The gather reads and writes; its rows are read, those of the update written, read, and added to y's.
        assert sum(row.bytes for row in counted) == least + 3 * x + 4 * y + 2 * s
    assert flops.get_total_flops() == case.frozen_flops + case.low_rank_flops
