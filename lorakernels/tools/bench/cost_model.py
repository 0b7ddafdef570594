"""The tables of docs/cost-model.md, made from the counts.

`python -m lorakernels.tools.bench.cost_model docs/cost-model.md` writes them into the page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lorakernels.configs.data_sheet import DATA_SHEETS
from lorakernels.configs.device import assume
from lorakernels.tools.bench.costs import GEMM_SHARE, GRAPHS, MEMORY_SHARES, Cost, cost, floor, predict
from lorakernels.tools.bench.registry import HEADLINE, Case

_MIB = 1 << 20
_NOT_MEASURED = "not measured"
_CASE = Case(*HEADLINE)
_DROPOUTS = (0.0, 0.1)
# The configs that the counts depend on are those of this architecture.
_ARCH = "sm_90"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _costs() -> list[tuple[str, float, Cost | None]]:
    """Label, dropout and cost of every graph; None where it has no dropout."""
    rows: list[tuple[str, float, Cost | None]] = []
    with assume(_ARCH):
        for name, graph in GRAPHS.items():
            for dropout in (0.0,) if name == "frozen" else _DROPOUTS:
                applies = graph.dropout or not dropout
                rows.append((graph.label, dropout, cost(name, replace(_CASE, dropout=dropout)) if applies else None))
    return rows


def graphs() -> str:
    """Extra traffic, operations and launches of every graph."""
    rows = []
    for label, dropout, own in _costs():
        numbers = ["no dropout", "", "", ""]
        if own is not None:
            extra = (f"{moved / _MIB:.0f}" for moved in (own.extra_tall, own.extra))
            numbers = [*extra, f"{own.flops / 1e9:.1f}", str(own.launches)]
        rows.append([label, f"{dropout:g}", *numbers, _NOT_MEASURED])
    head = ["graph", "p", "extra MiB in matrices of a row a token", "extra MiB, all", "GFLOP", "launches", "measured"]
    return _table(head, rows)


def predictions() -> str:
    """Time over the frozen layer's on every device, for memory at its best and at its usual share."""
    rows = []
    for label, dropout, own in _costs()[1:]:
        if own is not None:
            low, high = ([predict(own, _CASE, sheet, at) for sheet in DATA_SHEETS] for at in reversed(MEMORY_SHARES))
            cells = (f"{a:.2f} to {b:.2f}; {_NOT_MEASURED}" for a, b in zip(low, high, strict=True))
            rows.append([label, f"{dropout:g}", *cells])
    return _table(["graph", "p", *(sheet.name for sheet in DATA_SHEETS)], rows)


def floors() -> str:
    """The floor by tokens and rank, over all devices."""
    rows = []
    for M, r in ((1, 16), (64, 16), (1024, 16), (8192, 4), (8192, 16), (8192, 64), (8192, 256)):
        case = replace(_CASE, M=M, r=r)
        found = sorted({f"{floor(case, sheet):.3f}" for sheet in DATA_SHEETS})
        rows.append([str(M), str(r), found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"])
    return _table(["tokens", "r", "floor"], rows)


def devices() -> str:
    """The data sheets."""
    rows = [
        [
            sheet.name,
            f"{sheet.half / 1e12:g}",
            f"{sheet.single / 1e12:g}",
            f"{sheet.bandwidth / 1e12:g}",
            f"{sheet.l2_bytes >> 20}",
            sheet.source,
        ]
        for sheet in DATA_SHEETS
    ]
    return _table(["device", "16-bit TFLOP/s", "float32 TFLOP/s", "TB/s", "last-level cache, MiB", "source"], rows)


def assumptions() -> str:
    """The shares of the data sheet that predictions assume, in words."""
    low, high = (f"{share:.0%}".replace("%", " %") for share in MEMORY_SHARES)
    return (
        f"A matrix product runs at {GEMM_SHARE:.0%} of the dense peak; ".replace("%", " %")
        + f"memory at {high} of the bandwidth (the first figure) or {low} (the second)."
    )


TABLES: dict[str, Callable[[], str]] = {
    "graphs": graphs,
    "assumptions": assumptions,
    "predictions": predictions,
    "floors": floors,
    "devices": devices,
}


def write_tables(page: Path) -> None:
    """Put every table into its place in the page, between its `<!-- table: name -->` and `<!-- end -->`."""
    text = page.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        content = f"\n{table()}\n\n"
        match = place.search(text)
        if match is None:
            raise ValueError(f"{page} has no place for the table {name!r}: <!-- table: {name} --> and <!-- end -->")
        text = text[: match.start()] + match[1] + content + match[2] + text[match.end() :]
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_tables(Path(sys.argv[1]))
