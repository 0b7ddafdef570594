"""Modules that an adapter reaches and that their parent runs without: its rows would answer as the base model's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from lorakernels.adapters.uncalled import uncalled
from lorakernels.nn.modules import is_compiled, names_of
from lorakernels.serving.books import Version
from lorakernels.serving.served import Batch, is_running


@contextmanager
def watched(model: nn.Module, versions: Iterable[Version], batch: Batch) -> Iterator[None]:
    """Around the running of a batch of these versions: each module that they reach is looked for until it is called.

    Raises RuntimeError at the end, naming them, for modules that were not called while their parents ran.
    """
    unseen = {site for version in versions if not version.is_seen for site in version.sites if not site.is_seen}
    if not unseen or any(map(is_compiled, model.modules())):  # of a graph nothing is seen
        for version in versions:
            version.is_seen = True
        yield
        return
    modules = {path: module for module, path in names_of(model).items()}
    parents = {site: modules[site.path.rpartition(".")[0]] for site in unseen}
    ran: set[nn.Module] = set()
    batch.called = set()

    def note(module: nn.Module, args: object) -> None:
        if is_running(batch):  # other threads run other batches
            ran.add(module)

    hooks = [parent.register_forward_pre_hook(note) for parent in set(parents.values())]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for site in unseen & batch.called:
        site.is_seen = True
    left_out = sorted(site.path for site, parent in parents.items() if parent in ran and not site.is_seen)
    if left_out:
        raise RuntimeError(uncalled(left_out, model, "load adapters that leave these out"))
