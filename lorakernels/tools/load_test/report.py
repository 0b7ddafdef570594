"""What a load test has found: figures, a table, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lorakernels.tools.load_test.traffic import Answer, Request

Row = dict[str, Any]
PERCENTILES = (50, 95, 99)
_TIMES = tuple((what, at) for what in ("first", "next") for at in PERCENTILES)
COLOURS = {"none": "#5b5b5b", "vllm": "#d55e00", "lorakernels": "#0072b2"}


def summary(requests: Sequence[Request], answers: Sequence[Answer], expected: Mapping[Any, Answer]) -> Row:
    """Of the answers that came; one is right if it begins as the answer to the same asked alone."""
    came = [answer for answer in answers if answer.error is None and answer.times]
    right = sum(
        answer.error is None
        and len(answer.tokens) > 0
        and answer.tokens == expected[request.model, request.prompt].tokens[: len(answer.tokens)]
        for request, answer in zip(requests, answers, strict=True)
    )
    ends = [
        request.arrives + answer.times[-1] for request, answer in zip(requests, answers, strict=True) if answer.times
    ]
    tokens = sum(sum(answer.counts) for answer in came)
    seconds = max(ends, default=0.0)
    return {
        "requests": len(requests),
        "failed": len(requests) - len(came),
        "right": right,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "first_ms": _percentiles([answer.times[0] for answer in came]),
        "between_ms": _percentiles([gap for answer in came for gap in gaps(answer)]),
        "errors": sorted({answer.error for answer in answers if answer.error})[:5],
    }


def gaps(answer: Answer) -> list[float]:
    """Seconds from token to token; those that came together share theirs."""
    return [
        (now - before) / count
        for before, now, count in zip(answer.times, answer.times[1:], answer.counts[1:], strict=False)
        for _ in range(count)
    ]


def _percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    found = np.percentile(seconds, PERCENTILES) * 1e3 if len(seconds) else [None] * len(PERCENTILES)
    return {f"p{at}": None if value is None else float(value) for at, value in zip(PERCENTILES, found, strict=True)}


def print_table(rows: Mapping[str, Row], console: Console | None = None) -> None:
    title, times = "ms to the first token, and to each next one", [f"{what}\np{at}" for what, at in _TIMES]
    table = Table("LoRA", "right", "lost", *times, "tokens/s", title=title, box=None)
    for name, row in rows.items():
        found = [*row["first_ms"].values(), *row["between_ms"].values()]
        cells = ("-" if each is None else f"{each:.0f}" if each >= 100 else f"{each:.1f}" for each in found)
        right, speed = f"{row['right']}/{row['requests']}", f"{row['tokens_per_second']:.1f}"
        table.add_row(name, right, str(row["failed"]), *cells, speed)
    console = console or Console(highlight=False)
    console.print(table)
    for name, row in rows.items():
        for error in row["errors"]:
            console.print(f"{name}: {error}", markup=False)


def draw(answers: Mapping[str, Sequence[Answer]], path: str | Path) -> None:
    """The share of requests that had their first token, and of tokens that came, within a time.

    Raises ModuleNotFoundError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('a picture needs matplotlib: pip install "lorakernels[demo]"') from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, label in zip(figure.subplots(1, 2, sharey=True), ("first token", "between tokens"), strict=True):
        for name, own in answers.items():
            came = [answer for answer in own if answer.times]
            seconds = [a.times[0] for a in came] if label == "first token" else [gap for a in came for gap in gaps(a)]
            if seconds:
                axes.ecdf([each * 1e3 for each in seconds], label=name, color=COLOURS.get(name), linewidth=1.8)
        axes.set_xscale("log")
        axes.set_xlabel(f"{label}, ms")
        axes.grid(True, color="#d8dee4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("share")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
