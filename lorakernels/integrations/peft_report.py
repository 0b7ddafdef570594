"""What `accelerate` did to each LoRA layer, as data and as a table."""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One LoRA layer: its full name, whether its calls take the fused path, and if not, why not."""

    name: str
    accelerated: bool
    reason: str = ""


@dataclass(frozen=True, repr=False)
class AccelerationReport:
    """The LoRA layers of a model as `accelerate` left them; as text, a table with a line for each kind of layer.

    It tells of the adapters that were active then. `rows` has every layer by its own name.
    """

    rows: tuple[LayerReport, ...]

    @property
    def num_accelerated(self) -> int:
        return sum(row.accelerated for row in self.rows)

    @property
    def num_layers(self) -> int:
        return len(self.rows)

    @property
    def not_accelerated(self) -> tuple[LayerReport, ...]:
        return tuple(row for row in self.rows if not row.accelerated)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def __repr__(self) -> str:
        return f"<AccelerationReport: {self._summary()}>"

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self._summary(), title_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("number", justify="right")
        table.add_column("accelerated")
        table.add_column("why not", overflow="fold")
        # Decoder layers differ by a number only: a line for all of them, or the table has hundreds.
        kinds = Counter(
            (re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name), row.accelerated, row.reason) for row in self.rows
        )
        for (name, accelerated, reason), number in kinds.items():
            # Text and not str: rich would read [0] in a name as markup.
            table.add_row(Text(name), str(number), "yes" if accelerated else "no", Text(reason))
        return table

    def _summary(self) -> str:
        return f"{self.num_accelerated} of {self.num_layers} LoRA layers accelerated"
