"""The demo's result for a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorakernels.tools.demo.results import Claim, DemoResult


def print_report(result: DemoResult, console: Console | None = None) -> None:
    """A table of the worlds, the claims, and where the files are."""
    console = console or Console(highlight=False)
    console.print(_table(result))
    console.print(
        f"before: the frozen network alone. after: with its adapter of rank {result.rank}, trained for "
        f"{result.steps} steps. Accuracies on digits that no training has seen; seed {result.seed}, {result.device}."
    )
    console.print(f"Every layer ran {escape(str(result.explanation))}\n")
    for claim in result.claims:
        console.print(_mark(claim) + Text(claim.text))
    if any(not claim.enforced for claim in result.claims):
        console.print("With --steps the accuracies of the adapters (marked -) are reported, not enforced.")
    # Paths stay whole, to be copied.
    console.print(f"\nadapters, in PEFT's format: {escape(str(result.folder))}", soft_wrap=True)
    console.print(f"picture: {escape(str(result.picture))}", soft_wrap=True)
    if result.failures:
        console.print(f"\nFAILED: {len(result.failures)} of {len(result.claims)} claims do not hold", style="bold red")
        for claim in result.failures:
            console.print(Text(f"✗ {claim.text}", "red"))


def _mark(claim: Claim) -> Text:
    if not claim.enforced:
        return Text("- ", "yellow")
    return Text("✓ ", "green") if claim.held else Text("✗ ", "red")


def _table(result: DemoResult) -> Table:
    table = Table(
        title="One frozen network, three changed worlds", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False
    )
    table.add_column("world", no_wrap=True)
    for name in ("before", "after", "reloaded", "merged", "trains", "of all", "seconds", "ran"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("upright", f"{result.upright:.1%}")
    for world in result.worlds:
        table.add_row(
            world.name,
            Text(f"{world.before:.1%}", "red"),
            Text(f"{world.after:.1%}", "green"),
            f"{world.reloaded:.1%}",
            f"{world.merged:.1%}",
            f"{world.trainable:,}",
            f"{world.share:.1%}",
            f"{world.seconds:.1f}",
            result.explanation.impl,
        )
    return table
