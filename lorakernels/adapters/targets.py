"""Which modules a configuration means."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from lorakernels.adapters.saved_modules import SavedModule
from lorakernels.config import LoRAConfig
from lorakernels.nn.adapt import layer_for
from lorakernels.nn.expert_layer import LoRAExperts, Stack
from lorakernels.nn.experts import is_mixture, stack_names
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.linear import LoRALinear
from lorakernels.nn.modules import named_modules
from lorakernels.patterns import by_pattern, matches

ALL_LINEAR = "all-linear"
# What PEFT's layers, and its copies of whole modules, are subclasses of.
_PEFTS = (".BaseTunerLayer", ".AuxiliaryTrainingWrapper", ".ModulesToSaveWrapper")
# Classes, and of each the layers whose weights it reads: mamba_ssm's kernels have the output projection in them, and
# what attention does in one function is called nowhere else.
_READERS = re.compile(
    r"(FalconMamba|FalconH1|Bamba|(Zamba2|NemotronH|GraniteMoeHybrid)?Mamba2?)(Mixer|Layer)\.out_proj"
    r"|(Falcon|Jamba)?MambaMixer\.dt_proj|WavLMAttention\.(q|k|v|out)_proj|TDNNLayer\.kernel"
    r"|\w+(DeltaAttention|LinearAttention|ShortConvolution|ShortConv)\.conv(1d)?"
)
WITHOUT_FORWARD = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


Target = nn.Module | Stack  # an adapted layer, or what gets to be one


def find_targets(model: nn.Module, config: LoRAConfig) -> dict[str, Target]:
    """The modules and stacks of experts to adapt by their full names, shared ones under each of their names.

    Raises ValueError, with the names that come near, when a configuration means none.
    """
    stacks = find_stacks(model, config.target_parameters or ())
    if config.target_modules is None and not config.target_parameters:
        raise ValueError('target_modules is None; expected names, suffixes, a regular expression or "all-linear"')
    if config.target_parameters and not stacks:
        raise ValueError(
            f"target_parameters={config.target_parameters!r} matches no parameter of {type(model).__name__}"
            f"{_near_parameters(config.target_parameters, model)}"
        )
    wanted = config.target_modules or ()
    return _find_modules(model, config, wanted) | stacks if wanted or not stacks else stacks


def find_stacks(model: nn.Module, names: Iterable[str]) -> dict[str, Target]:
    """The parameters of one of `names`, or with such an end, as stacks or the layers that adapt them.

    As in PEFT, in the order in which their module has them, and whatever exclude_modules and modules_to_save say.
    """
    names = list(names)
    return {path: target for path, target in _parameters(model) if matches(path, names)} if names else {}


def known_stacks(model: nn.Module) -> dict[str, Target]:
    """The stacks of the experts that are known, by full names."""
    found = {}
    for path, target in _parameters(model):
        stack = target.target if isinstance(target, LoRAExperts) else target
        if isinstance(stack, Stack) and is_mixture(stack.experts) and stack.name in stack_names(stack.experts):
            found[path] = target
    return found


def _parameters(model: nn.Module) -> Iterator[tuple[str, Target]]:
    for path, module in plain_modules(model):
        adapted = {one.parameter_name: one for one in module.around()} if isinstance(module, LoRAExperts) else {}
        for name in (module.plain_layer if isinstance(module, LoRALayer) else module)._parameters:
            yield f"{path}.{name}", adapted.get(name, Stack(module, name))


def _find_modules(model: nn.Module, config: LoRAConfig, wanted: str | Iterable[str]) -> dict[str, Target]:
    modules = dict(plain_modules(model))
    if wanted == ALL_LINEAR:
        head = output_layer(model)
        linears = {name for name, module in modules.items() if _is_linear(module) and module is not head}
        named = {name for name in linears if not why_without_effect(modules, name)}
    else:
        named = {name for name in modules if matches(name, wanted)}
    whole = find_modules_to_save(model, config.modules_to_save)
    excluded = config.exclude_modules or ()
    found: dict[str, Target] = {n: modules[n] for n in modules if n in named and owner_of(n, whole) is None}
    found = {name: module for name, module in found.items() if not matches(name, excluded)}
    if not found:
        left_out = [field for field in ("exclude_modules", "modules_to_save") if getattr(config, field)]
        rest = " and ".join(f"{field}={getattr(config, field)!r}" for field in left_out)
        without = f", of which {rest} leaves none" if named else ""
        raise ValueError(
            f"target_modules={wanted!r} matches {len(named)} modules of {type(model).__name__}"
            f"{without}; {_near_names(wanted, modules)}"
        )
    return found


def why_without_effect(modules: Mapping[str, nn.Module], path: str) -> str:
    """Why an adapter on this module would change nothing: its parent reads its weight, and does not call it.

    Those that run in one kernel or function are known, as PEFT knows some of them; the convolutions of state-space
    models by their neighbour A_log.
    """
    parent, _, name = path.rpartition(".")
    reader = modules.get(parent)
    if reader is None:
        return ""
    kind = type(reader).__name__
    is_read = _READERS.fullmatch(f"{kind}.{name}") or (name == "conv1d" and "A_log" in reader._parameters)
    return f"its parent, a {kind}, reads its weight and does not call it: no effect" if is_read else ""


def warn_of_unused(model: nn.Module, config: LoRAConfig, targets: Iterable[str]) -> None:
    """Warn of each entry of `config` that means no module, or no target: a name that is misspelt has no effect."""
    names = [name for name, _ in plain_modules(model)]
    unused: list[str] = []
    for field in ("target_modules", "exclude_modules"):
        given = getattr(config, field) or ()
        entries = [[entry] for entry in given] if not isinstance(given, str) else [given] if given != ALL_LINEAR else []
        unused += [f"{field}={entry!r}" for entry in entries if not any(matches(name, entry) for name in names)]
    parameters = [name for name, _ in _parameters(model)] if config.target_parameters else []
    given = config.target_parameters or ()
    unused += [f"target_parameters={entry!r}" for entry in given if not any(matches(n, [entry]) for n in parameters)]
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(by_pattern(targets, {key: True}, False).values()):
                unused.append(f"{field}[{key!r}]")
    if unused:
        warnings.warn(f"{' and '.join(unused)} matches nothing in {type(model).__name__}, and is ignored", stacklevel=4)


def find_modules_to_save(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Module]:
    """The modules whose full name ends in one of `names` (PEFT's rule), the outermost where they lie in each other.

    Raises TypeError for one that cannot be copied beside itself.
    """
    found: dict[str, nn.Module] = {}
    for name, module in plain_modules(model):
        if owner_of(name, found) is not None or not any(name.endswith(ending) for ending in names or ()):
            continue
        adapted = [inner for inner in module.modules() if isinstance(inner, (LoRALayer, SavedModule))]
        if isinstance(module, WITHOUT_FORWARD) or (adapted and not isinstance(module, SavedModule)):
            what = type(module).__qualname__ + (" with adapters in it" if adapted else "")
            raise TypeError(f"modules_to_save means {name!r}, a {what}; expected a module without adapters to call")
        found[name] = module
    return found


def owner_of(name: str, modules: Iterable[str]) -> str | None:
    """The one of `modules` that a name is or lies in."""
    return next((module for module in modules if name == module or name.startswith(f"{module}.")), None)


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under each of its names, adapted layers and saved modules as one: what is inside is no target.

    Nor is what is inside a layer of PEFT's.
    """
    return named_modules(model, _is_closed)


def _is_closed(module: nn.Module) -> bool:
    return isinstance(module, (LoRALayer, SavedModule)) or _is_of_peft(type(module).__mro__)


@lru_cache(maxsize=1024)
def _is_of_peft(kinds: tuple[type, ...]) -> bool:
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    return any(name.startswith("peft.") and name.endswith(_PEFTS) for name in names)


def _is_linear(module: nn.Module) -> bool:
    return layer_for(module.target if isinstance(module, LoRALayer) else module) is LoRALinear


def output_layer(model: nn.Module) -> nn.Module | None:
    """The head of a transformers model, which "all-linear" leaves alone as PEFT does."""
    get: Any = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _near_parameters(names: Iterable[str], model: nn.Module) -> str:
    known = list(known_stacks(model))
    suffixes = sorted({".".join(name.split(".")[-2:]) for name in known} | set(known))
    near = [name for want in names for name in difflib.get_close_matches(want, suffixes, n=3, cutoff=0.5)]
    if not known:
        return ", which has no experts that can be adapted"
    return f"; near names: {', '.join(dict.fromkeys(near)) or ', '.join(suffixes[:4])}"


def _near_names(patterns: str | Iterable[str], modules: Mapping[str, nn.Module]) -> str:
    layers = [name for name, module in modules.items() if layer_for(module) or isinstance(module, LoRALayer)]
    suffixes = sorted({name.rpartition(".")[2] for name in layers} | set(layers))
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    near = [name for want in wanted for name in difflib.get_close_matches(want, suffixes, n=3, cutoff=0.5)]
    if near:
        return f"near names: {', '.join(dict.fromkeys(near))}"
    if not layers:
        return "the model has no layer that can be adapted"
    return f"its layers that can be adapted are: {', '.join(layers[:10])}{', …' if len(layers) > 10 else ''}"
