"""Who may import whom inside the package, read from the sources with `ast`: nothing of it is imported here.

A unit is a folder or a module of `lorakernels`. A unit may import itself and every unit on a lower row of LADDER, and
nothing above it or beside it. BESIDE lists the units that stand off the ladder. The remaining rules are in RULES.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lorakernels"

# ---------------------------------------------------------------------------------------------- the table

LADDER: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("tools",),
    ("integrations", "serving"),
    ("adapters",),
    ("nn",),
    ("functional", "explanation", "experts"),
    ("arguments",),
    ("ops",),
    ("kernels", "eager"),
    ("weight",),
    ("plan", "quant", "configs", "config", "backend", "dropout", "formula", "low_rank", "member", "when_imported"),
    ("route",),
    ("plan_layout", "patterns", "printable"),
)
LIBRARY = frozenset(unit for row in LADDER[3:] for unit in row)  # all but the command line and its commands


@dataclass(frozen=True)
class Beside:
    """A unit off the ladder: what it may import, and which units may import it."""

    imports: frozenset[str]
    imported_by: frozenset[str]


BESIDE: dict[str, Beside] = {
    # Files know configurations, tensors, names and shapes, how weights are packed, and no model.
    "files": Beside(
        frozenset({"config", "formula", "patterns", "printable", "quant"}),
        frozenset({"adapters", "serving", "tools", "cli", "lorakernels"}),
    ),
    "testing": Beside(LIBRARY, frozenset({"tools"})),
}

FACADE = "lorakernels"  # __init__.py: hands out the library's names, so it may import all of LIBRARY
FACADE_USERS = ("__main__", "cli", "tools.demo")  # the rest name the module that they mean
FACADE_OPEN_NAMES = frozenset({"lorakernels.__version__"})

TRITON_PLACES = ("kernels", "testing", "tools.arch", "tools.tune", "tools.compile_report")
TRITON_UNITS_INSIDE_A_CALL = frozenset({"backend"})
HOSTS = frozenset({"peft", "transformers", "vllm", "ray"})
# Each only in integrations/<one of these>.py, and where it is measured.
MEASURED = {"lorakernels.tools.bench.peers": {"peft", "vllm"}}
MAX_LINES = 400

ROW = {unit: row for row, units in enumerate(LADDER) for unit in units}
UNITS = frozenset(ROW) | frozenset(BESIDE) | {FACADE}

# ---------------------------------------------------------------------------------------------- reading imports


@dataclass(frozen=True)
class Import:
    """`from a.b import c` is the target `a.b.c`, and so is `import a.b.c`."""

    target: str
    line: int
    at_top: bool  # runs when the module is imported: not inside a function, nor under `if TYPE_CHECKING`


def imports_of(source: str, module: str, is_package: bool = False) -> list[Import]:
    """Every import statement of `source`, and every `import_module` or `__import__` of a literal name."""
    package = module if is_package else module.rpartition(".")[0]

    def absolute(name: str, level: int) -> str:
        if level == 0:
            return name
        base = package.split(".")[: len(package.split(".")) - level + 1]
        return ".".join([*base, name] if name else base)

    def visit(node: ast.AST, at_top: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_top)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module or "", node.level)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, at_top)
        elif isinstance(node, ast.Call) and (name := literal_import(node)) is not None:
            stripped = name.lstrip(".")
            yield Import(absolute(stripped, len(name) - len(stripped)), node.lineno, at_top)
        if isinstance(node, ast.If) and is_type_checking(node.test):
            for statement in node.body:
                yield from visit(statement, False)
            for statement in node.orelse:
                yield from visit(statement, at_top)
            return
        inside = at_top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return list(visit(ast.parse(source), True))


def last_name(node: ast.AST) -> str:
    """`c` for both `c` and `a.b.c`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def is_type_checking(test: ast.AST) -> bool:
    return last_name(test) == "TYPE_CHECKING"


def literal_import(call: ast.Call) -> str | None:
    """The name in `importlib.import_module("name")` or `__import__("name")`, where it is written out."""
    if last_name(call.func) not in ("import_module", "__import__") or not call.args:
        return None
    value = call.args[0].value if isinstance(call.args[0], ast.Constant) else None
    return value if isinstance(value, str) else None


def unit_of(name: str) -> str | None:
    """The unit of a dotted name: the longest one of the table that it lies in; None outside the package."""
    root, _, inner = name.partition(".")
    if root != "lorakernels":
        return None
    parts = inner.split(".")
    for length in (2, 1):
        unit = ".".join(parts[:length])
        if unit in UNITS and unit != FACADE:
            return unit
    return FACADE


def within(module: str, places: tuple[str, ...]) -> bool:
    """Whether the module is one of these places of the package, or in one."""
    return any(f"{module}.".startswith(f"lorakernels.{place}.") for place in places)


