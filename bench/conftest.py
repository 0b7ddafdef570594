"""Prints the ratios that the benchmarks found, below pytest-benchmark's own table, and keeps them as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from lorakernels.tools.bench.environment import describe
from lorakernels.tools.bench.timing import spread

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ratios", type=Path, help="a JSON file for the rows of the tables and where they were measured")


@pytest.fixture
def record_ratio(request: pytest.FixtureRequest) -> Any:
    """Keep a row for the table at the end; a ratio is its percentiles 20, 50 and 80."""
    return request.config.stash.setdefault(ROWS, []).append


def pytest_terminal_summary(config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    if path := config.getoption("--ratios"):
        path.write_text(json.dumps({"environment": describe(torch.device("cpu")), "rows": rows}, indent=1) + "\n")
    console = Console(width=140)
    for columns in dict.fromkeys(tuple(row) for row in rows):
        table = Table(*columns, title="Ratios of times in one run: median (p20 … p80)")
        for row in rows:
            if tuple(row) == columns:
                table.add_row(*(spread(cell) if isinstance(cell, list) else str(cell) for cell in row.values()))
        console.print(table)
