"""Many adapters in one batch against a loop over tokens in float64: both implementations, values and every gradient."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakernels as lk
from lorakernels import ops
from lorakernels.configs import table
from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import assume, device_of
from lorakernels.dropout import drop_threshold, inverse_keep
from lorakernels.eager.dropout import unpack_mask
from lorakernels.eager.multi_lora import route
from lorakernels.functional import multi_lora_embedding
from lorakernels.kernels import multi_expand as kernels_multi_expand
from lorakernels.kernels import multi_lora as kernels_multi_lora
from lorakernels.kernels import multi_shrink as kernels_multi_shrink
from lorakernels.kernels.launch import compile_options, record_launches
from lorakernels.plan import PlanError
from lorakernels.testing.budget import assert_within_budget, error
from lorakernels.testing.cases import leaves_of
from lorakernels.testing.device import COMPILED, NUMBERS, has_room
from lorakernels.testing.guards import canaries, guarded
from lorakernels.testing.multi_cases import (
    LARGE_MULTI_CASES,
    MULTI_CASES,
    MultiCase,
    MultiInputs,
    Results,
    adapter_of,
    by_slot,
    by_token,
    make_multi_inputs,
    run_loop,
)
from lorakernels.tools.steps import multi_step

# Sixteen is the smallest block: a small batch then takes several tiles, turns of every loop, and planes.
TINY = KernelConfig(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, BLOCK_R=16, SPLIT=2)
HEIGHTS = {"triton-token": 1, "triton-tiles": 16, "triton-high_tiles": 64}
PATHS = ["torch", "triton", *HEIGHTS]
# What the interpreter takes long for is run by one form in one dtype.
IN_ALL_FORMS = ("mixed_ranks", "pages", "empty", "spare_slots")
# One token's form has no dropout, and adapters there are of a token or two.
NOT_BY_TOKEN = ("dropout", "dropout_by_slot", "dropout_pages", "all_one_adapter", "several_blocks", "grouped", "only_A")
# Where offsets are what counts.
BY_TILES = ("pages_slices_odd", "huge_strides")
SEED = 1234


@contextlib.contextmanager
def path(name: str) -> Iterator[str]:
    """One way through: the implementation, and the form and blocks of its kernels."""
    if name not in HEIGHTS:
        yield name
        return
    by_height = dataclasses.replace(TINY, BLOCK_M=HEIGHTS[name])
    forced = {"multi_shrink": by_height, "multi_expand": by_height, "multi_outer": dataclasses.replace(TINY, SPLIT=2)}
    with table.forced_configs(forced):
        yield "triton"


def call(case: MultiCase, inputs: MultiInputs, impl: str, leaves: Results | None = None) -> list[torch.Tensor]:
    leaves = inputs.tensors() if leaves is None else leaves

    def of(name: str) -> Any:
        slices = [leaves[f"{name}.{i}"] for i in range(len(case.Ns)) if f"{name}.{i}" in leaves]
        return (slices or None) if len(case.Ns) > 1 else (slices[0] if slices else None)

    dropout = case.dropout_p
    if isinstance(dropout, tuple):
        dropout = torch.tensor(dropout, device=inputs.x.device)
    torch.manual_seed(SEED)
    ys = lk.multi_lora_linear(
        leaves["x"],
        of("weight"),
        of("lora_A"),
        of("lora_B"),
        inputs.plan,
        bias=of("bias"),
        dropout_p=dropout,
        impl=impl,
    )
    return ys if isinstance(ys, list) else [ys]


def run(case: MultiCase, inputs: MultiInputs, impl: str) -> Results:
    """The ys [T, N] and the gradients that the case asks for; no input may be written to."""
    leaves = leaves_of(inputs.tensors(), case.needs)
    versions = {name: leaf._version for name, leaf in leaves.items()}
    ys = call(case, inputs, impl, leaves)
    assert all(y.shape == (*inputs.x.shape[:-1], N) for y, N in zip(ys, case.Ns, strict=True))
    torch.autograd.backward(ys, inputs.dys)
    assert {name: leaf._version for name, leaf in leaves.items()} == versions
    assert all((leaf.grad is not None) == (name.split(".")[0] in case.needs) for name, leaf in leaves.items())
    assert all(leaf.grad is None or leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
    results = {f"y.{i}": y.detach().reshape(case.T, y.shape[-1]) for i, y in enumerate(ys)}
    return results | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def keep_of(case: MultiCase, inputs: MultiInputs, impl: str) -> torch.Tensor | None:
    """Dropout's mask [T, K] over 1 - p of each token's slot, as the operator draws it from the seed of `call`."""
    if case.dropout_p == 0.0 or case.T == 0:
        return None
    slots = len(case.ranks)
    probabilities = case.dropout_p if isinstance(case.dropout_p, tuple) else (case.dropout_p,) * slots
    thresholds = [drop_threshold(p) for p in probabilities] + [0]
    torch.manual_seed(SEED)
    device = inputs.x.device
    seed = torch.randint(-(2**62), 2**62, (1,), device=device)
    tensors = inputs.plan.tensors
    _, _, mask = torch.ops.lorakernels.multi_lora_linear(
        inputs.x, inputs.weight[:1], [], [], [None], inputs.lora_A[:1], inputs.lora_B[:1], *tensors, seed,
        torch.tensor(thresholds, dtype=torch.int32, device=device), False, impl,
    )  # fmt: skip
    kept = unpack_mask(mask, case.K).double()
    if impl == "torch":
        where = route(tensors, case.T)
        if where.tokens is not None:
            kept = torch.zeros_like(kept).index_copy_(0, where.tokens, kept[: len(where.tokens)])
    scale = torch.tensor([inverse_keep(threshold) for threshold in thresholds], dtype=torch.float64, device=device)
    adapted = inputs.token_slots >= 0
    return torch.where(adapted[:, None], kept, 0.0) * scale[inputs.token_slots.long()][:, None]


def _table() -> Iterator[tuple[MultiCase, str, torch.dtype]]:
    for case, way, dtype in itertools.product(MULTI_CASES, PATHS, [torch.float32, torch.float16, torch.bfloat16]):
        if case.layout == "huge_strides" and dtype is not torch.float16:
            continue
        if way != "torch" and not COMPILED:
            if case.name not in IN_ALL_FORMS and way in ("triton", "triton-high_tiles"):
                continue
            if dtype is torch.bfloat16 and (case.name != "mixed_ranks" or way == "triton"):
                continue
            if way == "triton-token" and case.name in NOT_BY_TOKEN:
                continue
            if dtype is torch.float16 and case.layout != "huge_strides" and case.name not in IN_ALL_FORMS:
                continue
        yield case, way, dtype


def _marked() -> Iterator[Any]:
    """In the interpreter every third case by default, in turn, and all of them with `-m slow`: they take minutes."""
    for i, (case, way, dtype) in enumerate(_table()):
        often = way == "torch" or COMPILED or i % 3 == 0 or (way == "triton-tiles" and case.name in BY_TILES)
        yield pytest.param(case, way, dtype, marks=() if often else pytest.mark.slow)


@pytest.mark.parametrize(("case", "way", "dtype"), list(_marked()), ids=lambda value: str(value).removeprefix("torch."))
def test_against_a_loop_over_tokens(case: MultiCase, way: str, dtype: torch.dtype, device: str) -> None:
    if case.layout == "huge_strides" and not has_room(32):
        pytest.skip("strides past 2³¹ elements take up to 24 GiB of a GPU")
    draws: list[tuple[Results, Results, Results]] = []
    # Of a handful of elements plain torch may round every one luckily: its error is then taken over many draws.
    for draw in range(1 if case.K * case.T > 300 else 8):
        inputs = make_multi_inputs(case, dtype, device, seed=draw)
        with path(way) as impl, canaries():
            ours = run(case, inputs, impl)
            keep = keep_of(case, inputs, impl)
        if not NUMBERS:
            return
        grouped = run_loop(case, inputs, keep, dtype, by_slot(inputs))
        draws.append((ours, grouped, run_loop(case, inputs, keep, torch.float64, by_token(inputs))))
    assert all(ours.keys() == exact.keys() for ours, _, exact in draws)
    for name in draws[0][0]:
        actual, eager, exact = (torch.stack([results[name] for results in kind]) for kind in zip(*draws, strict=True))
        rounding = max(dtype, draws[0][0][name].dtype, key=lambda dtype: torch.finfo(dtype).eps)
        assert_within_budget(actual, eager, exact, rounding, name)


@pytest.mark.skipif(not COMPILED, reason="sizes for compiled kernels: the interpreter would take hours")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("case", LARGE_MULTI_CASES, ids=str)
def test_large(case: MultiCase, dtype: torch.dtype, device: str) -> None:
    test_against_a_loop_over_tokens(case, "triton", dtype, device)


def test_float64_is_exact_to_its_own_rounding() -> None:
    for case in MULTI_CASES:
        if case.dropout_p == 0.0 and case.adapter_dtype is None and case.layout != "huge_strides":
            inputs = make_multi_inputs(case, torch.float64)
            ours = run(case, inputs, "torch")
            exact = run_loop(case, inputs, None, torch.float64, by_token(inputs))
            for name, result in ours.items():
                assert error(result, exact[name]) < 1e-14, (case.name, name)


@pytest.mark.parametrize("way", ["torch", "triton-token", "triton-tiles"])
@given(
    T=st.integers(16, 20),  # of a handful of elements there would be 8 draws; the table has sizes of 0 and 1
    ranks=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    K=st.integers(19, 36),
    N=st.integers(17, 36),
    paged=st.booleans(),
    batch=st.sampled_from(["random", "grouped", "rows 0"]),
)
@settings(max_examples=settings.default.max_examples // 2)  # of the profile, short or long
def test_any_batch(way: str, T: int, ranks: list[int], K: int, N: int, paged: bool, batch: str, device: str) -> None:
    case = MultiCase("drawn", T=T, ranks=tuple(ranks), R=20, K=K, Ns=(N,), paged=paged, batch=batch)
    test_against_a_loop_over_tokens(case, way, torch.float32, device)


@pytest.mark.parametrize("way", PATHS)
@pytest.mark.parametrize("name", ["all_base", "all_empty_slots", "empty", "scalings"])
def test_rows_of_the_base_are_the_base_to_the_bit(name: str, way: str, device: str) -> None:
    case = next(case for case in MULTI_CASES if case.name == name)
    inputs = make_multi_inputs(case, torch.float32, device)
    with path(way) as impl:
        [y] = call(case, inputs, impl)
    off = torch.tensor([*((inputs.slot_ranks == 0) | (inputs.slot_scalings == 0)).tolist(), True], device=device)
    base = off[inputs.token_slots.long()]
    assert base.any() or case.T == 0
    expected = torch.nn.functional.linear(inputs.x, inputs.weight[0], inputs.bias[0] if inputs.bias else None)
    assert torch.equal(y[base], expected[base])
    assert base.all() or not torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_bases_bias_is_rounded_as_torchs_for_any_strides(dtype: torch.dtype, device: str) -> None:
    """Torch adds it to the product of such an x by itself, with one rounding more."""
    case = MultiCase("strided", T=24, K=33, Ns=(40, 17))
    inputs = make_multi_inputs(case, dtype, device)
    x = torch.nn.functional.pad(inputs.x, (0, 7)).view(6, 4, 40)[..., :33]
    ys = lk.multi_lora_linear(x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.plan, bias=inputs.bias)
    base = (inputs.token_slots < 0).view(6, 4)
    assert base.any()
    for y, weight, bias in zip(ys, inputs.weight, inputs.bias, strict=True):
        assert torch.equal(y[base], torch.nn.functional.linear(x, weight, bias)[base])


@pytest.mark.parametrize("way", PATHS)
@pytest.mark.parametrize("poison", [float("nan"), 1e4])
def test_an_adapter_touches_no_other_job(poison: float, way: str, device: str) -> None:
    case = MultiCase("tenants", T=20, needs=("x", "lora_A", "lora_B"))
    clean, dirty = make_multi_inputs(case, torch.float32, device), make_multi_inputs(case, torch.float32, device)
    dirty.lora_A[0][1, : case.ranks[1]] = poison
    dirty.lora_B[0][1, :, : case.ranks[1]] = poison
    with path(way) as impl:
        ours, theirs = run(case, clean, impl), run(case, dirty, impl)
    others = clean.token_slots != 1
    for name in ("y.0", "x"):
        assert torch.equal(ours[name][others], theirs[name][others])
        assert not torch.equal(ours[name][~others], theirs[name][~others])
    jobs = [slot for slot in range(len(case.ranks)) if slot != 1]
    for name in ("lora_A.0", "lora_B.0"):
        assert torch.equal(ours[name][jobs], theirs[name][jobs])


@pytest.mark.parametrize("way", PATHS)
def test_a_row_reaches_the_gradient_of_its_own_job_alone(way: str, device: str) -> None:
    case = MultiCase("jobs")
    clean, dirty = make_multi_inputs(case, torch.float32, device), make_multi_inputs(case, torch.float32, device)
    row = int((clean.token_slots == 3).nonzero()[0])
    dirty.x[row] = float("nan")
    dirty.dys[0][row] = float("nan")
    with path(way) as impl:
        ours, theirs = run(case, clean, impl), run(case, dirty, impl)
    for name in ("lora_A.0", "lora_B.0"):
        rank = case.ranks[3]
        of_job = theirs[name][3, :rank] if "A" in name else theirs[name][3, :, :rank]
        assert of_job.isnan().all()
        jobs = [slot for slot in range(len(case.ranks)) if slot != 3]
        assert torch.equal(ours[name][jobs], theirs[name][jobs])
        past = theirs[name][3, rank:] if "A" in name else theirs[name][3, :, rank:]
        assert torch.equal(past, torch.zeros_like(past))


@pytest.mark.parametrize("way", list(HEIGHTS))
def test_programs_run_in_any_order(way: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("the interpreter's order of programs: a GPU has its own")
    from lorakernels.testing.interpreter import shuffled_programs

    case = MultiCase("shuffled", T=9, Ns=(24, 20), dropout_p=0.2)
    inputs = make_multi_inputs(case, torch.float32, device)
    with path(way) as impl:
        in_order = run(case, inputs, impl)
        for seed in range(2):
            with shuffled_programs(seed):
                shuffled = run(case, inputs, impl)
            assert all(torch.equal(in_order[name], shuffled[name]) for name in in_order)


@pytest.mark.parametrize("way", PATHS)
@pytest.mark.parametrize("paged", [False, True])
def test_shrink_and_expand(way: str, paged: bool, device: str) -> None:
    case = MultiCase("halves", T=15, Ns=(24, 20), paged=paged)
    inputs = make_multi_inputs(case, torch.float32, device)
    ranks = torch.cat([inputs.slot_ranks, torch.zeros(1)])[inputs.token_slots.long()]  # 0 where the slot is -1
    past = (torch.arange(case.R) >= ranks[:, None]).to(device)
    with path(way) as impl, canaries():
        s = lk.lora_shrink(inputs.x, inputs.lora_A, inputs.plan, impl=impl)
        outs = [guarded(torch.ones(N, case.T, device=device).t()) for N in case.Ns]
        dirty = s.masked_fill(past, float("nan"))  # of what is past a rank nothing is seen
        assert lk.lora_expand(dirty, inputs.lora_B, inputs.plan, out=outs, impl=impl) is outs
        alone = lk.lora_shrink(inputs.x, inputs.lora_A[1], inputs.plan, impl=impl)
        out = torch.ones(case.T, 20, device=device)
        assert lk.lora_expand(alone, inputs.lora_B[1], inputs.plan, out=out, impl=impl) is out
    assert s.shape == (2, case.T, case.R) and s.dtype is torch.float32
    assert alone.shape == (case.T, case.R)
    leaves = {name: tensor.double() for name, tensor in inputs.tensors().items()}
    for i in range(2):
        exact_s, exact_y = torch.zeros(case.T, case.R).double(), torch.ones(case.T, case.Ns[i]).double()
        for t, slot in enumerate(inputs.token_slots.tolist()):
            if slot >= 0:
                A, B = adapter_of(inputs, leaves, i, slot)
                exact_s[t, : len(A)] = (leaves["x"][t] @ A.T) * inputs.slot_scalings[slot]
                exact_y[t] += (exact_s[t, : len(A)].to(B) @ B.T).cpu()
        assert error(s[i].cpu(), exact_s) < 1e-6 and error(outs[i].cpu(), exact_y) < 1e-6
        assert (s[i].cpu()[exact_s == 0] == 0).all()
    assert error(out, outs[1]) < 1e-6 and error(alone, s[1]) < 1e-6


@pytest.mark.parametrize("way", PATHS)
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_embedding(way: str, paged: bool, dtype: torch.dtype, device: str) -> None:
    case = MultiCase("words", T=24, K=50, Ns=(16,), paged=paged)
    inputs, rounding = make_multi_inputs(case, dtype, device), torch.finfo(dtype).eps
    ids = torch.randint(50, (4, 6), device=device)
    # As a linear layer of one-hot rows, in float64.
    inputs.x = torch.nn.functional.one_hot(ids.view(-1), 50).to(inputs.x.dtype)
    case = dataclasses.replace(case, bias=False, needs=("weight", "lora_A", "lora_B"))
    inputs.bias = []
    exact = run_loop(case, inputs, None, torch.float64, by_token(inputs))
    weight, A, B = inputs.weight[0].t().contiguous(), inputs.lora_A[0], inputs.lora_B[0]
    with path(way) as impl:
        with torch.no_grad():
            plain = multi_lora_embedding(ids, weight, A, B, inputs.plan, impl=impl)
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (weight, A, B)]
        y = multi_lora_embedding(ids, *leaves, inputs.plan, impl=impl)
        grads = torch.autograd.grad(y, leaves, inputs.dys[0].view(4, 6, -1))
    assert y.shape == (4, 6, 16) and torch.equal(y, plain)
    assert error(y.view(24, -1), exact["y.0"]) < rounding
    for grad, name in zip((grads[0].t(), *grads[1:]), ("weight.0", "lora_A.0", "lora_B.0"), strict=True):
        assert error(grad, exact[name]) < rounding, name
    base = inputs.token_slots < 0
    assert torch.equal(y.view(24, -1)[base], weight[ids.view(-1)[base]])
    nobody = lk.BatchPlan(inputs.plan.num_slots, 1, max_rank=1, num_pages=8 if paged else None, device=device)
    with path(way) as impl:
        assert multi_lora_embedding(ids[:0], weight, A, B, nobody, impl=impl).shape == (0, 6, 16)


@pytest.mark.parametrize("way", ["torch", "triton-tiles"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_plan_updated_before_the_backward_changes_no_gradient(dropout_p: float, way: str, device: str) -> None:
    case = MultiCase("stale", dropout_p=dropout_p)
    inputs = make_multi_inputs(case, torch.float32, device)
    with path(way) as impl:
        expected = run(case, inputs, impl)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors().items()}
        [y] = call(case, inputs, impl, leaves)
        inputs.plan.update(inputs.token_slots.flip(0)[:7], inputs.slot_ranks.flip(0), -inputs.slot_scalings)
        y.backward(inputs.dys[0])
        with pytest.raises(PlanError, match="23 tokens"):
            call(case, inputs, impl)
    for name in ("x", "lora_A.0", "lora_B.0"):
        assert torch.equal(leaves[name].grad, expected[name])


def test_an_adapter_edited_before_the_backward_is_an_error(device: str) -> None:
    case = MultiCase("edited")
    inputs = make_multi_inputs(case, torch.float32, device)
    inputs.lora_A[0].requires_grad_()
    [y] = call(case, inputs, "torch")
    with torch.no_grad():
        inputs.lora_B[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("way", PATHS)
def test_bitwise_the_same_on_every_run(way: str, device: str) -> None:
    case = MultiCase("again", T=30, dropout_p=0.1)
    inputs = make_multi_inputs(case, torch.float16, device)
    with path(way) as impl:
        first, second = run(case, inputs, impl), run(case, inputs, impl)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_dropout_acts_in_training_alone_and_anew_each_time(impl: str, device: str) -> None:
    case = MultiCase("training", dropout_p=0.4)
    inputs = make_multi_inputs(case, torch.float32, device)

    def once(p: float, training: bool) -> torch.Tensor:
        x, w, A, B = inputs.x, inputs.weight[0], inputs.lora_A[0], inputs.lora_B[0]
        return lk.multi_lora_linear(x, w, A, B, inputs.plan, dropout_p=p, training=training, impl=impl)

    assert torch.equal(once(0.4, False), once(0.0, True))
    assert not torch.equal(once(0.4, True), once(0.4, True))


@pytest.mark.parametrize(
    ("tokens", "slots", "kernel"),
    [
        (1, 4, "multi_shrink_token_kernel"),
        (64, 64, "multi_shrink_token_kernel"),
        (65, 64, "multi_shrink_kernel"),
        (2048, 4, "multi_shrink_kernel"),
    ],
)
def test_the_form_follows_tokens_and_slots(tokens: int, slots: int, kernel: str) -> None:
    plan = lk.BatchPlan(slots, tokens, max_rank=16, device="meta")
    plan.update(*(torch.zeros(n, dtype=d, device="meta") for n, d in ((tokens, torch.int32), (slots, torch.int32))),
                torch.zeros(slots, device="meta"))  # fmt: skip
    x, A = torch.empty(tokens, 64, device="meta"), torch.empty(slots, 16, 64, device="meta")
    from lorakernels.kernels import multi_lora

    with record_launches() as launches:
        multi_lora.shrink(x, [A], plan.tensors)
    assert launches[0].kernel.__name__ == kernel


class _OnGpu:
    """Stands for `torch.device("cuda")` where there is none."""

    type = "cuda"


@pytest.mark.parametrize("captured", [False, True])
def test_in_a_graph_the_first_product_runs_beside_the_base(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    @contextlib.contextmanager
    def side_stream(device: torch.device, enabled: bool) -> Iterator[Any]:
        events.append(("fork", enabled))
        yield contextlib.nullcontext()
        events.append("join")

    monkeypatch.setattr(kernels_multi_lora, "side_stream", side_stream)
    monkeypatch.setattr(kernels_multi_lora, "is_captured", lambda device: captured)
    for name in ("multi_shrink", "linear", "multi_expand"):
        called = getattr(kernels_multi_lora, name)
        noted = lambda *args, _name=name, _called=called: (events.append(_name), _called(*args))[1]  # noqa: E731
        monkeypatch.setattr(kernels_multi_lora, name, noted)
    with record_launches():
        multi_step(torch.bfloat16, 8, 4, 16, 64, (64,), train=False)
    assert events == [("fork", captured), "multi_shrink", "linear", "join", "multi_expand"]


@pytest.mark.parametrize(
    ("arch", "update", "depends"), [("sm_90", True, True), ("sm_90", False, False), ("sm_80", True, False)]
)
def test_what_adds_starts_early_behind_what_makes_s_alone(
    arch: str, update: bool, depends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base product has not said that it may; behind an update of the plan it may not."""
    for module in (kernels_multi_expand, kernels_multi_shrink):
        monkeypatch.setattr(module, "may_depend", lambda device: device_of(device).arch == "sm_90")
    with assume(arch), record_launches() as launches:
        multi_step(torch.bfloat16, 64, 64, 16, 4096, (4096,), train=False, update=update)
    shrink, expand = launches
    assert shrink.constexprs["SIGNALS"] == (arch == "sm_90")
    assert (
        expand.constexprs["DEPENDENT"]
        == depends
        == compile_options(expand.config, expand.constexprs).get("launch_pdl", False)
    )


