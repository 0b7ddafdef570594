"""The documentation holds: its code runs, its commands, names and files are there, its links lead somewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakernels as lk
from lorakernels import cli

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import pages
import picture

DOCS = sorted((ROOT / "docs").glob("*.md"))
WITH_CODE = [ROOT / "README.md", *DOCS]
PAGES = [*WITH_CODE, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb"))

NOT_RUN = "<!-- not run -->"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?<![\w./-])lorakernels +([a-z][\w-]*)")
MODULE = re.compile(r"python -m (lorakernels[\w.]*)")
PLACES = ("lorakernels/", "tests/", "docs/", "examples/")


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    run: bool


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page; `line` is that of the code's first line."""
    for match in FENCE.finditer(text):
        before = text[: match.start()].rstrip()
        yield Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1, not before.endswith(NOT_RUN))


def prose(text: str) -> str:
    return FENCE.sub("", text)


def spans(text: str) -> list[str]:
    return SPAN.findall(prose(text))


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("page", WITH_CODE, ids=page_id)
def test_code_runs(page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python":
            # Blank lines before it, so that a traceback names the line of the page.
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            if block.run:
                exec(code, namespace)


def test_examples_are_short_and_listed() -> None:
    """`pytest -m slow tests/test_examples.py` runs them."""
    listed = re.findall(r"^\| `(examples/\S+)` \|", (ROOT / "docs" / "get-started.md").read_text(), re.MULTILINE)
    assert sorted(listed) == [page_id(example) for example in EXAMPLES]
    for example in EXAMPLES:
        assert example.suffix != ".py" or len(example.read_text().splitlines()) <= 60, example


@every_page
def test_commands_are_real(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shell = [block.code for block in blocks(text) if block.language != "python"]
    known = {command.name for command in cli.COMMANDS}
    for code in (*shell, *spans(text)):
        assert set(COMMAND.findall(code)) <= known, code
        for module in MODULE.findall(code):
            assert importlib.util.find_spec(module) is not None, module
    for line in "\n".join(shell).splitlines():
        for words in split_commands(line):
            if words[0] == "lorakernels":
                cli.parser().parse_args(words[1:])  # SystemExit, if an option is not there


def split_commands(line: str) -> Iterator[list[str]]:
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), "&&"]:
        if word != "&&":
            words.append(word)
        elif words:
            yield words
            words = []


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page.read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page_id(page)} links to {target}"
        if page in DOCS:
            assert ROOT / "docs" in file.parents, f"{page_id(page)} links to {target}, which the site has not"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page_id(page)} links to {target}"


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ +(.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@every_page
def test_named_files_and_names_exist(page: Path) -> None:
    for span in spans(page.read_text(encoding="utf-8")):
        if span.startswith(PLACES) and re.fullmatch(r"[\w./-]+", span):
            assert (ROOT / span).exists(), f"{page_id(page)} names {span}"
        for name in re.findall(r"\blk\.(\w+)", span):
            assert name in lk.__all__, f"{page_id(page)} names lk.{name}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(navigation) == [page.name for page in DOCS]


def test_every_command_field_and_public_name_is_documented() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in WITH_CODE)
    missing = [command.name for command in cli.COMMANDS if f"lorakernels {command.name}" not in text]
    table = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    missing += [field.name for field in dataclasses.fields(lk.LoRAConfig) if f"| `{field.name}` |" not in table]
    missing += [name for name in lk.__all__ if f"::: lorakernels.{name}\n" not in text and name != "__version__"]
    assert not missing, f"not documented: {missing}"


# What a row of README's tables says of a configuration; of fields with a name alone each is tried by itself.
ROWS: dict[str, list[dict[str, Any]]] = {
    "LoRA, rsLoRA": [{}, {"use_rslora": True}, {"lora_dropout": 0.5}, {"r": 3}],
    "DoRA": [{"use_dora": True}, {"lora_bias": True}, {"bias": "all"}],
    "QA-LoRA": [{"use_qalora": True, "qalora_group_size": 8}],
    "starts](": [{"init_lora_weights": start} for start in ("kaiming", "gaussian", "orthogonal")],
    "starts that change": [{"init_lora_weights": start} for start in ("pissa", "olora")],
}


@pytest.mark.parametrize("column", [1, 2], ids=["float", "packed"])
def test_the_tables_of_what_is_supported(column: int, elsewhere: None) -> None:
    """In plain torch: what trains and what is refused, what is served and what is refused, by name."""

    def model() -> torch.nn.Module:
        layers = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 64))
        return layers if column == 1 else lk.quantize(layers, "int4", block=32)

    training, serving = (
        [line for line in part.splitlines() if line.startswith("| ")]
        for part in (ROOT / "README.md").read_text().split("## What is supported")[1].split("| serving |")
    )
    x = torch.randn(2, 64)
    for name, settings in ROWS.items():
        (cell,) = (line.split(" | ")[column] for line in training if name in line)
        served = name == "LoRA, rsLoRA" or name.startswith("starts")
        assert any(name in line and "refused" in line.split(" | ")[1] for line in serving) is not served, name
        for fields in settings:
            config = lk.LoRAConfig(**{"r": 4, "target_modules": "all-linear", **fields})
            if cell == "refused":
                with pytest.raises(ValueError, match="init_lora_weights"):
                    lk.inject(model(), config)
                continue
            assert cell == "both"
            adapted = lk.inject(model(), config)
            adapted(x).sum().backward()
            lk.save_adapter(adapted, "an-adapter")
            store = lk.AdapterStore(base := model(), max_adapters=2, max_rank=8)
            if served:
                store.load("one", "an-adapter")
                with torch.no_grad(), store.batch(["one", None]):
                    base(x)
            else:
                with pytest.raises(lk.AdapterFileError, match="is not served"):
                    store.load("one", "an-adapter")


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_the_picture_and_the_tables_are_of_committed_results(tmp_path: Path) -> None:
    """Their numbers are those of the results, and the rows that they are of are there."""
    results = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())
    shown = re.findall(r"<!-- (\d\.\d\d) -->", (ROOT / "docs" / "speed.svg").read_text())
    bars = [[step[bar][1] for step in picture.steps_of(results["rows"]).values()] for bar in picture.BARS]
    assert shown == [f"{number:.2f}" for number in itertools.chain(*bars)]
    picture.draw(results, tmp_path / "again.svg")
    assert re.findall(r"<!-- (\d\.\d\d) -->", (tmp_path / "again.svg").read_text()) == shown
    assert pages.read(ROOT / "docs" / "benchmarks.md") == picture.tables(results)
    with pytest.raises(ValueError, match=r"no row with dropout = 0\.0"):
        picture.steps_of(results["rows"][1:])
