"""Many adapters of a stack of experts: the formula's numbers row by row, by plain torch and the interpreted kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorakernels as lk
from lorakernels import ops
from lorakernels.plan import BatchPlan, PlanError
from lorakernels.plan_layout import TILE_HEIGHTS, num_tiles
from lorakernels.testing.budget import assert_within_budget

E, S, R, N, K, T, TOP_K = 3, 2, 4, 16, 24, 7, 2
RANKS, SCALINGS, TOKENS = [3, 4], [0.5, -1.5], [0, 1, -1, 1, 0, -1, 1]
CASES = [
    ("torch", torch.float64, True),
    ("torch", torch.float64, False),
    ("torch", torch.bfloat16, True),
    ("triton", torch.float32, True),
]


def make(dtype: torch.dtype, paged: bool, device: str) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw, dtype=torch.float64) / 3).to(device=device, dtype=dtype)

    pages = torch.randperm(E * S * R + 5, generator=draw)[: E * S * R].view(E * S, R).to(device, torch.int32)
    made = {"x": normal(T, K), "weight": normal(E, N, K), "bias": normal(E, N)}
    shapes = ((E * S * R + 5, K), (E * S * R + 5, N)) if paged else ((E * S, R, K), (E * S, N, R))
    made |= {"lora_A": normal(*shapes[0]), "lora_B": normal(*shapes[1]), "page_table": pages if paged else None}
    index = torch.randint(0, 2, (T, TOP_K), generator=draw) * 2  # expert 1 has no rows
    return made | {"route": lk.expert_route(index.to(device), E)}


def run(made: dict[str, Any], **options: Any) -> torch.Tensor:
    given = dict(made)
    table = given.pop("page_table")
    number = None if table is None else given["lora_A"].shape[0]
    plan = lk.expert_plan(given["route"], TOKENS, RANKS, SCALINGS, table, num_pages=number)
    return lk.multi_expert_lora_linear(**given, plan=plan, **options)


def oracle(made: dict[str, Any]) -> torch.Tensor:
    x, weight, bias, route, table = (made[key] for key in ("x", "weight", "bias", "route", "page_table"))
    ys = []
    starts = route.starts.tolist()
    for place, pair in enumerate(route.order.tolist()):
        e = next(e for e in range(E) if starts[e] <= place < starts[e + 1])
        token, slot = pair // TOP_K, TOKENS[pair // TOP_K]
        y = weight[e] @ x[token] + bias[e]
        if slot >= 0:
            own, r = e * S + slot, RANKS[slot]
            A, B = made["lora_A"], made["lora_B"]
            A_e, B_e = (A[own, :r], B[own, :, :r]) if table is None else (A[table[own, :r]], B[table[own, :r]].T)
            y = y + SCALINGS[slot] * (B_e @ (A_e @ x[token]))
        ys.append(y)
    return torch.stack(ys)


def with_gradients(y: torch.Tensor, made: dict[str, Any]) -> list[torch.Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad(y, [made[key] for key in ("x", "lora_A", "lora_B")], dy)]


def in_dtype(made: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        key: value.detach().to(dtype).requires_grad_(key in ("x", "lora_A", "lora_B"))
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in made.items()
    }


@pytest.mark.parametrize(("impl", "dtype", "paged"), CASES, ids=str)
def test_numbers(impl: str, dtype: torch.dtype, paged: bool, device: str) -> None:
    """y and every gradient; without gradients the same, and rows of the base the frozen experts' to the bit."""
    made = in_dtype(make(dtype, paged, device), dtype)
    found = with_gradients(run(made, impl=impl), made)
    exact_made = in_dtype(made, torch.float64)
    exact = with_gradients(oracle(exact_made), exact_made)
    if dtype is torch.float64:
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    else:
        for name, *each in zip("yxAB", found, with_gradients(oracle(made), made), exact, strict=True):
            assert_within_budget(*each, dtype, name)
    with torch.no_grad():
        y = run(made, impl=impl)
    torch.testing.assert_close(y, found[0])
    base = torch.tensor([TOKENS[pair // TOP_K] < 0 for pair in made["route"].order.tolist()])
    none = lk.expert_plan(made["route"], [-1] * T, [1], [1.0])
    A, B = y.new_zeros((E, 1, K)), y.new_zeros((E, N, 1))
    weights = {key: made[key] for key in ("weight", "bias")}
    with torch.no_grad():
        frozen = lk.multi_expert_lora_linear(
            made["x"], **weights, lora_A=A, lora_B=B, route=made["route"], plan=none, impl=impl
        )
    assert base.any() and torch.equal(y[base], frozen[base])


def test_invariant_and_sorted() -> None:
    """A row's bits do not depend on the other rows' adapters; rows that are sorted already are taken as they are."""
    made = make(torch.float32, True, "cpu")
    route, table = made.pop("route"), made.pop("page_table")
    rows = route.take(made.pop("x"))
    number = made["lora_A"].shape[0]
    ys = []
    for tokens in (TOKENS, [0, 0, 0, -1, 0, 1, 1]):
        plan = lk.expert_plan(route, tokens, RANKS, SCALINGS, table, num_pages=number, invariant=True)
        ys.append(lk.multi_expert_lora_linear(rows, **made, route=route, plan=plan, sorted_x=True))
    same = torch.tensor([pair // TOP_K in (0, 4, 6) for pair in route.order.tolist()])
    assert torch.equal(ys[0][same], ys[1][same])


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize(
    ("experts", "adapters", "tokens", "top_k"), [(3, 2, 7, 2), (1, 1, 1, 1), (40, 30, 70, 3), (2, 5, 150, 2)]
)
def test_the_kernels_write_the_same_plan(
    experts: int, adapters: int, tokens: int, top_k: int, paged: bool, device: str
) -> None:
    """Ranks and scalings of 0, tokens of the base and of adapters that there are not, experts likewise, bad pages."""
    draw, R = torch.Generator().manual_seed(3), 5
    index = torch.randint(-1, experts + 2, (tokens, top_k), generator=draw)
    slots = torch.randint(-2, adapters + 1, (tokens,), generator=draw)
    ranks = torch.randint(0, R + 1, (adapters,), generator=draw).tolist()
    scalings = torch.tensor([0.0, 1.0, -2.5])[torch.randint(0, 3, (adapters,), generator=draw)].tolist()
    table = torch.randint(-9, 99, (experts * adapters, R), generator=draw).int().abs() if paged else None
    route = lk.expert_route(index.to(device), experts, impl="triton")
    options: dict[str, Any] = {"max_rank": R, "num_pages": 90 if paged else None}
    written = BatchPlan(experts * adapters, tokens * top_k, **options, device=device)
    written.tensors.buffer.fill_(-7)  # all that is read is written
    numbers = ranks, scalings, None if table is None else table.to(device).mT.contiguous().mT
    assert ops.route_adapters(written, route, slots.to(device).repeat_interleave(2)[::2], *numbers)

    known = (slots >= -1) & (slots < adapters)
    ok = torch.ones(experts * adapters, dtype=torch.bool)
    if table is not None:
        used = torch.arange(R) < torch.tensor(ranks * experts)[:, None]
        ok = ~(used & (table >= 90)).any(1)
        table = table.clamp(max=89)
    own = torch.where(known, slots, -1)[route.order.cpu() // top_k]
    expert = index.reshape(-1)[route.order.cpu()]
    row = torch.where((own < 0) | (expert < 0) | (expert >= experts), -1, expert * adapters + own)
    expected = BatchPlan(experts * adapters, tokens * top_k, **options)
    expected.update(row, (torch.tensor(ranks * experts) * ok).int(), torch.tensor(scalings * experts), table)
    layout, (found, truth) = written.layout, (plan.tensors for plan in (written, expected))
    S, P = experts * adapters, tokens * top_k
    parts = [(layout.ranks, S + 1), (layout.starts, S + 2), *((begin, P) for begin in layout[2:5])]
    parts += [(begin, 3 * num_tiles(P, S, height)) for begin, height in zip(layout.tiles, TILE_HEIGHTS, strict=True)]
    for begin, length in parts:
        assert torch.equal(found.part(begin, length).cpu(), truth.part(begin, length))
    live = found.part(layout.ranks, S).cpu() > 0
    assert torch.equal(found.scales.cpu()[:-1][live], truth.scales[:-1][live])
    if paged:
        assert torch.equal(found.page_table.cpu()[:-1][live], truth.page_table[:-1][live])
    assert written.masked.tolist() == [int((~known).sum()), int((~ok).sum())]
    assert (written.num_tokens, written.version) == (P, 1)


def test_bad_input() -> None:
    made = make(torch.float32, False, "cpu")
    route = made["route"]
    for tokens, message in (
        ([0] * (T - 1), r"token_slots is \[6\] .*; expected \[7\] integers"),
        ([0, 0, 2, 0, 0, 0, 0], "token 2 has adapter 2; expected -1 or 0 … 1"),
    ):
        with pytest.raises(PlanError, match=message):
            lk.expert_plan(route, tokens, RANKS, SCALINGS)
    with pytest.raises(TypeError, match="route must be an ExpertRoute"):
        lk.expert_plan(made["x"], TOKENS, RANKS, SCALINGS)  # type: ignore[arg-type]
    other = BatchPlan(4, T * TOP_K)
    other.update([0] * (T * TOP_K), [1] * 4, [1.0] * 4)
    del made["page_table"]
    with pytest.raises(PlanError, match="the plan has 4 slots; expected E · S of E=3"):
        lk.multi_expert_lora_linear(**made, plan=other)
    plan = lk.expert_plan(route, TOKENS, RANKS, SCALINGS)
    with pytest.raises(PlanError, match=r"lora_A is \[5, 4, 24\]; expected \[S, R, 24\]"):
        lk.multi_expert_lora_linear(**{**made, "lora_A": made["lora_A"][:5]}, plan=plan)
