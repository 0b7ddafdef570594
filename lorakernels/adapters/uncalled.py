"""Adapted layers that a model does not call, so that they have no effect: noticed in the first pass that trains."""

from __future__ import annotations

import sys
import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from lorakernels.adapters import held
from lorakernels.nn.base import LoRABase
from lorakernels.nn.modules import is_compiled, names_of


def watch(model: nn.Module) -> None:
    """Warn once, after the next pass of `model` that trains, of adapted layers that their parent ran without."""
    if _first_pass not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_first_pass)


def uncalled(paths: list[str], model: nn.Module, mend: str) -> str:
    """What is said of modules that adapters reach and that nobody calls."""
    shown = ", ".join(paths[:5]) + (", …" if len(paths) > 5 else "")
    return (
        f"{len(paths)} adapted layers were not called while {type(model).__name__} ran: {shown}. A module that reads a "
        "layer's weight and does not call it (fused projections, a kernel of its own) leaves the adapter without "
        f"effect and without gradients: {mend}, or have them called"
    )


def unwatch(model: nn.Module) -> None:
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _first_pass]:
        del model._forward_pre_hooks[key]


def _first_pass(model: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
        return
    if getattr(model, "_is_replica", False):  # of DataParallel, with whose other ones it shares its hooks
        return
    unwatch(model)
    paths = names_of(model)
    modules = {path: module for module, path in paths.items()}
    layers = {path: layer for path, layer in held.layers(model).items() if layer.active_adapters}
    if any(map(is_compiled, model.modules())):
        return  # of a graph nothing is seen, and a hook would have it compiled again
    parents = {path: modules[paths[layer].rpartition(".")[0]] for path, layer in layers.items()}
    ran = WeakSet([model])
    LoRABase.ran = ran  # in the place of one that an interrupt, which runs no hook, has left

    def called(module: nn.Module, args: Any) -> None:
        ran.add(module)

    def ended(module: nn.Module, args: Any, result: Any) -> None:
        for hook in hooks:
            hook.remove()
        if LoRABase.ran is not ran:  # another model's
            return
        LoRABase.ran = None
        if sys.exc_info()[0] is not None:  # it raised
            return watch(module)
        left_out = [path for path, layer in layers.items() if layer not in ran and parents[path] in ran]
        if left_out:
            warnings.warn(uncalled(left_out, module, "leave these out (exclude_modules)"), stacklevel=2)

    # On the layers themselves a hook would keep them out of their groups.
    hooks = [module.register_forward_pre_hook(called) for module in set(parents.values())]
    hooks.append(model.register_forward_hook(ended, always_call=True))
