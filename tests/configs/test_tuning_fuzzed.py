"""Tuning tables with mistakes of every kind: read, in part or whole, or refused; a launch has a config that fits.

`pytest tests/configs/test_tuning_fuzzed.py --hypothesis-profile long` tries many more.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import assume, example_of
from lorakernels.configs.heuristic import MULTI_OPERATIONS, OPERATIONS, Batch
from lorakernels.configs.table import choose, clear, load_table, misfit
from lorakernels.configs.table_file import Entry, Table, read_table, write_table

H100 = example_of("sm_90")
ENTRIES = [
    Entry(operation, 4096, 512, 512, 16, 2, KernelConfig(BLOCK_M=64), slots=8 if operation in MULTI_OPERATIONS else 1)
    for operation in (*OPERATIONS, *MULTI_OPERATIONS)
]
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([1, 16, 48, 1 << 40])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=3,
)
changes = st.lists(
    st.tuples(st.integers(0, 60), st.sampled_from(["replace", "drop", "rename"]), values), min_size=1, max_size=4
)

pytestmark = pytest.mark.usefixtures("own_tables")


def places(value: Any) -> list[tuple[dict[str, Any], str]]:
    """Every field of a table, with what it is in."""
    found: list[tuple[dict[str, Any], str]] = []
    if isinstance(value, dict):
        found += [(value, key) for key in value]
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        found += places(inner)
    return found


@given(made=changes)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_read_or_refused(made: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "table.json")
        write_table(path, Table("", H100.name, "sm_90", ENTRIES, {}))
        content = json.loads(path.read_text())
        for where, kind, value in made:
            # The fields of the table itself are few among those of entries.
            fields, key = places(content)[where % len(places(content))]
            old = fields.pop(key)
            if kind == "replace":
                fields[key] = value
            elif kind == "rename":
                fields[str(value)] = old
        path.write_text(json.dumps(content))
        try:
            read_table(path)
            load_table(path)
        except ValueError:
            pass
        try:
            with assume(H100, here=True):
                for entry in ENTRIES:
                    batch = Batch(8) if entry.operation in MULTI_OPERATIONS else None
                    config = choose(entry.operation, 4096, 512, 512, 16, 2, torch.device("cpu"), batch=batch)
                    assert misfit(entry.operation, config, 16, 2, False, "sm_90") is None
        finally:
            clear()
