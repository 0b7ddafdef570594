"""Several LoRA linears of one x: against float64, among torch's own machinery, and what is launched."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lorakernels as lk
from lorakernels.configs import table
from lorakernels.configs.config import KernelConfig
from lorakernels.kernels import lora_linear as kernels
from lorakernels.kernels.launch import as_if_captured, record_launches
from lorakernels.member import Member, columns
from lorakernels.ops import linear as ops_linear
from lorakernels.testing.budget import assert_within_budget, error
from lorakernels.testing.cases import keep_of, leaves_of
from lorakernels.testing.device import COMPILED, NUMBERS
from lorakernels.testing.group_cases import (
    GROUP_CASES,
    LARGE_GROUP_CASES,
    GroupCase,
    GroupInputs,
    Results,
    collect,
    make_group_inputs,
    run_group_formula,
)
from lorakernels.testing.guards import canaries

SEED = 1234
IMPLS = ["torch", "triton"]
PATHS = ["torch", "torch-small", "triton-few", "triton-general", "triton-tma", "triton-cublas", "triton-few-forked"]
# What the interpreter takes long for runs in one form of the kernels, and in float32 alone.
IN_ALL_FORMS = ("plain", "five", "odd_sizes", "dropout", "transposed")
IN_ALL_DTYPES = ("plain", "dropout_half_odd", "adapter_dtypes_differ", "adapter_float32_dropout")
SMALLEST = KernelConfig(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, BLOCK_R=16, GROUP_M=2, SPLIT=3)


@pytest.fixture(autouse=True)
def _the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not torch's own operators, which small layers on a CPU are made of."""
    monkeypatch.setattr(ops_linear, "SMALL", 0)


@contextlib.contextmanager
def path(name: str, ranks: tuple[int, ...] = (1,)) -> Iterator[str]:
    """One way through the group: the implementation, the form of its kernels with the smallest blocks."""
    impl, _, form = name.partition("-")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(table, "FEW_TOKENS", 1 << 30 if "few" in form else -1)
        if "forked" in form:
            stack.enter_context(as_if_captured())
        patch.setattr(ops_linear, "SMALL", 1 << 62 if form == "small" else 0)
        if impl == "triton" and form != "shipped":
            whole = max(16, 1 << (max(ranks) - 1).bit_length())
            expand = dataclasses.replace(SMALLEST, tma=form == "tma", cublas=form == "cublas")
            few = dataclasses.replace(SMALLEST, BLOCK_R=whole, side_stream=True)
            forced = {"shrink": SMALLEST, "outer": SMALLEST, "linear_expand": expand, "few_tokens": few}
            stack.enter_context(table.forced_configs(forced))
        yield impl


def call(case: GroupCase, leaves: Results, impl: str, **arguments: Any) -> list[torch.Tensor]:
    n = len(case.Ns)
    weights, As, Bs, biases = (
        [leaves.get(f"{name}.{i}") for i in range(n)] for name in ("weight", "lora_A", "lora_B", "bias")
    )
    arguments = {"scalings": case.scalings[:n], "dropout_p": case.dropout_p, "impl": impl, **arguments}
    return lk.lora_linear_group(leaves["x"], weights, As, Bs, biases=biases, **arguments)


def run(case: GroupCase, inputs: GroupInputs, impl: str) -> Results:
    """y's and gradients; no input may be written to."""
    leaves = leaves_of(inputs.tensors(), case.needs)
    versions = {name: leaf._version for name, leaf in leaves.items()}
    torch.manual_seed(SEED)
    ys = call(case, leaves, impl)
    results = collect(case, leaves, ys, [member.dy for member in inputs.members])
    assert {name: leaf._version for name, leaf in leaves.items()} == versions
    return results


def _table() -> Iterator[tuple[GroupCase, str, torch.dtype]]:
    for case, way, dtype in itertools.product(GROUP_CASES, PATHS, (torch.float32, torch.float16, torch.bfloat16)):
        interpreted = way.startswith("triton") and not COMPILED
        if interpreted and (
            (way != "triton-general" and case.name not in IN_ALL_FORMS)
            or (dtype is not torch.float32 and (case.name not in IN_ALL_DTYPES or way != "triton-general"))
            or case.name == "several_blocks"
        ):
            continue
        if way == "torch-small" and case.dropout_p:
            continue
        yield case, way, dtype


