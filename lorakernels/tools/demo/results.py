"""What the demo finds. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
