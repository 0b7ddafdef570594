"""`multi_lora_add`: what a serving engine asks for, in graphs of any number of tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from lorakernels import ops
from lorakernels.configs import table
from lorakernels.configs.config import KernelConfig
from lorakernels.kernels import multi_lora
from lorakernels.kernels.launch import record_launches
from lorakernels.plan import BatchPlan, PlanError
from lorakernels.testing.budget import assert_within_budget, error
from lorakernels.testing.guards import canaries
from lorakernels.testing.multi_cases import MultiCase, MultiInputs, by_slot, by_token, make_multi_inputs, run_loop

# A token a program, and tiles of 16 tokens; the blocks are the smallest.
HEIGHTS = {"triton-token": 1, "triton-tiles": 16}
WAYS = ["torch", *HEIGHTS]
CASES = (
    MultiCase("mixed_ranks"),
    MultiCase("three_slices", T=17, Ns=(24, 20, 17)),
    MultiCase("odd_sizes", T=33, ranks=(5, 17, 2), R=19, K=37, Ns=(29,)),
    MultiCase("in_turn", T=20, batch="in_turn"),
    MultiCase("scalings", scalings=(0.0, -2.0, 1.0, 0.1, 16.0)),
    MultiCase("pages", paged=True),
    MultiCase("one_token", T=1, batch="rows 0"),
    MultiCase("all_base", batch="rows -1"),
    MultiCase("empty", T=0),
)


@contextlib.contextmanager
def path(way: str) -> Iterator[str]:
    if way == "torch":
        yield way
        return
    config = KernelConfig(BLOCK_M=HEIGHTS[way], BLOCK_N=16, BLOCK_K=16, BLOCK_R=16, SPLIT=2)
    with table.forced_configs({"multi_shrink": config, "multi_expand": config}):
        yield "triton"


def columns(Ns: tuple[int, ...], wide: torch.Tensor) -> list[torch.Tensor]:
    """The slices side by side in one tensor, with three columns of nobody's before each."""
    ends = torch.tensor([N + 3 for N in Ns]).cumsum(0).tolist()
    return [wide[:, end - N : end] for N, end in zip(Ns, ends, strict=True)]


def add(inputs: MultiInputs, outs: list[torch.Tensor], impl: str, **options: object) -> list[torch.Tensor]:
    ops.multi_lora_add(outs, inputs.x, inputs.lora_A, inputs.lora_B, inputs.plan, impl=impl, **options)  # type: ignore[arg-type]
    return outs


@pytest.mark.parametrize(
    ("case", "way", "dtype"),
    [
        (case, way, dtype)
        for case, way, dtype in itertools.product(CASES, WAYS, (torch.float32, torch.bfloat16))
        if dtype is torch.float32 or way == "torch" or case.name == "mixed_ranks"  # the interpreter is slow in bfloat16
    ],
    ids=str,
)
def test_against_a_loop_over_tokens(case: MultiCase, way: str, dtype: torch.dtype, device: str) -> None:
    case = dataclasses.replace(case, bias=False, needs=())
    draws = []
    for seed in range(1 if case.T > 1 else 8):
        inputs = make_multi_inputs(case, dtype, device, seed)
        for weight in inputs.weight:
            weight.zero_()
        wide = torch.full((case.T, sum(case.Ns) + 3 * len(case.Ns)), 7.0, dtype=dtype, device=device)
        with path(way) as impl, canaries():
            outs = add(inputs, columns(case.Ns, wide), impl, add_inputs=False)
        eager = run_loop(case, inputs, None, dtype, by_slot(inputs))
        exact = run_loop(case, inputs, None, torch.float64, by_token(inputs))
        draws.append([(out, eager[f"y.{i}"], exact[f"y.{i}"]) for i, out in enumerate(outs)])
        assert (wide == 7).sum() == 3 * len(case.Ns) * case.T  # what lies between is nobody's
        assert all((out[inputs.token_slots < 0] == 0).all() for out in outs)
    for results in zip(*draws, strict=True):
        assert_within_budget(*(torch.stack(each) for each in zip(*results, strict=True)), dtype, case.name)


