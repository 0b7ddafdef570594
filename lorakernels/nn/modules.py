"""What any torch module is asked on the way to its forward, quickly: it is asked at every call."""

from __future__ import annotations

from typing import Any


def parameter_of(module: Any, name: str) -> Any:
    """`module.name` at a tenth of what `nn.Module.__getattr__` takes; FSDP may have put a plain tensor in its place."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def runs_more_than_forward(module: Any) -> bool:
    """Whether a call of `module` does other things than its class's forward: hooks, or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def of_base_layer(name: str) -> Any:
    """A property that is the base layer's, for code that knows the plain layer."""

    def get(layer: Any) -> Any:
        return getattr(layer.base_layer, name)

    def set_(layer: Any, value: Any) -> None:
        setattr(layer.base_layer, name, value)

    return property(get, set_)
