"""Bytes, operations and launches: those of the formulas are those that the program asks for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.data_sheet import DATA_SHEETS, data_sheet
from lorakernels.configs.device import assume
from lorakernels.configs.table import choose, forced_configs, takes_few_tokens_form
from lorakernels.tools.bench import formulas, multi
from lorakernels.tools.bench.counting import Counted, own_multi, own_step, torch_step
from lorakernels.tools.bench.multi_peers import MULTI_PEERS
from lorakernels.tools.bench.peers import PEERS, make_tensors
from lorakernels.tools.bench.registry import Case, MultiCase

MIB = 1 << 20
HEADLINE = Case(8192, 4096, 4096)
H200 = data_sheet("NVIDIA H200")
assert H200 is not None

SHAPES = (
    (8192, 4096, 4096, 16),
    (8192, 1024, 4096, 16),
    (300, 14336, 4096, 64),  # dy in two passes, few programs, planes everywhere
    (2048, 131, 97, 5),
    (4096, 4096, 1024, 256),  # several rounds over x and dy
    (200, 512, 384, 128),  # few tokens, too large a rank for the one kernel
)
FEW = ((1, 4096, 4096, 16), (200, 1024, 4096, 8), (256, 131, 97, 5), (16, 96, 64, 64))


@contextmanager
def base_product(cublas: bool, case: Case) -> Iterator[None]:
    """The general form with cuBLAS for the base, or without; the other operations keep their own configs."""
    config = choose("linear_expand", case.M, case.N, case.K, case.r, case.itemsize, torch.device("meta"))
    with forced_configs({"linear_expand": dataclasses.replace(config, cublas=cublas, tma=not cublas)}):
        yield


def same(counted: list[Counted], graph: str, case: Case) -> None:
    expected = formulas.cost(graph, case)
    assert sum(row.bytes for row in counted) == expected.bytes, counted
    assert len(counted) == expected.launches, [row.name for row in counted]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("dropout", "dtype"), [(0.0, "bfloat16"), (0.1, "bfloat16"), (0.1, "float32")])
@pytest.mark.parametrize("graph", ["fused", "split"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(shape: tuple[int, ...], graph: str, dropout: float, dtype: str, arch: str) -> None:
    case = Case(*shape, dropout, dtype)
    assert not takes_few_tokens_form(case.M, case.r, case.itemsize)
    with assume(arch), base_product(graph == "split", case):
        same(own_step(case, "triton"), graph, case)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_few_tokens(shape: tuple[int, ...], dropout: float) -> None:
    case = Case(*shape, dropout)
    assert takes_few_tokens_form(case.M, case.r, case.itemsize)
    with assume("sm_90"):
        same(own_step(case, "triton"), "fused", case)


@pytest.mark.parametrize("split", [1, 3])
def test_planes_of_one_block(split: int) -> None:
    """A block of columns as wide as the output leaves no planes of G."""
    case = Case(300, 64, 48, 8)
    small = KernelConfig(BLOCK_M=16, BLOCK_N=64, BLOCK_K=16, BLOCK_R=16, SPLIT=split)
    with forced_configs(dict.fromkeys(("shrink", "linear_expand", "outer"), small)):
        same(own_step(case, "triton"), "fused", case)
        assert formulas.cost("fused", case).launches == 5 + 3 * (split > 1)


@pytest.mark.parametrize(
    ("peer", "graph", "dropouts"),
    [
        ("frozen", "frozen", (0.0, 0.1)),
        ("eager", "plain", (0.0, 0.1)),
        ("unsloth-order", "unsloth", (0.0,)),
        ("ours-torch", "addmm", (0.0,)),
    ],
)
def test_torch_graphs(peer: str, graph: str, dropouts: tuple[float, ...]) -> None:
    """On real tensors: what autograd adds is counted too. Operations agree, which kernels do not tell."""
    for dropout, (M, N, K, r) in itertools.product(dropouts, ((40, 24, 56, 4), (3, 64, 32, 8))):
        case = Case(M, N, K, r, dropout)
        step = PEERS[peer].make(case, make_tensors(case, "cpu", 0))
        counted = own_step(case, "torch") if peer == "ours-torch" else torch_step(step)
        same(counted, graph, case)
        assert sum(row.flops for row in counted) == formulas.cost(graph, case).flops


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
    extra = formulas.cost(graph, case).extra_tall
    assert extra == extra_mib * MIB
    assert formulas.predict(graph, case, H200, 1.0, extra) == pytest.approx(low, abs=0.006)
    assert formulas.predict(graph, case, H200, 0.82, extra) == pytest.approx(high, abs=0.006)


def test_known_operations() -> None:
    assert formulas.cost("frozen", HEADLINE).flops == pytest.approx(549.8e9, rel=1e-4)
    assert formulas.low_rank_flops(HEADLINE) == pytest.approx(6.44e9, rel=1e-3)
    for sheet in (None, *DATA_SHEETS):
        assert formulas.floor(HEADLINE, sheet) == pytest.approx(1.012, abs=5e-4)
    # One token: reading A and B beside W, three times each.
    assert formulas.floor(Case(1, 4096, 4096), H200) == pytest.approx(1 + 3 * 2 * 16 / (2 * 4096), rel=1e-3)


@pytest.mark.parametrize("graph", formulas.GRAPHS)
def test_every_product_is_made(graph: str) -> None:
    extra = formulas.cost(graph, HEADLINE).flops - formulas.cost("frozen", HEADLINE).flops
    again = {"frozen": -6, "unsloth": 2}.get(graph, 0)  # S and dy B once more
    assert extra == formulas.low_rank_flops(HEADLINE) * (6 + again) // 6


def test_no_dropout_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="has no dropout"):
        formulas.cost("unsloth", dataclasses.replace(HEADLINE, dropout=0.1))


MULTI = [MultiCase(48, 96, 64, 6, 16), MultiCase(48, 96, 64, 8, 32, True), MultiCase(1024, 64, 96, 4, 40)]


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("height", [1, 16])
@pytest.mark.parametrize("case", MULTI, ids=str)
def test_kernels_of_many_adapters(case: MultiCase, height: int, split: int) -> None:
    """Beyond the frozen layer: x for each block of ranks, y and S's planes twice, each adapter once, and the plan."""
    tensors = multi.make_multi_tensors(case, "cpu", 0)
    plan = tensors.plan(paged=True).tensors
    config = KernelConfig(BLOCK_M=height, BLOCK_N=32, BLOCK_K=32, BLOCK_R=16, SPLIT=split)
    with forced_configs(dict.fromkeys(("multi_shrink", "multi_expand"), config)):
        base, shrink, expand = own_multi(tensors.x, tensors.weight, tensors.pages_A, tensors.pages_B, plan, "triton")
    assert base.bytes == multi.frozen_bytes(case)
    S = split * case.M * case.r * 4
    assert plan.pages is not None
    routes = [t.numel() * t.element_size() for t in (plan.buffer, plan.scales, plan.pages)]
    blocks = -(-case.r // 16)
    adapters_of = {"A": sum(case.ranks) * case.K * 2, "B": sum(case.ranks) * case.N * 2}
    assert shrink.bytes == blocks * case.M * case.K * 2 + adapters_of["A"] + S + sum(routes)
    assert expand.bytes == S + adapters_of["B"] + 2 * case.M * case.N * 2 + routes[0] + routes[2]


@pytest.mark.parametrize("case", MULTI, ids=str)
def test_loop_over_adapters(case: MultiCase) -> None:
    """A gather, two products and an addition for each adapter; of x and y only the rows that it has."""
    tensors = multi.make_multi_tensors(case, "cpu", 0)
    counted = torch_step(MULTI_PEERS["loop"].make(case, tensors))
    x, y, s = (case.M * columns * case.itemsize for columns in (case.K, case.N, 0))
    s = 2 * sum(case.ranks[slot] for slot in case.slots().tolist())
    least = multi.frozen_bytes(case) + multi.own_bytes(case)
    if case.together:
        assert len(counted) == 1 + 2 * case.adapters
        assert sum(row.bytes for row in counted) == least + x + 2 * y + 2 * s
    else:
        assert len(counted) == 1 + 4 * case.adapters
        # The gather reads and writes; its rows are read, those of the update written, read, and added to y's.
        assert sum(row.bytes for row in counted) == least + 3 * x + 4 * y + 2 * s
    assert sum(row.flops for row in counted) == multi.frozen_flops(case) + multi.low_rank_flops(case)
