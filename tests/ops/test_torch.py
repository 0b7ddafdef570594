"""The layer among torch's own machinery: autograd, memory, compile, autocast, checkpointing, functorch."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lorakernels as lk
from lorakernels.eager import lora_linear as eager_lora_linear
from lorakernels.ops import linear as ops_linear
from lorakernels.testing.cases import LinearCase, LinearInputs, make_inputs

IMPLS = ["torch", "triton"]


@pytest.fixture(autouse=True)
def _the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not torch's own operators, which small layers on a CPU are made of."""
    monkeypatch.setattr(ops_linear, "SMALL", 0)


def leaves(dtype: torch.dtype = torch.float32, tokens: int = 20, device: str = "cpu", **fields: object) -> LinearInputs:
    """Contiguous inputs whose x, A, B and bias need a gradient."""
    case = LinearCase("torch", tokens=(tokens,), K=24, N=16, r=3, **fields)  # type: ignore[arg-type]
    inputs = make_inputs(case, dtype, device)
    for name, tensor in inputs.tensors().items():
        setattr(inputs, name, tensor.detach().clone().requires_grad_(name != "weight"))
    return inputs


def call(inputs: LinearInputs, impl: str = "torch", **arguments: object) -> torch.Tensor:
    return lk.lora_linear(
        inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, bias=inputs.bias, scaling=0.7, impl=impl, **arguments
    )


def gradients(inputs: LinearInputs, y: torch.Tensor) -> list[torch.Tensor]:
    wanted = [tensor for tensor in inputs.tensors().values() if tensor.requires_grad]
    return list(torch.autograd.grad(y, wanted, inputs.dy.to(y.dtype)))


