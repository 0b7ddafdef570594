"""Results as one HTML file that needs nothing else: where they are from, the worst first, pictures, a former run."""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorakernels.tools.bench.compare import compare, ratio_text
from lorakernels.tools.bench.plot import plot
from lorakernels.tools.bench.registry import case_of

Row = dict[str, Any]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: 4px 10px; text-align: left; vertical-align: top }
td:not(:last-child) { white-space: nowrap }
th { color: var(--quiet); font-weight: 600 }
img { max-width: 100%; background: #fff; border-radius: 6px; margin: 0.5rem 0 }
.wide { overflow-x: auto }
.bad { color: #d1242f }
.good { color: #1a7f37 }
"""


def write_report(rows: Sequence[Row], path: str | Path, former: Sequence[Row] | None = None) -> Path:
    """One file: environment, the worst rows first, what was left out, pictures, and the changes since `former`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: no row has a time, or the rows are of several devices; a run is empty.
    """
    with tempfile.TemporaryDirectory() as folder:
        pictures = [base64.b64encode(picture.read_bytes()).decode() for picture in plot(rows, folder)]
    where = rows[0]["environment"]
    parts = [
        f"<h1>lorakernels bench</h1><p>{_text(where['device'])}, {_text(where['date'])}</p>",
        "<h2>Worst first</h2><p>The time over the frozen layer's, p20 … p80 in brackets; how near it is to the "
        "floor, the least there can be; and the fastest of the others on the same shape.</p>",
        _table(("shape", "what", "× frozen", "floor", "share", "kept, MiB", "launches", "others"), _worst(rows)),
        *(["<h2>Since the former run</h2>", _changes(former, rows)] if former is not None else []),
        "<h2>Pictures</h2>",
        *(f'<p><img alt="" src="data:image/png;base64,{picture}"></p>' for picture in pictures),
        "<h2>A call's time on the host</h2>",
        _table(("call", "by", "µs", "beyond torch's linear, µs"), _host(rows)),
        "<h2>Where it was measured</h2>",
        _table(("", ""), ((name, _text(value)) for name, value in where.items())),
        "<h2>What has no time</h2>",
        _table(("shape", "what", "why"), _without_time(rows)),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
    page = f'<!doctype html><html lang="en"><head>{head}<title>lorakernels bench</title></head><body>'
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([page, *parts, "</body></html>\n"]), encoding="utf-8")
    return path


def _worst(rows: Sequence[Row]) -> Iterable[tuple[str, ...]]:
    """Our rows: those that are wrong or broke, then by how far they are from the floor."""
    ours = [row for row in rows if row["peer"].startswith("ours") and "beyond_linear_s" not in row]
    ours = [row for row in ours if row["status"] != "skipped"]
    for row in sorted(ours, key=lambda row: row["floor"] / row["ratio"][1] if "ratio" in row else 0.0):
        shape = str(case_of(row))
        if row["status"] != "ok":
            yield shape, row["label"], f'<span class="bad">{row["status"]}: {_text(row["reason"])}</span>', *[""] * 5
            continue
        beside = [other for other in rows if other.get("ratio") and case_of(other) == case_of(row)]
        beside = [other for other in beside if not other["peer"].startswith(("ours", "frozen"))]
        best = min(beside, key=lambda other: other["ratio"][1], default=None)
        yield (
            shape,
            row["label"],
            ratio_text(row),
            f"{row['floor']:.3f}",
            f"{row['floor'] / row['ratio'][1]:.0%}" if "ratio" in row else "",
            f"{row['kept_bytes'] / 2**20:.2f}",
            _text(row["launches"]),
            f"{ratio_text(best)} {_text(best['label'])}" if best else "",
        )


def _changes(former: Sequence[Row], rows: Sequence[Row]) -> str:
    """Slower first, last what cannot be compared."""
    colours = {"slower": "bad", "faster": "good"}
    changes = sorted(compare(former, rows), key=lambda each: (each.change is None, -(each.change or 0.0)))
    cells = (
        (
            f"{each.operation} {each.case}",
            each.peer,
            ratio_text(each.before),
            ratio_text(each.after),
            "" if each.change is None else f"{each.change:+.1%}",
            f'<span class="{colours.get(each.verdict, "")}">{_text(each.verdict)}</span>',
        )
        for each in changes
    )
    return _table(("shape", "what", "before", "after", "change", "verdict"), cells)


def _host(rows: Sequence[Row]) -> Iterable[tuple[str, ...]]:
    for row in rows:
        if "beyond_linear_s" in row:
            yield (
                row["operation"],
                row["label"],
                *(f"{row[key][1] * 1e6:.1f}" for key in ("seconds", "beyond_linear_s")),
            )


def _without_time(rows: Sequence[Row]) -> Iterable[tuple[str, ...]]:
    for row in rows:
        if row["status"] != "ok":
            yield str(case_of(row)), row["label"], f"{row['status']}: {_text(row['reason'])}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{name} {part}" for name, part in value.items() if part is not None)
    return html.escape("-" if value is None else str(value))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML."""
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    if not lines:
        return "<p>None.</p>"
    first = "".join(f"<th>{cell}</th>" for cell in head)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{first}</tr>\n{body}</table></div>'
