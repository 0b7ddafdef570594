"""What importing the package starts, and what it does without Triton: each case in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("TRITON_INTERPRET", "LORAKERNELS_IMPL")


def run_python(code: str) -> str:
    """Run `code` in a fresh interpreter, without the variables that would change what is under test."""
    env = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_import_starts_neither_triton_nor_cuda() -> None:
    run_python(
        """
        import sys
        import torch

        torch_brings_triton = "triton" in sys.modules

        import lorakernels

        assert torch_brings_triton or "triton" not in sys.modules, "`import lorakernels` imported triton"
        assert not torch.cuda.is_initialized(), "`import lorakernels` initialised CUDA"
        """
    )


def test_public_names_start_neither_triton_nor_cuda() -> None:
    run_python(
        """
        import sys
        import torch

        torch_brings_triton = "triton" in sys.modules

        import lorakernels

        assert lorakernels.__all__
        for name in lorakernels.__all__:
            getattr(lorakernels, name)
            assert torch_brings_triton or "triton" not in sys.modules, f"lorakernels.{name} imported triton"
            assert not torch.cuda.is_initialized(), f"lorakernels.{name} initialised CUDA"
        """
    )


def test_import_alone_brings_no_optional_package() -> None:
    run_python(
        """
        import sys
        import torch

        before = set(sys.modules)
        import lorakernels

        for name in lorakernels.__all__:
            getattr(lorakernels, name)
        optional = {"peft", "transformers", "vllm", "ray", "bitsandbytes", "sklearn", "matplotlib", "openai"}
        brought = {module.split(".")[0] for module in set(sys.modules) - before}
        assert not brought & optional, sorted(brought & optional)
        """
    )


def test_public_names_resolve_and_are_listed() -> None:
    run_python(
        """
        import lorakernels

        names = list(lorakernels.__all__)
        assert len(names) == len(set(names)), "a name is in __all__ twice"
        missing = [name for name in names if getattr(lorakernels, name, None) is None]
        assert not missing, f"__all__ names what does not resolve: {missing}"
        unlisted = sorted(set(names) - set(dir(lorakernels)))
        assert not unlisted, f"dir() does not list {unlisted}"
        """
    )


def test_dir_lists_names_that_nobody_has_used_yet() -> None:
    run_python(
        """
        import lorakernels

        unlisted = sorted(set(lorakernels.__all__) - set(dir(lorakernels)))
        assert not unlisted, f"dir() does not list {unlisted} before their first use"
        """
    )


def test_unknown_name_is_an_attribute_error() -> None:
    run_python(
        """
        import lorakernels

        try:
            lorakernels.no_such_name
        except AttributeError as error:
            assert "no_such_name" in str(error), error
        else:
            raise AssertionError("lorakernels.no_such_name did not raise")
        """
    )


WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None  # every later `import triton` raises ModuleNotFoundError

import torch
import lorakernels

torch.manual_seed(0)
x, w = torch.randn(5, 24), torch.randn(12, 24)
A, B = torch.randn(4, 24, requires_grad=True), torch.randn(12, 4, requires_grad=True)
"""


def test_without_triton_the_cpu_result_is_right() -> None:
    run_python(
        WITHOUT_TRITON
        + textwrap.dedent(
            """
            y = lorakernels.lora_linear(x, w, A, B)
            torch.testing.assert_close(y, x @ w.T + (x @ A.T) @ B.T)
            y.sum().backward()
            dy = torch.ones(5, 12)
            torch.testing.assert_close(A.grad, (dy @ B.detach()).T @ x)
            torch.testing.assert_close(B.grad, dy.T @ (x @ A.detach().T))
            """
        )
    )


def test_without_triton_asking_for_it_raises() -> None:
    run_python(
        WITHOUT_TRITON
        + textwrap.dedent(
            """
            try:
                lorakernels.lora_linear(x, w, A, B, impl="triton")
            except RuntimeError as error:
                assert "triton" in str(error).lower(), error
            else:
                raise AssertionError('impl="triton" did not raise without Triton')
            """
        )
    )


def test_without_triton_every_public_name_resolves() -> None:
    run_python(WITHOUT_TRITON + "\nfor name in lorakernels.__all__:\n    getattr(lorakernels, name)\n")