@pytest.mark.parametrize("way", WAYS)
def test_it_adds_and_leaves_rows_of_the_base_alone(way: str, device: str) -> None:
    case = MultiCase("adds", ranks=(8, 3, 1), Ns=(24, 20))
    inputs = make_multi_inputs(case, torch.float32, device)
    given = [torch.randn(case.T, N, device=device) for N in case.Ns]
    yes, no = torch.tensor([True]), torch.tensor([False])

    def after(impl: str, **options: object) -> list[torch.Tensor]:
        return add(inputs, [y.clone() for y in given], impl, **options)

    with path(way) as impl:
        updates = add(inputs, [torch.zeros_like(y) for y in given], impl)
        added, asked, over = after(impl), after(impl, skip_on_host=no), after(impl, add_inputs=False)
        skipped, emptied = after(impl, skip_on_host=yes), after(impl, skip_on_host=yes, add_inputs=False)
    base = inputs.token_slots < 0
    assert base.any()
    for i, y in enumerate(given):
        assert torch.equal(added[i][base], y[base]) and updates[i][~base].abs().min() > 0
        assert error(added[i] - updates[i], y) < 1e-6 and torch.equal(asked[i], added[i])
        assert torch.equal(over[i], updates[i])
        assert torch.equal(skipped[i], y) and not emptied[i].any()


@pytest.mark.parametrize("way", WAYS)
def test_into_outs_of_a_wider_dtype(way: str, device: str) -> None:
    """Logits in float32, from hidden states of 16 bits."""
    case = MultiCase("logits", T=20, Ns=(24,), bias=False, needs=())
    inputs = make_multi_inputs(case, torch.float16, device)
    inputs.weight[0].zero_()
    with path(way) as impl:
        [out] = add(inputs, [torch.zeros(case.T, 24, device=device)], impl)
    exact = run_loop(case, inputs, None, torch.float64, by_token(inputs))
    assert out.dtype is torch.float32 and error(out, exact["y.0"]) < 2 * torch.finfo(torch.float16).eps


def test_a_skipped_batch_launches_nothing(device: str) -> None:
    inputs = make_multi_inputs(MultiCase("skipped"), torch.float32, device)
    with record_launches() as launches:
        add(inputs, [torch.zeros(23, 24, device=device)], "triton", skip_on_host=torch.tensor([True]))
        assert not launches
        add(inputs, [torch.zeros(23, 24, device=device)], "triton", skip_on_host=torch.tensor([False]))
    assert len(launches) == 2


@pytest.mark.parametrize("way", WAYS)
def test_a_padded_plan_serves_fewer_tokens_and_more(way: str, device: str) -> None:
    """An engine updates with the tokens there are, and replays a graph of more, or calls with those alone."""
    case = MultiCase("padded", T=64, ranks=(8, 8, 8), Ns=(24,))
    inputs = make_multi_inputs(case, torch.float32, device)
    x, padded = inputs.x, BatchPlan(3, 64, max_rank=8, device=device)
    for T in (53, 5, 0, 17, 64):
        slots = [(7 * t + T) % 4 - 1 for t in range(T)]
        inputs.plan.update_host(slots)
        padded.update_host(slots, 64)
        outs = []
        for plan, rows in ((inputs.plan, T), (padded, T), (padded, 64)):
            given = dataclasses.replace(inputs, x=x[:rows], plan=plan)
            with path(way) as impl:
                outs += add(given, [torch.ones(rows, 24, device=device)], impl)
        assert all(torch.equal(out[:T], outs[0]) for out in outs)
        assert (outs[2][T:] == 1).all()
        assert not outs[0].numel() or (outs[0] != 1).any()


@pytest.mark.parametrize("dispatched", [True, False])
def test_more_tokens_than_the_plans_are_refused_where_the_host_sees_them(dispatched: bool) -> None:
    inputs = make_multi_inputs(MultiCase("short"), torch.float32)
    x, out = torch.cat([inputs.x, inputs.x[:1]]), torch.zeros(24, 24)
    with pytest.raises(PlanError, match="x has 24 tokens and the plan 23"):
        if dispatched:
            arguments = ([out], x, inputs.lora_A, inputs.lora_B, *inputs.plan.tensors, None, True, "torch")
            torch.ops.lorakernels.multi_lora_add(*arguments)
        add(dataclasses.replace(inputs, x=x), [out], "torch")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", ["random", "in_turn"])