def test_a_list_goes_to_a_gpu_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, steps = lk.BatchPlan(2, 4), []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        steps.append("pinned")
        return tensor

    def to(tensor: torch.Tensor, device: Any, non_blocking: bool = False) -> torch.Tensor:
        steps.append("on its way" if non_blocking else "waited for")
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(plan, "device", _OnGpu())
    assert plan.as_tensor("slot_ranks", [1, 2], torch.int32).tolist() == [1, 2]
    assert steps == ["pinned", "on its way"]


def test_operators_and_compile(device: str) -> None:
    case = MultiCase("compiled", Ns=(24, 40))
    inputs = make_multi_inputs(case, torch.float32, device)
    biases = list(inputs.bias)
    tensors = inputs.plan.tensors
    torch.library.opcheck(
        torch.ops.lorakernels.multi_lora_linear,
        (inputs.x, inputs.weight, [], [], biases, inputs.lora_A, inputs.lora_B, *tensors, None, None, True, "torch"),
        test_utils=("test_schema", "test_faketensor"),
    )
    expected = run(case, inputs, "torch")
    torch._dynamo.reset()
    compiled = torch.compile(lk.multi_lora_linear, fullgraph=True, backend="aot_eager")
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.tensors().items()}
    slices = [[leaves[f"{name}.{i}"] for i in range(2)] for name in ("weight", "lora_A", "lora_B", "bias")]
    for _ in range(3):  # the plan's version must not make a new graph
        inputs.update()
        with torch.compiler.set_stance("fail_on_recompile" if _ else "default"):
            ys = compiled(leaves["x"], *slices[:3], inputs.plan, bias=slices[3], impl="torch")
    torch.autograd.backward(ys, inputs.dys)
    for i, y in enumerate(ys):
        assert error(y, expected[f"y.{i}"]) < 1e-6
    for name in ("x", "lora_A.0", "lora_B.1", "bias.0"):
        assert error(leaves[name].grad, expected[name]) < 1e-6


