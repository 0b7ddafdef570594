"""lora_linear against float64: every case of the table, both implementations, values and every gradient."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import lorakernels as lk
from lorakernels.configs import table
from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import assume
from lorakernels.dropout import LEVELS, drop_threshold
from lorakernels.eager.dropout import draw_mask, philox_mask, unpack_mask
from lorakernels.kernels import lora_linear as kernels_lora_linear
from lorakernels.kernels.launch import as_if_captured, launch, record_launches, side_stream
from lorakernels.member import Member, training_step
from lorakernels.ops import linear as ops_linear
from lorakernels.testing.budget import assert_within_budget, error
from lorakernels.testing.cases import (
    LARGE_CASES,
    LINEAR_CASES,
    LinearCase,
    LinearInputs,
    keep_of,
    leaves_of,
    make_inputs,
    run_formula,
)
from lorakernels.testing.device import COMPILED, NUMBERS, has_room
from lorakernels.testing.guards import canaries
from lorakernels.testing.interpreter import tf32_products
from lorakernels.tools.steps import packed_weight, shipped_launches

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = 1234
LARGE = ("several_blocks",)
IN_ALL_DTYPES = ("plain", "dropout_half_odd", "adapter_float32_dropout", "odd_sizes", "huge_strides")
# Forms of `linear_expand` alone: the cases where that kernel does something else, and aligned, which descriptors need.
OF_ONE_KERNEL = (
    *("triton-tma-tiny", "triton-cublas-tiny", "triton-late-tiny", "triton-tma-late-halves-tiny"),
    "triton-few-forked-tiny",
)
FOR_ONE_KERNEL = (
    "three_dimensions",
    "zero_tokens",
    "odd_sizes",
    "rank_17",
    "no_bias",
    "dropout",
    "adapter_float32_dropout",
    "transposed",
    "row_scale",
    "row_scale_dropout",
    "row_scale_scaling_zero",
    "row_scale_zero_tokens",
)
# Where a kernel's blocks matter: sizes, layouts, and the parts that one launch has and another has not.
WITH_EVERY_CONFIG = (
    *("plain", "zero_tokens", "odd_sizes", "primes", "rank_17", "rank_64", "rank_over_both_sizes"),
    *("several_blocks", "no_bias", "dropout_half_odd", "adapter_float32_dropout", "transposed", "expanded"),
    *("x_and_B", "weight_too", "row_scale_no_bias", "row_scale_dropout", "row_scale_all"),
)
Results = dict[str, torch.Tensor]
# Sixteen is the smallest block there is: odd shapes then take several programs and several turns of every loop.
TINY = dict.fromkeys(
    ("shrink", "linear_expand", "few_tokens", "outer"),
    KernelConfig(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, BLOCK_R=16, GROUP_M=2, SPLIT=3),
)
PATHS = [
    "torch",
    "torch-small",
    "triton-few",
    "triton-general",
    "triton-few-tiny",
    "triton-general-tiny",
    "triton-tma-tiny",
    "triton-cublas-tiny",
    "triton-late-tiny",
    "triton-tma-late-halves-tiny",
    "triton-few-forked-tiny",
]


@contextlib.contextmanager
def path(name: str, r: int = 1) -> Iterator[str]:
    """One way through the layer: the implementation, the form of its kernels, their block sizes."""
    impl, _, form = name.partition("-")
    few = "few" in form and r <= table.FEW_TOKENS_MAX_RANK
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(table, "FEW_TOKENS", 1 << 30 if few else -1)
        patch.setattr(ops_linear, "SMALL", 1 << 62 if form == "small" else 0)
        if "forked" in form:
            stack.enter_context(as_if_captured())
        if "tiny" in form:
            block_r = max(16, 1 << (r - 1).bit_length()) if few else 16
            flags = {flag: flag in form for flag in ("tma", "cublas", "late", "halves")}
            block_n = 32 if flags["halves"] else 16
            tiny = {n: dataclasses.replace(c, BLOCK_N=block_n, BLOCK_R=block_r, **flags) for n, c in TINY.items()}
            tiny["few_tokens"] = dataclasses.replace(
                tiny["few_tokens"], side_stream=True
            )  # but in a graph all the same
            stack.enter_context(table.forced_configs(tiny))
        yield impl


def run(case: LinearCase, inputs: LinearInputs, impl: str) -> dict[str, torch.Tensor]:
    """y and the gradients that the case asks for; no input may be written to."""
    leaves = leaves_of(inputs.tensors(), case.needs)
    versions = {name: leaf._version for name, leaf in leaves.items()}
    torch.manual_seed(SEED)
    y = lk.lora_linear(
        leaves["x"],
        leaves["weight"],
        leaves["lora_A"],
        leaves["lora_B"],
        bias=leaves.get("bias"),
        row_scale=leaves.get("row_scale"),
        scaling=case.scaling,
        dropout_p=case.dropout_p,
        impl=impl,
    )
    y.backward(inputs.dy)
    assert {name: leaf._version for name, leaf in leaves.items()} == versions
    assert all((leaves[name].grad is not None) == (name in case.needs) for name in leaves)
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def _table() -> Iterator[tuple[LinearCase, str, torch.dtype]]:
    """Every case in every dtype by every path on a GPU and in torch; what the interpreter takes long for, in fewer."""
    for case, way, dtype in itertools.product(LINEAR_CASES, PATHS, DTYPES):
        if way in OF_ONE_KERNEL and case.name not in FOR_ONE_KERNEL:
            continue
        interpreted = way != "torch" and not COMPILED
        slow = way.endswith("tiny") and case.name in LARGE
        if case.layout == "huge_strides" and dtype is not torch.float16:  # of which alone the layout is made
            continue
        if not interpreted or case.name in IN_ALL_DTYPES or (dtype is torch.float32 and not slow):
            yield case, way, dtype


@pytest.mark.parametrize(("case", "way", "dtype"), list(_table()), ids=lambda value: str(value).removeprefix("torch."))
def test_against_float64(case: LinearCase, way: str, dtype: torch.dtype, device: str) -> None:
    if case.layout == "huge_strides" and not has_room(32):
        pytest.skip("strides past 2³¹ elements take up to 24 GiB of a GPU")
    draws: list[tuple[Results, Results, Results]] = []
    # Of a handful of elements eager torch may round every one luckily: its error is then taken over many draws.
    for draw in range(1 if case.K * case.N > 100 else 16):
        inputs = make_inputs(case, dtype, device, seed=draw)
        with path(way, case.r) as impl, canaries():
            ours = run(case, inputs, impl)
            keep = keep_of(inputs.x, case.dropout_p * bool(case.scaling), SEED, impl)
        if not NUMBERS:
            return
        draws.append((ours, run_formula(case, inputs, keep, dtype), run_formula(case, inputs, keep, torch.float64)))
        for name, result in ours.items():
            assert result.dtype == (dtype if name == "y" else getattr(inputs, name).dtype)
    assert all(ours.keys() == exact.keys() for ours, _, exact in draws)
    for name in draws[0][0]:
        actual, eager, exact = (torch.stack([results[name] for results in kind]) for kind in zip(*draws, strict=True))
        rounding = max(dtype, draws[0][0][name].dtype, key=lambda dtype: torch.finfo(dtype).eps)
        assert_within_budget(actual, eager, exact, rounding, name if name == "y" else f"gradient of {name}")


@pytest.mark.skipif(not COMPILED, reason="sizes for compiled kernels: the interpreter would take hours")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
def test_large(case: LinearCase, dtype: torch.dtype, device: str) -> None:
    way = "triton-few" if case.name.startswith("few") else "triton-general"
    test_against_float64(case, way, dtype, device)


def _rounds() -> Iterator[tuple[torch.dtype, dict[str, KernelConfig]]]:
    """Every config that a shipped launch takes on some architecture, one of each kernel at a time."""
    configs: dict[torch.dtype, dict[str, list[KernelConfig]]] = {}
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        with assume(arch):
            for launch in shipped_launches():
                operation = launch.kernel.__name__.removesuffix("_kernel").removesuffix("_tma")
                dtype, config = launch.tensor.dtype, launch.config
                if not COMPILED:  # the interpreter has neither
                    config = dataclasses.replace(config, num_warps=4, num_stages=2)
                if operation in TINY:
                    found = configs.setdefault(dtype, {}).setdefault(operation, [])
                    found += [] if config in found else [config]
    for dtype, by_operation in configs.items():
        for i in range(max(map(len, by_operation.values()))):
            half = torch.float32 if dtype is torch.float32 else torch.float16
            yield half, {operation: found[i % len(found)] for operation, found in by_operation.items()}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["few", "general"])
@pytest.mark.parametrize(("dtype", "configs"), list(_rounds()), ids=lambda value: str(value)[:0])
def test_every_shipped_config(dtype: torch.dtype, configs: dict[str, KernelConfig], form: str, device: str) -> None:
    """Cases with each shipped config forced: large blocks on small inputs are all edges."""
    for case in LINEAR_CASES:
        if case.name not in WITH_EVERY_CONFIG or (form == "few" and case.r > configs["few_tokens"].BLOCK_R):
            continue
        with table.forced_configs(configs):
            test_against_float64(case, f"triton-{form}", dtype, device)


def test_float64_is_exact_to_its_own_rounding() -> None:
    for case in LINEAR_CASES:
        if case.dropout_p == 0 and case.adapter_dtype is None:
            inputs = make_inputs(case, torch.float64)
            ours, exact = run(case, inputs, "torch"), run_formula(case, inputs, None, torch.float64)
            for name, result in ours.items():
                assert error(result, exact[name]) < 1e-14, (case.name, name)


@pytest.mark.parametrize("way", ["torch", "triton-few-tiny", "triton-general-tiny"])
@given(
    tokens=st.integers(0, 33),
    K=st.integers(11, 40),  # of a handful of elements there would be 16 draws; the table has sizes of 1
    N=st.integers(10, 33),
    r=st.integers(1, 20),
    dropout_p=st.sampled_from([0.0, 0.25]),
)
@settings(max_examples=4, deadline=None, derandomize=True)
def test_any_shape(way: str, tokens: int, K: int, N: int, r: int, dropout_p: float, device: str) -> None:
    case = LinearCase("drawn", tokens=(tokens,), K=K, N=N, r=r, dropout_p=dropout_p)
    test_against_float64(case, way, torch.float32, device)


@pytest.mark.parametrize("way", PATHS)
def test_scaling_zero_is_the_base_layer_to_the_bit(way: str, device: str) -> None:
    inputs = make_inputs(LinearCase("off", scaling=0.0), torch.float32, device)
    inputs.lora_A.fill_(float("inf"))
    inputs.x.requires_grad_()
    with path(way) as impl:
        y = lk.lora_linear(
            inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, bias=inputs.bias, scaling=0.0, impl=impl
        )
        [dx] = torch.autograd.grad(y, inputs.x, inputs.dy)
    assert torch.equal(y, torch.nn.functional.linear(inputs.x, inputs.weight, inputs.bias))
    torch.testing.assert_close(dx, inputs.dy @ inputs.weight)


@pytest.mark.parametrize("tokens", [1, 512])
def test_scaling_zero_is_the_base_layer_where_the_product_is_not_torchs(tokens: int) -> None:
    x, weight, A, B = torch.randn(tokens, 1024), torch.randn(512, 1024), torch.randn(4, 1024), torch.randn(512, 4)
    assert torch.equal(lk.lora_linear(x, weight, A, B, scaling=0.0), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("way", PATHS)
def test_bitwise_the_same_on_every_run(way: str, device: str) -> None:
    case = next(case for case in LINEAR_CASES if case.name == "dropout")
    inputs = make_inputs(case, torch.float16, device)
    with path(way) as impl:
        first, second = run(case, inputs, impl), run(case, inputs, impl)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("way", "kernel", "base"),
    [
        ("tma", "linear_expand_tma_kernel", 0),
        ("cublas", "linear_expand_kernel", 2),
        ("general", "linear_expand_kernel", 0),
    ],
)
def test_the_form_that_is_asked_for_runs(way: str, kernel: str, base: int) -> None:
    inputs = make_inputs(LinearCase("aligned", tokens=(64,), K=64, N=32), torch.float16, "meta")
    x, weight, A, B, bias, *_ = inputs.tensors().values()
    with path(f"triton-{way}-tiny"), record_launches() as launches:
        training_step(kernels_lora_linear, x, [inputs.dy], [Member(weight, A, B, bias, scaling=0.5)])
    expands = [launch for launch in launches if launch.kernel.__name__.startswith("linear_expand")]
    assert [launch.kernel.__name__ for launch in expands] == [kernel] * 2
    assert sum(launch.constexprs.get("HAS_BASE", False) for launch in expands) == base


def test_what_one_thread_records_another_runs(device: str) -> None:
    inputs = make_inputs(LINEAR_CASES[0], torch.float32, device)
    step = functools.partial(run, LINEAR_CASES[0], inputs, "triton")
    expected = step()
    with assume("sm_90"), record_launches() as launches, table.record_choices() as asked, ThreadPoolExecutor(1) as pool:
        found = pool.submit(step).result()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not launches and not asked


def test_a_grid_without_programs_starts_nothing() -> None:
    """CUDA refuses it, and the interpreter does not."""
    kernel = SimpleNamespace(fn=None, arg_names=())
    launch(kernel, (1, 0), {"x_ptr": torch.empty(1)}, {}, KernelConfig())


@pytest.mark.parametrize("way", ["triton-few-tiny", "triton-general-tiny"])
def test_programs_run_in_any_order(way: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("the interpreter's order of programs: a GPU has its own")
    from lorakernels.testing.interpreter import shuffled_programs

    case = next(case for case in LINEAR_CASES if case.name == "dropout")
    inputs = make_inputs(case, torch.float32, device)
    with path(way) as impl:
        in_order = run(case, inputs, impl)
        for seed in range(2):
            with shuffled_programs(seed):
                shuffled = run(case, inputs, impl)
            assert all(torch.equal(in_order[name], shuffled[name]) for name in in_order)


@pytest.mark.parametrize("way", PATHS)
def test_a_row_of_nan_stays_in_its_row(way: str, device: str) -> None:
    inputs = make_inputs(LinearCase("rows"), torch.float32, device)
    with path(way) as impl:
        clean = lk.lora_linear(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, impl=impl)
        inputs.x[5] = float("nan")
        dirty = lk.lora_linear(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, impl=impl)
    rows = torch.arange(len(clean), device=device) != 5
    assert torch.equal(dirty[rows], clean[rows])
    assert dirty[5].isnan().all()


@pytest.mark.parametrize("way", ["triton-few-tiny", "triton-general-tiny", "triton-few", "triton-general"])
@pytest.mark.parametrize("K", [1, 8, 83])
def test_the_kernels_mask_is_philox_of_the_seed(way: str, K: int, device: str) -> None:
    inputs = make_inputs(LinearCase("mask", tokens=(50,), K=K), torch.float32, device)
    seed = torch.tensor([-(2**62) + 12345], device=device)
    # The threshold is the very number of the first element, which is kept.
    threshold = bisect.bisect(range(LEVELS), 0, key=lambda t: ~int(philox_mask(seed, 1, 1, t)) & 1) - 1
    with path(way) as impl:
        x, weight, A, B, *_ = inputs.tensors().values()
        _, _, mask = torch.ops.lorakernels.lora_linear(x, weight, A, B, None, None, seed, 1.0, threshold / LEVELS, impl)
    assert mask.shape == (50, -(-K // 8))
    expected = unpack_mask(philox_mask(seed, 50, K, threshold), K)
    assert expected[0, 0] and torch.equal(unpack_mask(mask, K), expected)


@pytest.mark.parametrize("draw", [draw_mask, lambda *args: unpack_mask(philox_mask(*args), args[2])])
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.999])
def test_dropout_keeps_the_right_share(draw, p: float) -> None:
    rows, cols = 400, 1003
    assert draw(torch.tensor([0]), rows, cols, 0).all()  # the least of 65536 numbers is not below it
    masks = [draw(torch.tensor([seed]), rows, cols, drop_threshold(p)).double() for seed in range(4)]
    # Four deviations of the binomial for the whole mask, six for the worst of its 1003 columns.
    deviation = (p * (1 - p)) ** 0.5
    for mask in masks:
        assert abs(mask.mean() - (1 - p)) < 4 * deviation / (rows * cols) ** 0.5 + 2**-17
        assert ((mask.mean(0) - (1 - p)).abs() < 6 * deviation / rows**0.5 + 2 / rows).all()
    flat = [(mask.flatten() - (1 - p)) / deviation for mask in masks]
    # Neighbours, rows and seeds do not know of each other.
    for one, other in ((flat[0][1:], flat[0][:-1]), (flat[0][cols:], flat[0][:-cols]), (flat[0], flat[1])):
        assert abs((one * other).mean()) < 5 / len(one) ** 0.5


@pytest.mark.parametrize("way", PATHS)
def test_one_seed_one_mask_and_dropout_is_unbiased(way: str, device: str) -> None:
    inputs = make_inputs(LinearCase("mean", tokens=(8,), K=24, N=16), torch.float32, device)
    x, weight, A, B, bias = inputs.tensors().values()
    with path(way) as impl:

        def call() -> torch.Tensor:
            return lk.lora_linear(x, weight, A, B, bias=bias, dropout_p=0.4, impl=impl)

        torch.manual_seed(7)
        first = call()
        torch.manual_seed(7)
        assert torch.equal(call(), first)
        assert not torch.equal(call(), first)
        n = 64 if way == "torch" else 25
        runs = torch.stack([call() for _ in range(n)]).double()
        exact = lk.lora_linear(x, weight, A, B, bias=bias, impl=impl)
        evaluated = lk.lora_linear(x, weight, A, B, bias=bias, dropout_p=0.4, training=False, impl=impl)
    assert torch.equal(evaluated, exact)
    # The mean of the runs lies within its own standard error: five of them for the worst of 128 elements.
    assert ((runs.mean(0) - exact).abs() < 5 * runs.std(0) / n**0.5 + 1e-6).all()


def test_each_stream_forks_to_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, index: int) -> None:
            self.cuda_stream, self.waits = id(self), []

        def wait_stream(self, other: Stream) -> None:
            self.waits.append(other)

    one, other = Stream(0), Stream(0)
    sides = []
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    for current in (one, other, one):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, current=current: current)
        with side_stream(torch.device("cuda", 0), True) as side:
            assert side.waits[-1] is current
        assert current.waits[-1] is side
        sides.append(side)
    assert sides[0] is sides[2] is not sides[1]


@pytest.mark.parametrize(
    ("features", "weight", "captured", "forks"),
    [
        *((4096, kind, captured, captured and not kind) for kind in ("", "int8") for captured in (False, True)),
        (256, "", True, False),  # which is read before x Aᵀ is made
    ],
)
@pytest.mark.parametrize("num_members", [1, 2])
def test_in_a_graph_few_tokens_of_a_large_weight_fork(
    features: int, weight: str, captured: bool, forks: bool, num_members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    @contextlib.contextmanager
    def forking(device: torch.device, enabled: bool) -> Iterator[Any]:
        assert enabled
        events.append("fork")
        yield contextlib.nullcontext()
        events.append("join")

    def note(name: str) -> None:
        called = getattr(kernels_lora_linear, name)
        monkeypatch.setattr(kernels_lora_linear, name, lambda *a, **k: (events.append(name), called(*a, **k))[1])

    for name in ("few_tokens", "shrink", "multiply", "linear_expand"):
        note(name)
    monkeypatch.setattr(kernels_lora_linear, "side_stream", forking)
    meta = functools.partial(torch.empty, device="meta", dtype=torch.bfloat16)
    W = packed_weight(weight, features, features) if weight else meta(features, features)
    members = [Member(W, meta(8, features), meta(features, 8))] * num_members
    with assume("sm_90"), record_launches(), as_if_captured() if captured else contextlib.nullcontext():
        ys, s, _ = kernels_lora_linear.forward(meta(64, features), members, None, 0)
    n = num_members
    beside = ["fork", "shrink", *["multiply"] * n, "join", *["linear_expand"] * n]
    assert events == (beside if forks else ["few_tokens"] * n)
    assert [y.shape for y in ys] == [(64, features)] * n and s.shape == (64, 8 * n)


@pytest.mark.parametrize("num_members", [1, 3])
def test_the_backward_forks_after_g(num_members: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """dx waits for G alone; what waits for nothing more runs beside it, and leaves nothing in the side stream's memory.

    Else another thread's launches on that stream could be given memory that this one still reads.
    """
    events: list[str] = []

    class Marked(TorchDispatchMode):
        """A stream, inside which memory is noted."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def __enter__(self) -> Marked:
            events.append(self.name)
            return super().__enter__() if self.name == "beside" else Marked("beside")

        def __exit__(self, *error: Any) -> None:
            events.append(f"end of {self.name}")
            if self.name == "beside":
                super().__exit__(*error)

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            events.extend(["memory"] if "empty" in str(function) else [])
            return function(*args, **(kwargs or {}))

    def note(name: str) -> None:
        called = getattr(kernels_lora_linear, name)
        monkeypatch.setattr(kernels_lora_linear, name, lambda *a, **k: (events.append(name), called(*a, **k))[1])

    for name in ("shrink", "linear_expand", "dy_pass", "grad_A"):
        note(name)
    forks: list[bool] = []
    monkeypatch.setattr(kernels_lora_linear, "side_stream", lambda device, on: (forks.append(on), Marked("fork"))[1])
    x, *dys = torch.empty(1 + num_members, 512, 64, device="meta")
    W, A, B = torch.empty(64, 64, device="meta"), torch.empty(4, 64, device="meta"), torch.empty(64, 4, device="meta")
    members = [Member(W, A, B, torch.empty(64, device="meta"), None, 1.0)] * num_members
    forced = {"outer": KernelConfig(side_stream=True), "shrink": KernelConfig(), "linear_expand": KernelConfig()}
    with table.forced_configs(forced), record_launches():
        training_step(
            kernels_lora_linear, x, dys, members, 0, need_dbias=True,
            ran=lambda part: events.clear() if part == "forward" else None,
        )  # fmt: skip
    n = num_members
    beside = ["beside", *["dy_pass"] * n, "grad_A", "end of beside"]
    assert events == [*["shrink"] * n, "fork", "linear_expand", *beside, "end of fork"]
    assert forks == [True]


