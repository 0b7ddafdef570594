"""Modules that an adapter reaches and that their parent runs without: its rows would answer as the base model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lorakernels.adapters.uncalled import uncalled
from lorakernels.serving.books import Books, Version
from lorakernels.serving.served import Batch, is_running


@contextmanager
def watched(model: nn.Module, books: Books, versions: Sequence[Version], batch: Batch) -> Iterator[None]:
    """Around the running of a batch of these versions: each module that they reach is looked for until it is called.

    Raises RuntimeError at the end, naming them, for modules that were not called while their parents ran.
    """
    parents: list[Any] = list(books.uncalled) if versions else []
    if not parents:
        yield
        return
    ran: set[nn.Module] = set()
    batch.called = set()

    def note(module: nn.Module, args: object) -> None:
        if is_running(batch):  # other threads run other batches
            ran.add(module)

    name = f"lorakernels {id(batch)}"  # torch's own registering takes ten times as long, of parents that may never run
    try:
        for parent in parents:
            parent._forward_pre_hooks[name] = note
        yield
    finally:
        for parent in parents:
            parent._forward_pre_hooks.pop(name, None)
    reached = {site for version in versions for site in version.sites} if ran else set()
    with books.lock:
        books.forget_called(batch.called)
        left_out = {site.path for parent in ran for site in books.uncalled.get(parent, ()) if site in reached}
    if left_out:
        raise RuntimeError(uncalled(sorted(left_out), model, "load adapters that leave these out"))
