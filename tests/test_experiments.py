"""The founding experiments of docs/what-lora-is.md."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorakernels as lk
from lorakernels.backend import ENVIRONMENT

ROWS, K, N = 100, 20, 10


@pytest.mark.parametrize(
    ("impl", "dtype"), [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)]
)
def test_rank_1_follows_a_world_that_moves_by_one(
    impl: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT, impl)
    theta = torch.randn(K, N, dtype=dtype, device=device)
    x = torch.randn(ROWS, K, dtype=dtype, device=device)
    y = x @ (theta + 1)
    known = nn.Linear(K, N, bias=False, dtype=dtype, device=device)
    with torch.no_grad():
        known.weight.copy_(theta.T)
    layer = lk.LoRALinear.from_linear(known, r=1, lora_alpha=1)
    parameters = lk.trainable_parameters(layer)
    assert parameters.num_trainable == K + N

    def loss() -> torch.Tensor:
        return nn.functional.mse_loss(layer(x), y)

    optimizer = torch.optim.LBFGS(
        parameters, max_iter=30, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    before = loss().item()
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    adapted = loss().item()
    assert adapted < 1e-9 * before

    # ‖x (Δ - 1)ᵀ‖ ≥ σ ‖Δ - 1‖ for the smallest singular value σ of x, and the loss is its square over ROWS · N. The
    # two products it compares have K terms, a few more roundings, and an error of eps / 2 for each of them.
    sizes = x.double().abs() @ (theta.double().abs() + 2)
    rounding = 2 * (K + 5) * torch.finfo(dtype).eps / 2 * torch.linalg.matrix_norm(sizes)
    sigma = torch.linalg.svdvals(x.double())[-1]
    allowed = ((adapted * y.numel()) ** 0.5 + rounding) / sigma
    assert (layer.delta_weight().double() - 1).abs().max() <= allowed < 1e-3
    assert torch.equal(known.weight, theta.T)

    layer.eval()
    layer.merge()
    merged = loss().item()
    assert abs(merged**0.5 - adapted**0.5) * y.numel() ** 0.5 <= rounding
    assert (known.weight.double() - (theta.double().T + 1)).abs().max() <= allowed + 4 * torch.finfo(dtype).eps


def test_parameters_of_a_large_layer() -> None:
    parameters = lk.trainable_parameters(lk.LoRALinear(2500, 2500, r=8, bias=False, device="meta"))
    assert parameters.num_trainable == 40_000
    assert parameters.num_total - parameters.num_trainable == 6_250_000


def test_parameters_of_rank_1() -> None:
    parameters = lk.trainable_parameters(lk.LoRALinear(1000, 1001, r=1, device="meta"))
    assert parameters.num_trainable == 2_001


class Block(nn.Module):
    """The linear layers of one encoder layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(width, width))
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)


def test_parameters_of_an_encoders_queries_and_values() -> None:
    with torch.device("meta"):
        encoder = nn.ModuleList(Block(1024) for _ in range(24))
    lk.inject(encoder, lk.LoRAConfig(r=8, target_modules=["q_proj", "v_proj"]))
    parameters = lk.trainable_parameters(encoder)
    assert parameters.num_trainable == 786_432
    assert len(parameters) == 24 * 2 * 2
