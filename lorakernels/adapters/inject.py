"""Putting adapters into a model that knows nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lorakernels.adapters.saved_modules import SavedModule, give_copies, saved_modules
from lorakernels.adapters.targets import find_modules_to_save, find_targets, warn_of_unused
from lorakernels.config import LoRAConfig, of_one_layer
from lorakernels.files.patterns import by_pattern
from lorakernels.nn import siblings
from lorakernels.nn.adapt import LAYERS, adapt, layer_for
from lorakernels.nn.base import DEFAULT, check_adapter_name
from lorakernels.nn.init import changes_base
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.linear import LoRALinear
from lorakernels.quant.layers import why_refused


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
        TypeError: a target is not a layer that can be adapted, or its weight is no plain tensor; `groups` is not a list
            of lists of names.
        RuntimeError: adapters are merged, or one in the model has changed the base weights (PiSSA, OLoRA).
    """
    if not isinstance(model, nn.Module) or not isinstance(config, LoRAConfig):
        got = " and ".join(f"{type(one).__module__}.{type(one).__qualname__}" for one in (model, config))
        raise TypeError(f"inject takes a torch.nn.Module and a lorakernels.LoRAConfig; got {got}")
    check_adapter_name(adapter_name)
    compiled, model = model, uncompiled(model)
    earlier = adapters_in(model)
    if adapter_name in earlier:
        raise ValueError(f"adapter name {adapter_name!r} is taken; the model has: {list(earlier)}")
    refuse_shared_biases(model, config, adapter_name)
    targets = find_targets(model, config)
    whole = find_modules_to_save(model, config.modules_to_save)
    missing = [ending for ending in config.modules_to_save or () if not any(name.endswith(ending) for name in whole)]
    if missing:
        raise ValueError(f"modules_to_save={missing!r} matches no module of {type(model).__name__}")
    ranks = by_pattern(targets, config.rank_pattern, config.r)
    alphas = by_pattern(targets, config.alpha_pattern, config.lora_alpha)
    configs = {name: of_one_layer(config, ranks[name], alphas[name]) for name in targets}
    for name, module in targets.items():
        _check_target(name, module, configs[name])
    linears = {m for m in targets.values() if isinstance(m, LoRALinear) or layer_for(m) is LoRALinear}
    siblings_of = siblings.find(model, lambda module: module in linears or isinstance(module, LoRALinear), groups)
    refuse_changed_base(model)
    if changes_base(config.init_lora_weights):
        start = f"init_lora_weights={config.init_lora_weights!r}"
        if earlier:
            raise RuntimeError(
                f"{start} changes the base weights, which the adapters {list(earlier)} were made beside; expected a "
                "model without adapters"
            )
        refuse_tied(model, [module.weight for module in targets.values()], start)  # type: ignore[misc]
    warn_of_unused(model, config, targets)

    made: dict[nn.Module, nn.Module] = {}
    restore_activity = activity(model)
    with nothing_on_error(model, adapter_name, made):
        given: set[nn.Module] = set()
        for name, module in targets.items():
            # A module under two names stays one module, with one adapter.
            if module not in given:
                give_adapter(module, adapter_name, configs[name], made)
                given.add(module)
        made |= give_copies(whole.values(), adapter_name)
        replace_modules(model, made)
        if earlier:
            restore_activity()
        else:
            for wrapper in saved_modules(model).values():
                wrapper.set_adapter([adapter_name])
            freeze_all_but_adapters(model, config.bias)
    own = {made.get(module, module) for module in linears}
    siblings.declare({p: names for p, names in siblings_of.items() if not own.isdisjoint(p._modules.values())}, group)
    remember(model, adapter_name, config)
    return compiled


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given, whose names have no prefix; any other module itself."""
    return getattr(model, "_orig_mod", model)


def _check_target(name: str, module: nn.Module, config: LoRAConfig) -> None:
    """Raise where a target cannot have the adapter that `config` describes."""
    base = module.base_layer if isinstance(module, LoRALayer) else module
    kind = layer_for(base)
    if kind is None and served(base):
        raise TypeError(f"target {name!r} {served(base)}")
    if kind is None and (why := why_refused(base)):
        raise TypeError(f"target {name!r} is a {type(base).__module__}.{type(base).__qualname__}: {why}")
    if kind is None:
        raise TypeError(
            f"target {name!r} is a {type(module).__module__}.{type(module).__qualname__}; expected exactly one of "
            f"{adaptable()}: narrow target_modules, or name it in exclude_modules"
        )
    if isinstance(module, LoRALayer) and module.merged:
        raise RuntimeError(f"adapters are merged into {name!r}; call unmerge first")
    try:
        kind.check_adapter(base, config)
    except (ValueError, TypeError) as error:
        raise type(error)(f"target {name!r}: {error}") from error


def adaptable() -> str:
    """The layers that can be adapted, in words."""
    return ", ".join(f"torch.nn.{base.__name__}" for base in LAYERS)


def served(module: nn.Module) -> str:
    """What to say of a module that an AdapterStore has given a class of its own; nothing of others."""
    if module.__dict__.get("_lora_site") is None:
        return ""
    return "is served by an AdapterStore; close() that first, or use another copy of the model"


def give_adapter(
    module: nn.Module, adapter_name: str, config: LoRAConfig, made: dict[nn.Module, nn.Module]
) -> LoRALayer:
    """Give a layer an adapter; one that had none goes into `made`, with the layer to put in its place."""
    if isinstance(module, LoRALayer):
        module.add_adapter(adapter_name, config)
        return module
    layer = adapt(module, adapter_name, config)
    made[module] = layer
    return layer


@contextmanager
def nothing_on_error(model: nn.Module, adapter_name: str, made: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Where the body raises, take out of the model what it has added under a new name: no memory, an SVD that fails."""
    restore_activity = activity(model)
    had = {module for module in model.modules() if adapter_name in _names_in(module)}
    try:
        yield
    except BaseException:
        for module in {*model.modules(), *made.values()} - had:
            if adapter_name in _names_in(module):
                module.delete_adapter(adapter_name)  # type: ignore[operator]
        restore_activity()
        raise


