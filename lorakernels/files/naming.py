"""Which module of a model, or of a model's files, each name in an adapter's file means: one, or it is refused."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lorakernels.files.checkpoint import Checkpoint
from lorakernels.files.formats import AdapterFile
from lorakernels.files.one_file import part_of
from lorakernels.files.reading import AdapterFileError
from lorakernels.files.stacks import stored_stacks
from lorakernels.files.unet_names import original_names

HEADS = ("lm_head", "embed_out", "output_projection")
_MOST_LAYERS = 1000  # of a model that is made for its names


@dataclass(frozen=True)
class Model:
    """What has the modules that are meant: a model, or its files.

    `weights` has its tensors' names, `where` is what to call it in an error, and `renamings` gives what renames the
    tensors of older models of its kind, in order.
    """

    weights: Any  # a mapping from them
    where: str
    renamings: Callable[[], Sequence[Any]]
    hint: str = ""  # what to say where a name is not found


def of_files(checkpoint: Checkpoint) -> Model:
    """A model's folder. What transformers has renamed is known where it is imported, and `lorakernels` does not."""
    unknown = "architectures" in checkpoint.config and "transformers" not in sys.modules
    hint = "; names that transformers has changed since are known after `import transformers`" if unknown else ""
    # A stack of experts is a parameter, not a module's weight.
    stacks = stored_stacks(checkpoint.tensors).items()
    weights = {**checkpoint.tensors, **{f"{path}.weight": checkpoint.tensors[name] for path, name in stacks}}
    return Model(weights, str(checkpoint.folder), partial(_renamings_of_files, checkpoint), hint)


def _renamings_of_files(checkpoint: Checkpoint) -> list[Any]:
    """As `renamings_of`, of the model that config.json means, which is made without memory."""
    config = checkpoint.config
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    kind: Any = getattr(sys.modules.get("transformers"), name, None) if name.isidentifier() else None
    if not hasattr(kind, "config_class"):
        return []
    try:
        if _most_layers(config) > _MOST_LAYERS:
            return []
        with torch.device("meta"):
            model = kind(kind.config_class.from_dict(dict(config)))
    except Exception:  # of another version, or not whole: the names are then as they are
        return []
    return renamings_of(model)


def _most_layers(config: Mapping[str, Any]) -> int:
    """The most layers that a configuration asks for, in any part: one that lies would make a model without end."""
    inner = [_most_layers(value) for value in config.values() if isinstance(value, dict)]
    own = [value for name, value in config.items() if isinstance(value, int) and ("layer" in name or "depth" in name)]
    return max([0, *inner, *own])


def renamings_of(model: Any) -> list[Any]:
    """What transformers renames in files of models of this kind that are older than its names of today.

    Nothing where nobody has imported it: who makes a model of it has.
    """
    mapping: Any = sys.modules.get("transformers.conversion_mapping")
    if not hasattr(mapping, "get_model_conversion_mapping"):  # before transformers 5
        return []
    every = mapping.get_model_conversion_mapping(model)
    return [one for one in every if not getattr(one, "operations", ())]  # others change tensors too


