"""README's picture and the tables of docs/benchmarks.md, from results that are committed.

pytest bench/test_llama_step.py bench/test_mixed_generate.py --ratios bench/results/cpu.json
python bench/picture.py bench/results/cpu.json docs/speed.svg docs/benchmarks.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pages
from matplotlib.figure import Figure

from lorakernels.tools.bench.timing import spread

INK, QUIET = "#1f2328", "#656d76"
BARS = {"PEFT": "#d55e00", "accelerated": "#0072b2"}
# What a row says of itself, and its label.
STEPS = {
    ("dropout", 0.0): "training step",
    ("dropout", 0.1): "training step,\ndropout 0.1",
    ("batch", "one adapter"): "generate,\none adapter",
    ("batch", "in turn"): "generate,\neight adapters\nin one batch",
}


def steps_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """The percentiles of each bar over the frozen model, by the label of what was timed.

    Raises ValueError where a row is missing.
    """
    found = {}
    for (name, value), label in STEPS.items():
        row = next((row for row in rows if row.get(name) == value), None)
        if row is None:
            raise ValueError(f"there is no row with {name} = {value!r}; run both benchmarks of this file's first lines")
        found[label] = {bar: row[f"{bar} / {'frozen' if name == 'dropout' else 'base'}"] for bar in BARS}
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Bars with the spread of each, p20 … p80."""
    steps, where = steps_of(results["rows"]), results["environment"]
    matplotlib.rcParams.update({"svg.hashsalt": "", "font.size": 10, "text.color": INK, "axes.edgecolor": QUIET})
    figure = Figure(figsize=(6.2, 3.1), layout="constrained", facecolor="white")
    axes = figure.add_subplot(ylabel="× the frozen model's time")
    for at, (bar, colour) in zip((-0.19, 0.19), BARS.items(), strict=True):
        low, middle, high = zip(*(step[bar] for step in steps.values()), strict=True)
        places = [place + at for place in range(len(steps))]
        axes.bar(places, middle, width=0.34, color=colour, label="lorakernels" if bar == "accelerated" else bar)
        errors = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
        axes.errorbar(places, middle, yerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        for place, number, above in zip(places, middle, high, strict=True):
            axes.annotate(f"{number:.2f}", (place, above), (0, 4), textcoords="offset points", ha="center")
    axes.axhline(1, color=INK, linewidth=1)
    axes.set_xticks(range(len(steps)), steps)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.14)
    axes.legend(frameon=False, loc="upper left")
    versions = where["versions"]
    axes.set_title(
        f"A Llama of 4 layers, LoRA on all linear layers.\n{where['device']}, {where['threads']} threads, "
        f"torch {versions['torch']}, peft {versions['peft']}",
        loc="left", size=9, color=QUIET,
    )  # fmt: skip
    figure.savefig(path, metadata={"Date": None})


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Of docs/benchmarks.md: where it was measured, and every row that says the same things of itself in one table."""
    where, versions = results["environment"], results["environment"]["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "peft", "lorakernels"))
    made = {"where": f"{where['device']}, {where['threads']} threads; {packages}; {where['date'][:10]}."}
    for name, key in (("training", "dropout"), ("generate", "batch")):
        rows = [row for row in results["rows"] if key in row]
        cells = [[spread(cell) if isinstance(cell, list) else str(cell) for cell in row.values()] for row in rows]
        made[name] = pages.table(list(rows[0]), cells)
    return made


if __name__ == "__main__":
    source, target, page = map(Path, sys.argv[1:])
    found = json.loads(source.read_text())
    draw(found, target)
    pages.write(page, tables(found))
