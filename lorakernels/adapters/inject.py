"""Putting adapters into a model that knows nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lorakernels.adapters import held
from lorakernels.adapters.saved_modules import give_copies, saved_modules
from lorakernels.adapters.targets import (
    Target,
    find_modules_to_save,
    find_targets,
    plain_modules,
    warn_of_unused,
    why_without_effect,
)
from lorakernels.adapters.transformers_methods import give_methods
from lorakernels.adapters.uncalled import watch
from lorakernels.config import LoRAConfig, of_one_layer
from lorakernels.nn import siblings
from lorakernels.nn.adapt import LAYERS, layer_for
from lorakernels.nn.base import DEFAULT, Adapter, check_adapter_name, no_fast_path
from lorakernels.nn.expert_layer import LoRAExperts, Stack
from lorakernels.nn.init import changes_base
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.linear import LoRALinear
from lorakernels.nn.modules import unwrapped
from lorakernels.nn.quantized import QuantizedLinear
from lorakernels.nn.whole import put, whole, write
from lorakernels.patterns import by_pattern
from lorakernels.quant.layers import keep_packing, why_refused


@whole
def inject(
    model: nn.Module,
    config: LoRAConfig,
    adapter_name: str = DEFAULT,
    *,
    group: bool | None = None,
    groups: Sequence[Sequence[str]] = (),
) -> nn.Module:
    """Give the target layers of `model` an adapter, in place, and freeze everything else.

    In a model that has adapters already the new one is not active until `set_adapter`, and what trains stays the same.
    Nothing changes when an error is raised. An entry of `config` that means nothing in `model` gets a warning.

    Args:
        model: any module that holds layers that can be adapted: linear, embedding, convolution; compiled or not.
        config: which layers, and what rank and scale.
        adapter_name: the adapter's name, part of its parameters' names.
        group: whether projections that one module calls with the same x (q, k, v; gate, up) are computed together, as
            `lora_linear_group` does: None, where they have no dropout; True, with dropout too, which then is one mask
            for all; False, never. They are found by the names that models give them. It holds for all adapters.
        groups: further groups, each a list of names of one module's children: [["query_key", "value"]].

    Returns:
        `model` itself.

    Raises:
        ValueError: nothing matches (with near names), or the name is taken or malformed, or a layer cannot have
            such an adapter; one of several adapters trains biases; PiSSA or OLoRA on a weight that is tied, computed
            at each call, or on the meta device; no module has two adapted linear layers of the names of a group.
        TypeError: a target is not a layer that can be adapted, or its weight is no plain tensor, or a parameter is no
            stack of experts that are known; `groups` is not a list of lists of names.
        RuntimeError: adapters are merged, or one in the model has changed the base weights (PiSSA, OLoRA).
    """
    if not isinstance(model, nn.Module) or not isinstance(config, LoRAConfig):
        got = " and ".join(f"{type(one).__module__}.{type(one).__qualname__}" for one in (model, config))
        raise TypeError(f"inject takes a torch.nn.Module and a lorakernels.LoRAConfig; got {got}")
    compiled, model = model, unwrapped(model)
    earlier = held.names(model)
    check_new_name(adapter_name, earlier)
    held.refuse_shared_biases(model, config, adapter_name)
    targets = find_targets(model, config)
    to_save = find_modules_to_save(model, config.modules_to_save)
    missing = [ending for ending in config.modules_to_save or () if not any(name.endswith(ending) for name in to_save)]
    if missing:
        raise ValueError(f"modules_to_save={missing!r} matches no module of {type(model).__name__}")
    ranks = by_pattern(targets, config.rank_pattern, config.r)
    alphas = by_pattern(targets, config.alpha_pattern, config.lora_alpha)
    configs = {name: of_one_layer(config, ranks[name], alphas[name]) for name in targets}
    held.refuse_merged(model)
    modules = dict(plain_modules(model))
    for name, module in targets.items():
        base, kind = base_and_kind(f"target {name!r}", module)
        if why := why_without_effect(modules, name):
            raise ValueError(f"target {name!r}: {why}; leave it out (exclude_modules)")
        try:
            kind.check_adapter(base, configs[name])
        except (ValueError, TypeError) as error:
            raise type(error)(f"target {name!r}: {error}") from error
    linears = {m for m in targets.values() if isinstance(m, nn.Module) and _is_linear(m)}
    siblings_of = siblings.find(model, lambda module: module in linears or isinstance(module, LoRALinear), groups)
    held.refuse_changed_base(model)
    if changes_base(config.init_lora_weights):
        start = f"init_lora_weights={config.init_lora_weights!r}"
        if earlier:
            raise RuntimeError(
                f"{start} changes the base weights, which the adapters {list(earlier)} were made beside; expected a "
                "model without adapters"
            )
        held.refuse_tied(model, [module.weight for module in targets.values()], start)  # type: ignore[misc]
    warn_of_unused(model, config, targets)

    of_modules: dict[Target, LoRAConfig] = {}
    for name, module in targets.items():  # a module under two names stays one module, with one adapter
        of_modules.setdefault(module, configs[name])
    made = add(model, adapter_name, of_modules, to_save.values())
    if not earlier:
        activate(model, [adapter_name])
        freeze_all_but_adapters(model, config.bias)
    own = {made.get(module, module) for module in linears}
    parents = {p: names for p, names in siblings_of.items() if not own.isdisjoint(p._modules.values())}
    siblings.declare(parents, group)
    held.remember(model, adapter_name, config)
    give_methods(model)
    watch(model)
    return compiled


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, LoRALinear) or layer_for(module) is LoRALinear


def check_new_name(adapter_name: str, earlier: Iterable[str]) -> None:
    check_adapter_name(adapter_name)
    if adapter_name in earlier:
        raise ValueError(f"adapter name {adapter_name!r} is taken; the model has: {list(earlier)}")


def base_and_kind(
    what: str, module: Target, bases: Mapping[type, type] = MappingProxyType({})
) -> tuple[Any, type[LoRALayer]]:
    """A layer or stack without its adapters, and the class that adapts it; raises TypeError of `what` for no such one.

    `bases` says of a layer's class which plain one stands for it, where a store has switched the model's.
    """
    base = module.target if isinstance(module, LoRALayer) else module
    kind = LAYERS.get(bases.get(type(base), type(base))) or layer_for(base)
    experts = base.experts if isinstance(base, Stack) else None
    if kind is not None and (experts is None or bases or experts.__dict__.get("_lora_site") is None):
        return base, kind
    base = experts or base
    assert isinstance(base, nn.Module)
    if base.__dict__.get("_lora_site") is not None:
        raise TypeError(f"{what} is served by an AdapterStore; close() that first, or use another copy of the model")
    expected = f"expected exactly one of {', '.join(f'torch.nn.{base.__name__}' for base in LAYERS)}"
    why = why_refused(base) or f"{expected}: leave it out (exclude_modules)"
    raise TypeError(f"{what} is a {type(base).__module__}.{type(base).__qualname__}; {why}")


def add(
    model: nn.Module,
    adapter_name: str,
    configs: Mapping[Target, LoRAConfig],
    to_save: Iterable[nn.Module] = (),
    tensors: Mapping[Target, Iterable[torch.Tensor]] = MappingProxyType({}),
) -> dict[nn.Module, nn.Module]:
    """Give modules an adapter, and those `to_save` a copy, within a change of the whole model.

    It is not active; otherwise the same runs and trains. `tensors` has the values of parameters that do not start by
    the configuration, and gives them its dtype. A layer that has an adapter of the name gets the new configuration and
    values.

    Returns what has come into the model, by what it has replaced.
    """
    made: dict[nn.Module, nn.Module] = {}
    configs = dict(sorted(configs.items(), key=lambda item: _depth(item[0])))
    restore_activity = activity(model)
    had = set(held.holders(model, adapter_name).values())
    for target, config in configs.items():
        if isinstance(target, LoRALayer):
            layer = target
        elif isinstance(target, Stack):  # around the layer of another stack of the same experts
            layer = made[target.module] = LoRAExperts(made.get(target.module, target.module), target.name)
        else:
            kind = layer_for(target)
            assert kind is not None, "whoever calls has asked base_and_kind"
            layer = made[target] = kind.from_base(target, adapter_name, config)
        if layer in had:
            layer.adapters[adapter_name] = Adapter.of(config)
        elif adapter_name not in layer.adapters:
            layer.add_adapter(adapter_name, config)
        if target in tensors:
            _set_tensors(layer, adapter_name, tensors[target])
    made |= give_copies([module for module in to_save if module not in had], adapter_name)
    replace_modules(model, made)
    keep_packing(model)
    restore_activity()
    return made


def _depth(target: Target) -> int:
    """Which of a module's layers is around which: that of a parameter that it has later is further out."""
    return list(target.experts._parameters).index(target.name) if isinstance(target, Stack) else -1