def _renamed(name: str, renamings: Iterable[Any]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _spellings(modules: Iterable[str], renamings: Sequence[Any]) -> dict[str, set[str]]:
    """Of modules those names, older and newer than their own, that the renamings make one with it."""
    ways = [renamings, *([one.reverse_transform()] for one in renamings)] if renamings else []
    found = {}
    for path in modules:
        today = _renamed(f"{path}.weight", renamings)
        names = {_renamed(f"{path}.weight", way) for way in ways}
        found[path] = {name.removesuffix(".weight") for name in names if _renamed(name, renamings) == today}
    return found


def own_names(names: Iterable[str], known: Any, renamings: Callable[[], Sequence[Any]]) -> dict[str, str]:
    """What a model calls each of a file's tensors, where one of the two is older than a renaming by transformers.

    Raises AdapterFileError where two of them are one, or one is two.
    """
    own = {name: name for name in names}
    missing = [name for name in own if name not in known]
    steps = renamings() if missing else ()
    if steps:
        today = defaultdict(list)
        for name in known:
            today[_renamed(name, steps)].append(name)
        for name in missing:
            new = _renamed(name, steps)
            found = [new] if new in known else today.get(new, [])
            if len(found) > 1:
                raise AdapterFileError(f"{name!r} can mean {' or '.join(found[:4])} of the model; expected one of them")
            own[name] = found[0] if found else name
    first: dict[str, str] = {}
    for name, one in own.items():
        if first.setdefault(one, name) != name:
            raise AdapterFileError(f"{first[one]!r} and {name!r} are both {one!r} of the model; expected one of them")
    return own


def place(
    adapter: AdapterFile, model: Model | None, prefix: str | None = None, *, choose: bool = False
) -> tuple[str, dict[str, str]]:
    """The part of an adapter that is meant, and by the file's names the model's modules, and its tensors of `others`.

    Args:
        prefix: the part, where a file has several; with `choose` it may be left out where one alone fits the model.

    Raises AdapterFileError, where names are not the model's, or mean several of its modules.
    """
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for name in adapter.updates:
        part, inner = part_of(adapter.format, name, prefix)
        parts[part][name] = inner
    listing = ", ".join(f"{part or 'none'} ({len(names)} modules)" for part, names in sorted(parts.items()))
    if prefix is not None and prefix not in parts:
        raise AdapterFileError(f"{adapter.source} has no modules of the prefix {prefix!r}; it has: {listing}")
    several = (
        f"{adapter.source} holds adapters of several models: {listing}; a PEFT folder is for one: "
        "choose with prefix (--prefix), and give that model (its folder as --model)"
    )
    wanted = [prefix] if prefix is not None else list(parts)
    if len(wanted) > 1 and (model is None or not choose):
        raise AdapterFileError(several)
    found: dict[str, dict[str, str]] = {}
    errors = []
    for part in wanted:
        try:
            found[part] = _names_of(adapter, parts[part], model)
        except AdapterFileError as error:
            errors.append(error)
    if len(wanted) == 1 and errors:
        raise errors[0]
    if len(found) != 1:
        fit = f"{' and '.join(found)} fit" if found else f"none fits: {errors[0]}"
        raise AdapterFileError(f"{several}; {fit}")
    return next(iter(found.items()))


def _names_of(adapter: AdapterFile, names: dict[str, str], model: Model | None) -> dict[str, str]:
    """`names` has by the file's the names without the part's."""
    if adapter.format == "kohya":
        return _of_underscores(adapter, names, model)
    if model is None:
        return names
    weights = {f"{inner}.weight": name for name, inner in names.items()}
    own = own_names([*weights, *adapter.others], model.weights, model.renamings)
    if not all(own[weight] in model.weights for weight in weights):
        own = _with_other_start(list(names.values()), own, model)
    meant = {name: own[weight].removesuffix(".weight") for weight, name in weights.items()}
    return meant | {name: own[name] for name in adapter.others}


def _with_other_start(paths: list[str], own: dict[str, str], model: Model) -> dict[str, str]:
    """The one other way in which the paths mean the model's names.

    An inner model lacks the first part of a path ("model."), an outer one has one more; or a UNet's names are
    Stability's. Exactly one way must place every module.
    """
    weights = model.weights
    original = {f"{name}.weight": f"{path}.weight" for path, name in original_names(_modules(weights)).items()}
    if all(f"{path}.weight" in original for path in paths):
        return own | {f"{path}.weight": original[f"{path}.weight"] for path in paths}
    ways: list[tuple[str, str]] = []  # the start that goes, the start that comes
    parts = paths[0].split(".")
    for count in range(1, len(parts)):
        gone = ".".join(parts[:count]) + "."
        if all(path.startswith(gone) for path in paths):
            ways.append((gone, ""))
    suffix = f".{paths[0]}.weight"
    ways += [("", name[: len(name) - len(suffix) + 1]) for name in weights if name.endswith(suffix)]

    def apply(way: tuple[str, str], name: str) -> str:
        return way[1] + name.removeprefix(way[0])

    placed = [way for way in ways if all(apply(way, f"{path}.weight") in weights for path in paths)]
    if len(placed) > 1:
        meanings = " or ".join(apply(way, paths[0]) for way in placed[:4])
        raise AdapterFileError(f"{paths[0]} can mean {meanings} of {model.where}; expected one meaning")
    if not placed:
        missing = [path for path in paths if own[f"{path}.weight"] not in weights]
        tied = missing[0].rpartition(".")[2] in HEADS
        raise AdapterFileError(
            f"{model.where} has no weight for {len(missing)} of the adapter's {len(paths)} modules, such as "
            f"{missing[0]}.weight{' (a head tied to the embedding has no tensor of its own)' if tied else ''}; "
            f"expected the model that it was trained on{model.hint}"
        )
    return {name: apply(placed[0], name) for name in own}


def _modules(weights: Iterable[str]) -> list[str]:
    return [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]


def _of_underscores(adapter: AdapterFile, names: dict[str, str], model: Model | None) -> dict[str, str]:
    if model is None:
        raise AdapterFileError(
            f"{adapter.source} is a kohya file, whose module names have underscores for dots; "
            "give the model's folder as --model, whose tensor names tell which were dots"
        )
    modules = _modules(model.weights)
    own = _by_underscores((path, path) for path in modules)
    others: dict[str, dict[str, None]] = {}
    if not all(inner in own for inner in names.values()):
        older = [(other, path) for path, found in _spellings(modules, model.renamings()).items() for other in found]
        others = _by_underscores([*older, *((other, path) for path, other in original_names(modules).items())])
    meant = {name: list(own.get(inner) or others.get(inner) or ()) for name, inner in names.items()}
    for name, found in meant.items():
        if len(found) > 1:
            raise AdapterFileError(f"{name} can mean {' or '.join(found)} of {model.where}; expected one module")
    unknown = [name for name in names if not meant[name]]
    if unknown:
        raise AdapterFileError(
            f"{model.where} has no module for {len(unknown)} of {len(names)} names, such as {unknown[0]}; expected the "
            f"model that the adapter was trained on, and of it a single part (unet, text_encoder, ...){model.hint}"
        )
    twice = next((path for path, count in Counter(found[0] for found in meant.values()).items() if count > 1), None)
    if twice is not None:
        both = " and ".join(name for name, found in meant.items() if found == [twice])
        raise AdapterFileError(f"{both} are both {twice} of {model.where}; expected one of them")
    return {name: found[0] for name, found in meant.items()}


def _by_underscores(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, None]]:
    """The modules that a name with underscores can mean, of pairs of a name with dots and a module."""
    meant: dict[str, dict[str, None]] = defaultdict(dict)
    for name, path in pairs:
        meant[name.replace(".", "_")][path] = None
    return meant
