"""What an adapter's files hold: kind, shapes, and the singular values of every update."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lorakernels.files.formats import read_adapter
from lorakernels.files.update import BIAS, MAGNITUDE, Update
from lorakernels.printable import printable

# As many lines as colours that an eye tells apart; further kinds of module are drawn grey.
MAX_KINDS = 8


@dataclass(frozen=True)
class UpdateReport:
    """One module. The norms, the rank and the values are those of scaling · B A, before DoRA's magnitude."""

    name: str
    shape: tuple[int, ...]
    r: int
    alpha: float
    scaling: float
    frobenius: float
    spectral: float
    effective_rank: float
    parameters: int
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class AdapterReport:
    """All that `lorakernels inspect` says."""

    source: str
    format: str
    init: str | None
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    others: tuple[str, ...]
    assumed: tuple[str, ...]
    updates: tuple[UpdateReport, ...]


def singular_values(update: Update) -> torch.Tensor:
    """The singular values of scaling · B A in float64, largest first, without forming B A.

    With B = Q_B R_B and Aᵀ = Q_A R_A, B A = Q_B (R_B R_Aᵀ) Q_Aᵀ has those of the [r, r] matrix in the middle. The B of
    a convolution with groups is block-diagonal here, and the whole update of a stack of experts.
    """
    A, B = (factor.double() for factor in update.factors)
    if not update.experts:
        A, B = A.flatten(1), torch.block_diag(*B.flatten(1).chunk(update.groups))
    R_B, R_A = (torch.linalg.qr(factor, mode="r").R for factor in (B, A.mT))
    return torch.linalg.svdvals(R_B @ R_A.mT).flatten().sort(descending=True).values * abs(update.scaling)


def effective_rank(values: torch.Tensor) -> float:
    """exp of the entropy of σ / Σσ (Roy & Vetterli, EUSIPCO 2007): between 1 and r, and 0 for a zero update."""
    p = values[values > 0] / values.sum()
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


def inspect_adapter(source: str | os.PathLike[str]) -> AdapterReport:
    """Read an adapter of any format that `read_adapter` knows and measure it. Raises AdapterFileError as that does."""
    adapter = read_adapter(source)
    tensors = [tensor for update in adapter.updates.values() for tensor in update.tensors.values()]
    tensors += adapter.others.values()
    return AdapterReport(
        source=str(adapter.source),
        format=adapter.format,
        init=str(adapter.fields.get("init_lora_weights", True)) if adapter.format == "peft" else None,
        use_rslora=any(on for name, on in adapter.fields.items() if name.rpartition(".")[2] == "use_rslora"),
        use_dora=any(MAGNITUDE in update.tensors for update in adapter.updates.values()),
        lora_bias=any(BIAS in update.tensors for update in adapter.updates.values()),
        parameters=sum(tensor.numel() for tensor in tensors),
        bytes=sum(tensor.nbytes for tensor in tensors),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        others=tuple(adapter.others),
        assumed=tuple(f"{what}{f' of {part}' if part else ''}" for part, what in adapter.assumed.items()),
        updates=tuple(_report(name, update) for name, update in adapter.updates.items()),
    )


def _report(name: str, update: Update) -> UpdateReport:
    values = singular_values(update)
    norms = float(values.norm()), float(values.max()), effective_rank(values)
    parameters = sum(tensor.numel() for tensor in update.tensors.values())
    settings = tuple(update.shape), update.r, update.alpha, update.scaling
    return UpdateReport(name, *settings, *norms, parameters, tuple(values.tolist()))


def as_json(report: AdapterReport) -> str:
    """Every field of the report."""
    return json.dumps(asdict(report), indent=2, allow_nan=False)


def group_name(name: str) -> str:
    """The name with `*` for numbers: decoder layers differ by them only. kohya's has underscores around them."""
    return re.sub(r"(?<![^._])\d+(?![^._])", "*", name)


