"""The torch path of many adapters: all of them as one product where that is right, the plan read once a version."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import lorakernels as lk
from lorakernels import ops
from lorakernels.dropout import LEVELS
from lorakernels.eager import multi_grid
from lorakernels.eager import multi_lora as eager
from lorakernels.eager.multi_grid import Gathered, Grid
from lorakernels.functional import multi_lora_embedding
from lorakernels.ops.multi_linear import _thresholds
from lorakernels.testing.budget import error
from lorakernels.testing.guards import canaries
from lorakernels.testing.multi_cases import MultiCase, MultiInputs, Results, by_token, make_multi_inputs, run_loop

EQUAL = (6, 6, 6, 6)
# (case, how the adapters are one product: of rows that are views, of rows that are gathered; None where they are not)
CASES = (
    (MultiCase("base_around", T=20, ranks=(8, 8, 8), batch="rows -1 0 1 2 -1"), "views"),
    (MultiCase("base_around_in_slices", T=5, ranks=(8, 8, 8), Ns=(24, 20), batch="rows -1 0 1 2 -1"), "views"),
    (MultiCase("equal ranks", ranks=EQUAL), "gathered"),
    (MultiCase("of larger stacks", ranks=EQUAL, R=9, T=40), "gathered"),
    (MultiCase("grouped", ranks=EQUAL, batch="grouped"), "gathered"),
    (MultiCase("in order", T=20, ranks=EQUAL, batch="in_order"), "views"),
    (MultiCase("in turn", T=20, ranks=EQUAL, batch="in_turn"), "views"),
    (MultiCase("in turn, slices", T=12, ranks=EQUAL, Ns=(24, 17), layout="every_second", batch="in_turn"), "views"),
    (MultiCase("in turn, transposed", T=12, ranks=EQUAL, layout="transposed", batch="in_turn"), "views"),
    (MultiCase("in turn, of larger stacks", T=12, ranks=EQUAL, R=9, batch="in_turn", bias=False), "views"),
    (MultiCase("in turn, pages", T=12, ranks=(2, 5, 1), paged=True, batch="in_turn"), "views"),
    (MultiCase("rows in turn", T=160, ranks=EQUAL, batch="rows 0 1 2 3 0 1 2 3"), "2 lots of views"),
    (MultiCase("rows in any order", T=160, ranks=EQUAL, batch="rows 2 0 1 0 3 1 0 2"), "views"),
    (MultiCase("rows beside the base's", T=176, ranks=EQUAL, batch="rows 0 1 -1 2 3 0 1 2"), "2 lots of views"),
    (MultiCase("rows, pages", T=160, ranks=(2, 5, 1), paged=True, batch="rows 2 0 1 0 2 1 0 2"), "views"),
    (
        MultiCase("rows, slices", T=160, ranks=EQUAL, Ns=(9, 5), layout="every_second", batch="rows 0 3 -1 2 3"),
        "2 lots of views",
    ),
    (MultiCase("rows shorter than a rank", T=160, ranks=EQUAL, batch="rows" + " 2 0 1 3" * 8), "gathered"),
    (MultiCase("in turn, but one", T=11, ranks=EQUAL, batch="in_turn"), "gathered"),
    (MultiCase("each its own", ranks=EQUAL, T=4, batch="each_its_own"), "gathered"),
    (MultiCase("an empty slot", ranks=(6, 0, 6), bias=False), "gathered"),
    (MultiCase("one scaling", ranks=EQUAL, scalings=(2.0,) * 4), "gathered"),
    (MultiCase("slices", ranks=EQUAL, Ns=(24, 17, 5), layout="every_second"), "gathered"),
    (MultiCase("transposed", ranks=EQUAL, layout="transposed"), "gathered"),
    (MultiCase("layered", ranks=EQUAL, layout="layered"), "gathered"),
    (MultiCase("pages", paged=True), "gathered"),
    (MultiCase("pages of equal ranks", ranks=EQUAL, paged=True, Ns=(24, 9)), "gathered"),
    (MultiCase("several ranks"), None),
    (MultiCase("one adapter", ranks=(6,), batch="rows 0"), None),
    (MultiCase("none", ranks=EQUAL, batch="rows -1"), None),
)


def run(case: MultiCase, inputs: MultiInputs, leaves: Results) -> list[torch.Tensor]:
    slices = range(len(case.Ns))
    x, *rest = (leaves["x"], *([leaves[f"{name}.{i}"] for i in slices] for name in ("weight", "lora_A", "lora_B")))
    bias = [leaves[f"bias.{i}"] for i in slices] if case.bias else None
    return lk.multi_lora_linear(x, *rest, inputs.plan, bias=bias)


def arrangement(grid: Grid | None) -> str | None:
    if grid is None or len(grid.lots) > 1:
        return grid and f"{len(grid.lots)} lots of views"
    return "gathered" if isinstance(grid.lots[0].rows, Gathered) else "views"


@pytest.mark.parametrize(("case", "rows"), CASES, ids=lambda value: str(value))
def test_values_and_gradients(case: MultiCase, rows: str | None) -> None:
    inputs = make_multi_inputs(case, torch.float64)
    exact = run_loop(case, inputs, None, torch.float64, by_token(inputs))
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors().items()}
    with canaries():
        ys = run(case, inputs, leaves)
        torch.autograd.backward(ys, inputs.dys)
        with torch.no_grad():
            plain = run(case, inputs, leaves)
            s = lk.lora_shrink(inputs.x, inputs.lora_A, inputs.plan)
            outs = [torch.nn.functional.linear(inputs.x, w) for w in inputs.weight]
            lk.lora_expand(s, inputs.lora_B, inputs.plan, out=outs)
    grid = inputs.plan.on_host.grid
    assert arrangement(grid) == rows
    if rows and case.layout != "layered":
        bases = [
            torch.nn.functional.linear(inputs.x, inputs.weight[i], inputs.bias[i] if case.bias else None)
            for i in range(len(case.Ns))
        ]
        bound = torch.cat(bases, 1)
        update = ops.bound_updates(inputs.x, inputs.lora_A, inputs.lora_B, inputs.plan)
        assert update is not None
        update(bound, inputs.x.contiguous())
        if len(bases) == 1:
            assert torch.equal(bound, plain[0].detach())
        assert error(bound, torch.cat([exact[f"y.{i}"] for i in range(len(bases))], 1)) < 1e-14
    for i in range(len(case.Ns)):
        in_two_steps = outs[i] + (inputs.bias[i] if case.bias else 0.0)
        for y in (ys[i], plain[i], in_two_steps):
            assert error(y.detach(), exact[f"y.{i}"]) < 1e-14
    for name in ("x", *(f"{tensor}.{i}" for tensor in ("lora_A", "lora_B") for i in range(len(case.Ns)))):
        assert error(leaves[name].grad, exact[name]) < 1e-14, name


@pytest.mark.parametrize("poison", [float("nan"), 1e4])
@pytest.mark.parametrize("case", [case for case, rows in CASES if rows], ids=str)
def test_an_adapter_touches_no_other_row(case: MultiCase, poison: float) -> None:
    clean, dirty = make_multi_inputs(case, torch.float32), make_multi_inputs(case, torch.float32)
    slot = len(case.ranks) - 1
    for factors in (dirty.lora_A, dirty.lora_B):
        for factor in factors:
            if dirty.page_table is None:
                factor[slot].fill_(poison)
            else:
                factor[dirty.page_table[slot, : case.ranks[slot]].long()] = poison
    others = clean.token_slots != slot
    base = (clean.token_slots < 0) | (clean.slot_ranks[clean.token_slots.long()] == 0)
    for i, (y, z) in enumerate(zip(run(case, clean, clean.tensors()), run(case, dirty, dirty.tensors()), strict=True)):
        assert torch.equal(y[others], z[others]) and not torch.equal(y[~others], z[~others])
        expected = torch.nn.functional.linear(clean.x, clean.weight[i], clean.bias[i] if case.bias else None)
        assert torch.equal(y[base], expected[base])


def test_long_adapters_beside_short_ones_are_not_padded() -> None:
    case = MultiCase("skewed", T=4000, ranks=(8, 8, 8), K=64, Ns=(64,))
    inputs = make_multi_inputs(case, torch.float32)
    few = torch.randint(0, 2, (4000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    few[0] = 2
    for slots, fits in ((torch.arange(4000, dtype=torch.int32) % 3, True), (few, False)):
        inputs.plan.update(slots, inputs.slot_ranks, inputs.slot_scalings)
        run(case, inputs, inputs.tensors())
        grid = inputs.plan.on_host.grid
        assert grid.fits(128) == fits


def test_one_large_rank_is_not_everyones() -> None:
    """Of pages, where several ranks may be one product."""
    case = MultiCase("one large rank", T=40, ranks=(1,) * 7 + (64,), R=64, K=512, Ns=(512,), paged=True)
    small = MultiCase("ranks alike", T=40, ranks=(7,) * 4 + (8,) * 4, K=512, Ns=(512,), paged=True)
    for tried, fits in ((case, False), (small, True)):
        inputs = make_multi_inputs(tried, torch.float32)
        inputs.plan.update(torch.arange(40) % 8, inputs.slot_ranks, inputs.slot_scalings, inputs.page_table)
        run(tried, inputs, inputs.tensors())
        assert inputs.plan.on_host.grid.fits(1024) == fits


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch.func.jvp's own
def test_derivatives_that_would_be_lost_are_refused() -> None:
    case = MultiCase("transforms", ranks=EQUAL)
    inputs = make_multi_inputs(case, torch.float64)
    x, A, B, plan = inputs.x, inputs.lora_A[0], inputs.lora_B[0], inputs.plan
    s = lk.lora_shrink(x, A, plan)
    ids = torch.arange(x.shape[0]) % x.shape[1]

    def linear(x: torch.Tensor) -> torch.Tensor:
        return lk.multi_lora_linear(x, inputs.weight[0], A, B, plan)

    calls = (
        (linear, x),
        (lambda A: multi_lora_embedding(ids, inputs.weight[0].t(), A, B, plan), A),
        (lambda x: lk.lora_shrink(x, A, plan), x),
        (lambda s: lk.lora_expand(s, B, plan, out=torch.zeros(x.shape[0], B.shape[1], dtype=x.dtype)), s),
    )
    for call, given in calls:
        with pytest.raises(RuntimeError):
            torch.func.jvp(call, (given,), (given,))
        with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
            call(forward_ad.make_dual(given, given))
    assert torch.equal(torch.func.functionalize(linear)(x), linear(x))


def test_torchs_default_device_does_not_matter() -> None:
    for case, _ in CASES:
        inputs = make_multi_inputs(case, torch.float64)
        with torch.device("meta"):
            there = run(case, inputs, inputs.tensors())
        again = make_multi_inputs(case, torch.float64)
        for y, z in zip(there, run(case, again, again.tensors()), strict=True):
            assert torch.equal(y, z)


def test_a_probability_that_nobody_checks_is_clamped() -> None:
    given = torch.tensor([float("nan"), -1.0, 2.0, float("inf"), 0.5])  # as on a GPU, where the host does not look
    thresholds = _thresholds(given, torch.zeros(6))
    assert thresholds.tolist() == [0, 0, LEVELS - 1, LEVELS - 1, LEVELS // 2, 0]


def test_each_slot_has_a_mask_of_its_own() -> None:
    """Of one seed, for jobs of the same numbers too."""
    plan = lk.BatchPlan(2, 32, max_rank=8)
    plan.update([0] * 16 + [1] * 16, [8, 8], [1.0, 1.0])
    A, B = torch.randn(1, 8, 40).expand(2, 8, 40), torch.randn(1, 24, 8).expand(2, 24, 8)
    y = lk.multi_lora_linear(torch.ones(32, 40), torch.zeros(24, 40), A, B, plan, dropout_p=0.5, impl="torch")
    assert y[:16].any() and not torch.equal(y[:16], y[16:])


@pytest.mark.parametrize("of_embedding", [False, True])
def test_a_plan_updated_before_a_checkpoint_is_recomputed_is_an_error(of_embedding: bool) -> None:
    case = MultiCase("checkpointed", ranks=EQUAL)
    inputs = make_multi_inputs(case, torch.float32)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors().items()}
    ids = torch.arange(case.T)

    def forward() -> torch.Tensor:
        if of_embedding:
            weight = leaves["weight.0"].t()
            return multi_lora_embedding(ids, weight, leaves["lora_A.0"], leaves["lora_B.0"], inputs.plan)
        return run(case, inputs, leaves)[0]

    def gradients(y: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(y, [leaves["lora_A.0"], leaves["lora_B.0"]], inputs.dys[0]))

    expected = gradients(forward())
    checkpointed = [checkpoint(forward, use_reentrant=False) for _ in range(2)]
    assert all(map(torch.equal, gradients(checkpointed[0]), expected))
    inputs.plan.update(inputs.token_slots.flip(0), inputs.slot_ranks, inputs.slot_scalings)
    with pytest.raises(RuntimeError, match="update the plan after the backward, or use another plan"):
        gradients(checkpointed[1])


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("of_embedding", [False, True])
def test_batched_gradients(of_embedding: bool, paged: bool, impl: str, device: str) -> None:
    inputs = make_multi_inputs(MultiCase("batched", T=9, ranks=(3, 2), R=4, paged=paged), torch.float32, device)
    leaves = [tensor.detach().requires_grad_() for name, tensor in inputs.tensors().items() if name != "bias.0"]
    x, weight, A, B = leaves
    if of_embedding:
        leaves = [A, B]
        y = multi_lora_embedding(torch.arange(9, device=device), weight.t(), A, B, inputs.plan, impl=impl)
    else:
        y = lk.multi_lora_linear(x, weight, A, B, inputs.plan, impl=impl)
    dys = torch.randn(3, *y.shape, device=device)
    batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        one = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        # NaN past a slot's rank are left alone by both.
        assert all(torch.equal(grad[i], each) for grad, each in zip(batched, one, strict=True))


@pytest.mark.parametrize(("K", "N"), [(0, 5), (5, 0)])
@pytest.mark.parametrize("paged", [False, True])
def test_no_columns(paged: bool, K: int, N: int) -> None:
    inputs = make_multi_inputs(MultiCase("no columns", ranks=EQUAL, K=K, Ns=(N,), paged=paged), torch.float32)
    [y] = run(MultiCase("no columns", bias=False), inputs, inputs.tensors())
    assert torch.equal(y, torch.zeros(23, N))
    assert arrangement(inputs.plan.on_host.grid) == "gathered"


def test_meta_tensors_have_shapes() -> None:
    x, weight, A, B = (torch.empty(shape, device="meta") for shape in ((6, 8), (5, 8), (3, 4, 8), (3, 5, 4)))
    plan = lk.BatchPlan(3, 6, max_rank=4, device="meta")
    plan.update(*(torch.zeros(n, dtype=torch.int32, device="meta") for n in (6, 3)), torch.zeros(3, device="meta"))
    y = lk.multi_lora_linear(x, weight, A.requires_grad_(), B, plan)
    y.sum().backward()
    assert y.shape == (6, 5) and A.grad is not None and A.grad.shape == A.shape
    with torch.no_grad():
        s = lk.lora_shrink(x, A, plan)
        assert s.shape == (6, 4) and lk.lora_expand(s, B, plan, out=y).is_meta


def test_runs_that_are_no_views_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_grid, "_lots", lambda *_, **__: pytest.fail("listed"))
    inputs = make_multi_inputs(MultiCase("scattered", T=2000, ranks=EQUAL), torch.float32)
    run(MultiCase("scattered"), inputs, inputs.tensors())
    assert arrangement(inputs.plan.on_host.grid) == "gathered"


def test_a_plan_is_read_once_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    real = eager.route
    monkeypatch.setattr(eager, "route", lambda *given: (read.append(given), real(*given))[1])
    case = MultiCase("layers", ranks=EQUAL)
    inputs = make_multi_inputs(case, torch.float32)
    [first], [again] = run(case, inputs, inputs.tensors()), run(case, inputs, inputs.tensors())
    lk.lora_shrink(inputs.x, inputs.lora_A[0], inputs.plan)
    assert torch.equal(first, again) and len(read) == 1
    copied = copy.deepcopy(inputs.plan)
    for plan in (inputs.plan, copied):
        plan.update(inputs.token_slots.flip(0), inputs.slot_ranks, inputs.slot_scalings)
        inputs.plan = plan
        [turned] = run(case, inputs, inputs.tensors())
        assert not torch.equal(turned, first)
    assert len(read) == 3