@pytest.mark.parametrize("row_scale", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("order", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradcheck(order: Callable[..., bool], dropout_p: float, row_scale: bool) -> None:
    inputs = leaves(torch.float64, tokens=4, row_scale=row_scale)
    inputs.weight.requires_grad_()

    def under_one_seed(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        x, weight, A, B, bias, *scale = tensors
        return lk.lora_linear(
            x, weight, A, B, bias=bias, row_scale=scale[0] if scale else None, scaling=-0.6, dropout_p=dropout_p
        )

    assert order(under_one_seed, tuple(inputs.tensors().values()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("row_scaled", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(impl: str, dropout_p: float, row_scaled: bool, device: str) -> None:
    inputs = make_inputs(LinearCase("op", tokens=(2, 5), K=24, N=16, r=3, row_scale=row_scaled), torch.float32, device)
    x, weight, A, B, bias, *_ = inputs.tensors().values()
    row_scale = inputs.row_scale
    seed = torch.tensor([5], device=device) if dropout_p else None
    arguments = (x, weight, A, B, bias, row_scale, seed, 0.5, dropout_p, impl)
    torch.library.opcheck(torch.ops.lorakernels.lora_linear.default, arguments)
    _, s, mask = torch.ops.lorakernels.lora_linear(*arguments)
    for needs in ([True] * 5 + [row_scaled], [True, False, False, True, False, False]):
        torch.library.opcheck(
            torch.ops.lorakernels.lora_linear_backward.default,
            (inputs.dy, x, weight, A, B, row_scale, s, mask, 0.5, dropout_p, needs, impl),
        )


def kept_bytes(function: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps for the backward, those of the parameters left out."""
    ours = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()
    assert kept.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("row_scaled", [False, True])
def test_kept_for_the_backward(impl: str, dtype: torch.dtype, dropout_p: float, row_scaled: bool, device: str) -> None:
    M, K, N, r = 64, 48, 80, 4
    with torch.device(device):
        row_scale = torch.rand(N, requires_grad=True) if row_scaled else None
        x = torch.randn(M, K, dtype=dtype, requires_grad=True)
        weight, bias = torch.randn(N, K, dtype=dtype), torch.randn(N, dtype=dtype)
        A, B = torch.randn(r, K, requires_grad=True), torch.randn(N, r, requires_grad=True)
    kept = kept_bytes(
        lambda: lk.lora_linear(x, weight, A, B, bias=bias, row_scale=row_scale, dropout_p=dropout_p, impl=impl),
        [weight, bias, A, B] + ([row_scale] if row_scale is not None else []),
    )
    s_bytes = M * r * dtype.itemsize
    mask_bytes = 0 if not dropout_p else M * -(-K // 8) if impl == "triton" else M * K
    assert kept == M * K * dtype.itemsize + s_bytes + mask_bytes


def test_x_is_not_kept_where_nobody_needs_it() -> None:
    x, weight = torch.randn(64, 48), torch.randn(80, 48)
    A, B = torch.randn(4, 48), torch.randn(80, 4, requires_grad=True)
    assert kept_bytes(lambda: lk.lora_linear(x, weight, A, B), [weight, A, B]) == 64 * 4 * 4


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_an_edit_in_place_between_forward_and_backward_raises(name: str) -> None:
    inputs = leaves()
    y = call(inputs)
    with torch.no_grad():
        getattr(inputs, name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_mask(impl: str, reentrant: bool, device: str) -> None:
    inputs = leaves(device=device)
    torch.manual_seed(11)
    y = call(inputs, impl, dropout_p=0.4)
    plain = [y, *gradients(inputs, y)]
    torch.manual_seed(11)
    y = checkpoint(lambda x: lk.lora_linear(
        x, inputs.weight, inputs.lora_A, inputs.lora_B, bias=inputs.bias, scaling=0.7, impl=impl, dropout_p=0.4
    ), inputs.x, use_reentrant=reentrant)  # fmt: skip
    torch.rand(1000, device=device)  # the generator moves on before the recomputation
    for leaf in inputs.tensors().values():
        leaf.grad = None
    y.backward(inputs.dy)
    again = [y, *(leaf.grad for leaf in inputs.tensors().values() if leaf.requires_grad)]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE])
def test_selective_checkpointing(policy: CheckpointPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = leaves()
    runs = 0
    forward = eager_lora_linear.forward

    def counted(*arguments: Any) -> Any:
        nonlocal runs
        runs += 1
        return forward(*arguments)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return call(dataclasses.replace(inputs, x=x.sin()), dropout_p=0.4).tanh()

    def policy_of(_: object, op: object, *arguments: object, **keywords: object) -> CheckpointPolicy:
        ours = op is torch.ops.lorakernels.lora_linear.default
        return policy if ours else CheckpointPolicy.PREFER_RECOMPUTE

    torch.manual_seed(11)
    y = layer(inputs.x)
    plain = [y, *gradients(inputs, y)]
    monkeypatch.setattr(eager_lora_linear, "forward", counted)
    torch.manual_seed(11)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy_of)
    y = checkpoint(layer, inputs.x, use_reentrant=False, context_fn=contexts)
    torch.rand(1000)
    again = [y, *gradients(inputs, y)]
    assert runs == (1 if policy is CheckpointPolicy.MUST_SAVE else 2)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def graph_backend(names: list[str]) -> Callable[..., object]:
    """A compiler that runs graphs as they are and notes which operators they call."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def note(graph: torch.fx.GraphModule, _: object) -> object:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=note, bw_compiler=note)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compile_takes_one_operator_forward_and_one_backward(dropout_p: float) -> None:
    torch._dynamo.reset()
    inputs = leaves()
    names: list[str] = []
    compiled = torch.compile(call, fullgraph=True, backend=graph_backend(names))
    torch.manual_seed(2)
    y = compiled(inputs, "torch", dropout_p=dropout_p)
    grads = gradients(inputs, y)
    assert names.count("lorakernels.lora_linear.default") == 1
    assert names.count("lorakernels.lora_linear_backward.default") == 1
    torch.manual_seed(2)
    expected = call(inputs, "torch", dropout_p=dropout_p)
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, gradients(inputs, expected), strict=True))


def test_compile_with_dynamic_shapes_does_not_recompile() -> None:
    torch._dynamo.reset()
    layer = lk.LoRALinear(24, 16, r=3)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    counts = torch._dynamo.utils.counters["stats"]
    for tokens in (5, 9, 31):
        x = torch.randn(tokens, 24, requires_grad=True)
        assert torch.allclose(compiled(x), layer(x))
    frames = counts["unique_graphs"]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    x = torch.randn(7, 24, requires_grad=True)
    assert torch.equal(compiled(x), layer(x))
    assert counts["unique_graphs"] == frames


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_gives_one_dtype_eager_and_compiled(impl: str, device: str) -> None:
    torch._dynamo.reset()
    inputs = leaves(device=device)
    with torch.autocast(device, torch.bfloat16):
        eager = call(inputs, impl)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(inputs, impl)
        plain = torch.nn.functional.linear(inputs.x, inputs.weight)
        direct = torch.ops.lorakernels.lora_linear(
            *(tensor.detach() for tensor in inputs.tensors().values()), None, None, 0.7, 0.0, impl
        )[0]
    assert eager.dtype == compiled.dtype == plain.dtype == direct.dtype == torch.bfloat16
    assert torch.equal(eager, compiled) and torch.equal(eager, direct)
    assert all(grad.dtype == torch.float32 for grad in gradients(inputs, eager))


def test_autocast_leaves_float64_alone() -> None:
    inputs = leaves(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(inputs).dtype == torch.float64


def test_func_grad_and_vmap_agree_with_autograd() -> None:
    inputs = leaves(torch.float64)
    fixed = {name: tensor.detach() for name, tensor in inputs.tensors().items()}

    def loss(A: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return lk.lora_linear(x, fixed["weight"], A, fixed["lora_B"], bias=fixed["bias"]).square().sum()

    expected = torch.autograd.grad(loss(inputs.lora_A, fixed["x"]), inputs.lora_A)[0]
    assert torch.allclose(torch.func.grad(loss)(fixed["lora_A"], fixed["x"]), expected)
    batch = fixed["x"].view(4, 5, -1)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(fixed["lora_A"], batch)
    assert torch.allclose(each.sum(0), expected)
    for i in range(4):
        assert torch.allclose(each[i], torch.func.grad(loss)(fixed["lora_A"], batch[i]))


@pytest.mark.parametrize("in_dims", [(0, None, None, None), (None, 0, None, None), (0, None, 0, 0), (1, 0, 0, 0)])
def test_vmap_over_any_argument(in_dims: tuple[int | None, ...]) -> None:
    inputs = make_inputs(LinearCase("vmap", tokens=(5,), K=6, N=4, r=2), torch.float64)
    x, weight, A, B, _ = inputs.tensors().values()
    batched = [
        tensor if dim is None else torch.stack([tensor, 2 * tensor, -tensor], dim)
        for tensor, dim in zip((x, weight, A, B), in_dims, strict=True)
    ]
    result = torch.func.vmap(lk.lora_linear, in_dims=in_dims)(*batched)
    for i in range(3):
        one = [t if dim is None else t.select(dim, i) for t, dim in zip(batched, in_dims, strict=True)]
        assert torch.allclose(result[i], lk.lora_linear(*one))


def test_flops_are_counted_for_what_is_computed() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = leaves()
    M, (N, K), r = 20, inputs.weight.shape, 3
    with FlopCounterMode(display=False) as counter:
        y = call(inputs)
    assert counter.get_total_flops() == 2 * M * (N * K + r * (N + K))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * M * (N * K + 2 * r * (N + K))


def test_scaling_as_a_tensor_and_its_gradient() -> None:
    inputs = leaves(torch.float64)
    scaling = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y = lk.lora_linear(inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, bias=inputs.bias, scaling=scaling)
    assert torch.allclose(y, call(inputs))
    low_rank = (inputs.x @ inputs.lora_A.T) @ inputs.lora_B.T
    (grad,) = torch.autograd.grad(y, scaling, inputs.dy)
    assert torch.allclose(grad, (low_rank * inputs.dy).sum())


def test_layers_copy_save_and_load() -> None:
    layer = lk.LoRALinear(24, 16, r=3, lora_dropout=0.1)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(5, 24)
    layer.eval()
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), layer(x))
    assert copied.base_layer.weight is not layer.base_layer.weight
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = lk.LoRALinear(24, 16, r=3).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x))


def test_export() -> None:
    layer = lk.LoRALinear(24, 16, r=3).eval()
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(5, 24)
    exported = torch.export.export(layer, (x,))
    assert torch.equal(exported.module()(x), layer(x))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_meta_tensors_have_the_right_shapes(dropout: float) -> None:
    layer = lk.LoRALinear(24, 16, r=3, lora_dropout=dropout, device="meta")
    y = layer(torch.empty(2, 5, 24, device="meta"))
    y.sum().backward()
    assert y.shape == (2, 5, 16) and layer.lora_A["default"].weight.grad.shape == (3, 24)


@pytest.mark.parametrize("argument", ["x", "lora_A", "lora_B", "bias"])
def test_func_grad_of_one_argument(argument: str) -> None:
    inputs = leaves(torch.float64)
    fixed = {name: tensor.detach() for name, tensor in inputs.tensors().items()}

    def loss(value: torch.Tensor) -> torch.Tensor:
        tensors = {**fixed, argument: value}
        return lk.lora_linear(*list(tensors.values())[:4], bias=tensors["bias"]).square().sum()

    (expected,) = torch.autograd.grad(loss(getattr(inputs, argument)), getattr(inputs, argument))
    assert torch.allclose(torch.func.grad(loss)(fixed[argument]), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["plain", "row scale", "group"])
def test_batched_gradients(kind: str, dropout_p: float, impl: str, device: str) -> None:
    inputs = leaves(device=device, row_scale=kind == "row scale")
    x, weight, A, B, bias, *scale = inputs.tensors().values()
    if kind == "group":
        ys = lk.lora_linear_group(
            x, [weight] * 2, [A] * 2, [B] * 2, biases=[bias, None], dropout_p=dropout_p, impl=impl
        )
    else:
        row_scale = scale[0] if scale else None
        ys = [lk.lora_linear(x, weight, A, B, bias=bias, row_scale=row_scale, dropout_p=dropout_p, impl=impl)]
    wanted = [tensor for tensor in inputs.tensors().values() if tensor.requires_grad]
    dys = [torch.randn(3, *y.shape, device=device) for y in ys]
    batched = torch.autograd.grad(ys, wanted, dys, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        each = torch.autograd.grad(ys, wanted, [dy[i] for dy in dys], retain_graph=True)
        for grad, one in zip(batched, each, strict=True):
            torch.testing.assert_close(grad[i], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_dropout": 0.1}], ids=str)
def test_a_vectorised_jacobian(fields: dict[str, Any]) -> None:
    layer = lk.LoRALinear(24, 16, r=3, **fields).eval()
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(2, 24)
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(layer, x, vectorize=True), jacobian(layer, x), rtol=1e-4, atol=1e-4)


def test_a_gradient_penalty_with_a_frozen_adapter() -> None:
    inputs = leaves(torch.float64)
    x, weight, A, B, bias = (tensor.detach() for tensor in inputs.tensors().values())
    x.requires_grad_()
    y = lk.lora_linear(x, weight, A, B, bias=bias).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    (again,) = torch.autograd.grad(dx.square().sum(), x)
    full = weight + B @ A
    assert torch.allclose(again, 8 * ((x.detach() @ full.T + bias) @ full) @ full.T @ full)


def test_forward_mode_raises_and_drops_nothing() -> None:
    inputs = leaves(torch.float64)
    x, weight, A, B, _ = (tensor.detach() for tensor in inputs.tensors().values())
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: lk.lora_linear(x, weight, A, B), (x,), (torch.ones_like(x),))


def test_vmap_over_zero_tokens_and_with_one_mask() -> None:
    x, weight, A, B, _ = make_inputs(LinearCase("vmap", tokens=(5,), K=6, N=4, r=2), torch.float64).tensors().values()
    assert torch.func.vmap(lambda x: lk.lora_linear(x, weight, A, B))(x.new_empty(3, 0, 6)).shape == (3, 0, 4)
    same = torch.func.vmap(lambda x: lk.lora_linear(x, weight, A, B, dropout_p=0.5), randomness="same")
    results = same(torch.stack([x, x, x]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_integers_are_refused_under_autocast_too() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"x is .*torch\.int64"):
        lk.lora_linear(torch.ones(3, 8).long(), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_at_sizes_where_the_product_changes_hands(dtype: torch.dtype) -> None:
    M = K = N = 272  # over 2²⁴ multiplications: float32 takes another product on some CPUs
    wide = torch.randn(2 * M, 2 * K).to(dtype)
    A, B = torch.randn(4, K), torch.randn(N, 4)
    layouts = [wide[:M, :K], wide[:K, :M].t(), wide[::2, ::2], wide[:1, :K].expand(M, K)]
    biases = [None, wide[0, :N], wide[0, : 2 * N : 2], wide[0, :1].expand(N)]
    for x in layouts:
        for weight in layouts:
            for bias in biases:
                strided = lk.lora_linear(x, weight, A, B, bias=bias)
                packed = [None if t is None else t.contiguous() for t in (x, weight, bias)]
                exact = (packed[0].double() @ (packed[1].double() + B.double() @ A.double()).T) + (  # type: ignore[union-attr]
                    0 if bias is None else bias.double()
                )
                # Sums of K products: their rounding grows with √K, and eight of them is beyond chance.
                limit = 8 * torch.finfo(dtype).eps * exact.abs().max()
                assert ((strided.double() - exact).abs() <= limit).all()