# ---------------------------------------------------------------------------------------------- the rules
# A rule gets the importing module and one of its imports, and returns what is wrong with it, or None.

Rule = Callable[[str, Import], "str | None"]


def ladder(module: str, imported: Import) -> str | None:
    importer, unit = unit_of(module), unit_of(imported.target)
    if unit is None or unit in (importer, FACADE) or unit in BESIDE:
        return None
    if importer == FACADE:
        return None if unit in LIBRARY else f"the package's __init__ may import the library only, not `{unit}`"
    if importer in BESIDE:
        allowed = BESIDE[importer].imports
        return None if unit in allowed else f"`{importer}` may import {', '.join(sorted(allowed))} only, not `{unit}`"
    assert importer is not None
    if ROW[unit] > ROW[importer]:
        return None
    where = "beside" if ROW[unit] == ROW[importer] else "above"
    return f"`{unit}` is {where} `{importer}`: a layer imports only those below it"


def beside(module: str, imported: Import) -> str | None:
    importer, unit = unit_of(module), unit_of(imported.target)
    if unit not in BESIDE or importer == unit or importer in BESIDE[unit].imported_by:
        return None
    importers = ", ".join(sorted(BESIDE[unit].imported_by)) or "nothing in the package"
    return f"`{unit}` may be imported by {importers}, not by `{importer}`"


def facade(module: str, imported: Import) -> str | None:
    importer = unit_of(module)
    if unit_of(imported.target) != FACADE or within(module, FACADE_USERS) or imported.target in FACADE_OPEN_NAMES:
        return None
    return f"`{importer}` reaches through the package's __init__ (or a unit that LADDER lacks): name the module meant"


def triton(module: str, imported: Import) -> str | None:
    importer = unit_of(module)
    if imported.target.split(".")[0] != "triton" or within(module, TRITON_PLACES):
        return None
    if importer in TRITON_UNITS_INSIDE_A_CALL:
        return f"`{importer}` may import triton inside a function only" if imported.at_top else None
    return f"only {', '.join(TRITON_PLACES)} may import triton, not `{importer}`"


def kernels_late(module: str, imported: Import) -> str | None:
    """Kernels import triton, so whoever is imported without it must reach them late: ops, and any other unit too."""
    importer = unit_of(module)
    if unit_of(imported.target) != "kernels" or not imported.at_top or within(module, TRITON_PLACES):
        return None
    return f"`{importer}` may import kernels inside a call only, never at the top of the module"


def hosts(module: str, imported: Import) -> str | None:
    root = imported.target.split(".")[0]
    if root not in HOSTS or module.startswith(tuple(f"lorakernels.integrations.{name}" for name in HOSTS)):
        return None
    if root in MEASURED.get(module, ()):
        return None
    return f"only {', '.join(f'integrations/{name}*.py' for name in sorted(HOSTS))} may import {root}"


RULES: tuple[Rule, ...] = (ladder, beside, facade, triton, kernels_late, hosts)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """One line for each import of `source` that breaks a rule."""
    return [
        f"{module}:{imported.line}: import of {imported.target} breaks the rule {rule.__name__!r}: {message}"
        for imported in sorted(set(imports_of(source, module, is_package)), key=lambda i: (i.line, i.target))
        for rule in RULES
        if (message := rule(module, imported)) is not None
    ]