def activity(model: nn.Module) -> Callable[[], None]:
    """What brings back the adapters that are active now and what trains; of what is made since then nothing is."""
    layers = {layer: layer.active_adapters for layer in adapted_layers(model).values()}
    wrappers = {wrapper: wrapper.active_adapter for wrapper in saved_modules(model).values()}
    needed_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}

    def restore() -> None:
        for layer in adapted_layers(model).values():
            layer.active_adapters = layers.get(layer, [])
        for wrapper in saved_modules(model).values():
            wrapper.active_adapter = wrappers.get(wrapper)
        for parameter in model.parameters():
            parameter.requires_grad_(needed_grad.get(parameter, False))

    return restore


def refuse_shared_biases(model: nn.Module, config: LoRAConfig, adapter_name: str) -> None:
    """Raise ValueError where two adapters would meet in the base model's biases (PEFT's rule)."""
    others = [name for name in adapters_in(model) if name != adapter_name]
    with_bias = [name for name, one in {**adapter_configs(model), adapter_name: config}.items() if one.bias != "none"]
    if others and with_bias:
        raise ValueError(
            f"adapter {with_bias[0]!r} trains biases, which are the base model's own, so it can only be alone; the "
            f'model has {others}. Set bias="none" for all of several adapters'
        )


def refuse_changed_base(model: nn.Module, but_by: str | None = None) -> None:
    """Raise RuntimeError where PiSSA or OLoRA took a part out of the base: alone, another adapter would miss it."""
    changed = {name for layer in adapted_layers(model).values() for name in layer.base_changed_by}
    changed_by = sorted(changed - {but_by})
    if changed_by:
        raise RuntimeError(
            f"adapter {changed_by[0]!r} has changed the base weights (init_lora_weights), so no other can stand beside "
            "it; save_adapter it, delete_adapter it, and load it again as a plain one"
        )


