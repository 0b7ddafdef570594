"""Text that others wrote, for a terminal."""

from __future__ import annotations

_MOST = 2_000


def printable(text: str) -> str:
    """Without what a terminal obeys or a screen hides: control characters, and any that cannot be shown, by number."""
    shown = text if len(text) <= _MOST else f"{text[:_MOST]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
