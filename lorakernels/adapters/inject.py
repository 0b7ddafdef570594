"""Putting adapters into a model that knows nothing of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lorakernels.adapters.targets import find_targets, pattern_value
from lorakernels.config import LoRAConfig
from lorakernels.nn.layer import DEFAULT, LoRALayer, check_adapter_name
from lorakernels.nn.linear import LoRALinear


def inject(model: nn.Module, config: LoRAConfig, adapter_name: str = DEFAULT) -> nn.Module:
    """Give the target layers of `model` an adapter, in place, and freeze everything else.

    Layers that have an adapter already get another one beside it, not active until `set_adapter`.
    Nothing changes when an error is raised.

    Args:
        model: any module that holds `torch.nn.Linear` layers.
        config: which layers, and what rank and scale.
        adapter_name: the adapter's name, part of its parameters' names.

    Returns:
        `model` itself.

    Raises:
        ValueError: nothing matches (with near names), or the name is taken or malformed.
        TypeError: a target is not a layer that can be adapted.
    """
    check_adapter_name(adapter_name)
    if adapter_name in adapter_configs(model):
        raise ValueError(f"adapter name {adapter_name!r} is taken; the model has: {list(adapter_configs(model))}")
    targets = find_targets(model, config)
    for name, module in targets.items():
        if not (type(module) is nn.Linear or isinstance(module, LoRALayer)):
            raise TypeError(
                f"target {name!r} is a {type(module).__module__}.{type(module).__qualname__}; "
                "expected exactly torch.nn.Linear: narrow target_modules, or name it in exclude_modules"
            )
        if isinstance(module, LoRALayer) and module.merged:
            raise RuntimeError(f"adapters are merged into {name!r}; call unmerge first")
    ranks = {name: pattern_value(name, config.rank_pattern, config.r) for name in targets}
    alphas = {name: pattern_value(name, config.alpha_pattern, config.lora_alpha) for name in targets}

    made: dict[nn.Module, nn.Module] = {}
    for name, module in targets.items():
        # A module under two names stays one module, with one adapter.
        if module not in made:
            made[module] = _adapt(module, ranks[name], alphas[name], config, adapter_name)
    replace_modules(model, made)
    freeze_all_but_adapters(model, config.bias)
    model._lora_configs = {**adapter_configs(model), adapter_name: config}  # type: ignore[assignment]
    return model


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module under every name that the old one has in `model`."""
    new = set(replacements.values())
    for parent in [module for module in model.modules() if module not in new]:
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


def adapter_configs(model: nn.Module) -> dict[str, LoRAConfig]:
    """The configuration of each adapter that `inject` has put into `model`, by name."""
    return getattr(model, "_lora_configs", {})


def adapted_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers of `model` by their full names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


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


def _adapt(module: nn.Module, r: int, alpha: float, config: LoRAConfig, adapter_name: str) -> LoRALayer:
    if isinstance(module, LoRALayer):
        module.add_adapter(adapter_name, r, alpha, config.lora_dropout, config.use_rslora, config.init_lora_weights)
        return module
    assert isinstance(module, nn.Linear)
    return LoRALinear.from_linear(
        module,
        r,
        alpha,
        config.lora_dropout,
        config.use_rslora,
        init_lora_weights=config.init_lora_weights,
        adapter_name=adapter_name,
    )


def freeze_all_but_adapters(model: nn.Module, bias: str) -> None:
    """Only the parameters of adapters train, and the biases that `bias` names ("none", "all" or "lora_only")."""
    adapter_parameters = {
        id(p)
        for layer in adapted_layers(model).values()
        for adapters in (layer.lora_A, layer.lora_B)
        for p in adapters.parameters()
    }
    for name, parameter in model.named_parameters():
        if id(parameter) not in adapter_parameters:
            parameter.requires_grad_(bias == "all" and name.rpartition(".")[2] == "bias")
    if bias == "lora_only":
        for layer in adapted_layers(model).values():
            if isinstance(layer.base_layer.bias, nn.Parameter):
                layer.base_layer.bias.requires_grad_(True)