def test_autocast(device: str) -> None:
    case = MultiCase("autocast")
    inputs = make_multi_inputs(case, torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = run(case, inputs, "torch")["y.0"]
    exact = run_loop(case, inputs, None, torch.float64, by_token(inputs))["y.0"]
    assert y.dtype is torch.bfloat16 and error(y, exact) < 0.01


def _bad(**changes: Any) -> dict[str, Any]:
    return changes


BAD = [
    (_bad(x=torch.zeros(22, 40)), PlanError, "22 tokens"),
    (_bad(x=torch.zeros(23, 39)), ValueError, "do not fit"),
    (_bad(x=torch.zeros(23, 40).half()), TypeError, "expected x's"),
    (_bad(x=torch.zeros(23, 40).long()), TypeError, "x is .* torch.int64; expected float64, float32"),
    (_bad(x=torch.zeros(23, 40).to(torch.float8_e4m3fn)), TypeError, "float16 or bfloat16"),
    (_bad(x=[1.0]), TypeError, "x must be a tensor"),
    (_bad(lora_A=torch.zeros(4, 8, 40)), PlanError, "S ≥ 5"),
    (_bad(lora_A=torch.zeros(5, 7, 40)), PlanError, "R ≥ 8"),
    (_bad(lora_A=torch.zeros(5, 9, 40)), ValueError, "one R"),
    (_bad(lora_A=torch.zeros(8, 40)), PlanError, "lora_A"),
    (_bad(lora_A=torch.zeros(5, 40, 8)), PlanError, "lora_A"),
    (_bad(lora_A=torch.zeros(5, 8, 40).long()), TypeError, "float dtype"),
    (_bad(lora_B=torch.zeros(5, 8, 24)), PlanError, "lora_B"),
    (_bad(lora_B=[torch.zeros(5, 24, 8)] * 2), ValueError, "as many of each"),
    (_bad(weight=[]), ValueError, "empty list"),
    (_bad(weight=None), TypeError, "weight must be a tensor or a list of them; got NoneType"),
    (_bad(lora_A=[1.0]), TypeError, "got a list with float"),
    (_bad(bias=torch.zeros(23)), ValueError, "bias"),
    (_bad(bias=1.0), TypeError, "bias must be a tensor or a list of them; got float"),
    (_bad(bias=[1.0]), TypeError, "got a list with float"),
    (_bad(plan="plan"), TypeError, "BatchPlan"),
    (_bad(dropout_p=1.0), ValueError, "probability"),
    (_bad(dropout_p="0.1"), TypeError, "dropout_p must be a number or a tensor; got str"),
    (_bad(dropout_p=torch.full((5,), 1.5)), ValueError, "probabilities"),
    (_bad(dropout_p=torch.full((4,), 0.5)), ValueError, r"expected \[5\]"),
    (_bad(impl="cuda"), ValueError, "impl"),
]


@pytest.mark.parametrize(("changes", "error_type", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_arguments_are_refused(changes: dict[str, Any], error_type: type[Exception], message: str) -> None:
    inputs = make_multi_inputs(MultiCase("bad"), torch.float32)
    given = {"x": inputs.x, "weight": inputs.weight[0], "lora_A": inputs.lora_A[0], "lora_B": inputs.lora_B[0]}
    given |= {"plan": inputs.plan, "bias": inputs.bias[0]}
    with pytest.raises(error_type, match=message):
        lk.multi_lora_linear(**(given | changes))


def test_integers_are_refused() -> None:
    inputs = make_multi_inputs(MultiCase("integers"), torch.float32)
    x, A, B, plan = inputs.x, inputs.lora_A[0], inputs.lora_B[0], inputs.plan
    s, out, weight = lk.lora_shrink(x, A, plan), inputs.dys[0], inputs.weight[0].t()
    for name, use in {
        "x": lambda: lk.lora_shrink(x.long(), A, plan),
        "s": lambda: lk.lora_expand(s.long(), B, plan, out=out),
        "out": lambda: lk.lora_expand(s, B, plan, out=out.long()),
        "weight": lambda: multi_lora_embedding(inputs.token_slots.abs(), weight.long(), A, B, plan),
    }.items():
        with pytest.raises(TypeError, match=rf"{name} is .* torch.int64; expected float64, float32"):
            use()


@pytest.mark.parametrize(
    ("changes", "error_type", "message"),
    [
        (_bad(ids=[1, 2]), TypeError, "int32 or int64; got list"),
        (_bad(ids=torch.zeros(23, dtype=torch.bool)), TypeError, "int32 or int64; got torch.bool"),
        (_bad(ids=torch.zeros(23, dtype=torch.int16)), TypeError, "int32 or int64; got torch.int16"),
        (_bad(weight=torch.zeros(40)), ValueError, r"expected \[V, N\]"),
        (_bad(lora_A=[torch.zeros(5, 8, 40)] * 2), TypeError, "lora_A must be a tensor; got list"),
        (_bad(lora_A=torch.zeros(5, 9, 40)), ValueError, "one R for both"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_of_the_embedding_are_refused(
    changes: dict[str, Any], error_type: type[Exception], message: str
) -> None:
    inputs = make_multi_inputs(MultiCase("bad"), torch.float32)
    given = {"ids": inputs.token_slots.abs(), "weight": inputs.weight[0].t()}
    given |= {"lora_A": inputs.lora_A[0], "lora_B": inputs.lora_B[0], "plan": inputs.plan}
    with pytest.raises(error_type, match=message):
        multi_lora_embedding(**(given | changes))


def test_what_has_no_gradient_says_so(device: str) -> None:
    inputs = make_multi_inputs(MultiCase("inference"), torch.float32, device)
    inputs.lora_A[0].requires_grad_()
    with pytest.raises(RuntimeError, match="multi_lora_linear"):
        lk.lora_shrink(inputs.x, inputs.lora_A[0], inputs.plan)
    with torch.no_grad():
        s = lk.lora_shrink(inputs.x, inputs.lora_A[0], inputs.plan)
        with pytest.raises(ValueError, match="from lora_shrink"):
            lk.lora_expand(s[:, :3], inputs.lora_B[0], inputs.plan, out=inputs.dys[0])
    y = ops.multi_lora_linear(
        inputs.x, inputs.weight, inputs.bias, inputs.lora_A, inputs.lora_B, inputs.plan, 0.0, "auto"
    )
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(y[0].sum(), inputs.lora_A[0], create_graph=True)


@pytest.mark.parametrize("way", ["torch", "triton-token", "triton-tiles"])
@pytest.mark.parametrize("unit", [1, 3])
def test_a_rows_bits_do_not_depend_on_the_others_adapters(unit: int, way: str, device: str) -> None:
    """With `invariant`, forward and dx; without it torch's products of an adapter's tokens do."""
    S, R, K, N, rows = 4, 8, 72, 40, 8
    torch.manual_seed(0)
    dtype = torch.float64 if way == "torch" else torch.float32
    x, weight, dy = (torch.randn(*shape, dtype=dtype, device=device) for shape in ((rows * unit, K), (N, K), (rows, N)))
    x, dy = x.requires_grad_(), dy.repeat_interleave(unit, 0)
    A, B = torch.randn(S, R, K, dtype=dtype, device=device), torch.randn(S, N, R, dtype=dtype, device=device)
    others = ([-1] * 6, [0] * 6, [1, 0, 1, 0, 1, 0], [2, 3, -1, 1, 0, 2], [3, 3, 2, 2, 2, 0])

    def of_two_rows(slots: list[int], invariant: bool | int) -> torch.Tensor:
        """y and dx of the rows 1 and 6, whose adapters are 0 and 1."""
        slots = [slots[0], 0, *slots[1:5], 1, slots[5]]
        plan = lk.BatchPlan(S, rows * unit, max_rank=R, invariant=invariant, device=device)
        plan.update([slot for slot in slots for _ in range(unit)], [8, 5, 8, 3], [1.0, 0.5, 2.0, 1.0])
        with path(way) as impl:
            y = lk.multi_lora_linear(x, weight, A, B, plan, impl=impl)
            [dx] = torch.autograd.grad(y, x, dy)
        return torch.stack([t.view(rows, -1)[[1, 6]] for t in (y.detach() @ y.new_ones(N, K), dx)])

    first, *rest = (of_two_rows(slots, unit) for slots in others)
    assert all(torch.equal(first, other) for other in rest)
    if way == "torch":
        first, *rest = (of_two_rows(slots, False) for slots in others)
        assert not all(torch.equal(first, other) for other in rest)