@pytest.mark.parametrize("way", ["torch", "triton-few-tiny", "triton-general-tiny", "many-torch", "many-triton"])
@pytest.mark.parametrize(("size_B", "size_dy"), [(1e-6, 1e-4), (1e-3, 1e-2)], ids=["tiny", "mostly_update"])
def test_float16_with_float32_adapters_is_as_near_as_peft(size_B: float, size_dy: float, way: str, device: str) -> None:
    """x of 1e3 gives S past 65504, and gradients of 1e-4 a G below 6e-8: float16 would have inf and 0 for them.

    The gradients of A and B have as many bits as PEFT's, which makes them of float32 alone: tf32 would have 11.
    """
    M, K, N, r, scaling = 24, 144, 40, 5, 0.5

    def leaf(rows: int, cols: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
        return (torch.randn(rows, cols, device=device) * scale).to(dtype).requires_grad_()

    x, weight = leaf(M, K, 1e3, torch.float16), leaf(N, K, 1e-3, torch.float16).detach()
    A, B = leaf(r, K, 10.0, torch.float32), leaf(N, r, size_B, torch.float32)
    dy = leaf(M, N, size_dy, torch.float16).detach()

    def as_peft(x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = torch.nn.functional.linear(x, weight)
        return (y + scaling * torch.nn.functional.linear(torch.nn.functional.linear(x.to(wide), A), B)).to(x.dtype)

    def ours(x: torch.Tensor, weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        if way.startswith("many"):
            plan = lk.BatchPlan(1, M, max_rank=r, device=device)
            plan.update(torch.zeros(M, dtype=torch.int32), slot_ranks=[r], slot_scalings=[scaling])
            return lk.multi_lora_linear(x, weight, A[None], B[None], plan, impl=way.removeprefix("many-"))
        with path(way, r) as impl:
            y = lk.lora_linear(x, weight, A, B, scaling=scaling, impl=impl)
            y.backward(dy)
        return y

    def results(call: Callable[..., torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, A, B)]
        y = call(leaves[0], weight.to(dtype or weight.dtype), *leaves[1:])
        if leaves[0].grad is None:
            y.backward(dy.to(y.dtype))
        return [y.detach(), *[t.grad for t in leaves if t.grad is not None]]

    assert not (x @ A.half().t()).isfinite().all()
    assert size_B > 1e-6 or not (dy @ B.half()).count_nonzero()
    with contextlib.nullcontext() if COMPILED else tf32_products():
        found = results(ours)
    for actual, eager, truth in zip(found, results(as_peft), results(as_peft, torch.float64), strict=True):
        assert_within_budget(actual, eager, truth, actual.dtype)
