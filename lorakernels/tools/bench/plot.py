"""Pictures of results: the ratio to the frozen layer, a roofline, and memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorakernels.configs.data_sheet import DataSheet, data_sheet
from lorakernels.tools.bench.multi import padded_bytes, paged_bytes
from lorakernels.tools.bench.registry import Case, MultiCase, case_of
from lorakernels.tools.bench.timing import EVENTS, clock

Row = dict[str, Any]

INK, QUIET, GRID = "#1f2328", "#656d76", "#d8dee4"
BLUE, ORANGE = "#0072b2", "#d55e00"
# Okabe and Ito's colours, which most kinds of eye tell apart, and a marker; ours are blue and green.
STYLES = {
    "frozen": ("#5b5b5b", "o"),
    "ours-auto": (BLUE, "o"),
    "ours-torch": ("#56b4e9", "s"),
    "ours-triton": ("#004466", "^"),
    "ours-fused": ("#009e73", "D"),
    "ours-split": ("#00d8a0", "v"),
    "eager": ("#cc79a7", "<"),
    "compile": ("#7b3294", ">"),
    "peft": (ORANGE, "P"),
    "unsloth-order": ("#e69f00", "X"),
    "lorafusion-order": ("#8c510a", "h"),
    "unsloth": ("#f0e442", "X"),
    "lorafusion": ("#bf812d", "h"),
    "ours-stacks": ("#009e73", "D"),
    "loop": ("#cc79a7", "<"),
    "bmm": ("#7b3294", ">"),
    "vllm": ("#e69f00", "X"),
}
_LAYER_SIZES = ("N", "K", "M", "r", "dropout", "dtype")
_MULTI_SIZES = ("N", "K", "M", "adapters", "r", "mixed", "dtype")
_SIZE = (9.5, 5.4)


def plot(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Draw every picture that the rows have something for, into `folder`; the paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: no row has a time, or the rows are of several devices.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'bench plot needs matplotlib, which is not installed; pip install "lorakernels[bench]"'
        ) from None
    operations = (Case.operation, MultiCase.operation)
    timed = [row for row in rows if row["status"] == "ok" and row["operation"] in operations and "ratio" in row]
    if not timed:
        raise ValueError("no row has a time; expected results of lorakernels bench with at least one right result")
    devices = sorted({row["environment"]["device"] for row in timed})
    if len(devices) > 1:
        raise ValueError(f"the rows are of {len(devices)} devices ({', '.join(devices)}); expected one in a picture")
    # What was measured twice counts once, as it was last.
    timed = list({(case_of(row), row["peer"]): row for row in timed}.values())
    layer, multi = ([row for row in timed if row["operation"] == operation] for operation in operations)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures: tuple[tuple[str, list[Row], Callable[[Sequence[Row], Path], bool]], ...] = (
        ("ratio_by_tokens.png", layer, lambda rows, path: _ratio(rows, path, "M", "tokens M", _LAYER_SIZES)),
        ("ratio_by_rank.png", layer, lambda rows, path: _ratio(rows, path, "r", "rank r", _LAYER_SIZES)),
        ("roofline.png", layer, _roofline),
        ("memory.png", layer, _memory),
        (
            "ratio_by_adapters.png",
            multi,
            lambda rows, path: _ratio(rows, path, "adapters", "different adapters in the batch", _MULTI_SIZES),
        ),
        ("adapter_memory.png", multi, _adapter_memory),
    )
    return [folder / name for name, own, draw in pictures if own and draw(own, folder / name)]


def _ratio(rows: Sequence[Row], path: Path, over: str, label: str, sizes: Sequence[str]) -> bool:
    """The ratio against one size, the others held at their most frequent values; False with fewer than two points."""
    fixed = [name for name in sizes if name != over]

    def held(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in fixed)

    points = Counter(group for group, _ in {(held(row), row[over]) for row in rows})
    most = max(points.values())
    if most < 2:
        return False
    # Of those with as many points, the largest layer.
    group = max((group for group, count in points.items() if count == most), key=lambda g: (g[0] * g[1], str(g)))
    chosen = [row for row in rows if held(row) == group and row["peer"] != "frozen"]
    figure, axes = _figure()
    xs = sorted({row[over] for row in chosen})
    for peer, own in _by_peer(chosen):
        own = sorted(own, key=lambda row: row[over])
        low, middle, high = zip(*(row["ratio"] for row in own), strict=True)
        colour, marker = STYLES[peer]
        at = [row[over] for row in own]
        fill = "white" if _by_events(own[0]) else colour
        axes.plot(at, middle, c=colour, marker=marker, mfc=fill, label=_label(own[0]), linewidth=1.8, markersize=5.5)
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    for name, style in (("floor", "--"), ("memory_floor", ":")):
        floors = [next(row for row in chosen if row[over] == x).get(name) for x in xs]
        if all(floors):
            axes.plot(xs, floors, color=INK, linestyle=style, linewidth=1.2, label=name.replace("_", " "))
    axes.axhline(1.0, color=QUIET, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, map(str, xs))
    axes.minorticks_off()
    named = ", ".join(f"{name} = {value}" for name, value in zip(fixed, group, strict=True))
    step = "a batch of many adapters" if "adapters" in sizes else "forward and backward"
    _finish(figure, axes, f"Time over the frozen layer's, {step}", named, rows)
    axes.set(xlabel=label, ylabel="× frozen layer")
    figure.savefig(path)
    return True


def _roofline(rows: Sequence[Row], path: Path) -> bool:
    """Useful operations a second against operations a byte; the device's two limits where they are known."""
    chosen = [row for row in rows if row.get("bytes") and row.get("flops")]
    if not chosen:
        return False
    figure, axes = _figure()
    for peer, own in _by_peer(chosen):
        colour, marker = STYLES[peer]
        at = [row["flops"] / row["bytes"] for row in own]
        reached = [row["flops"] / row["seconds"][1] for row in own]
        fill, edge = ("none", 1.2) if _by_events(own[0]) else (colour, 0)
        look = {"facecolors": fill, "edgecolors": colour, "linewidths": edge, "marker": marker}
        axes.scatter(at, reached, s=34, alpha=0.8, label=_label(own[0]), **look)
    sheet = _sheet(rows)
    if sheet is not None:
        for dtype in sorted({row["dtype"] for row in chosen}):
            peak = sheet.peak(dtype)
            corner = peak / sheet.bandwidth
            left, right = axes.get_xlim()[0], max(axes.get_xlim()[1], 4 * corner)
            axes.plot([left, corner, right], [left * sheet.bandwidth, peak, peak], color=INK, linewidth=1.2)
            axes.annotate(f"{sheet.name}, {dtype}", (corner, peak), xytext=(6, 5), textcoords="offset points", size=9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    subtitle = "bytes and operations as counted" + ("" if sheet else "; the device's limits are not known")
    _finish(figure, axes, "Roofline of a training step", subtitle, rows)
    axes.set(xlabel="operations a byte", ylabel="operations a second")
    figure.savefig(path)
    return True


def _memory(rows: Sequence[Row], path: Path) -> bool:
    """What is kept from forward to backward, for the largest case, and the peak of a step on a GPU."""
    measured = [row for row in rows if row.get("kept_bytes") is not None]
    if not measured:
        return False
    largest = max((_layer_case(row) for row in measured), key=lambda case: (case.M * (case.N + case.K), case))
    own = [row for row in measured if case_of(row) == largest]
    bars = {"kept for the backward (without weights and adapters)": [row["kept_bytes"] for row in own]}
    peaks = [row["peak_bytes"] for row in own]
    if all(peaks):
        bars["peak of a step"] = peaks
    _bars(rows, path, "Memory of a training step", str(largest), [row["label"] for row in own], bars)
    return True


def _adapter_memory(rows: Sequence[Row], path: Path) -> bool:
    """What adapters of mixed ranks take as pages, and padded to the largest; False where no case has mixed ranks."""
    cases = [case for case in dict.fromkeys(case_of(row) for row in rows) if isinstance(case, MultiCase) and case.mixed]
    # Of those that differ in their tokens alone, one.
    held = list({(case.N, case.K, case.adapters, case.r, case.dtype): case for case in cases}.values())
    if not held:
        return False
    sizes = {"pages, with their table": paged_bytes, "padded to the largest rank": padded_bytes}
    bars = {label: [size(case) for case in held] for label, size in sizes.items()}
    labels = [f"{case.adapters} adapters, r = 8…{case.r},\n{case.K} → {case.N} {case.dtype}" for case in held]
    _bars(rows, path, "Memory of adapters of mixed ranks, one layer", "by formula", labels, bars)
    return True


def _bars(
    rows: Sequence[Row], path: Path, title: str, subtitle: str, labels: list[str], bars: dict[str, list[int]]
) -> None:
    """Bytes as bars, one or two a label."""
    figure, axes = _figure()
    most = max(max(numbers) for numbers in bars.values())
    unit, scale = ("MiB", 1 << 20) if most >= 1 << 20 else ("KiB", 1 << 10)
    thick = 0.62 if len(bars) == 1 else 0.38
    for number, (label, numbers) in enumerate(bars.items()):
        places = [place + (number - (len(bars) - 1) / 2) * thick for place in range(len(labels))]
        colour = (BLUE, ORANGE)[number]
        drawn = axes.barh(places, [value / scale for value in numbers], height=thick, color=colour, label=label)
        axes.bar_label(drawn, fmt="%.4g", padding=4, color=INK, size=9)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    _finish(figure, axes, title, subtitle, rows)
    axes.set(xlabel=unit)
    axes.grid(visible=False)
    figure.savefig(path)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: the caller's backend and figures stay as they are

    figure = Figure(figsize=_SIZE, dpi=130, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(QUIET)
    return figure, axes


def _finish(figure: Any, axes: Any, title: str, subtitle: str, rows: Sequence[Row]) -> None:
    environment = rows[0]["environment"]
    versions = environment["versions"]
    where = f"{environment['device']}, torch {versions['torch']}, triton {versions['triton']}"
    axes.set_title(f"{title}\n", loc="left", size=13.5, color=INK, weight="bold")
    axes.text(0, 1.02, f"{subtitle}.  {where}", transform=axes.transAxes, color=QUIET, size=9)
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _by_peer(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """In the order of the styles; what is timed by events stands apart from what is timed by a CUDA graph."""
    grouped = [
        (name, [row for row in rows if row["peer"] == name and _by_events(row) is events])
        for name in STYLES
        for events in (False, True)
    ]
    return [(name, own) for name, own in grouped if own]


def _by_events(row: Row) -> bool:
    return clock(row["timing"]) == EVENTS


def _label(row: Row) -> str:
    return f"{row['label']} (events)" if _by_events(row) else str(row["label"])


def _layer_case(row: Row) -> Case:
    case = case_of(row)
    assert isinstance(case, Case)
    return case


def _sheet(rows: Sequence[Row]) -> DataSheet | None:
    return data_sheet(rows[0]["environment"]["device"])
