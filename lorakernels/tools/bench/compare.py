"""Two runs side by side: what changed by more than the runs themselves scatter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from lorakernels.tools.bench.registry import AnyCase, case_of
from lorakernels.tools.bench.timing import EVENTS, clock

Row = dict[str, Any]
_CANNOT_COMPARE = "not in both"


class Key(NamedTuple):
    """What makes two rows the same measurement."""

    operation: str  # the host's own rows have a case too
    case: AnyCase
    peer: str


@dataclass(frozen=True)
class Change:
    """One row of both runs: the ratio to the frozen layer as (p20, p50, p80), None where there is none.

    A `note` says why the two cannot be compared.
    """

    key: Key
    before: tuple[float, float, float] | None
    after: tuple[float, float, float] | None
    note: str = ""
    clocks: tuple[str | None, str | None] = (None, None)

    @property
    def change(self) -> float | None:
        """After over before, less 1: negative is faster."""
        if self.note or self.before is None or self.after is None:
            return None
        return self.after[1] / self.before[1] - 1

    @property
    def verdict(self) -> str:
        """Faster or slower, where the two spreads (p20 to p80) do not meet; else within the spread."""
        if self.note or self.before is None or self.after is None:
            return self.note or _CANNOT_COMPARE
        if self.after[2] < self.before[0]:
            return "faster"
        if self.after[0] > self.before[2]:
            return "slower"
        return "within the spread"


@dataclass(frozen=True)
class Comparison:
    changes: tuple[Change, ...]
    devices: tuple[str, str]


def compare(before: Sequence[Row], after: Sequence[Row]) -> Comparison:
    """Every row that is in either run, but for the frozen layer and what neither could run.

    Raises:
        ValueError: a run is empty.
    """
    if not before or not after:
        raise ValueError("one of the runs has no rows; expected a file that lorakernels bench --out wrote")
    old, new = ({_key(row): row for row in rows} for rows in (before, after))
    changes = []
    for key in dict.fromkeys((*old, *new)):
        first, second = old.get(key), new.get(key)
        if key.peer == "frozen" or (_unable(first) and _unable(second)):
            continue
        notes = [
            f"{when}: {row['status']}, {row['reason']}"
            for when, row in (("before", first), ("after", second))
            if row is not None and row["status"] != "ok"
        ]
        clocks = _clock(first), _clock(second)
        if None not in clocks and clocks[0] != clocks[1]:
            notes.append(f"timed by {clocks[0]} before, by {clocks[1]} after")
        changes.append(Change(key, _ratio(first), _ratio(second), "; ".join(notes), clocks))
    return Comparison(tuple(changes), (_device(before), _device(after)))


def print_comparison(comparison: Comparison, console: Console) -> None:
    """A table of the changes, and how many there are of each kind."""
    table = Table("shape", "what", "before", "after", "change", "verdict", title="Time over the frozen layer's")
    for change in comparison.changes:
        shape = f"{change.key.operation} {change.key.case}"
        percent = "" if change.change is None else f"{change.change:+.1%}"
        style = {"faster": "green", "slower": "red"}.get(change.verdict)
        before, after = map(_text, (change.before, change.after), change.clocks)
        table.add_row(shape, change.key.peer, before, after, percent, change.verdict, style=style)
    console.print(table)
    if comparison.devices[0] != comparison.devices[1]:
        console.print(f"Two devices: {comparison.devices[0]} before, {comparison.devices[1]} after.")
    verdicts = [change.verdict for change in comparison.changes]
    for verdict in ("faster", "slower", "within the spread"):
        console.print(f"{verdicts.count(verdict)} {verdict}")


def _key(row: Row) -> Key:
    return Key(row["operation"], case_of(row), row["peer"])


def _unable(row: Row | None) -> bool:
    return row is None or row["status"] == "skipped"


def _ratio(row: Row | None) -> tuple[float, float, float] | None:
    if row is None or "ratio" not in row:
        return None
    low, middle, high = row["ratio"]
    return low, middle, high


def _clock(row: Row | None) -> str | None:
    return None if row is None or "timing" not in row else clock(row["timing"])


def _device(rows: Sequence[Row]) -> str:
    return str(rows[0]["environment"]["device"])


def _text(ratio: tuple[float, float, float] | None, timed_by: str | None) -> str:
    text = "-" if ratio is None else f"{ratio[1]:.3f} ({ratio[0]:.3f} … {ratio[2]:.3f})"
    return f"{text}, events" if timed_by == EVENTS else text
