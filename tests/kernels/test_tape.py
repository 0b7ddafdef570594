"""Calls that are run again from a tape give what the launchers give: to the bit, and on the driver to the byte."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import lorakernels as lk
from lorakernels.configs import table
from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import assume
from lorakernels.configs.heuristic import MULTI_OPERATIONS
from lorakernels.kernels import tape
from lorakernels.kernels.launch import as_if_captured
from lorakernels.nn.quantized import pack
from lorakernels.testing.cases import LINEAR_CASES, LinearCase, leaves_of, make_inputs
from lorakernels.testing.device import DEVICE
from lorakernels.testing.multi_cases import MULTI_CASES, MultiCase, make_multi_inputs

# Small blocks: several programs of everything, and planes that are added. Few tokens, and the kernels for many.
TINY = KernelConfig(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, BLOCK_R=16, GROUP_M=2, SPLIT=3)
FORCED = dict.fromkeys(("shrink", "outer"), TINY) | {
    "few_tokens": dataclasses.replace(TINY, side_stream=True),  # as it is in a graph alone
    "linear_expand": dataclasses.replace(TINY, SPLIT=1),
}
MULTI = {name: dataclasses.replace(TINY, SPLIT=1 if name == "multi_expand" else 3) for name in MULTI_OPERATIONS}
# What decides which runs there are; the other cases differ in sizes.
LINEAR_NAMES = (
    "plain",
    "zero_tokens",
    "dropout_half_odd",
    "transposed",
    "adapter_float32_dropout",
    "row_scale_all",
    "only_A",
)
MULTI_NAMES = ("pages_slices_odd", "dropout_by_slot", "weight_too")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each tape that is run, of those that are made in this test."""
    table.clear()
    monkeypatch.setattr(tape, "interpreted_too", True)
    counted: list[int] = []
    run = tape.Tape.run
    monkeypatch.setattr(tape.Tape, "run", lambda self, t: (counted.append(1), run(self, t))[1])
    return counted


def assert_same(call: Callable[[int], list[Any]], runs: list[int], tapes: int) -> None:
    """The third call, on tensors of its own, runs `tapes` of them, and gives what the launchers give of those."""
    call(0), call(1)
    assert runs == []
    found = call(2)
    assert len(runs) == tapes
    with table.record_choices():
        expected = call(2)
    assert len(runs) == tapes
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (torch.equal(one, other) and (one.stride(), one.dtype) == (other.stride(), other.dtype))


