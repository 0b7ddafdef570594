"""What only a GPU can show: the same bits on twenty runs at real sizes, CUDA graphs of a training and a decode step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import lorakernels as lk
from lorakernels.kernels.launch import as_if_captured
from lorakernels.testing.cases import LARGE_CASES, LinearInputs, make_inputs
from lorakernels.testing.device import COMPILED, DEVICE, ON_GPU
from lorakernels.testing.multi_cases import LARGE_MULTI_CASES, MultiCase, MultiInputs, make_multi_inputs

pytestmark = pytest.mark.skipif(not COMPILED, reason="for compiled kernels: the interpreter would take hours")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="nothing runs here: it needs a GPU")
RUNS = 20 if ON_GPU else 1
DTYPE = torch.bfloat16
LAYERS = ("headline", "headline_dropout", "edges", "edges_dora_dropout", "few_tokens")
Results = list[torch.Tensor]


def layer(name: str) -> LinearInputs:
    inputs = make_inputs(next(case for case in LARGE_CASES if case.name == name), DTYPE, DEVICE)
    for tensor in (inputs.x, inputs.lora_A, inputs.lora_B):
        tensor.requires_grad_()
    return inputs


def training_step(name: str, i: LinearInputs) -> Results:
    case = next(case for case in LARGE_CASES if case.name == name)
    y = lk.lora_linear(
        i.x,
        i.weight,
        i.lora_A,
        i.lora_B,
        bias=i.bias,
        row_scale=i.row_scale,
        scaling=case.scaling,
        dropout_p=case.dropout_p,
        impl="triton",
    )
    return [y.detach(), *torch.autograd.grad(y, (i.x, i.lora_A, i.lora_B), i.dy)]


def decode_step(i: MultiInputs) -> Results:
    with torch.no_grad():
        return list(lk.multi_lora_linear(i.x, i.weight, i.lora_A, i.lora_B, i.plan, bias=i.bias, impl="triton"))


@pytest.mark.parametrize("name", LAYERS)
def test_on_gpu_bitwise_the_same_on_every_run(name: str) -> None:
    """Several products in a kernel have read what they must not, now and then, on sm_90: a race shows in some runs."""
    inputs = layer(name)
    first: Results = []
    for _ in range(RUNS):
        torch.manual_seed(7)
        results = training_step(name, inputs)
        first = first or [result.clone() for result in results]
        if ON_GPU:
            assert all(map(torch.equal, results, first))


@pytest.mark.parametrize("case", [case for case in LARGE_MULTI_CASES if case.name.startswith("decode")], ids=str)
def test_on_gpu_decode_bitwise_the_same_on_every_run(case: MultiCase) -> None:
    inputs = make_multi_inputs(case, DTYPE, DEVICE)
    first: Results = []
    for _ in range(RUNS):
        results = decode_step(inputs)
        first = first or results
        if ON_GPU:
            assert all(map(torch.equal, results, first))


def captured(step: Callable[..., Results], *arguments: object) -> tuple[torch.cuda.CUDAGraph, Results]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*arguments)
    return graph, results


@needs_gpu
@pytest.mark.parametrize("name", ["headline", "edges_dora_dropout", "few_tokens"])
def test_on_gpu_a_graph_of_a_training_step(name: str) -> None:
    inputs = layer(name)
    graph, results = captured(training_step, name, inputs)
    with torch.no_grad():
        inputs.x.copy_(torch.randn_like(inputs.x))  # a graph reads what is there when it is replayed
    graph.replay()
    replayed = [result.clone() for result in results]
    assert all(result.isfinite().all() for result in replayed)
    if "dropout" not in name:
        with as_if_captured():
            assert all(map(torch.equal, replayed, training_step(name, inputs)))
        return
    graph.replay()
    assert not torch.equal(results[0], replayed[0])  # each replay draws a mask of its own


@needs_gpu
def test_on_gpu_a_graph_of_a_decode_step() -> None:
    case = next(case for case in LARGE_MULTI_CASES if case.name == "decode_64")
    inputs = make_multi_inputs(case, DTYPE, DEVICE)
    graph, results = captured(decode_step, inputs)
    for slots in (inputs.token_slots.flip(0), torch.full_like(inputs.token_slots, -1)):
        inputs.token_slots = slots
        inputs.update()
        graph.replay()
        assert all(map(torch.equal, results, decode_step(inputs)))