@pytest.mark.parametrize(("case", "way", "dtype"), list(_table()), ids=lambda value: str(value).removeprefix("torch."))
def test_against_float64(case: GroupCase, way: str, dtype: torch.dtype, device: str) -> None:
    draws: list[tuple[Results, Results, Results]] = []
    # Of a handful of elements eager torch may round every one luckily: its error is then taken over many draws.
    for draw in range(1 if case.K * min(case.Ns) > 100 else 16):
        inputs = make_group_inputs(case, dtype, device, seed=draw)
        with path(way, case.ranks) as impl, canaries():
            ours = run(case, inputs, impl)
            keep = keep_of(inputs.x, case.dropout_p, SEED, impl)
        if not NUMBERS:
            return
        eager, exact = (run_group_formula(case, inputs, keep, to) for to in (dtype, torch.float64))
        draws.append((ours, eager, exact))
        own = {f"y.{i}": dtype for i in range(len(case.Ns))} | {n: t.dtype for n, t in inputs.tensors().items()}
        assert all(result.dtype == own[name] for name, result in ours.items())
    assert all(ours.keys() == exact.keys() for ours, _, exact in draws)
    for name in draws[0][0]:
        actual, eager, exact = (torch.stack([results[name] for results in kind]) for kind in zip(*draws, strict=True))
        rounding = max(dtype, draws[0][0][name].dtype, key=lambda dtype: torch.finfo(dtype).eps)
        assert_within_budget(actual, eager, exact, rounding, name)


@pytest.mark.skipif(not COMPILED, reason="sizes for compiled kernels: the interpreter would take hours")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("case", LARGE_GROUP_CASES, ids=str)
def test_large(case: GroupCase, dtype: torch.dtype, device: str) -> None:
    test_against_float64(case, "triton-shipped", dtype, device)


def test_float64_is_exact_to_its_own_rounding() -> None:
    for case in GROUP_CASES:
        if not case.dropout_p and not any(case.adapter_dtypes):
            inputs = make_group_inputs(case, torch.float64)
            ours, exact = run(case, inputs, "torch"), run_group_formula(case, inputs, None, torch.float64)
            for name, result in ours.items():
                assert error(result, exact[name]) < 1e-14, (case.name, name)


@pytest.mark.parametrize("way", ["torch", "triton-general"])
def test_bitwise_the_same_on_every_run(way: str, device: str) -> None:
    case = next(case for case in GROUP_CASES if case.name == "dropout")
    inputs = make_group_inputs(case, torch.float16, device)
    with path(way) as impl:
        first, second = run(case, inputs, impl), run(case, inputs, impl)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("way", PATHS)
def test_scaling_zero_and_no_adapter_are_the_base_layer_to_the_bit(way: str, device: str) -> None:
    inputs = make_group_inputs(GROUP_CASES[0], torch.float32, device)
    x, (q, k, v) = inputs.x, inputs.members
    k.lora_A.fill_(float("inf"))
    with path(way) as impl:
        ys = lk.lora_linear_group(
            x, [q.weight, k.weight, v.weight], [q.lora_A, k.lora_A, None], [q.lora_B, k.lora_B, None],
            biases=[None, k.bias, v.bias], scalings=[1.0, 0, 1.0], impl=impl,
        )  # fmt: skip
    for y, member in zip(ys[1:], (k, v), strict=True):
        assert torch.equal(y, torch.nn.functional.linear(x, member.weight, member.bias))


