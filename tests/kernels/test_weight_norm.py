"""DoRA's norm ‖W + scaling · B A‖ by rows, against float64, without B A."""

from __future__ import annotations

import contextlib

import pytest
import torch

from lorakernels.functional import lora_weight_norm, row_norm
from lorakernels.testing.device import COMPILED
from lorakernels.testing.interpreter import tf32_products

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(40, 48, 8), (29, 51, 5), (1100, 37, 3), (1, 1, 1), (24, 16, 100)]  # N, K, r; 1100 rows are two chunks


def factors(N: int, K: int, r: int, dtype: torch.dtype, adapter: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(N + K)
    weight, A, B = (torch.randn(shape, generator=generator) for shape in ((N, K), (r, K), (N, r)))
    return weight.to(dtype), A.to(adapter), B.to(adapter)


def exact(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    return (weight.double() + scaling * (B.double() @ A.double())).norm(dim=1)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "r"), SHAPES)
def test_against_float64(N: int, K: int, r: int, dtype: torch.dtype, impl: str, device: str) -> None:
    if dtype is torch.float64:
        impl = "torch"  # the kernels' widest is float32
    weight, A, B = (t.to(device) for t in factors(N, K, r, dtype, torch.promote_types(dtype, torch.float32)))
    with contextlib.nullcontext() if COMPILED else tf32_products():
        found = lora_weight_norm(weight, A, B, scaling=0.3, impl=impl)
    expected = exact(weight, A, B, 0.3)
    assert found.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    # Sums of K + r positive squares beside the cross term, which the kernels make with A in bfloat16 for such W.
    unit = torch.finfo(dtype if (impl, dtype) == ("triton", torch.bfloat16) else found.dtype).eps / 2
    size = weight.double().square().sum(1) + (0.3 * (B.double() @ A.double())).square().sum(1)
    allowed = 4 * unit * size / expected + (K + r) * torch.finfo(found.dtype).eps * expected
    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("view", [lambda w: w.t().contiguous().t(), lambda w: torch.stack([w, w * 9], 2)[:, :, 0]])
def test_any_strides_and_a_given_square_norm(view) -> None:
    weight, A, B = factors(24, 18, 3, torch.float64, torch.float64)
    strided = view(weight)
    assert not strided.is_contiguous()
    given = lora_weight_norm(strided, A, B, scaling=-1.5, base_norm=row_norm(strided))
    torch.testing.assert_close(given, exact(weight, A, B, -1.5), rtol=1e-13, atol=0)


def test_a_row_of_zeros_in_the_weight() -> None:
    weight, A, B = factors(24, 18, 3, torch.float64, torch.float64)
    weight[3] = 0
    torch.testing.assert_close(lora_weight_norm(weight, A, B), exact(weight, A, B, 1.0), rtol=1e-13, atol=0)


def test_a_scaling_tensor_and_no_gradient() -> None:
    weight, A, B = factors(24, 18, 3, torch.float64, torch.float64)
    found = lora_weight_norm(weight, A.requires_grad_(), B.requires_grad_(), scaling=torch.tensor(0.7))
    torch.testing.assert_close(found, exact(weight, A, B, float(torch.tensor(0.7))), rtol=1e-13, atol=0)
    assert not found.requires_grad


def test_autocast_does_not_round_it() -> None:
    weight, A, B = factors(24, 18, 3, torch.float32, torch.float32)
    expected = lora_weight_norm(weight, A, B)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lora_weight_norm(weight, A, B), expected)


def test_an_update_of_zeros_leaves_the_base_norm_to_the_bit() -> None:
    for dtype in DTYPES:
        weight, A, B = factors(29, 51, 5, dtype, torch.promote_types(dtype, torch.float32))
        weight[3] = 0
        found = lora_weight_norm(weight, A, torch.zeros_like(B))
        assert torch.equal(found, torch.linalg.norm(weight.to(found.dtype), dim=1))


def test_a_row_that_the_update_cancels_is_zero_and_not_nan() -> None:
    A = torch.randn(3, 18)
    B = torch.randn(24, 3)
    norm = lora_weight_norm(-(B @ A), A, B)
    # What is left is rounding: of three terms of the size of ‖W‖² each, before the root.
    assert (norm <= (B @ A).norm(dim=1) * (32 * torch.finfo(torch.float32).eps) ** 0.5).all()


def test_no_matrix_of_the_weights_size_is_made() -> None:
    weight, A, B = factors(512, 256, 4, torch.float32, torch.float32)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() != weight.data_ptr():
                self.numel = max(self.numel, out.numel())
            return out

    from lorakernels.eager import weight_norm

    with Largest() as seen:
        projected, _ = weight_norm.project(weight, A)
        weight_norm.from_projection(projected, A, B, weight_norm.row_norm(weight), 0.5)
    assert 0 < seen.numel <= 512 * 4


def test_compiles_whole_and_passes_opcheck() -> None:
    torch._dynamo.reset()
    weight, A, B = factors(24, 18, 3, torch.float32, torch.float32)
    torch.library.opcheck(torch.ops.lorakernels.row_norm.default, (weight,))
    arguments = (weight, A, B, row_norm(weight), 0.5, "torch")
    torch.library.opcheck(torch.ops.lorakernels.lora_weight_norm.default, arguments)
    compiled = torch.compile(lora_weight_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight, A, B, scaling=0.5), lora_weight_norm(weight, A, B, scaling=0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_norm": torch.ones(5)}, "base_norm is \\[5\\]; expected \\[24\\]"),
        ({"lora_B": torch.ones(3, 24)}, "transposed"),
        ({"lora_A": torch.ones(3, 7)}, "lora_A is \\[3, 7\\]"),
    ],
)
def test_wrong_arguments(arguments: dict[str, torch.Tensor], message: str) -> None:
    weight, A, B = factors(24, 18, 3, torch.float32, torch.float32)
    with pytest.raises(ValueError, match=message):
        lora_weight_norm(**{"weight": weight, "lora_A": A, "lora_B": B, **arguments})
