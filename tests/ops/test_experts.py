"""LoRA on a stack of experts: numbers, gradients, bad input, and torch's own machinery around it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lorakernels as lk
from lorakernels import formula
from lorakernels.configs.config import KernelConfig
from lorakernels.configs.table import forced_configs
from lorakernels.eager import experts as eager_experts
from lorakernels.kernels.launch import record_launches
from lorakernels.nn.quantized import pack_stack
from lorakernels.plan_layout import num_tiles, plan_layout
from lorakernels.testing.budget import assert_within_budget, error
from lorakernels.testing.guards import watch_allocations

IMPLS = ["torch", "triton"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
T, TOP_K, E, N, K, R = 9, 3, 5, 16, 24, 4


class Inputs(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    bias: torch.Tensor | None
    index: torch.Tensor

    def floats(self) -> list[torch.Tensor]:
        return [t for t in self[:5] if t is not None]

    def to(self, dtype: torch.dtype) -> Inputs:
        made = [None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in self[:5]]
        return Inputs(*made, self.index)  # type: ignore[arg-type]


def make(
    dtype: torch.dtype = torch.float64,
    *,
    tokens: int = T,
    layout: str = "plain",
    bias: bool = True,
    sorted_x: bool = False,
    r: int = R,
    sizes: tuple[int, int] = (N, K),
    device: str = "cpu",
) -> Inputs:
    """Expert 1 gets nobody, token 0 goes to expert 2 twice. Leaves: all but a weight; `peft` is PEFT's layout."""
    N, K = sizes
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(device=device, dtype=dtype)

    index = torch.randint(2, E, (tokens, TOP_K), generator=draw)
    index[index == 4] = 0
    index[:1, :2] = 2
    A, B = normal(E, r, K) / K**0.5, normal(E, N, r) / r**0.5
    weight = normal(E, N, K) / K**0.5
    if layout == "peft":  # transposed stacks too
        weight = weight.mT.contiguous().mT
        B = B.permute(1, 2, 0).contiguous().view(N, r * E).requires_grad_().view(N, r, E).permute(2, 0, 1)
        B.retain_grad()
    made = [normal(tokens * (TOP_K if sorted_x else 1), K), A, *([normal(E, N)] if bias else [])]
    x, A, *rest = (t.requires_grad_() for t in made)
    B = B if B.requires_grad else B.requires_grad_()
    return Inputs(x, weight, A, B, rest[0] if rest else None, index.to(device))


def call(inputs: Inputs, sorted_x: bool = False, **options: Any) -> torch.Tensor:
    x, weight, A, B, bias, index = inputs
    route = lk.expert_route(index, E, impl=options.get("impl", "auto"))
    return lk.expert_lora_linear(x, weight, A, B, route, bias=bias, scaling=0.7, sorted_x=sorted_x, **options)


