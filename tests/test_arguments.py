"""Wrong arguments: an error at the call that says what was given and what is expected."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import lorakernels as lk


def call(**changed: Any) -> torch.Tensor:
    """A right call of N = 6, K = 8, r = 2, with some arguments changed."""
    right: dict[str, Any] = {
        "x": torch.randn(3, 8),
        "weight": torch.randn(6, 8),
        "lora_A": torch.randn(2, 8),
        "lora_B": torch.randn(6, 2),
    }
    return lk.lora_linear(**{**right, **changed})


WRONG_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.randn(3, 7)}, ValueError, r"x \[3, 7\] and weight \[6, 8\]"),
    ({"x": torch.randn(())}, ValueError, r"x \[\] and weight \[6, 8\]"),
    ({"weight": torch.randn(8)}, ValueError, r"expected x \[..., K\] and weight \[N, K\]"),
    ({"lora_A": torch.randn(8, 2)}, ValueError, r"lora_A is \[8, 2\]; expected \[r, 8\].*transposed"),
    ({"lora_A": torch.randn(0, 8), "lora_B": torch.randn(6, 0)}, ValueError, r"lora_A is \[0, 8\].*r ≥ 1"),
    ({"lora_B": torch.randn(2, 6)}, ValueError, r"lora_B is \[2, 6\]; expected \[6, 2\].*transposed"),
    ({"lora_B": torch.randn(6, 3)}, ValueError, r"lora_B is \[6, 3\]; expected \[6, 2\]"),
    ({"bias": torch.randn(5)}, ValueError, r"bias is \[5\]; expected \[6\]"),
    ({"bias": torch.randn(6).half()}, TypeError, "bias is torch.float16"),
    ({"bias": 1.0}, TypeError, "bias must be a tensor or None; got float"),
    ({"row_scale": torch.randn(5)}, ValueError, r"row_scale is \[5\]; expected \[6\]"),
    ({"row_scale": torch.ones(6, dtype=torch.long)}, TypeError, "row_scale is torch.int64"),
    ({"weight": torch.randn(6, 8).half()}, TypeError, "x is torch.float32 and weight is torch.float16"),
    ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, "x is torch.int64"),
    ({"lora_A": torch.ones(2, 8, dtype=torch.int32)}, TypeError, "lora_A is torch.int32"),
    ({"lora_A": torch.randn(2, 8, device="meta")}, ValueError, "lora_A on meta.*expected one device"),
    ({"lora_A": None}, TypeError, "lora_A must be a tensor; got NoneType"),
    ({"x": [1.0]}, TypeError, "x and weight must be tensors; got list"),
    ({"scaling": float("nan")}, ValueError, "scaling is nan"),
    ({"scaling": float("inf")}, ValueError, "scaling is inf"),
    ({"scaling": "1"}, TypeError, "scaling is '1'; expected a number"),
    ({"scaling": None}, TypeError, "scaling is None; expected a number"),
    ({"scaling": torch.ones(2)}, ValueError, r"scaling is a tensor of shape \[2\]"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0; expected a probability in \[0, 1\)"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p is nan"),
    ({"impl": "cuda"}, ValueError, "impl .* is 'cuda'; expected"),
]


def name_of(value: object) -> str:
    """The same in every process, where the value of a random tensor is not."""
    return "+".join(value) if isinstance(value, dict) else str(value)[:40]


@pytest.mark.parametrize(("changed", "error", "message"), WRONG_CALLS, ids=name_of)
def test_wrong_calls(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changed)


WRONG_LAYERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"r": 0}, ValueError, "r is 0; expected an int of at least 1"),
    ({"r": -3}, ValueError, "r is -3"),
    ({"r": 2.0}, TypeError, "r is 2.0"),
    ({"r": True}, TypeError, "r is True"),
    ({"lora_alpha": float("nan")}, ValueError, "lora_alpha is nan; expected a finite number"),
    ({"lora_alpha": float("inf")}, ValueError, "lora_alpha is inf"),
    ({"lora_alpha": None}, TypeError, "lora_alpha is None"),
    ({"lora_dropout": 1.0}, ValueError, r"lora_dropout is 1.0; expected a number in \[0, 1\)"),
    ({"lora_dropout": "0.1"}, TypeError, "lora_dropout is '0.1'"),
    ({"init_lora_weights": "xavier"}, ValueError, "init_lora_weights is 'xavier'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG_LAYERS, ids=str)
def test_wrong_layers_and_configs(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lk.LoRALinear(4, 4, **arguments)
    with pytest.raises(error, match=message):
        lk.LoRAConfig(**arguments)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_wrong_patterns(field: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"{field}\['q'\] is"):
        lk.LoRAConfig(**{field: {"q": "8"}})


def test_wrong_bias_field() -> None:
    with pytest.raises(ValueError, match="bias is 'some'; expected one of 'none', 'all', 'lora_only'"):
        lk.LoRAConfig(bias="some")


def run_without_the_interpreter(code: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: triton runs")
def test_triton_by_name_without_a_gpu_says_so_and_how_to_run_it() -> None:
    printed = run_without_the_interpreter(
        "import torch, lorakernels as lk\n"
        "x, W, A, B = (torch.randn(size) for size in ((2, 4), (3, 4), (1, 4), (3, 1)))\n"
        "try: lk.lora_linear(x, W, A, B, impl='triton')\n"
        "except lk.BackendError as error: print(error)\n"
        "print(lk.explain(torch.randn(2, 4)).impl)"
    )
    assert "needs a GPU" in printed and "TRITON_INTERPRET=1" in printed and 'impl="auto"' in printed
    assert printed.endswith("torch\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: triton runs")
def test_the_environment_variable_is_what_auto_means() -> None:
    printed = run_without_the_interpreter(
        "import torch, lorakernels as lk\n"
        "try: lk.explain(torch.randn(2, 4))\n"
        "except lk.BackendError as error: print(error)\n"
        "print(lk.explain(torch.randn(2, 4), impl='torch'))",
        LORAKERNELS_IMPL="triton",
    )
    assert "unset LORAKERNELS_IMPL" in printed
    assert "impl=torch: asked for with impl='torch'" in printed


def test_float64_is_refused_by_triton_and_taken_by_auto() -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(lk.BackendError, match=r"not torch\.float64"):
        lk.explain(x, impl="triton")
    assert lk.explain(x).impl == "torch"


def test_explain_names_kernels_and_configs(device: str) -> None:
    x, weight, A = (torch.randn(size, device=device) for size in ((3, 8), (6, 8), (2, 8)))
    explanation = lk.explain(x, weight, A, impl="triton")
    assert explanation.impl == "triton" and "few_tokens: KernelConfig" in str(explanation)
    explanation = lk.explain(x.new_empty(1000, 8), weight, A, impl="triton")
    assert [kernel.partition(":")[0] for kernel in explanation.kernels][:2] == ["shrink", "linear_expand"]