def print_report(report: AdapterReport, console: Any = None) -> None:
    """The report for a terminal: a row for all modules that differ by a number only."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a pipe has no width, and 80 would fold every name
    kinds = [("rsLoRA", report.use_rslora), ("DoRA", report.use_dora), ("lora_bias", report.lora_bias)]
    variants = ", ".join(name for name, on in kinds if on) or "plain LoRA"
    facts = {
        "adapter": report.source,
        "format": report.format,
        "kind": variants if report.init is None else f"{variants}, init_lora_weights={report.init}",
        "parameters": f"{report.parameters:,} ({report.bytes:,} bytes, {', '.join(report.dtypes)})",
    }
    if report.others:
        facts["replaces"] = f"{len(report.others)} whole tensors, such as {report.others[0]}"
    if report.assumed:
        facts["assumed"] = "; ".join(report.assumed)
    for label, fact in facts.items():
        console.print(Text(f"{label}: ", "bold") + Text(printable(fact)), soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("modules", overflow="fold")
    columns = ["r", "alpha", "scaling", "frobenius", "spectral", "effective_rank"]
    for heading in ("number", "weight", *columns[:3], "Frobenius", "spectral", "eff. rank"):
        table.add_column(heading, justify="right")
    groups: dict[tuple[str, tuple[int, ...]], list[UpdateReport]] = defaultdict(list)
    for row in report.updates:
        groups[group_name(row.name), row.shape].append(row)
    for (name, shape), rows in groups.items():
        spans = [_span([getattr(row, column) for row in rows]) for column in columns]
        table.add_row(Text(printable(name)), str(len(rows)), "×".join(map(str, shape)), *spans)
    console.print(table)


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low}…{high}"


def plot_spectra(report: AdapterReport, file: str | os.PathLike[str]) -> Path:
    """Draw every update's singular values into an image: a line for a kind of module, a band from least to largest.

    Raises ModuleNotFoundError, naming the extra, where matplotlib is not installed, and OSError or ValueError where
    the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('a plot needs matplotlib: pip install "lorakernels[demo]"') from error

    kinds: dict[str, list[UpdateReport]] = defaultdict(list)
    for row in report.updates:
        kinds[_kind(row.name)].append(row)
    most = max(row.spectral for row in report.updates)
    floor = most * 1e-16  # float64's rounding of the largest: what is below is zero
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, (kind, rows) in enumerate(sorted(kinds.items(), key=lambda item: -len(item[1]))):
        # Ranks may differ within a kind: a value that a module does not have is left out, and so is a zero.
        columns = zip_longest(*(row.singular_values for row in rows), fillvalue=0.0)
        spread = [sorted(found) for values in columns if (found := [value for value in values if value > floor])]
        x, middle = range(1, len(spread) + 1), [median(values) for values in spread]
        colour = f"C{index}" if index < MAX_KINDS else "0.6"
        label = f"{kind} ({len(rows)})" if index < MAX_KINDS else "others" if index == MAX_KINDS else None
        axes.plot(x, middle, marker="o", markersize=3, color=colour, label=label)
        low, high = [values[0] for values in spread], [values[-1] for values in spread]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if most > 0:
        axes.set_yscale("log")
    else:
        axes.text(0.5, 0.5, "every update is zero", transform=axes.transAxes, ha="center")
    figure.suptitle(f"Singular values of the updates s·B·A: {Path(report.source).resolve().name}")
    axes.set_title("median over the modules of a kind; band: least to largest", fontsize="small")
    axes.set(xlabel="index of the singular value", ylabel="singular value")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(title="kind of module (number)", fontsize="small")
    figure.savefig(file, dpi=150)
    return Path(file)


def _kind(name: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj`; of a kohya name, what follows the last number."""
    if "." in name:
        words = [part for part in name.split(".") if not part.isdigit()]
        return words[-1] if words else name
    return re.split(r"(?<![^_])\d+_", name)[-1]
