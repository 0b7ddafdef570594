"""Adapters of a mixture's stacks of experts (`target_parameters`) as PEFT's files have them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from lorakernels.config import LoRAConfig
from lorakernels.files.config_file import peft_version
from lorakernels.files.reading import AdapterFileError, Tensors
from lorakernels.files.update import LINEAR, Update
from lorakernels.patterns import matches

# The parameters that hold a mixture's experts, in the order in which PEFT's wrappers are around each other: the
# innermost first, for it is the one that the mixture has first.
STACKS = ("gate_up_proj", "up_proj", "down_proj")
WRITTEN_AS = "0.19.0"  # the first PEFT whose A is over a stack's last dimension where it is not transposed
# Whose experts say that their stacks are transposed.
_TRANSPOSED = ("aria", "aria_text", "gpt_oss", "openai_privacy_filter")
# What a stack is made of where a model's files have each expert by itself.
_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
# What a model's files call a stack that is one tensor in them, GraniteMoE's beside the parameter's own name.
_STORED = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down_proj"}
_OLDER_MIXTURES = (("", ""), (".mlp.experts", ".block_sparse_moe.experts"))


def by_parameter(layers: Mapping[str, Tensors], config: LoRAConfig, source: str) -> tuple[dict[str, Tensors], set[str]]:
    """The layers of a file, those of stacks by their parameters' names, and these names.

    PEFT has a wrapper around the experts for each of their parameters, one around another: `….experts.lora_A` is the
    outermost one's, and of which parameter that is, `target_parameters` says.
    """
    names = list(config.target_parameters or ())
    for name in names:
        if name.rpartition(".")[2] not in STACKS:
            raise AdapterFileError(
                f"{source}: target_parameters has {name!r}, which is no stack of experts that is known; expected the "
                f"names of parameters that end in {', '.join(STACKS)}"
            )
    if not names:
        return dict(layers), set()
    wrappers: dict[str, list[str]] = defaultdict(list)
    meant: dict[str, list[str]] = {}
    for path in sorted(layers, key=len, reverse=True):  # the innermost first
        module = _unwrapped(path)
        meant[module] = [name for name in STACKS if matches(f"{module}.{name}", names)]
        if path != module or (meant[module] and not matches(module, config.target_modules or ())):
            wrappers[module].append(path)
    renamed: dict[str, str] = {}
    for module, paths in wrappers.items():
        if len(paths) != len(meant[module]):
            raise AdapterFileError(
                f"{source}: {module} has {len(paths)} pairs of lora_A and lora_B, and target_parameters={names} means "
                f"{meant[module] or 'none'} of its parameters; expected a pair for each, which tells whose is which"
            )
        renamed |= {path: f"{module}.{name}" for path, name in zip(paths, meant[module], strict=True)}
    if not renamed:
        raise AdapterFileError(f"{source}: target_parameters={names}, of which the file has no tensors")
    return {renamed.get(path, path): tensors for path, tensors in layers.items()}, set(renamed.values())


def wrapped_names(stacks: Iterable[str]) -> dict[str, str]:
    """By the names of parameters what PEFT calls their wrappers: the other way round."""
    modules: dict[str, list[str]] = defaultdict(list)
    for path in sorted(stacks, key=lambda path: STACKS.index(path.rpartition(".")[2]), reverse=True):
        modules[path.rpartition(".")[0]].append(path)
    return {path: m + ".base_layer" * depth for m, paths in modules.items() for depth, path in enumerate(paths)}


def stored_stacks(names: Iterable[str]) -> dict[str, str]:
    """By the names of parameters those tensors of a model's files, of these names, that hold a stack."""
    found = {}
    for name in names:
        module, _, end = name.rpartition(".")
        holder, _, leaf = module.rpartition(".")
        if end in STACKS:
            found[name] = name
        elif known := _STORED.get(f"{leaf}.{end}"):
            found[f"{holder}.{known}"] = name
    return found


def num_experts(path: str, tensors: Tensors, r: int) -> int:
    """By a stack's own factors, of rank r each."""
    A = tensors.get(LINEAR[0])
    if A is None or A.dim() != 2:
        return 1
    if A.shape[0] < 2 * r or A.shape[0] % r:
        expected = f"expected r · experts of them, of several experts and r={r}"
        raise AdapterFileError(f"{path}: {LINEAR[0]} has {A.shape[0]} rows; {expected}")
    return A.shape[0] // r