def test_the_shards_of_adapters_make_up_the_whole(way: str, batch: str, device: str) -> None:
    case = MultiCase("shards", T=20, ranks=(8,) * 5, Ns=(24, 20), batch=batch)
    inputs = make_multi_inputs(case, torch.float32, device)
    half = [slice(0, 4), slice(4, 8)]
    shards = [
        dataclasses.replace(
            inputs, lora_A=[A[:, rows] for A in inputs.lora_A], lora_B=[B[:, :, rows] for B in inputs.lora_B]
        )
        for rows in half
    ]
    with path(way) as impl, canaries():
        whole = add(inputs, [torch.zeros(20, N, device=device) for N in case.Ns], impl)
        outs = [torch.zeros(20, N, device=device) for N in case.Ns]
        for shard in shards:
            add(shard, outs, impl)
        s = ops.multi_lora_shrink(inputs.x, inputs.lora_A, inputs.plan, impl)
        cut = [ops.multi_lora_shrink(shard.x, shard.lora_A, shard.plan, impl) for shard in shards]
    assert all(error(out, expected) < 1e-6 for out, expected in zip(outs, whole, strict=True))
    assert error(torch.cat(cut, dim=2), s) < 1e-6


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_without_guards_one_graph_serves_any_number_of_tokens(impl: str, device: str) -> None:
    """As vLLM traces a model: once, with the number of tokens marked as dynamic, and never asks again."""
    torch._dynamo.reset()
    case = MultiCase("traced", T=64, ranks=(8, 8, 8), Ns=(24, 40))
    inputs = make_multi_inputs(case, torch.float32, device)
    plan, skip, graphs = BatchPlan(3, 64, max_rank=8, device=device), torch.tensor([False]), []
    weight = torch.cat(inputs.weight)

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x.sin(), weight)
        ops.multi_lora_add([y[:, :24], y[:, 24:]], x, inputs.lora_A, inputs.lora_B, plan, skip, impl=impl)
        return y.tanh()

    def backend(graph: torch.fx.GraphModule, given: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return aot_eager(graph, given)

    unguarded = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    traced = torch.compile(layer, fullgraph=True, dynamic=False, backend=backend, options=unguarded)
    for T in (33, 5, 64, 17, 6):
        x = inputs.x[:T].clone()
        if T == 33:
            torch._dynamo.mark_dynamic(x, 0)
        slots = [(5 * t + T) % 4 - 1 for t in range(T)] if T != 6 else [-1] * T
        plan.update_host(slots, 64)
        skip[0] = max(slots) < 0
        assert torch.equal(traced(x), layer(x))
    assert len(graphs) == 1


def test_no_number_is_read_of_meta_tensors() -> None:
    case = MultiCase("meta", Ns=(24, 20))
    plan = BatchPlan(5, 64, max_rank=8, device="meta")
    plan.update_host([0, 1, 2], 64)
    with torch.device("meta"):
        x, outs = torch.empty(23, 40), [torch.empty(23, N) for N in case.Ns]
        As, Bs = [torch.empty(5, 8, 40)] * 2, [torch.empty(5, N, 8) for N in case.Ns]
        ops.multi_lora_add(outs, x, As, Bs, plan, torch.empty(1, dtype=torch.bool), add_inputs=False)
    with record_launches() as launches:
        multi_lora.add(x, As, Bs, plan.tensors, outs)
    assert len(launches) == 2


@pytest.mark.parametrize("skip", [None, torch.tensor([False])], ids=["always", "asked"])
def test_opcheck_and_flops(skip: torch.Tensor | None) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = make_multi_inputs(MultiCase("checked", T=20, Ns=(24, 16)), torch.float32)
    outs = [torch.zeros(20, 24), torch.zeros(20, 16)]
    arguments = (outs, inputs.x, inputs.lora_A, inputs.lora_B, *inputs.plan.tensors, skip, True, "torch")
    torch.library.opcheck(torch.ops.lorakernels.multi_lora_add, arguments)
    with FlopCounterMode(display=False) as counter:
        add(inputs, outs, "torch", skip_on_host=skip)
    assert counter.get_total_flops() == sum(2 * 20 * 8 * (40 + N) for N in (24, 16))
