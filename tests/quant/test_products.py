"""Layers over a packed weight: against float64, every gradient, by every path; and no whole weight at any moment."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lorakernels as lk
from lorakernels import formula, ops, weight
from lorakernels.configs import table
from lorakernels.nn.quantized import FORMATS, pack
from lorakernels.quant.packed import PackedWeight
from lorakernels.testing.budget import assert_within_budget
from lorakernels.testing.device import NUMBERS

N, K, R, TOKENS = 70, 96, 5, 11
DTYPES = (torch.float32, torch.bfloat16)
WHOLE, PARTS = weight.SCRATCH_BYTES, 4096  # a scratch for all of the weight, or for a few rows or columns of it
WAYS = (("torch", WHOLE), ("torch", PARTS), ("triton-few", WHOLE), ("triton-general", PARTS))
VARIANTS = {"plain": {}, "scaled": {"row_scale": True}, "without_bias": {"bias": False}}


def packed(kind: str, rows: int = N, columns: int = K) -> PackedWeight:
    return pack(torch.randn(rows, columns, generator=torch.Generator().manual_seed(7)), kind, 32)


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    made = {"x": torch.randn(TOKENS, K), "lora_A": torch.randn(R, K) / 9, "lora_B": torch.randn(N, R)}
    made |= {"bias": torch.randn(N), "row_scale": torch.rand(N) + 0.5, "dy": torch.randn(TOKENS, N)}
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def cases() -> Iterator[Any]:
    """Every format in every way, in one part and in several; of the variants the slow interpreter has few."""
    for kind, (way, scratch), dtype in itertools.product(FORMATS, WAYS, DTYPES):
        for variant in VARIANTS if way == "torch" or (dtype is torch.float32 and scratch == PARTS) else ["plain"]:
            yield pytest.param(kind, variant, dtype, way, scratch, id=f"{kind}-{variant}-{dtype}-{way}-{scratch}")


@pytest.mark.parametrize(("kind", "variant", "dtype", "way", "scratch"), list(cases()))
def test_against_float64(
    kind: str,
    variant: str,
    dtype: torch.dtype,
    way: str,
    scratch: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weight, "SCRATCH_BYTES", scratch)
    monkeypatch.setattr(table, "FEW_TOKENS", -1 if way == "triton-general" else 256)
    given, base = {name: t.to(device) for name, t in inputs(dtype).items()}, packed(kind)
    base = PackedWeight(base.text, *(None if t is None else t.to(device) for t in base[1:]))
    if not VARIANTS[variant].get("bias", True):
        given.pop("bias")
    if not VARIANTS[variant].get("row_scale"):
        given.pop("row_scale")
    dy = given.pop("dy")
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    x, A, B = (leaves[name] for name in ("x", "lora_A", "lora_B"))
    optional = {name: leaves[name] for name in ("bias", "row_scale") if name in leaves}
    y = lk.lora_linear(x, base, A, B, scaling=0.7, impl=way.partition("-")[0], **optional)
    y.backward(dy)

    def expected(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        wide = {name: tensor.to(dtype) for name, tensor in given.items()}
        own = [wide["x"], base.dense(dtype), wide["lora_A"], wide["lora_B"]]
        row_scale = wide.get("row_scale")
        y = formula.lora_linear(*own, wide.get("bias"), 0.7, None, row_scale)
        names = ("x", "weight", "lora_A", "lora_B", "bias", "row_scale")
        grads = formula.lora_linear_backward(dy.to(dtype), *own, 0.7, None, row_scale)
        return {"y": y, **dict(zip(names, grads, strict=True))}

    eager, exact = expected(dtype), expected(torch.float64)
    results = {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}
    for name, result in results.items():
        assert result is not None
        if NUMBERS:
            assert_within_budget(result, eager[name], exact[name], dtype, name)


@pytest.mark.parametrize("kind", FORMATS)
def test_groups_and_many_adapters(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v, one of them plain; and a batch whose tokens have adapters of their own."""
    monkeypatch.setattr(weight, "SCRATCH_BYTES", PARTS)
    exact = torch.float64  # so that only a fault is seen: a number is unpacked to the same in any dtype that holds it
    x = torch.randn(TOKENS, K, dtype=exact, requires_grad=True)
    bases = [packed(kind), packed(kind, 32), torch.randn(16, K, dtype=exact)]
    plain = [base.dense(exact) if isinstance(base, PackedWeight) else base for base in bases]
    As = [torch.randn(R, K, dtype=exact) for _ in bases]
    Bs = [torch.randn(len(base), R, dtype=exact) for base in plain]
    plan = lk.BatchPlan(2, TOKENS, device="cpu", max_rank=R)
    plan.update(torch.tensor([0, 1, -1] * 3 + [1, 1], dtype=torch.int32), [R, 3], [0.5, 2.0])
    stacks = [torch.stack([A, A + 1]) for A in As], [torch.stack([B, B - 1]) for B in Bs]
    calls: list[Callable[..., list[torch.Tensor]]] = [
        lambda weights: lk.lora_linear_group(x, weights, As, Bs, impl="torch"),
        lambda weights: lk.multi_lora_linear(x, weights, *stacks, plan, impl="torch"),
        lambda weights: [ops.frozen_linear(x, each, None) for each in weights],
    ]
    for call in calls:
        found, expected = call(bases), call(plain)
        dys = [torch.randn_like(y) for y in found]
        (dx,), (expected_dx,) = (torch.autograd.grad(ys, [x], dys) for ys in (found, expected))
        for ours, theirs in zip([*found, dx], [*expected, expected_dx], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["nf4", "int4"])