def of_today(
    path: str, tensors: Tensors, E: int, sizes: tuple[int, int], by_columns: bool, fields: Mapping[str, Any]
) -> Tensors:
    """A stack's factors as PEFT has them since 0.19; before, A was over the dimension before the last always.

    `sizes` are `in` and `out` of today's, and `by_columns` says that A is over the last dimension; else nothing has
    changed. Where both are one size the file's `peft_version` tells; raises AdapterFileError where there is none.
    """
    if not by_columns or not all(name in tensors and tensors[name].dim() == 2 for name in LINEAR):
        return tensors
    A, B = (tensors[name] for name in LINEAR)
    wide, tall = sizes
    if (A.shape[1], B.shape[0]) != (tall, wide) or A.shape[0] != B.shape[1] or A.shape[0] % E:
        return tensors
    if wide == tall:
        version = peft_version(fields)
        if version is None:
            raise AdapterFileError(
                f"{path}: the experts are [{tall}, {wide}], and which dimension lora_A is over only the peft_version "
                "tells, which adapter_config.json lacks; add that of the PEFT that has written the file"
            )
        if version >= (0, 19):
            return tensors
    own_A, own_B = A.unflatten(0, (E, -1)).permute(2, 1, 0), B.unflatten(1, (-1, E)).permute(2, 1, 0)
    return {**tensors, LINEAR[0]: own_B.flatten(0, 1).contiguous(), LINEAR[1]: own_A.flatten(1).contiguous()}


def fitted_stack(
    path: str, update: Update, shape: torch.Size, model_type: Any, fields: Mapping[str, Any]
) -> tuple[Update, bool]:
    """An update of today's layout for a stack [E, rows, columns] in a model's files, and whether its A is over rows."""
    E, rows, columns = shape
    by_columns = model_type not in _TRANSPOSED
    if rows != columns and by_columns:
        # What is not known to be transposed may be: it does not matter, for then A is over the rows in every version.
        A, B = (update.tensors[name] for name in LINEAR)
        if (A.shape[1], B.shape[0]) == (rows, columns):
            return update, True
    tensors = of_today(path, update.tensors, E, (columns, rows), by_columns, fields)
    return replace(update, tensors=tensors), not by_columns


class OwnExperts:
    """The layers of experts in a model's files, by what is alike in all of its mixtures: a big one has 40,000."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self._by_end: dict[str, list[tuple[str, torch.Size]]] = defaultdict(list)
        for name, shape in shapes.items():
            self._by_end[_end(name)].append((f".{name}", shape))

    def find(self, name: str) -> torch.Size | None:
        """The shape of the tensor of this name, whatever is before it in the files."""
        return next((shape for known, shape in self._by_end[_end(name)] if known.endswith(f".{name}")), None)


def _end(name: str) -> str:
    """experts.0.gate_proj.weight"""
    return ".".join(name.split(".")[-4:])


def of_own_experts(path: str, update: Update, files: OwnExperts, fields: Mapping[str, Any]) -> dict[str, Update]:
    """The updates of each expert's own layers, by their names, where a model's files hold these and no stack.

    Empty where they have no such experts; raises AdapterFileError where they have more than the adapter.
    """
    module, _, name = path.rpartition(".")
    for parts in _PARTS[name]:
        for name_now, older in _OLDER_MIXTURES:
            there = module.replace(name_now, older) if name_now else module
            found = [files.find(f"{there}.0.{part}.weight") for part in parts]
            if found[0] is None or not all(shape is not None and len(shape) == 2 for shape in found):
                continue
            if files.find(f"{there}.{update.experts}.{parts[0]}.weight") is not None:
                expected = "expected the model that it was trained on"
                raise AdapterFileError(
                    f"the adapter's {path} has {update.experts} experts, and the model more; {expected}"
                )
            N, K = found[0]
            tensors = of_today(path, update.tensors, update.experts, (K, N * len(parts)), True, fields)
            A, B = replace(update, tensors=tensors).factors
            own = {}
            for expert, (of_A, of_B) in enumerate(zip(A, B, strict=True)):
                for part, rows in zip(parts, of_B.chunk(len(parts)), strict=True):
                    pair = dict(zip(LINEAR, (of_A, rows), strict=True))
                    own[f"{there}.{expert}.{part}"] = replace(update, tensors=pair, experts=0)
            return own
    return {}


def _unwrapped(path: str) -> str:
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path
