"""transformers imported, so that `lorakernels.files` knows the names that it has changed."""

from __future__ import annotations

import contextlib


def import_transformers() -> None:
    """Nothing happens where it is not installed: names are then as they are."""
    with contextlib.suppress(ImportError):
        import transformers  # noqa: F401
