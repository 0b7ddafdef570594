"""Pictures of results: the ratio to the frozen layer, a roofline, and memory."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lorakernels.configs.data_sheet import data_sheet
from lorakernels.tools.bench.peers import PEERS
from lorakernels.tools.bench.registry import Case, case_of
from lorakernels.tools.bench.timing import EVENTS, clock

Row = dict[str, Any]

INK, QUIET = "#1f2328", "#656d76"
# Colours that most kinds of eye tell apart (ours are blue and green), and a marker for each peer.
_OURS = ("#5b5b5b", "#0072b2", "#56b4e9", "#004466", "#009e73", "#44aa99", "#00d8a0", "#117733")
_OTHERS = ("#cc79a7", "#7b3294", "#d55e00", "#f0e442", "#bf812d", "#882255", "#aa4499", "#e69f00")
STYLES = dict(zip(PEERS, zip(_OURS + _OTHERS, "os^DvxdP<>Xh*p8H", strict=True), strict=True))
_LOOK = {
    **{"axes.grid": True, "grid.color": "#d8dee4", "grid.linewidth": 0.7, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": QUIET},
    **{"axes.titlesize": 13.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlecolor": INK},
}


def plot(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Draw every picture that the rows have something for, into `folder`; the paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: no row has a time, or the rows are of several devices.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('pictures need matplotlib: pip install "lorakernels[bench]"') from error
    timed = [row for row in rows if row["status"] == "ok" and "ratio" in row and "beyond_linear_s" not in row]
    if not timed:
        raise ValueError("no row has a time; expected results of lorakernels bench with at least one right result")
    devices = sorted({row["environment"]["device"] for row in timed})
    if len(devices) > 1:
        raise ValueError(f"the rows are of {len(devices)} devices ({', '.join(devices)}); expected one in a picture")
    # What was measured twice counts once, as it was last.
    timed = list({(case_of(row), row["peer"]): row for row in timed}.values())
    layer, many = ([row for row in timed if ("adapters" in row) is batch] for batch in (False, True))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, tuple[list[Row], Callable[[list[Row], Path], bool]]] = {
        "ratio_by_tokens.png": (layer, partial(_ratio, over="M", label="tokens M")),
        "ratio_by_rank.png": (layer, partial(_ratio, over="r", label="rank r")),
        "roofline.png": (layer, _roofline),
        "memory.png": (layer, _memory),
        "ratio_by_adapters.png": (many, partial(_ratio, over="adapters", label="different adapters in the batch")),
        "adapter_memory.png": (many, _adapter_memory),
    }
    return [folder / name for name, (own, draw) in pictures.items() if own and draw(own, folder / name)]


def _ratio(rows: list[Row], path: Path, over: str, label: str) -> bool:
    """The ratio against one size, the others held where it has most values; False with fewer than two."""
    groups: dict[Case, list[Row]] = defaultdict(list)
    for row in rows:
        groups[case_of(row | {over: 1})].append(row)
    values = {held: sorted({row[over] for row in own}) for held, own in groups.items()}
    # Of those with as many, the largest layer.
    held = max(groups, key=lambda case: (len(values[case]), case.N * case.K, str(case)))
    xs, chosen = values[held], [row for row in groups[held] if row["peer"] != "frozen"]
    if len(xs) < 2:
        return False
    step = "forward and backward" if held.adapters is None else "a batch of many adapters"
    named = ", ".join(f"{name} = {value}" for name, value in held.as_dict().items() if name != over)
    titles = (f"Time over the frozen layer's, {step}", named)
    with _picture(path, rows, titles, label, "× frozen layer") as axes:
        for (colour, marker, fill, name), own in _by_peer(chosen):
            own = sorted(own, key=lambda row: row[over])
            at, (low, middle, high) = [row[over] for row in own], zip(*(row["ratio"] for row in own), strict=True)
            axes.plot(at, middle, c=colour, marker=marker, mfc=fill, label=name, linewidth=1.8, markersize=5.5)
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        for name, style in (("floor", "--"), ("memory_floor", ":")):
            floors = [next(row for row in chosen if row[over] == x).get(name) for x in xs]
            if all(floors):
                axes.plot(xs, floors, color=INK, linestyle=style, linewidth=1.2, label=name.replace("_", " "))
        axes.axhline(1.0, color=QUIET, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, map(str, xs))
        axes.minorticks_off()
    return True


def _roofline(rows: list[Row], path: Path) -> bool:
    """Useful operations a second against operations a byte; the device's two limits where they are known."""
    chosen, sheet = [row for row in rows if row["bytes"]], data_sheet(rows[0]["environment"]["device"])
    subtitle = "bytes as counted" + ("" if sheet else "; the device's limits are not known")
    labels = ("operations a byte", "operations a second")
    with _picture(path, rows, ("Roofline of a training step", subtitle), *labels) as axes:
        for (colour, marker, fill, name), own in _by_peer(chosen):
            at, reached = zip(*((r["flops"] / r["bytes"], r["flops"] / r["seconds"][1]) for r in own), strict=True)
            axes.scatter(at, reached, s=34, alpha=0.8, label=name, fc=fill, ec=colour, linewidths=1.2, marker=marker)
        for dtype in sorted({row["dtype"] for row in chosen}) if sheet else ():
            assert sheet is not None
            peak, corner = sheet.peak(dtype), sheet.peak(dtype) / sheet.bandwidth
            left, right = axes.get_xlim()[0], max(axes.get_xlim()[1], 4 * corner)
            axes.plot([left, corner, right], [left * sheet.bandwidth, peak, peak], color=INK, linewidth=1.2)
            axes.annotate(f"{sheet.name}, {dtype}", (corner, peak), xytext=(6, 5), textcoords="offset points", size=9)
        axes.set(xscale="log", yscale="log")
    return bool(chosen)