def test_few_tokens_of_many_adapters(kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding: the weight is unpacked inside the product, and never into a scratch."""
    monkeypatch.delattr(weight, "_scratch")
    base, bias = (
        PackedWeight(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in packed(kind))),
        torch.randn(N),
    )
    x, A, B = torch.randn(TOKENS, K), torch.randn(2, R, K) / 9, torch.randn(2, N, R)
    slots = torch.tensor([0, 1, -1] * 3 + [1, 1], dtype=torch.int32)
    plan = lk.BatchPlan(2, TOKENS, device=device, max_rank=R)
    plan.update(slots, [R, 3], [0.5, 2.0])
    given = [tensor.to(device) for tensor in (x, A, B, bias)]
    y = lk.multi_lora_linear(given[0], base, *given[1:3], plan, bias=given[3], impl="triton")

    def expected(dtype: torch.dtype) -> torch.Tensor:
        rows, own, B_own, add = x.to(dtype), A.to(dtype), B.to(dtype), bias.to(dtype)
        y = torch.nn.functional.linear(rows, base.dense(dtype).cpu(), add)
        for slot, rank, scaling in ((0, R, 0.5), (1, 3, 2.0)):
            update = scaling * rows @ own[slot, :rank].T @ B_own[slot, :, :rank].T
            y = torch.where((slots == slot)[:, None], y + update, y)
        return y

    if NUMBERS:
        assert_within_budget(y.cpu(), expected(torch.float32), expected(torch.float64), torch.float32)


class Largest(TorchDispatchMode):
    """The most elements that a floating tensor has which is made in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor) and each.is_floating_point() and each.itemsize > 1:
                self.numel = max(self.numel, each.numel())
        return result


@pytest.mark.parametrize("kind", FORMATS)
def test_the_whole_weight_is_never_made(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight, "SCRATCH_BYTES", 1 << 16)
    base, x = packed(kind, 512, 512), torch.randn(3, 512, requires_grad=True)
    layer = lk.LoRALinear.from_linear(quantized(base), r=4, use_dora=True)
    with Largest() as largest:
        layer(x).sum().backward()
    assert largest.numel < 512 * 512 // 4


def quantized(base: PackedWeight) -> torch.nn.Module:
    from lorakernels.nn.quantized import QuantizedLinear

    return QuantizedLinear(base)


@pytest.mark.parametrize("kind", FORMATS)
def test_compiled_in_one_graph(kind: str) -> None:
    base, A, B = packed(kind), torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True)
    x = torch.randn(TOKENS, K, requires_grad=True)
    step = torch.compile(
        lambda x, A, B: lk.lora_linear(x, base, A, B, impl="torch"), fullgraph=True, backend="aot_eager"
    )
    found, expected = step(x, A, B), lk.lora_linear(x, base, A, B, impl="torch")
    assert torch.equal(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), [x, A, B]), torch.autograd.grad(expected.sum(), [x, A, B]), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_gradients_of_gradients_are_refused() -> None:
    x = torch.randn(2, K, requires_grad=True)
    A, B = torch.randn(R, K, requires_grad=True), torch.randn(N, R)
    y = lk.lora_linear(x, packed("nf4"), A, B, impl="torch")
    with pytest.raises(RuntimeError, match="never made whole"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
