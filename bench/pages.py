"""Tables of a page that a command writes, each between its `<!-- table: name -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As Markdown has it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read(page: Path) -> dict[str, str]:
    """The tables that the page has, by name."""
    found = re.findall(r"<!-- table: (\w+) -->\n(.*?)<!-- end -->", page.read_text(encoding="utf-8"), re.DOTALL)
    return {name: text.strip() for name, text in found}


def write(page: Path, tables: Mapping[str, str]) -> None:
    """Put every table into its place.

    Raises:
        ValueError: the page has no place for one.
    """
    text = page.read_text(encoding="utf-8")
    for name, made in tables.items():
        place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, found = place.subn(lambda match, made=made: f"{match[1]}\n{made}\n\n{match[2]}", text)
        if not found:
            raise ValueError(f"{page} has no place for the table {name!r}: <!-- table: {name} --> and <!-- end -->")
    page.write_text(text, encoding="utf-8")