# ---------------------------------------------------------------------------------------------- the package

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    parts = ("lorakernels", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def file_id(file: Path) -> str:
    return file.relative_to(PACKAGE.parent).as_posix()


def test_the_package_is_found() -> None:
    assert PACKAGE / "__init__.py" in FILES


@pytest.mark.parametrize("file", FILES, ids=file_id)
def test_file_has_a_place_in_the_table(file: Path) -> None:
    module = module_of(file)
    assert unit_of(module) != FACADE or module == FACADE, f"{file_id(file)} is in no unit: give it a row in LADDER"


@pytest.mark.parametrize("file", FILES, ids=file_id)
def test_imports_keep_the_layers(file: Path) -> None:
    found = violations(file.read_text(encoding="utf-8"), module_of(file), file.name == "__init__.py")
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("file", FILES, ids=file_id)
def test_file_is_not_too_long(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{file_id(file)} has {lines} lines, over {MAX_LINES}: split it"


# ---------------------------------------------------------------------------------------------- the checker itself

CAUGHT = [
    # importing module, source, the rule that it breaks
    ("lorakernels.ops", "from lorakernels.functional import lora_linear", ladder),
    ("lorakernels.ops", "def f():\n    from lorakernels.nn.linear import LoRALinear", ladder),
    ("lorakernels.kernels.shrink", "from lorakernels.eager import lora_linear", ladder),
    ("lorakernels.eager.linear", "def f():\n    import lorakernels.kernels.shrink as s", ladder),
    ("lorakernels.eager.linear", "def f():\n    from ..kernels import shrink", ladder),
    ("lorakernels.serving.store", "from ..integrations import peft", ladder),
    ("lorakernels.plan", "import lorakernels.backend", ladder),
    ("lorakernels.nn.linear", "import importlib\nimportlib.import_module('lorakernels.adapters.switch')", ladder),
    ("lorakernels.quant.nf4", "from importlib import import_module\nimport_module('..ops', __package__)", ladder),
    ("lorakernels.tools.demo", "from lorakernels.cli import main", ladder),
    ("lorakernels", "from lorakernels.cli import main", ladder),
    ("lorakernels.configs.table", "from lorakernels.tools.tune import tuner", ladder),
    ("lorakernels.configs.table", "def f():\n    from ..kernels import launch", ladder),
    ("lorakernels.functional", "from lorakernels.tools.tune.tuner import tune", ladder),
    ("lorakernels.cli", "def f():\n    from lorakernels.testing import cases", beside),
    ("lorakernels", "from lorakernels.testing import cases", beside),
    ("lorakernels.files.peft", "from lorakernels.nn.adapt import LAYERS", ladder),
    ("lorakernels.files.formats", "from lorakernels.adapters.load import load_adapter", ladder),
    ("lorakernels.nn.layer", "from lorakernels.files.update import MAGNITUDE", beside),
    ("lorakernels.nn.linear", "from lorakernels import lora_linear", facade),
    ("lorakernels.nn.linear", "import lorakernels", facade),
    ("lorakernels.nn.linear", "from lorakernels.no_such_unit import f", facade),
    ("lorakernels.ops", "def f():\n    import triton", triton),
    ("lorakernels.eager.linear", "import triton.language as tl", triton),
    ("lorakernels.configs.table", "from triton.runtime import driver", triton),
    ("lorakernels.tools.bench.run", "import triton", triton),
    ("lorakernels.tools.bench.run", "from lorakernels.kernels.launch import launch", kernels_late),
    ("lorakernels.tools.doctor", "from lorakernels import lora_linear", facade),
    ("lorakernels.backend", "try:\n    import triton\nexcept ImportError:\n    triton = None", triton),
    ("lorakernels.ops", "from lorakernels.kernels.shrink import shrink", kernels_late),
    ("lorakernels.ops", "from .kernels import shrink", kernels_late),
    ("lorakernels.ops", "class A:\n    from lorakernels.kernels import shrink", kernels_late),
    ("lorakernels.adapters.load", "def f():\n    import peft", hosts),
    ("lorakernels.integrations.common", "from transformers import Trainer", hosts),
    ("lorakernels.serving.server", "import vllm.lora", hosts),
]

ALLOWED = [
    (
        "lorakernels.cli",
        "import lorakernels\nfrom lorakernels.tools.compile_report import main\nimport lorakernels.tools.demo",
    ),
    ("lorakernels.integrations.peft", "import peft\nfrom lorakernels.nn.linear import LoRALinear"),
    ("lorakernels.nn.conv", "from .linear import LoRALinear\nfrom ..plan import BatchPlan"),
    ("lorakernels.ops", "def f():\n    from lorakernels.kernels.shrink import shrink\nimport lorakernels.eager"),
    ("lorakernels.ops", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .kernels import shrink"),
    ("lorakernels.backend", "def f():\n    import triton"),
    ("lorakernels.kernels.shrink", "import triton\nfrom lorakernels.configs.config import KernelConfig"),
    ("lorakernels.tools.compile_report", "import triton\nfrom lorakernels.kernels import launch"),
    ("lorakernels.testing.cases", "import torch\nfrom lorakernels.functional import lora_linear"),
    ("lorakernels.serving.server", "from lorakernels import __version__"),
    ("lorakernels.nn.linear", "import transformers_free_name, tritonic"),
]


@pytest.mark.parametrize(("module", "source", "rule"), CAUGHT)
def test_checker_catches(module: str, source: str, rule: Rule) -> None:
    found = violations(source, module)
    assert len(found) == 1, found
    assert module in found[0] and repr(rule.__name__) in found[0]


def test_checker_reads_relative_imports_of_a_package() -> None:
    assert violations("from .testing import cases", "lorakernels", is_package=True)
    assert violations("from ..tools import tune", "lorakernels.configs", is_package=True)
    assert violations("from ..ops import f", "lorakernels.kernels", is_package=True)
    assert not violations("from .shrink import f", "lorakernels.kernels", is_package=True)


@pytest.mark.parametrize(("module", "source"), ALLOWED)
def test_checker_allows(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_the_tests_mirror_the_package() -> None:
    """A folder of tests is named as the folder of the package that they hold to its word."""
    tests = PACKAGE.parent / "tests"
    folders = {path.parent.name for path in tests.glob("*/test_*.py")}
    assert folders <= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
