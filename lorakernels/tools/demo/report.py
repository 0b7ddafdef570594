"""What the demo finds, as plain data and for a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorakernels.backend import Explanation


@dataclass(frozen=True)
class World:
    """What happened in one changed world: accuracies on the test set, of 1, and what they cost."""

    name: str
    before: float
    after: float
    reloaded: float
    merged: float
    trainable: int
    share: float  # of the parameters of the base and this adapter
    seconds: float


@dataclass(frozen=True)
class Claim:
    """A promise of the package's, and whether it held."""

    text: str
    held: bool
    enforced: bool = True


@dataclass(frozen=True)
class DemoResult:
    """What `run_demo` found, and where it put its files."""

    folder: Path
    picture: Path
    explanation: Explanation
    device: str
    seed: int
    rank: int
    steps: int
    upright: float
    worlds: tuple[World, ...]
    claims: tuple[Claim, ...]

    @property
    def failures(self) -> list[Claim]:
        """The claims that make the demo fail."""
        return [claim for claim in self.claims if claim.enforced and not claim.held]


def print_report(result: DemoResult, console: Console | None = None) -> None:
    """A table of the worlds, the claims, and where the files are."""
    console = console or Console(highlight=False)
    table = Table(
        title="One frozen network, three changed worlds", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False
    )
    table.add_column("world", no_wrap=True)
    for name in ("before", "after", "reloaded", "merged", "trains", "of all", "seconds", "ran"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("upright", f"{result.upright:.1%}")
    for w in result.worlds:
        before, after = Text(f"{w.before:.1%}", "red"), Text(f"{w.after:.1%}", "green")
        rest = (f"{w.reloaded:.1%}", f"{w.merged:.1%}", f"{w.trainable:,}", f"{w.share:.1%}", f"{w.seconds:.1f}")
        table.add_row(w.name, before, after, *rest, result.explanation.impl)
    console.print(table)
    console.print(
        f"before: the frozen network alone. after: with its adapter of rank {result.rank}, trained for "
        f"{result.steps} steps. Accuracies on digits that no training has seen; seed {result.seed}, {result.device}."
    )
    console.print(f"Every layer ran {escape(str(result.explanation))}\n")
    for claim in result.claims:
        mark, colour = ("- ", "yellow") if not claim.enforced else ("✓ ", "green") if claim.held else ("✗ ", "red")
        console.print(Text(mark, colour) + Text(claim.text))
    if any(not claim.enforced for claim in result.claims):
        console.print("With --steps the accuracies of the adapters (marked -) are reported, not enforced.")
    # Paths stay whole, to be copied.
    console.print(f"\nadapters, in PEFT's format: {escape(str(result.folder))}", soft_wrap=True)
    console.print(f"picture: {escape(str(result.picture))}", soft_wrap=True)
    if result.failures:
        console.print(f"\nFAILED: {len(result.failures)} of {len(result.claims)} claims do not hold", style="bold red")
        for claim in result.failures:
            console.print(Text(f"✗ {claim.text}", "red"))
