"""What any torch module is asked: at every call, quickly, and before it is adapted or its weight changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# What the wrappers of torch call the module that they run: checkpointing's and offloading's, torch.compile's, FSDP's.
_WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")


def wrapped_by(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper of torch runs; None for any other module."""
    name = "module" if isinstance(module, (DataParallel, DistributedDataParallel)) else ""
    return next((module._modules[own] for own in (*_WRAPPED, name) if own in module._modules), None)


def unwrapped(module: nn.Module) -> nn.Module:
    """What is inside all of torch's wrappers around a module, whose names have no prefix."""
    while (inner := wrapped_by(module)) is not None:
        module = inner
    return module


def is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def named_modules(
    model: nn.Module, is_closed: Callable[[nn.Module], bool] = lambda module: False, prefix: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Every module but `model` under each of its names, as without torch's wrappers, which do not come themselves.

    What is inside a closed one does not come.
    """
    for name, child in unwrapped(model)._modules.items():
        if child is not None:
            module, path = unwrapped(child), f"{prefix}{name}"
            yield path, module
            if not is_closed(module):
                yield from named_modules(module, is_closed, f"{path}.")


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """The first name of `model` and of every module in it."""
    names = {unwrapped(model): ""}
    for path, module in named_modules(model):
        names.setdefault(module, path)
    return names


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter under each of its names, as without torch's wrappers."""
    for path, module in [("", unwrapped(model)), *named_modules(model)]:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name, parameter


def parameter_of(module: Any, name: str) -> Any:
    """`module.name` at a tenth of what `nn.Module.__getattr__` takes; FSDP may have put a plain tensor in its place."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


# A quantised weight is a subclass of torch.Tensor in a plain torch.nn.Linear, as torchao's are.
_PLAIN_TENSORS = (
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.distributed.tensor.DTensor",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.functional_tensor.FunctionalTensor",
)


def check_weight_type(weight: torch.Tensor) -> None:
    """Raise TypeError for a weight that holds its numbers in another form."""
    kind = f"{type(weight).__module__}.{type(weight).__qualname__}"
    if kind not in _PLAIN_TENSORS:
        raise TypeError(
            f"the base weight is a {kind}, which may hold its numbers in another form; expected a torch.Tensor: leave "
            "this layer unquantised, or use PEFT, which has layers for quantised weights"
        )


def check_can_change(base_layer: Any, name: str = "weight") -> None:
    """Raise ValueError where what is written into a weight or bias would be lost, since each call makes it anew.

    Pruning, weight_norm and spectral_norm make `weight` out of parameters `weight_orig` or `weight_g`, and a
    parametrization makes a property of it. FSDP's plain tensor in the parameter's place is the weight itself.
    """
    made_of = [other for other in base_layer._parameters if other.startswith(f"{name}_")]
    if made_of or isinstance(getattr(type(base_layer), name, None), property):
        raise ValueError(
            f"the base layer's {name} is computed at each call (pruning, weight_norm, spectral_norm, a "
            "parametrization), so a change of it would be lost; make it permanent first, such as with "
            "torch.nn.utils.prune.remove"
        )


def runs_more_than_forward(module: Any) -> bool:
    """Whether a call of `module` does other things than its class's forward: hooks, or a forward of its own."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def of_base_layer(name: str, other: str = "") -> Any:
    """A property that is the base layer's, for code that knows the plain layer; `other` is what GPT-2's calls it."""

    def get(layer: Any) -> Any:
        base = layer.base_layer
        return getattr(base, name if not other or hasattr(base, name) else other)

    def set_(layer: Any, value: Any) -> None:
        setattr(layer.base_layer, name, value)

    return property(get, set_)
