"""Work that waits until somebody else imports a module, because importing it here would cost too much."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action` now if the module is imported already, else right behind its first import."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _WhenImported(name, action))


class _WhenImported(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module, lets its own loader load it, and calls the action behind it.

    It stays until the module runs: others ask whether a module could be found, and never import it.
    """

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action
        self.searching = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return None
        self.spec, self.loader = spec, spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        self.spec.loader = self.loader
        self.loader.exec_module(module)
        self.action()
