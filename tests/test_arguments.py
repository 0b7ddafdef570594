"""Wrong arguments: an error at the call that says what was given and what is expected."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import lorakernels as lk
from lorakernels import functional


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
    ({"row_scale": torch.ones(6, dtype=torch.long)}, TypeError, r"row_scale is \[6\] torch.int64"),
    ({"weight": torch.randn(6, 8).half()}, TypeError, "weight is torch.float16; expected x's, torch.float32"),
    ({"x": torch.ones(3, 8, dtype=torch.int64)}, TypeError, r"x is \[3, 8\] torch.int64; expected float64"),
    ({"lora_A": torch.ones(2, 8, dtype=torch.int32)}, TypeError, r"lora_A is \[2, 8\] torch.int32"),
    ({"lora_A": torch.randn(2, 8, device="meta")}, ValueError, "lora_A is on meta.*expected one device"),
    ({"lora_A": None}, TypeError, "lora_A must be a tensor; got NoneType"),
    ({"x": [1.0]}, TypeError, "x must be a tensor; got list"),
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


PLAN = lk.BatchPlan(3, 5, max_rank=2)
PLAN.update([0, 2, -1, 0, 1], [2, 1, 2], [1.0, 0.5, 2.0])

# The public functions, and the right arguments of each, for 5 tokens, N = 6, K = 8 and r = 2.
RIGHT: dict[Callable[..., Any], dict[str, Any]] = {
    lk.lora_linear: {
        "x": torch.randn(5, 8),
        "weight": torch.randn(6, 8),
        "lora_A": torch.randn(2, 8),
        "lora_B": torch.randn(6, 2),
        "bias": torch.randn(6),
        "row_scale": torch.rand(6),
        "dropout_p": 0.1,
        "scaling": 2.0,
    },
    lk.lora_linear_group: {
        "x": torch.randn(5, 8),
        "weights": [torch.randn(6, 8)],
        "lora_As": [torch.randn(2, 8)],
        "lora_Bs": [torch.randn(6, 2)],
        "biases": [torch.randn(6)],
        "dropout_p": 0.1,
    },
    functional.lora_weight_norm: {
        "weight": torch.randn(6, 8),
        "lora_A": torch.randn(2, 8),
        "lora_B": torch.randn(6, 2),
        "base_norm": torch.rand(6),
        "scaling": 2.0,
    },
    lk.lora_shrink: {"x": torch.randn(5, 8), "lora_A": torch.randn(3, 2, 8), "plan": PLAN},
    lk.lora_expand: {
        "s": torch.randn(5, 2),
        "lora_B": torch.randn(3, 6, 2),
        "plan": PLAN,
        "out": torch.zeros(5, 6),
    },
    lk.multi_lora_linear: {
        "x": torch.randn(5, 8),
        "weight": torch.randn(6, 8),
        "lora_A": torch.randn(3, 2, 8),
        "lora_B": torch.randn(3, 6, 2),
        "plan": PLAN,
        "bias": torch.randn(6),
        "dropout_p": 0.1,
    },
    functional.multi_lora_embedding: {
        "ids": torch.tensor([1, 0, 7, 7, 3]),
        "weight": torch.randn(8, 6),
        "lora_A": torch.randn(3, 2, 8),
        "lora_B": torch.randn(3, 6, 2),
        "plan": PLAN,
    },
    lk.explain: {"x": torch.randn(5, 8)},
}
FAULTS: dict[str, tuple[Callable[[torch.Tensor], Any], type[Exception]]] = {
    "no tensor": (lambda tensor: "given", TypeError),
    "integers": (lambda tensor: tensor.bool(), TypeError),
    "another device": (lambda tensor: tensor.to("meta"), ValueError),
    "another shape": (lambda tensor: torch.cat([tensor, tensor], -1), ValueError),
}
# What another argument is held against: that one is then called wrong.
MEASURES = {(lk.lora_shrink, "x"), (lk.lora_expand, "lora_B"), (lk.lora_expand, "out")}
MEASURES.add((functional.multi_lora_embedding, "weight"))


def _faults() -> Iterator[tuple[Callable[..., Any], str, Any, type[Exception]]]:
    for function, right in RIGHT.items():
        for name, given in right.items():
            tensor = given[0] if isinstance(given, list) else given
            if isinstance(tensor, torch.Tensor) and function is not lk.explain:
                for fault, (change, error) in FAULTS.items():
                    if fault == "another shape" and (function, name) in MEASURES:
                        continue
                    wrong = change(tensor)
                    yield pytest.param(  # type: ignore[misc]
                        function, name, [wrong] if isinstance(given, list) else wrong, error,
                        id=f"{function.__name__}-{name}-{fault}",
                    )  # fmt: skip
        for name, wrong, error in (
            ("impl", "cuda", ValueError),
            ("impl", 3, TypeError),
            ("plan", "plan", TypeError),
            ("dropout_p", "0.1", TypeError),
            ("dropout_p", 1.0, ValueError),
            ("scaling", "1", TypeError),
            ("scaling", float("nan"), ValueError),
        ):
            if name in right or name == "impl":
                yield pytest.param(function, name, wrong, error, id=f"{function.__name__}-{name}-{wrong}")  # type: ignore[misc]


@pytest.mark.parametrize("function", RIGHT, ids=lambda function: function.__name__)
def test_what_is_right_runs(function: Callable[..., Any]) -> None:
    function(**RIGHT[function])


@pytest.mark.parametrize(("function", "name", "wrong", "error"), list(_faults()))
def test_a_fault_gets_one_error_in_every_function(
    function: Callable[..., Any], name: str, wrong: Any, error: type[Exception]
) -> None:
    """A wrong type is a TypeError, anything else a ValueError, and the argument is named."""
    singular = {"weights": "weight", "lora_As": "lora_A", "lora_Bs": "lora_B", "biases": "bias"}.get(name, name)
    with pytest.raises(error, match=rf"\b{singular}\b") as raised:
        function(**{**RIGHT[function], name: wrong})
    assert isinstance(raised.value, ValueError) == (error is ValueError)


def test_what_cannot_run_is_a_backend_error_in_every_function() -> None:
    for function, right in RIGHT.items():
        double = {
            name: [t.double() for t in given] if isinstance(given, list) else given.double()
            if isinstance(given, torch.Tensor) and name != "ids" else given
            for name, given in right.items()
        }  # fmt: skip
        with pytest.raises(lk.BackendError, match=r"not torch\.float64"):
            function(**double, impl="triton")


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