def test_launches() -> None:
    """x is read once for S and once for dA, and dx is one launch, up to three members."""
    case = GroupCase("aligned", tokens=(512,), K=64, Ns=(64, 32, 32))
    inputs = make_group_inputs(case, torch.float16, "meta")
    members, dys = [Member(m.weight, m.lora_A, m.lora_B) for m in inputs.members], [m.dy for m in inputs.members]
    for way, kernel in (("triton-tma", "linear_expand_tma_kernel"), ("triton-general", "linear_expand_kernel")):
        with path(way), record_launches() as forward:
            _, s, _ = kernels.forward(inputs.x, members, None, 0)
        with path(way), record_launches() as backward:
            kernels.backward(
                dys, inputs.x, members, columns(s, members), None, 0,
                need_dx=True, need_dA=True, need_dB=[True] * 3, need_dbias=[False] * 3,
            )  # fmt: skip
        names = [launch.kernel.__name__ for launch in forward]
        assert [names.count("shrink_kernel"), names.count(kernel)] == [1, 3]
        (dx,) = [launch for launch in backward if launch.kernel.__name__ == kernel]
        assert dx.constexprs["NUM_PAIRS"] == 3
        of_x = [launch for launch in backward if "z" in launch.args and launch.args["z"].ptr is inputs.x]
        assert len(of_x) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_As": []}, "as many of each"),
        ({"weights": []}, "weights is an empty list"),
        ({"scalings": [1.0]}, "scalings 1"),
        ({"biases": [None]}, "biases 1"),
        ({"lora_Bs": [torch.ones(4, 2), torch.ones(2, 4)]}, "member 1: lora_B is .* transposed"),
        ({"lora_As": [torch.ones(2, 8), None]}, "member 1: lora_A must be a tensor"),
        ({"weights": [torch.ones(4, 8), torch.ones(4, 8).double()]}, "member 1: weight is torch.float64"),
        ({"scalings": [1.0, float("nan")]}, "member 1: scaling is nan"),
        ({"dropout_p": 1.0}, "dropout_p is 1"),
        ({"x": None}, "x must be a tensor"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(3, 8),
        "weights": [torch.ones(4, 8), torch.ones(4, 8)],
        "lora_As": [torch.ones(2, 8), torch.ones(2, 8)],
        "lora_Bs": [torch.ones(4, 2), torch.ones(4, 2)],
        **change,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        lk.lora_linear_group(**arguments)


# ------------------------------------------------------------------------------------------ torch's own machinery

SMALL_CASE = GroupCase("torch", tokens=(4, 5), K=24, Ns=(16, 8), ranks=(3, 2))


def gradients(inputs: GroupInputs, leaves: Results, ys: list[torch.Tensor]) -> list[torch.Tensor]:
    dys = [member.dy.to(y.dtype) for member, y in zip(inputs.members, ys, strict=True)]
    return list(torch.autograd.grad(ys, [leaf for leaf in leaves.values() if leaf.requires_grad], dys))


def prepared(
    dtype: torch.dtype = torch.float32, case: GroupCase = SMALL_CASE, device: str = "cpu"
) -> tuple[GroupInputs, Results]:
    inputs = make_group_inputs(case, dtype, device)
    return inputs, leaves_of({name: t.clone() for name, t in inputs.tensors().items()}, case.needs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("order", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradcheck(order: Callable[..., bool], dropout_p: float) -> None:
    case = GroupCase("check", tokens=(3,), K=4, Ns=(3, 2), ranks=(2, 1))
    _, leaves = prepared(torch.float64, case)
    for leaf in leaves.values():
        leaf.requires_grad_()

    def under_one_seed(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(3)
        return tuple(call(case, dict(zip(leaves, tensors, strict=True)), "torch", dropout_p=dropout_p))

    assert order(under_one_seed, tuple(leaves.values()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(impl: str, dropout_p: float, device: str) -> None:
    inputs = make_group_inputs(SMALL_CASE, torch.float32, device)
    weights, As, Bs, biases, dys = (
        [getattr(member, name) for member in inputs.members] for name in ("weight", "lora_A", "lora_B", "bias", "dy")
    )
    seed = torch.tensor([5], device=device) if dropout_p else None
    numbers = ([0.5, 2.0], dropout_p)
    scales = [None, torch.rand(8, device=device)]
    arguments = (inputs.x, weights, [], [], As, Bs, [biases[0], None], scales, seed, *numbers, impl)
    torch.library.opcheck(torch.ops.lorakernels.lora_linear_group.default, arguments)
    _, s, mask = torch.ops.lorakernels.lora_linear_group(*arguments)
    parts = [part.contiguous() for part in s.split([3, 2], dim=1)]
    for needs in ([True] * 8 + [False, False, True], [False] * 5 + [True] + [False] * 5):
        torch.library.opcheck(
            torch.ops.lorakernels.lora_linear_group_backward.default,
            (dys, inputs.x, weights, [], [], As, Bs, scales, parts, mask, *numbers, needs, impl),
        )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_kept_for_the_backward(impl: str, dropout_p: float, device: str) -> None:
    _, leaves = prepared(device=device)
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ys = call(SMALL_CASE, leaves, impl, dropout_p=dropout_p)
    assert ys[0].grad_fn is ys[1].grad_fn
    own = {leaf.untyped_storage().data_ptr() for name, leaf in leaves.items() if name != "x"}
    kept = sum(size for pointer, size in storages.items() if pointer not in own)
    mask = 0 if not dropout_p else 20 * 3 if impl == "triton" else 20 * 24
    assert kept == 4 * 20 * (24 + 3 + 2) + mask


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("impl", IMPLS)
def test_compile(impl: str, dropout_p: float, device: str) -> None:
    torch._dynamo.reset()
    inputs, leaves = prepared(device=device)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    ys = compiled(SMALL_CASE, leaves, impl, dropout_p=dropout_p)
    grads = gradients(inputs, leaves, ys)
    torch.manual_seed(2)
    expected = call(SMALL_CASE, leaves, impl, dropout_p=dropout_p)
    assert all(torch.equal(a, b) for a, b in zip(ys, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(grads, gradients(inputs, leaves, expected), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl: str, device: str) -> None:
    torch._dynamo.reset()
    inputs, leaves = prepared(device=device)
    with torch.autocast(device, torch.bfloat16):
        eager = call(SMALL_CASE, leaves, impl)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(SMALL_CASE, leaves, impl)
    assert all(y.dtype is torch.bfloat16 for y in eager)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    assert all(grad.dtype is torch.float32 for grad in gradients(inputs, leaves, eager))


@pytest.mark.parametrize("argument", ["x", "lora_A.0", "lora_B.1", "bias.0"])
def test_func_grad_and_vmap(argument: str) -> None:
    _, leaves = prepared(torch.float64)
    fixed = {name: leaf.detach() for name, leaf in leaves.items()}

    def loss(value: torch.Tensor) -> torch.Tensor:
        first, second = call(SMALL_CASE, {**fixed, argument: value}, "torch")
        return first.square().sum() + second.sum()

    (expected,) = torch.autograd.grad(loss(leaves[argument]), leaves[argument])
    assert torch.allclose(torch.func.grad(loss)(fixed[argument]), expected)
    batch = torch.stack([fixed[argument], 2 * fixed[argument]])
    assert torch.allclose(torch.func.vmap(torch.func.grad(loss))(batch)[0], expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_mask(reentrant: bool) -> None:
    inputs, leaves = prepared()
    torch.manual_seed(11)
    plain = gradients(inputs, leaves, call(SMALL_CASE, leaves, "torch", dropout_p=0.4))
    torch.manual_seed(11)
    ys = checkpoint(
        lambda x: tuple(call(SMALL_CASE, {**leaves, "x": x}, "torch", dropout_p=0.4)),
        leaves["x"],
        use_reentrant=reentrant,
    )
    torch.rand(1000)
    torch.autograd.backward(ys, [member.dy for member in inputs.members])
    again = [leaf.grad for leaf in leaves.values() if leaf.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", IMPLS)
def test_members_that_need_other_gradients(impl: str, device: str) -> None:
    inputs, leaves = prepared(device=device)
    dys = [member.dy for member in inputs.members]
    wanted = [leaves["lora_A.1"], leaves["lora_B.0"]]
    expected = torch.autograd.grad(call(SMALL_CASE, leaves, impl), wanted, dys)
    for leaf in leaves.values():
        leaf.requires_grad_(any(leaf is one for one in wanted))
    torch.testing.assert_close(torch.autograd.grad(call(SMALL_CASE, leaves, impl), wanted, dys), expected)


def test_outputs_may_be_edited_in_place_and_backward_runs_twice() -> None:
    inputs, leaves = prepared(torch.float64)
    for wanted in ([0], [1], [0, 1]):
        ys = call(SMALL_CASE, leaves, "torch")
        chosen = [ys[i].mul_(2) for i in wanted]
        dys = [inputs.members[i].dy for i in wanted]
        first = torch.autograd.grad(chosen, leaves["x"], dys, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(chosen, leaves["x"], dys)[0], first)
        exact = sum(
            2 * dy @ (leaves[f"weight.{i}"] + SMALL_CASE.scalings[i] * leaves[f"lora_B.{i}"] @ leaves[f"lora_A.{i}"])
            for i, dy in zip(wanted, dys, strict=True)
        )
        assert torch.allclose(first, exact)


def test_forward_mode_raises() -> None:
    _, leaves = prepared(torch.float64)
    fixed = {name: leaf.detach() for name, leaf in leaves.items()}
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(
            lambda x: tuple(call(SMALL_CASE, {**fixed, "x": x}, "torch")), (fixed["x"],), (torch.ones_like(fixed["x"]),)
        )


def test_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    _, leaves = prepared()
    M, K, (N, N2), (r, r2) = 20, 24, SMALL_CASE.Ns, SMALL_CASE.ranks
    with FlopCounterMode(display=False) as counter:
        ys = call(SMALL_CASE, leaves, "torch")
    assert counter.get_total_flops() == 2 * M * (N * K + r * (N + K)) + 2 * M * (N2 * K + r2 * (N2 + K))
    with FlopCounterMode(display=False) as counter:
        (ys[0].sum() + ys[1].sum()).backward()
    assert counter.get_total_flops() == 2 * M * (N * K + 2 * r * (N + K)) + 2 * M * (N2 * K + 2 * r2 * (N2 + K))


def test_meta_tensors_have_the_right_shapes() -> None:
    _, leaves = prepared()
    meta = {name: leaf.detach().to("meta").requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()}
    ys = call(SMALL_CASE, meta, "torch")
    sum(y.sum() for y in ys).backward()  # type: ignore[union-attr]
    assert [y.shape for y in ys] == [(4, 5, 16), (4, 5, 8)]
    assert all(leaf.grad is None or leaf.grad.shape == leaf.shape for leaf in meta.values())