def _memory(rows: list[Row], path: Path) -> bool:
    """What is kept from forward to backward, for the largest case, and the peak of a step on a GPU."""
    largest = max(map(case_of, rows), key=lambda case: (case.M * (case.N + case.K), str(case)))
    own = [row for row in rows if case_of(row) == largest]
    bars = {"kept for the backward (without weights and adapters)": [row["kept_bytes"] for row in own]}
    if all(row["peak_bytes"] for row in own):
        bars["peak of a step"] = [row["peak_bytes"] for row in own]
    return _bars(rows, path, ("Memory of a training step", str(largest)), [row["label"] for row in own], bars)


def _adapter_memory(rows: list[Row], path: Path) -> bool:
    """What adapters of mixed ranks take as pages, and padded to the largest; False where no case has mixed ranks."""
    # Of those that differ in their tokens alone, one.
    cases = dict.fromkeys(dataclasses.replace(case_of(row), M=1) for row in rows if row["mixed"])
    sizes = {"pages, with their table": Case.paged_bytes, "padded to the largest rank": Case.padded_bytes}
    bars = {label: [size(case) for case in cases] for label, size in sizes.items()}
    labels = [f"{case.adapters} adapters, r = 8…{case.r},\n{case.K} → {case.N} {case.dtype}" for case in cases]
    return _bars(rows, path, ("Memory of adapters of mixed ranks, one layer", "by formula"), labels, bars)


def _bars(rows: list[Row], path: Path, titles: tuple[str, str], labels: list[str], bars: dict[str, list[int]]) -> bool:
    """Bytes as bars, one or two a label; False where there are none."""
    if not labels:
        return False
    unit, scale = ("MiB", 1 << 20) if max(map(max, bars.values())) >= 1 << 20 else ("KiB", 1 << 10)
    thick = 0.62 if len(bars) == 1 else 0.38
    with _picture(path, rows, titles, unit, "") as axes:
        for number, (label, numbers) in enumerate(bars.items()):
            places = [place + (number - (len(bars) - 1) / 2) * thick for place in range(len(labels))]
            sizes, colour = [value / scale for value in numbers], ("#0072b2", "#d55e00")[number]
            drawn = axes.barh(places, sizes, height=thick, color=colour, label=label)
            axes.bar_label(drawn, fmt="%.4g", padding=4, color=INK, size=9)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.grid(visible=False)
    return True


@contextmanager
def _picture(path: Path, rows: list[Row], titles: tuple[str, str], x: str, y: str) -> Iterator[Any]:
    """Axes to draw on; at the end they get a legend and where it was measured, and are saved."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: the caller's backend and figures stay as they are

    where, versions = rows[0]["environment"]["device"], rows[0]["environment"]["versions"]
    subtitle = f"{titles[1]}.  {where}, torch {versions['torch']}, triton {versions['triton']}"
    with matplotlib.rc_context(_LOOK):
        figure = Figure(figsize=(9.5, 5.4), dpi=130, facecolor="white", layout="constrained")
        axes = figure.add_subplot(xlabel=x, ylabel=y, title=f"{titles[0]}\n")
        yield axes
        axes.text(0, 1.02, subtitle, transform=axes.transAxes, color=QUIET, size=9)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        figure.savefig(path)


def _by_peer(rows: list[Row]) -> Iterator[tuple[tuple[str, str, str, str], list[Row]]]:
    """Colour, marker, its fill, label and rows of each peer; what is timed by events stands apart, and is hollow."""
    for name, (colour, marker) in STYLES.items():
        for events in (False, True):
            own = [row for row in rows if row["peer"] == name and (clock(row["timing"]) == EVENTS) is events]
            if own:
                label = f"{own[0]['label']} (events)" if events else own[0]["label"]
                yield (colour, marker, "white" if events else colour, label), own