def refuse_tied(model: nn.Module, weights: Iterable[torch.Tensor], what: str) -> None:
    """A weight that another module uses too (a head tied to its embedding) would change there as well."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    for weight in weights:
        names = owners.get(id(weight), [])
        if len(names) > 1:
            both = " and ".join(map(repr, names))
            raise ValueError(f"{both} share one weight, so {what} would change both; untie them")


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
    for encoder in (module for module in model.modules() if isinstance(module, nn.TransformerEncoder)):
        if any(isinstance(module, LoRALayer) for module in encoder.modules()):
            encoder.use_nested_tensor = False  # whose attention needs the fast path, which adapted layers turn off


def adapter_configs(model: nn.Module) -> dict[str, LoRAConfig]:
    """The configuration of each adapter that was put into `model` as a whole and is still there, by name."""
    there = adapters_in(model)
    return {name: config for name, config in getattr(model, "_lora_configs", {}).items() if name in there}


def config_of(model: nn.Module, adapter_name: str) -> LoRAConfig:
    """The configuration of an adapter; raises KeyError where `model` as a whole was not given it."""
    paths = [path for path, layer in adapted_layers(model).items() if adapter_name in layer.adapters]
    if not paths:
        raise KeyError(f"the model has no adapter {adapter_name!r}; its adapters: {list(adapters_in(model))}")
    configs = adapter_configs(model)
    if adapter_name not in configs:
        where = ", ".join(map(repr, paths[:3])) + (", …" if len(paths) > 3 else "")
        raise KeyError(
            f"adapter {adapter_name!r} is in {where}, but was not put in by inject or load_adapter on this module: "
            "call it on the module that they were given"
        )
    return configs[adapter_name]


def remember(model: nn.Module, adapter_name: str, config: LoRAConfig, unused: Iterable[str] = ()) -> None:
    """Keep the configuration of an adapter, and which of its layers its last hot swap has left without it."""
    model._lora_configs = {**adapter_configs(model), adapter_name: config}  # type: ignore[assignment]
    model._lora_unused = {**getattr(model, "_lora_unused", {}), adapter_name: [*unused]}  # type: ignore[assignment]


def adapters_in(model: nn.Module) -> dict[str, None]:
    """The names of the adapters that the layers and the copies of whole modules in `model` have."""
    return dict.fromkeys(name for module in model.modules() for name in _names_in(module))


def _names_in(module: nn.Module) -> Iterable[str]:
    if isinstance(module, LoRALayer):
        return module.adapters
    return module.modules_to_save if isinstance(module, SavedModule) else ()


def adapted_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers of `model` by their full names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, LoRALayer]:
    """The layers that an adapter has, without those where its last hot swap has left it nothing."""
    unused = getattr(model, "_lora_unused", {}).get(adapter_name, ())
    owners = {path: layer for path, layer in adapted_layers(model).items() if adapter_name in layer.adapters}
    return {path: layer for path, layer in owners.items() if path not in unused}


class TrainableParameters(list[nn.Parameter]):
    """The parameters that train, for an optimizer; as text, their number and share."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(p for p in model.parameters() if p.requires_grad)
        self.num_trainable = sum(p.numel() for p in self)
        self.num_total = sum(p.numel() for p in model.parameters())

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters, the adapters included."""
        return self.num_trainable / self.num_total if self.num_total else 0.0

    def __str__(self) -> str:
        return f"trainable: {self.num_trainable:,} of {self.num_total:,} parameters ({self.share:.2%})"


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """The parameters of `model` that need a gradient, as a list with `num_trainable`, `num_total` and `share`."""
    return TrainableParameters(model)


def adapter_parameters(model: nn.Module, adapter_name: str | None = None) -> list[nn.Parameter]:
    """The parameters of one adapter, or of all: those in its layers and those of its copies of whole modules."""
    in_layers = [
        parameter
        for layer in adapted_layers(model).values()
        for name in layer.adapters
        if adapter_name in (None, name)
        for parameter in layer.adapter_tensors(name).values()
    ]
    return in_layers + [
        parameter
        for wrapper in saved_modules(model).values()
        for name, module in wrapper.modules_to_save.items()
        if adapter_name in (None, name)
        for parameter in module.parameters()
    ]


def freeze_all_but_adapters(model: nn.Module, bias: str) -> None:
    """Only the parameters of adapters train, and the biases that `bias` names ("none", "all" or "lora_only")."""
    of_adapters = set(map(id, adapter_parameters(model)))
    replaced = {id(p) for wrapper in saved_modules(model).values() for p in wrapper.original_module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in of_adapters:
            is_bias = name.rpartition(".")[2] == "bias" and id(parameter) not in replaced
            parameter.requires_grad_(bias == "all" and is_bias)
    if bias == "lora_only":
        for layer in adapted_layers(model).values():
            if isinstance(layer.bias, nn.Parameter):
                layer.bias.requires_grad_(True)
