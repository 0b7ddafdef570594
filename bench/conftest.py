"""Prints the ratios that the benchmarks found, below pytest-benchmark's own table."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

ROWS = pytest.StashKey[list[dict[str, Any]]]()


@pytest.fixture
def record_ratio(request: pytest.FixtureRequest) -> Any:
    """Keep a row for the table at the end."""
    return request.config.stash.setdefault(ROWS, []).append


def pytest_terminal_summary(config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    console = Console(width=140)
    for columns in dict.fromkeys(tuple(row) for row in rows):
        table = Table(*columns, title="Ratios of times in one run: median (p20 … p80)")
        for row in rows:
            if tuple(row) == columns:
                table.add_row(*map(str, row.values()))
        console.print(table)