def oracle(inputs: Inputs, sorted_x: bool = False) -> torch.Tensor:
    x, weight, A, B, bias, index = inputs
    experts, order = index.reshape(-1).sort(stable=True)
    return formula.expert_lora_linear(x if sorted_x else x[order // TOP_K], weight, A, B, experts, bias, 0.7)


def gradients(y: torch.Tensor, inputs: Inputs) -> list[torch.Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y)
    return list(torch.autograd.grad(y, [t for t in inputs.floats() if t.requires_grad], dy))


def both_ways(inputs: Inputs, sorted_x: bool, **options: Any) -> list[torch.Tensor]:
    y = call(inputs, sorted_x, **options)
    return [y, *gradients(y, inputs)]


SHAPES: list[dict[str, Any]] = [
    {"layout": "peft"},
    {"bias": False, "r": 1},
    {"sorted_x": True, "r": 17, "layout": "peft"},
    {"sizes": (7, 13), "r": 3},
    {"tokens": 40, "layout": "peft"},
]
# The interpreter is slow: of 16 bits it gets the one shape that has most.
CASES = [("torch", dtype, shape) for dtype in DTYPES for shape in SHAPES]
CASES += [("torch", torch.bfloat16, {"tokens": 80, "layout": layout, "r": 8}) for layout in ("plain", "peft")]
CASES += [("triton", torch.float32, shape) for shape in SHAPES]
CASES += [("triton", dtype, SHAPES[2]) for dtype in (torch.bfloat16, torch.float16)]


@pytest.fixture
def grouped_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Told of 80 tokens, has torch's grouped products made of rank r too."""
    return lambda tokens: monkeypatch.setattr(eager_experts, "_GROUPED_ROWS", 1 if tokens == 80 else 1 << 60)


@pytest.mark.parametrize(("impl", "dtype", "shape"), CASES, ids=str)
def test_numbers(
    impl: str, dtype: torch.dtype, shape: dict[str, Any], grouped_of: Callable[[int], None], device: str
) -> None:
    """In float64 the formula; else within twice the error of the formula in that dtype. Bitwise the same twice."""
    grouped_of(shape.get("tokens", 0))
    sorted_x = shape.get("sorted_x", False)
    inputs = make(dtype, device=device, **shape)
    found = both_ways(inputs, sorted_x, impl=impl)
    assert all(torch.equal(*pair) for pair in zip(found, both_ways(inputs, sorted_x, impl=impl), strict=True))
    exact_inputs = inputs.to(torch.float64)
    y = oracle(exact_inputs, sorted_x)
    exact = [y, *gradients(y, exact_inputs)]
    if dtype is torch.float64:
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
        return
    y = oracle(inputs, sorted_x)
    for name, *each in zip(["y", "x", "A", "B", "bias"], found, [y, *gradients(y, inputs)], exact, strict=False):
        assert_within_budget(*each, dtype, name)


@pytest.mark.parametrize("layout", ["plain", "peft"])
def test_by_descriptors(layout: str, device: str) -> None:
    """Tiles of x and of both layouts of W by TMA, and rank blocks more than one."""
    inputs = make(torch.float32, tokens=40, layout=layout, r=17, sizes=(24, 32), device=device)
    with (
        forced_configs({"linear_expand": KernelConfig(BLOCK_N=16, BLOCK_K=16, tma=True)}),
        record_launches() as launches,
    ):
        call(inputs, impl="triton")
    assert launches[-1].kernel.__name__ == "expert_expand_tma_kernel"
    with forced_configs({"linear_expand": KernelConfig(BLOCK_N=16, BLOCK_K=16, tma=True)}):
        found = both_ways(inputs, False, impl="triton")
    torch.testing.assert_close(found, both_ways(inputs, False, impl="torch"), rtol=1e-4, atol=1e-4)


def test_kernels_read_nothing_on_the_host(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(torch.float32, bias=False, device=device)
    monkeypatch.setattr(eager_experts, "_Spans", None)
    both_ways(inputs, False, impl="triton")


def test_routes_of_both_ways(device: str) -> None:
    """The kernels' route is torch's, and a route made for plain torch will do; an unknown expert's rows are zero."""
    inputs = make(torch.float32, tokens=70, device=device)
    by_torch, route = (lk.expert_route(inputs.index, E, impl=impl) for impl in ("torch", "triton"))
    assert by_torch.plan is None and route.plan is not None
    assert all(torch.equal(*pair) for pair in zip(by_torch[:3], route[:3], strict=True))
    rows = inputs.index.reshape(-1).sort().values
    layout = plan_layout(E, len(rows))
    for height, at in zip((16, 64, 128), (*layout.tiles, layout.size), strict=True):
        tiles = route.plan[at : at + 3 * num_tiles(len(rows), E, height)].view(-1, 3).tolist()
        covered = [(expert, row) for expert, first, end in tiles for row in range(first, end)]
        assert covered == list(zip(rows.tolist(), range(len(rows)), strict=True))
    x, weight, A, B, bias, index = inputs
    given = (x, weight, A, B)
    expected = lk.expert_lora_linear(*given, route, bias=bias, impl="triton")
    assert torch.equal(lk.expert_lora_linear(*given, by_torch, bias=bias, impl="triton"), expected)
    strange = index.clone()
    strange[3, 0], strange[5, 1] = E, -1
    route = lk.expert_route(strange, E, impl="triton")
    found = lk.expert_lora_linear(*given, route, bias=bias, impl="triton")
    slots, ranks = (route.plan[at : at + len(rows)] for at in (layout.slots, layout.token_ranks))
    assert slots[-2:].tolist() == [E, E] and torch.equal(ranks > 0, slots < E)
    by_pair = found[route.inverse].view(70, TOP_K, N)
    assert not by_pair[3, 0].any() and not by_pair[5, 1].any()
    torch.testing.assert_close(by_pair[6:], expected[by_torch.inverse].view(70, TOP_K, N)[6:])


@pytest.mark.parametrize(
    ("impl", "tokens", "dtype"),
    [("torch", 1, torch.float32), *(("torch", T, torch.bfloat16) for T in (40, 80)), ("triton", 40, torch.float32)],
    ids=str,
)
def test_dropout(impl: str, tokens: int, dtype: torch.dtype, grouped_of: Callable[[int], None], device: str) -> None:
    """One mask forward and backward: with an A and B that show it, y and every gradient are those of x ∘ keep."""
    grouped_of(tokens)
    inputs = make(dtype, tokens=tokens, sorted_x=True, bias=False, r=K, sizes=(K, K), device=device)
    eye = torch.eye(K, dtype=dtype, device=device).expand(E, K, K)
    inputs = inputs._replace(
        weight=torch.zeros_like(inputs.weight), lora_A=eye.clone().requires_grad_(), lora_B=eye.clone().requires_grad_()
    )
    torch.manual_seed(1)
    y, dx, dA, dB = both_ways(inputs, True, dropout_p=0.4, impl=impl)
    keep = y.detach().double() / (0.7 * inputs.x.detach().double())
    assert set((keep * 0.6).round(decimals=1).unique().tolist()) == {0.0, 1.0}
    assert 0.4 < float((keep > 0).double().mean()) < 0.8
    exact = inputs.to(torch.float64)
    keep = (keep > 0) / (1 - round(0.4 * 65536) / 65536)
    experts = inputs.index.reshape(-1).sort().values
    expected = gradients(
        formula.expert_lora_linear(exact.x, exact.weight, exact.lora_A, exact.lora_B, experts, None, 0.7, keep), exact
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for found, wanted in zip((dx, dA, dB), expected, strict=True):
        assert error(found, wanted) < tolerance
    assert torch.equal(call(inputs, True, dropout_p=0.4, training=False, impl=impl), call(inputs, True, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(impl: str, device: str) -> None:
    y, dx, *rest = both_ways(make(torch.float32, tokens=0, device=device), False, impl=impl)
    assert y.shape == (0, N) and dx.shape == (0, K) and not any(t.any() for t in rest)


@pytest.mark.parametrize("needs", [(0,), (2,), (3,), (4,), (0, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_only_what_is_asked_for(impl: str, needs: tuple[int, ...], device: str) -> None:
    """And the weights' own gradients, for experts that are trained themselves."""
    dtype = torch.float64 if impl == "torch" else torch.float32
    inputs = make(dtype, device=device)
    for i, tensor in enumerate(inputs.floats()):
        tensor.requires_grad_(i in needs)
    y = oracle(inputs)
    tolerance = 1e-12 if impl == "torch" else 1e-5
    torch.testing.assert_close(
        gradients(call(inputs, impl=impl), inputs), gradients(y, inputs), rtol=tolerance, atol=tolerance
    )


def test_combine() -> None:
    inputs = make()
    route = lk.expert_route(inputs.index, E)
    weights = torch.rand(T, TOP_K, dtype=torch.float64, requires_grad=True)
    y = torch.randn(T * TOP_K, N, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, w: lk.combine_experts(y, w, route), (y, weights))
    of_pairs = torch.empty_like(y)
    of_pairs[route.order] = y
    expected = torch.einsum("tkn,tk->tn", of_pairs.view(T, TOP_K, N), weights)
    torch.testing.assert_close(lk.combine_experts(y, weights, route), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl: str, device: str) -> None:
    inputs = make(torch.float32, layout="peft", device=device)
    x, weight, A, B, bias, index = (t.detach() for t in inputs)  # type: ignore[union-attr]
    route = lk.expert_route(index, E, impl=impl)[:4]
    # By the other implementation nothing but the results' shapes differs.
    tests = {"test_utils": "test_faketensor"} if impl == "triton" else {}
    torch.library.opcheck(torch.ops.lorakernels.expert_route.default, (index, E, impl), **tests)
    seed = torch.tensor([5], device=device)
    arguments = (x, weight, A, B, bias, *route, TOP_K, False, seed, 0.5, 0.3, impl, [], "")
    torch.library.opcheck(torch.ops.lorakernels.expert_lora_linear.default, arguments, **tests)
    y, s, mask = torch.ops.lorakernels.expert_lora_linear(*arguments)
    torch.library.opcheck(
        torch.ops.lorakernels.expert_lora_linear_backward.default,
        (y, x, weight, A, B, *route, TOP_K, False, s, mask, 0.5, 0.3, [True, False, True, True, True], impl, [], ""),
        **tests,
    )


def test_on_meta_tensors_and_counted() -> None:
    """No host value is read; 2 P (N K + r (N + K)) forward, and dx, G, dB and dA backward."""
    inputs = Inputs(*(None if t is None else t.detach().to("meta") for t in make(torch.float32)))  # type: ignore[arg-type]
    inputs = inputs._replace(lora_A=inputs.lora_A.requires_grad_(), lora_B=inputs.lora_B.requires_grad_())
    inputs = inputs._replace(x=inputs.x.requires_grad_())
    with FlopCounterMode(display=False) as counted:
        call(inputs).sum().backward()
    pairs = T * TOP_K
    assert counted.get_total_flops() == 2 * pairs * (2 * N * K + R * (N + K) + R * (2 * N + 2 * K))


def test_nothing_of_the_stacks_size_is_made() -> None:
    """Nor kept: between the passes x itself, S, and the order."""
    experts = 64
    weight = torch.randn(experts, 64, 48)
    A, B = torch.randn(experts, 2, 48).requires_grad_(), torch.randn(experts, 64, 2).requires_grad_()
    x, index = torch.randn(8, 48, requires_grad=True), torch.arange(16).view(8, 2)
    with watch_allocations() as made:
        y = lk.expert_lora_linear(x, weight, A, B, lk.expert_route(index, experts))
        y.square().sum().backward()
    assert 0 < max(made) < weight.nbytes // 4


PACKED = [("nf4", {"block": 32}), ("nf4", {"block": 32, "double_quant": True}), ("int4", {"block": 32}), ("int8", {})]


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(("kind", "options"), PACKED, ids=str)
def test_packed_stacks(kind: str, options: dict[str, Any], flipped: bool) -> None:
    """y and every gradient are those of the unpacked stack; of its size, and of an expert that has no rows, nothing."""
    sizes = (128, 64) if not flipped else (64, 128)
    inputs = make(torch.float32, sizes=sizes)
    packed = pack_stack(inputs.weight.mT.contiguous() if flipped else inputs.weight, kind, **options)
    packed = packed.mT if flipped else packed
    assert packed.shape == inputs.weight.shape and packed.nbytes < inputs.weight.nbytes / 3
    dense = packed.weight.dense(torch.float32).view(E, *packed.weight.shape[1:], -1).view(E, -1, packed.weight.shape[1])
    dense = dense.mT if flipped else dense
    expected = both_ways(inputs._replace(weight=dense), False)
    with watch_allocations() as made:
        found = both_ways(inputs._replace(weight=packed), False)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert 0 < max(made) < dense.nbytes / 2
    x, _, A, B, bias, index = inputs
    data, parts = packed.weight.data, list(packed.weight.parts)
    route = lk.expert_route(index, E)[:4]
    arguments = (x.detach(), data, A.detach(), B.detach(), bias.detach(), *route, TOP_K, False, None, 0.5, 0.0, "torch")
    torch.library.opcheck(torch.ops.lorakernels.expert_lora_linear.default, (*arguments, parts, packed.text))


@pytest.mark.parametrize(("kind", "flipped", "layout"), [("nf4", False, "peft"), ("int4", True, "plain")])
def test_packed_stacks_by_the_kernel(kind: str, flipped: bool, layout: str, device: str) -> None:
    """Rows and columns of an expert that are no multiples of a tile: nothing of the next expert's comes in."""
    sizes = (24, 64) if not flipped else (64, 24)
    inputs = make(torch.float32, sizes=sizes, layout=layout, r=3, device=device)
    packed = pack_stack(inputs.weight.mT.contiguous() if flipped else inputs.weight.contiguous(), kind, 32)
    inputs = inputs._replace(weight=packed.mT if flipped else packed)  # type: ignore[arg-type]
    with record_launches() as launches:
        call(inputs, impl="triton")
    assert launches[-1].kernel.__name__ == "expert_expand_packed_kernel"
    found = both_ways(inputs, False, impl="triton")
    torch.testing.assert_close(found, both_ways(inputs, False, impl="torch"), rtol=1e-4, atol=1e-4)


def test_stacks_that_cannot_be_packed() -> None:
    odd = pack_stack(torch.randn(2, 64, 24), "nf4")  # blocks that cross rows
    route = lk.expert_route(torch.zeros(1, 1, dtype=torch.int64), 2)
    A, B = torch.randn(2, 1, 24), torch.randn(2, 64, 1)
    with pytest.raises(lk.BackendError, match="no kernel for a stack that is packed so"):
        lk.expert_lora_linear(torch.randn(1, 24), odd, A, B, route, impl="triton")
    with pytest.raises(ValueError, match=r"rows 0 to 3 of nf4 .* are not whole blocks"):
        pack_stack(torch.randn(2, 3, 24), "nf4")


def test_recomputed_by_checkpointing() -> None:
    inputs = make()
    plain = both_ways(inputs, False)
    y = checkpoint(lambda *_: call(inputs), *inputs.floats(), use_reentrant=False)
    assert all(torch.equal(*pair) for pair in zip(plain, [y, *gradients(y, inputs)], strict=True))


def test_autocast_casts_x_and_no_stack() -> None:
    inputs = make(torch.bfloat16)._replace(x=make(torch.float32).x)
    with torch.autocast("cpu", torch.float16), watch_allocations() as made:
        y = call(inputs)
    assert y.dtype is torch.bfloat16 and 0 < max(made) < inputs.weight.nbytes


def test_no_second_derivative() -> None:
    inputs = make()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(call(inputs).square().sum(), inputs.x, create_graph=True)


def test_batched_gradients() -> None:
    inputs = make()
    y, dys = call(inputs), torch.randn(2, T * TOP_K, N, dtype=torch.float64)
    wanted = inputs.floats()[2:]
    found = torch.autograd.grad(y, wanted, dys, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(y, wanted, dy, retain_graph=True) for dy in dys]
    torch.testing.assert_close(list(found), [torch.stack(each) for each in zip(*expected, strict=True)])


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.ones(T, 3)}, ValueError, "weight is [5, 16, 24]; expected [E, N, 3]"),
    ({"x": torch.ones(T + 1, K)}, ValueError, "there are 10 rows and 5 experts; expected 9 rows and 5 experts"),
    ({"x": torch.ones(T, K, dtype=torch.int64)}, TypeError, "x is [9, 24] torch.int64"),
    ({"weight": torch.ones(E, K, N)}, ValueError, "transposed?"),
    ({"weight": torch.ones(E, N, K).half()}, TypeError, "weight is torch.float16"),
    ({"lora_A": torch.ones(R * E, K)}, ValueError, "lora_A is [20, 24]; expected [5, r, 24] with r ≥ 1"),
    ({"lora_B": torch.ones(E, R, N)}, ValueError, "lora_B is [5, 4, 16]; expected [5, 16, 4]"),
    ({"bias": torch.ones(N)}, ValueError, "bias is [16]; expected [5, 16]"),
    ({"lora_A": None}, TypeError, "lora_A must be a tensor"),
    ({"route": 3}, TypeError, "route must be an ExpertRoute"),
    ({"route": lk.expert_route(torch.zeros(T, 2, dtype=torch.int64), 4)}, ValueError, "of a route of 9 tokens with 2"),
    ({"scaling": float("nan")}, ValueError, "scaling is nan"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
    ({"impl": "cuda"}, ValueError, "impl"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=str)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    x, weight, A, B, bias, index = make(torch.float32)
    given = {"x": x, "weight": weight, "lora_A": A, "lora_B": B, "bias": bias, "route": lk.expert_route(index, E)}
    with pytest.raises(error, match=re.escape(message)):
        lk.expert_lora_linear(**(given | arguments))


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([[0, 5]], ValueError, "top_k_index has expert 5; expected 0 … 4"),
        ([[-1, 0]], ValueError, "top_k_index has expert -1"),
        ([0, 1], ValueError, "top_k_index is [2]; expected [T, top_k]"),
        ([[0.0]], TypeError, "top_k_index is torch.float32; expected int32 or int64"),
    ],
)
def test_bad_route(index: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        lk.expert_route(torch.tensor(index), E)
