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
_VERDICTS = ("faster", "slower", "within the spread")


class Key(NamedTuple):
    """What makes two rows the same measurement."""

    operation: str  # the host's own rows have a case too
    case: AnyCase
    peer: str


@dataclass(frozen=True)
class Change:
    """One row of both runs: the ratio to the frozen layer as (p20, p50, p80), None where there is none."""

    key: Key
    before: Sequence[float] | None
    after: Sequence[float] | None
    clocks: tuple[str | None, str | None]
    verdict: str  # faster or slower, where the two spreads (p20 to p80) do not meet; or why that cannot be said

    @property
    def change(self) -> float | None:
        """After over before, less 1: negative is faster."""
        if self.before is None or self.after is None or self.verdict not in _VERDICTS:
            return None
        return self.after[1] / self.before[1] - 1


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
    old, new = ({Key(row["operation"], case_of(row), row["peer"]): row for row in rows} for rows in (before, after))
    changes = []
    for key in dict.fromkeys((*old, *new)):
        rows = old.get(key), new.get(key)
        if key.peer != "frozen" and any(row is not None and row["status"] != "skipped" for row in rows):
            changes.append(_change(key, *rows))
    devices = tuple(str(rows[0]["environment"]["device"]) for rows in (before, after))
    return Comparison(tuple(changes), (devices[0], devices[1]))


def _change(key: Key, *rows: Row | None) -> Change:
    first, second = (None if row is None else row.get("ratio") for row in rows)
    old, new = (None if row is None or "timing" not in row else clock(row["timing"]) for row in rows)
    notes = [
        f"{when}: {row['status']}, {row['reason']}"
        for when, row in zip(("before", "after"), rows, strict=True)
        if row is not None and row["status"] != "ok"
    ]
    if None not in (old, new) and old != new:
        notes.append(f"timed by {old} before, by {new} after")
    if notes or first is None or second is None:
        verdict = "; ".join(notes) or "not in both"
    else:
        verdict = "faster" if second[2] < first[0] else "slower" if second[0] > first[2] else "within the spread"
    return Change(key, first, second, (old, new), verdict)


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
    for verdict in _VERDICTS:
        console.print(f"{verdicts.count(verdict)} {verdict}")


def _text(ratio: Sequence[float] | None, timed_by: str | None) -> str:
    text = "-" if ratio is None else f"{ratio[1]:.3f} ({ratio[0]:.3f} … {ratio[2]:.3f})"
    return f"{text}, events" if timed_by == EVENTS else text
