"""The demo's picture: what the network and its adapters read in each world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakernels.tools.demo.digits import CLASSES, accuracy

RIGHT, WRONG = "#1a7f37", "#cf222e"
BASE, ADAPTER = "#8c959f", "#0969da"
INK, QUIET = "#1f2328", "#656d76"


@dataclass(frozen=True)
class Strip:
    """The test set of one world, and the logits of the base and of its adapter."""

    world: str
    images: torch.Tensor
    labels: torch.Tensor
    base: torch.Tensor
    adapter: torch.Tensor | None = None


def draw(strips: Sequence[Strip], path: Path, adapter: str) -> Path:
    """Save the picture at `path`: the first test digit of each class in each world, and the accuracies."""
    from matplotlib.figure import Figure  # not pyplot: the caller's backend and figures stay as they are

    figure: Any = Figure(figsize=(15, 1.6 * len(strips) + 1), dpi=110, facecolor="white")
    title = {"x": 0.015, "y": 0.965, "ha": "left", "fontsize": 18, "color": INK}
    figure.suptitle("One frozen network, three changed worlds, an adapter for each", **title)
    left, right = figure.subfigures(1, 2, width_ratios=(2.05, 1))
    grid = {"left": 0.135, "right": 0.99, "top": 0.88, "bottom": 0.085, "hspace": 0.66}
    for row, strip in zip(left.subplots(len(strips), CLASSES, gridspec_kw=grid), strips, strict=True):
        _draw_strip(row, strip)
    _draw_bars(right.add_axes((0.1, 0.085, 0.77, 0.75)), strips, adapter)
    figure.savefig(path)
    return path


def _draw_strip(row: Sequence[Any], strip: Strip) -> None:
    texts = [(-0.17, "base reads", strip.base)]
    if strip.adapter is not None:
        texts.append((-0.42, "adapter reads", strip.adapter))
    for digit, cell in enumerate(row):
        first = int((strip.labels == digit).nonzero()[0])
        cell.imshow(strip.images[first].cpu().numpy(), cmap="gray_r", vmin=-1, vmax=1)
        cell.set(xticks=[], yticks=[])
        cell.spines[:].set_color("#d0d7de")
        middle = {"transform": cell.transAxes, "ha": "center", "va": "center"}
        for height, _, logits in texts:
            read = int(logits[first].argmax())
            mark, colour = ("✓", RIGHT) if read == digit else ("✗", WRONG)
            cell.text(0.5, height, f"{read} {mark}", color=colour, fontsize=13, weight="bold", **middle)
    label = {"transform": row[0].transAxes, "ha": "right", "va": "center", "x": -0.2}
    row[0].text(y=0.5, s=strip.world, color=INK, fontsize=14, **label)
    for height, text, _ in texts:
        row[0].text(y=height, s=text, color=QUIET, fontsize=10.5, **label)


def _draw_bars(axes: Any, strips: Sequence[Strip], adapter: str) -> None:
    for place, strip in enumerate(strips):
        bars = [(strip.base, BASE)] if strip.adapter is None else [(strip.base, BASE), (strip.adapter, ADAPTER)]
        for i, (logits, colour) in enumerate(bars):
            height = 100 * accuracy(logits, strip.labels)
            x = place + 0.4 * (i - (len(bars) - 1) / 2)
            axes.bar(x, height, 0.37, color=colour)
            axes.text(x, height + 1.2, f"{height:.0f}", ha="center", color=INK, fontsize=12)
    axes.axhline(100 / CLASSES, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(len(strips) - 0.45, 100 / CLASSES, "chance", va="center", color=QUIET, fontsize=11)
    axes.set(xticks=range(len(strips)), ylim=(0, 104), yticks=range(0, 101, 20), xlim=(-0.5, len(strips) - 0.48))
    axes.set_xticklabels([strip.world for strip in strips], fontsize=13, color=INK)
    axes.tick_params(length=0, colors=QUIET)
    title = f"accuracy on {len(strips[0].labels)} unseen digits, %"
    axes.set_title(title, loc="left", fontsize=13, color=INK, pad=32)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.yaxis.grid(color="#eaeef2")
    handles = [axes.bar(0, 0, color=colour) for colour in (BASE, ADAPTER)]
    place_of_legend: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.03, 1), "ncols": 2}
    axes.legend(handles, ["frozen base", f"with {adapter}"], frameon=False, fontsize=11, **place_of_legend)