def _set_tensors(layer: Any, adapter_name: str, tensors: Iterable[torch.Tensor]) -> None:
    for parameter, tensor in zip(layer.adapter_tensors(adapter_name).values(), tensors, strict=True):
        if parameter.dtype == tensor.dtype:
            write(parameter, tensor)
        else:  # the parameter itself stays, an optimizer may have it
            put(parameter, tensor.to(parameter.device, copy=True))


def activate(model: nn.Module, adapter_names: Iterable[str]) -> None:
    """Let adapters run and train where they are, and no others."""
    names = list(dict.fromkeys(adapter_names))
    for holder in held.holders(model).values():
        holder.set_adapter([name for name in names if name in holder.adapters])


def activity(model: nn.Module) -> Callable[[], None]:
    """What brings back the adapters that are active now and what trains; of what is made since then nothing is."""
    active = {holder: holder.active_adapters for holder in held.holders(model).values()}
    needed_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}

    def restore() -> None:
        for holder in held.holders(model).values():
            holder.active_adapters = active.get(holder, [])
        for parameter in model.parameters():
            parameter.requires_grad_(needed_grad.get(parameter, False))

    return restore


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module under every name that the old one has in `model`."""
    new, touched = set(replacements.values()), set()
    for parent in [module for module in model.modules() if module not in new]:
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
                touched.add(parent)
    found = siblings.find(model, lambda module: isinstance(module, LoRALinear))
    siblings.declare({p: names for p, names in found.items() if p in touched and not siblings.has_groups(p)})
    encoders = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
    for encoder in (module for module in model.modules() if isinstance(module, encoders)):
        off = any(isinstance(module, (LoRALayer, QuantizedLinear)) for module in encoder.modules())
        if isinstance(encoder, nn.TransformerEncoder):
            # Its attention needs the fast path.
            encoder.use_nested_tensor = encoder.use_nested_tensor and not off
        elif off and not encoder._forward_pre_hooks:
            encoder.register_forward_pre_hook(no_fast_path)
        elif not off:
            for key in [key for key, hook in encoder._forward_pre_hooks.items() if hook is no_fast_path]:
                del encoder._forward_pre_hooks[key]


def freeze_all_but_adapters(model: nn.Module, bias: str) -> None:
    """Only the parameters of adapters train, and the biases that `bias` names ("none", "all" or "lora_only")."""
    of_adapters = set(map(id, held.parameters(model)))
    replaced = {id(p) for wrapper in saved_modules(model).values() for p in wrapper.original_module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in of_adapters:
            is_bias = name.rpartition(".")[2] == "bias" and id(parameter) not in replaced
            parameter.requires_grad_(bias == "all" and is_bias)
    if bias == "lora_only":
        for layer in held.layers(model).values():
            if isinstance(layer.bias, nn.Parameter):
                layer.bias.requires_grad_(True)
