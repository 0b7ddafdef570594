"""Modules that train whole beside an adapter (PEFT's modules_to_save): a copy for each adapter, and the original."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lorakernels.nn.modules import names_of


class SavedModule(nn.Module):
    """Runs the active adapter's copy of a module, or the original where no active adapter has one.

    The names are PEFT's: `original_module` and `modules_to_save.<adapter>`. Attributes that it lacks are those of the
    module that runs, so that `model.lm_head.weight` goes on meaning something.
    """

    def __init__(self, original_module: nn.Module) -> None:
        super().__init__()
        self.original_module = original_module.requires_grad_(False)
        self.train(original_module.training)
        self.modules_to_save = nn.ModuleDict()
        self.active_adapters: list[str] = []  # one or none: whole modules do not add up
        self.in_merged_model = False  # whose state dict is the plain model's

    @property
    def adapters(self) -> nn.ModuleDict:
        """The copies by adapter: this and what follows is as in an adapted layer."""
        return self.modules_to_save

    @property
    def running(self) -> nn.Module:
        """The module that a call goes to."""
        return self.modules_to_save[self.active_adapters[0]] if self.active_adapters else self.original_module

    def adapter_tensors(self, adapter_name: str) -> dict[str, nn.Parameter]:
        return dict(self.modules_to_save[adapter_name].named_parameters())

    def add_adapter(self, adapter_name: str) -> None:
        """Give an adapter its own copy of the original, not active until `set_adapter`."""
        self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module).requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter's copy away; where it was active, the original runs again."""
        del self.modules_to_save[adapter_name]
        self.active_adapters = [name for name in self.active_adapters if name != adapter_name]

    def set_adapter(self, adapter_names: list[str]) -> None:
        """Let the first of these run and train; without one, the original."""
        self.active_adapters = adapter_names[:1]
        for name, module in self.modules_to_save.items():
            module.requires_grad_(name in self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.running(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_modules", {}):  # while it is being made or unpickled
                raise
            return getattr(self.running, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """While the model's adapters are merged that of the module that runs."""
        return self.running.state_dict(*args, **kwargs) if self.in_merged_model else super().state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"active={self.active_adapters}"


def saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """The wrapped modules of `model` by their full names."""
    return {path: module for module, path in names_of(model).items() if isinstance(module, SavedModule)}


def copies_of(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """An adapter's copies of whole modules by the modules' full names."""
    wrappers = saved_modules(model).items()
    return {path: one.modules_to_save[adapter_name] for path, one in wrappers if adapter_name in one.modules_to_save}


def give_copies(modules: Iterable[nn.Module], adapter_name: str) -> dict[nn.Module, SavedModule]:
    """Give an adapter a copy of each module; those that are not wrapped yet, with the wrapper to put in their place."""
    made: dict[nn.Module, SavedModule] = {}
    for module in dict.fromkeys(modules):
        wrapper = module if isinstance(module, SavedModule) else made.setdefault(module, SavedModule(module))
        wrapper.add_adapter(adapter_name)
    return made


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a module's state dict; other things that it may hold are not part of adapter files."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
