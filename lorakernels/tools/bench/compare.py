"""Two runs side by side: what changed by more than the runs themselves scatter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from lorakernels.tools.bench.registry import Case, case_of
from lorakernels.tools.bench.timing import EVENTS, clock, spread

Row = dict[str, Any]
_VERDICTS = ("faster", "slower", "within the spread")


class Change(NamedTuple):
    """One measurement of both runs, None in a run that lacks it."""

    operation: str  # the host's own rows have a case too
    case: Case
    peer: str
    before: Row | None
    after: Row | None
    verdict: str  # faster or slower, where the two spreads (p20 to p80) do not meet; or why that cannot be said

    @property
    def change(self) -> float | None:
        """After over before, less 1: negative is faster."""
        if self.before is None or self.after is None or self.verdict not in _VERDICTS:
            return None
        return self.after["ratio"][1] / self.before["ratio"][1] - 1


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """Every row that is in either run, but for the frozen layer and what neither could run.

    Raises:
        ValueError: a run is empty.
    """
    if not before or not after:
        raise ValueError("one of the runs has no rows; expected a file that lorakernels bench --out wrote")
    old, new = ({(row["operation"], case_of(row), row["peer"]): row for row in rows} for rows in (before, after))
    changes = []
    for key in old | new:
        rows = old.get(key), new.get(key)
        if key[2] != "frozen" and any(row is not None and row["status"] != "skipped" for row in rows):
            changes.append(Change(*key, *rows, _verdict(*rows)))
    return changes


def _verdict(before: Row | None, after: Row | None) -> str:
    rows = {"before": before, "after": after}
    notes = [f"{when}: {row['status']}, {row['reason']}" for when, row in rows.items() if row and row["status"] != "ok"]
    if before and after and "timing" in before and "timing" in after:
        old, new = (f"{clock(row['timing'])} on {row['environment']['device']}" for row in (before, after))
        if old != new:
            notes.append(f"timed by {old} before, by {new} after")
    if notes or not (before and after and "ratio" in before and "ratio" in after):
        return "; ".join(notes) or "not in both"
    (low, _, high), (new_low, _, new_high) = before["ratio"], after["ratio"]
    return "faster" if new_high < low else "slower" if new_low > high else "within the spread"


def print_comparison(changes: Sequence[Change], console: Console) -> None:
    """A table of the changes, and how many there are of each kind."""
    table = Table("shape", "what", "before", "after", "change", "verdict", title="Time over the frozen layer's")
    for each in changes:
        percent = "" if each.change is None else f"{each.change:+.1%}"
        style = {"faster": "green", "slower": "red"}.get(each.verdict)
        ratios = (ratio_text(row) for row in (each.before, each.after))
        table.add_row(f"{each.operation} {each.case}", each.peer, *ratios, percent, each.verdict, style=style)
    console.print(table)
    for verdict in _VERDICTS:
        console.print(f"{sum(each.verdict == verdict for each in changes)} {verdict}")


def ratio_text(row: Row | None) -> str:
    """Of a row, with its spread."""
    if row is None or "ratio" not in row:
        return "-"
    return spread(row["ratio"]) + (", events" if clock(row["timing"]) == EVENTS else "")