@pytest.mark.parametrize(
    ("case", "form"),
    [
        (case, form)
        for case in LINEAR_CASES
        for form in ("few", "general", "forked")
        if case.name in (LINEAR_NAMES if form != "forked" else ("dropout_half_odd", "row_scale_all"))
    ],
    ids=str,
)
def test_a_layer_is_the_same(case: LinearCase, form: str, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "general":
        monkeypatch.setattr(table, "FEW_TOKENS", 0)

    def call(seed: int) -> list[Any]:
        inputs = make_inputs(case, torch.float32, DEVICE, seed)
        leaves = leaves_of(inputs.tensors(), case.needs)
        torch.manual_seed(seed)
        y = lk.lora_linear(**leaves, scaling=case.scaling, dropout_p=case.dropout_p, impl="triton")
        y.backward(inputs.dy)
        return [y.detach(), *(leaf.grad for leaf in leaves.values())]

    with table.forced_configs(FORCED), as_if_captured() if form == "forked" else contextlib.nullcontext():
        assert_same(call, runs, 2 + case.row_scale)


@pytest.mark.parametrize("case", [case for case in MULTI_CASES if case.name in MULTI_NAMES], ids=str)
def test_a_batch_is_the_same(case: MultiCase, runs: list[int]) -> None:
    def call(seed: int) -> list[Any]:
        inputs = make_multi_inputs(case, torch.float32, DEVICE, seed)
        leaves = leaves_of(inputs.tensors(), case.needs)
        torch.manual_seed(seed)
        kinds = {name: [leaves[f"{name}.{i}"] for i in range(len(case.Ns))] for name in ("weight", "lora_A", "lora_B")}
        biases = [leaves.get(f"bias.{i}") for i in range(len(case.Ns))]
        p = case.dropout_p if isinstance(case.dropout_p, float) else torch.tensor(case.dropout_p)
        ys = lk.multi_lora_linear(
            leaves["x"], *kinds.values(), inputs.plan, bias=biases, dropout_p=p, impl="triton"
        )  # fmt: skip
        torch.autograd.backward(ys, inputs.dys)
        return [*(y.detach() for y in ys), *(leaf.grad for leaf in leaves.values())]

    with table.forced_configs(MULTI):
        assert_same(call, runs, 2)


def test_a_group_is_the_same(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own operators are steps too: A's, and G's, are put together."""
    monkeypatch.setattr(table, "FEW_TOKENS", 0)

    def call(seed: int) -> list[Any]:
        torch.manual_seed(seed)
        x = torch.randn(37, 40, device=DEVICE, requires_grad=True)
        Ws = [torch.randn(24 + i, 40, device=DEVICE) for i in range(2)]
        As = [torch.randn(3 + i, 40, device=DEVICE, requires_grad=True) for i in range(2)]
        Bs = [torch.randn(24 + i, 3 + i, device=DEVICE, requires_grad=True) for i in range(2)]
        ys = lk.lora_linear_group(x, Ws, As, Bs, dropout_p=0.1, impl="triton")
        torch.autograd.backward(ys, [torch.randn_like(y) for y in ys])
        return [*(y.detach() for y in ys), *(leaf.grad for leaf in (x, *As, *Bs))]

    with table.forced_configs(FORCED):
        assert_same(call, runs, 2)


def test_the_librarys_product_is_a_step(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "FEW_TOKENS", 0)

    def call(seed: int) -> list[Any]:
        torch.manual_seed(seed)
        x, W = torch.randn(37, 40, device=DEVICE), torch.randn(24, 40, device=DEVICE)
        A, B = torch.randn(4, 40, device=DEVICE), torch.randn(24, 4, device=DEVICE)
        return [lk.lora_linear(x, W, A, B, impl="triton")]

    with table.forced_configs(FORCED | {"linear_expand": KernelConfig(cublas=True)}):
        assert_same(call, runs, 1)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("inference", [True, False])
def test_a_packed_layer_is_the_same(kind: str, inference: bool, runs: list[int]) -> None:
    """The codes of 4 bits outlive every call; in inference mode casts come as operators that may be views."""

    def call(seed: int) -> list[Any]:
        torch.manual_seed(seed)
        x, W = torch.randn(5, 64, device=DEVICE), pack(torch.randn(32, 64), kind, 32)
        W = W._replace(**{name: t.to(DEVICE) for name, t in W._asdict().items() if isinstance(t, torch.Tensor)})
        A, B = torch.randn(4, 64, device=DEVICE).bfloat16(), torch.randn(32, 4, device=DEVICE)
        with torch.inference_mode(inference):
            y, x = lk.lora_linear(x, W, A, B, impl="triton"), x[:0]
            return [y, lk.lora_linear(x, W, A, B, impl="triton")]

    assert_same(call, runs, 2)


def test_arguments_in_one_storage_are_told_apart(runs: list[int]) -> None:
    """As FSDP keeps its parameters. Which gradient is which is not, where two are one tensor: that is never taped."""
    flat = [torch.randn(24 * 40 + 4 * 40 + 24 * 4, device=DEVICE) for _ in range(3)]

    def call(seed: int) -> list[Any]:
        W, A, B = flat[seed].split([24 * 40, 4 * 40, 24 * 4])
        x = torch.ones(5, 40, device=DEVICE)
        return [lk.lora_linear(x, W.view(24, 40), A.view(4, 40), B.view(24, 4), impl="triton")]

    assert_same(call, runs, 1)
    runs.clear()

    def backward(seed: int) -> list[Any]:
        torch.manual_seed(seed)
        x = torch.randn(37, 40, device=DEVICE, requires_grad=True)
        factors = [[torch.randn(*size, device=DEVICE) for _ in range(2)] for size in ((24, 40), (4, 40), (24, 4))]
        ys = lk.lora_linear_group(x, *factors, impl="triton")
        dy = torch.randn_like(ys[0])
        torch.autograd.backward(ys, [dy, dy if seed < 2 else 2 * dy])
        return [x.grad]

    assert_same(backward, runs, 1)  # the forward's


def test_experts_are_the_same(runs: list[int]) -> None:
    def call(seed: int) -> list[Any]:
        torch.manual_seed(seed)
        x = torch.randn(9, 16, device=DEVICE, requires_grad=True)
        A = torch.randn(3, 2, 16, device=DEVICE, requires_grad=True)
        B = torch.randn(3, 24, 2, device=DEVICE, requires_grad=True)
        route = lk.expert_route(torch.randint(3, (9, 1), device=DEVICE), 3, impl="triton")
        y = lk.expert_lora_linear(x, torch.randn(3, 24, 16, device=DEVICE), A, B, route, impl="triton")
        y.backward(torch.randn_like(y))
        return [y.detach(), x.grad, A.grad, B.grad]

    assert_same(call, runs, 3)  # the route is one


def test_a_tape_holds_no_tensor(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does what it gives hold what it was given. With descriptors too, which have a tensor in them."""
    monkeypatch.setattr(table, "FEW_TOKENS", 0)
    forced = FORCED | {"linear_expand": KernelConfig(16, 16, 16, 16, tma=True)}
    with assume("sm_90"), table.forced_configs(forced):
        for _ in range(4):
            tensors = [torch.ones(size, device=DEVICE) for size in ((37, 64), (32, 64), (16, 64), (32, 16))]
            y = lk.lora_linear(*tensors, impl="triton")
            memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in (*tensors, y)]
            del tensors, y
            gc.collect()
            assert all(each.expired() for each in memory)
    assert len(runs) == 2


def test_what_decides_makes_another_tape(runs: list[int]) -> None:
    W, A, B = (torch.randn(*size, device=DEVICE) for size in ((24, 40), (4, 40), (24, 4)))
    wide = torch.randn(64, 44, device=DEVICE)

    def call(x: torch.Tensor, **options: Any) -> int:
        for _ in range(2):
            lk.lora_linear(x, W, A, B, impl="triton", **options)
        before = len(runs)
        lk.lora_linear(x, W, A, B, impl="triton", **options)
        return len(runs) - before

    x = wide[:32, :40].contiguous()
    assert call(x) == 1
    lk.lora_linear(x, W, A, B, impl="triton")
    assert len(runs) == 2
    others = (wide[:31, :40].contiguous(), wide[:32, :40], wide[:32, 1:41], x.bfloat16().float().mT.contiguous().mT)
    for other in others:
        runs.clear()
        lk.lora_linear(other, W, A, B, impl="triton")
        assert runs == [] and call(other) == 1
    runs.clear()
    table.clear()
    lk.lora_linear(x, W, A, B, impl="triton")
    with table.forced_configs(FORCED):
        lk.lora_linear(x, W, A, B, impl="triton")
    lk.lora_linear(x, W, A, B, impl="triton")
    assert runs == []


def test_what_cannot_be_repeated_is_not_taped(runs: list[int]) -> None:
    """A number that the host reads, and a shape that follows from numbers."""

    @tape.taped
    def reads(x: torch.Tensor) -> torch.Tensor:
        return x.new_full((2,), float(x.sum()))

    @tape.taped
    def counts(x: torch.Tensor) -> torch.Tensor:
        return x.nonzero()

    for function in (reads, counts):
        for number in range(4):
            x = torch.tensor([number, 1.0], device=DEVICE)
            assert torch.equal(function(x), function.__wrapped__(x))
    assert runs == []
