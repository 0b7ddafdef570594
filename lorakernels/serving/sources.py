"""Where adapters come from: names, what their files hold, and the same packed into rank rows."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakernels.adapters.bind import Contents, bind
from lorakernels.adapters.folder import Source, check_inside, stamps_of
from lorakernels.config import LoRAConfig
from lorakernels.files.config_file import fields_of
from lorakernels.files.peft import parse, read_peft
from lorakernels.files.reading import AdapterFileError
from lorakernels.files.update import Update
from lorakernels.nn.experts import factors_of_each, is_transposed, why_not_run
from lorakernels.quant.layers import kind_of
from lorakernels.serving.errors import CapacityError
from lorakernels.serving.pools import ExpertSite, Pool, Site
from lorakernels.serving.served import BASES, served_by

# experts, expert_0, local_experts; not shared_expert, which is sent every token.
_EXPERT = re.compile(r"(?!.*shared).*experts?_?[0-9]*")
# T5's: looked up by query and key position, the same for all rows.
_POSITIONS = "relative_attention_bias"

Tensors = Mapping[str, torch.Tensor]
Given = str | os.PathLike[str] | tuple[LoRAConfig, Tensors]


@dataclass(frozen=True)
class Part:
    """What an adapter is in the modules of one class."""

    rank: int
    scaling: float


Parts = dict[Pool, Part]
Rows = dict[Pool, torch.Tensor]


def check_name(name: Any) -> None:
    """Raise ValueError unless a name could be a folder's: text, not empty, no separators, not "." or ".."."""
    bad = not isinstance(name, str) or not name.strip() or name in (".", "..") or any(c in "/\\" for c in name)
    if bad or any(ord(c) < 32 for c in name):
        raise ValueError(f"adapter name {name!r}: expected text without slashes and control characters, not '.', '..'")


def check_given(given: Any) -> None:
    """Raise TypeError unless it is None, a path, or a configuration and tensors."""
    if given is None or isinstance(given, (str, os.PathLike)):
        return
    pair = given if isinstance(given, tuple) and len(given) == 2 else (None, None)
    if not isinstance(pair[0], LoRAConfig) or not isinstance(pair[1], Mapping):
        kinds = ", ".join(type(one).__name__ for one in given) if isinstance(given, tuple) else type(given).__name__
        raise TypeError(f"the adapter is ({kinds}); expected a folder, or a LoRAConfig and tensors by PEFT's keys")
    for key, tensor in pair[1].items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            what = "on the meta device" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__qualname__}"
            raise TypeError(f"tensor {key!r} is {what}; expected a torch.Tensor with its numbers")


def read(
    model: nn.Module, sites: Mapping[str, Site], max_rank: int, source: Source | tuple[LoRAConfig, Tensors]
) -> tuple[Contents, Parts, Rows]:
    """What a source holds, or what came as tensors, checked against `model`; the same packed into rank rows.

    Raises AdapterFileError, also where the files are others than when they were first read, and CapacityError for a
    rank over `max_rank`.
    """
    if isinstance(source, Source):
        check_inside(source.folder, source.root)
        contents = bind(model, read_peft(source.folder), BASES)
        if stamps_of(source.folder) != source.stamps:
            mend = "replace(name, folder) takes the new ones"
            raise AdapterFileError(f"the files in {source.folder} have changed since the adapter was loaded; {mend}")
    else:
        config, tensors = source
        given = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
        contents = bind(model, parse(fields_of(config), given, "the adapter"), BASES)
    parts = _find_parts(contents, {"": model, **contents.modules}, sites, max_rank)
    return contents, parts, _pack(contents, parts, sites)


def _find_parts(
    contents: Contents, modules: Mapping[str, nn.Module], sites: Mapping[str, Site], max_rank: int
) -> Parts:
    """What is to be stored; allocates nothing.

    Raises AdapterFileError, naming it, for what a mixed batch cannot compute, and CapacityError for a rank over
    `max_rank`.
    """
    config = contents.config
    fields = {"use_dora": False, "lora_bias": False, "use_qalora": False, "bias": "none", "modules_to_save": None}
    for field, off in fields.items():
        if getattr(config, field) not in (off, [], ()):
            mend = "load_adapter runs such an adapter alone, on another copy of the model"
            raise AdapterFileError(f"{field}={getattr(config, field)!r} is not served; expected {off!r}: {mend}")
    largest: dict[Pool, tuple[int, float]] = {}
    taken: dict[Any, str] = {}
    for path, update in contents.layers.items():
        reason = _why_not_served(path, modules, sites.get(path), bool(update.experts))
        if reason:
            raise AdapterFileError(f"module {path!r} {reason}")
        site = sites[path]
        place = (site, path.rpartition(".")[2] if update.experts else "")
        if place in taken:
            raise AdapterFileError(f"{taken[place]!r} and {path!r} are one module; expected one of them in the file")
        taken[place] = path
        rank, scaling = update.r, update.scaling
        if rank > max_rank:
            raise CapacityError(f"module {path!r} has rank {rank}; the store takes at most max_rank={max_rank}")
        most, scale = largest.get(site.pool, (0, 0.0))
        largest[site.pool] = max(most, rank * site.pool.per_rank), max(scale, scaling, key=abs)
    return {pool: Part(rank, _of_plan(scaling, pool.dtype)) for pool, (rank, scaling) in largest.items()}


def _of_plan(scaling: float, dtype: torch.dtype) -> float:
    """Plans have their scalings in float32, which for float64 is not enough: then the rest of it goes into B's rows.

    All of it where float32 has nothing but 0, which no ratio to it could make good.
    """
    if dtype is not torch.float64 or scaling == 0:
        return scaling
    return torch.tensor(scaling, dtype=torch.float32, device="cpu").item() or 1.0


def module_path(path: str, update: Update) -> str:
    """Of the module that an update's path means: a stack is a parameter of one."""
    return path.rpartition(".")[0] if update.experts else path


def _why_not_served(path: str, modules: Mapping[str, nn.Module], site: Site | None, is_stack: bool) -> str:
    """What speaks against serving a module that an adapter reaches; nothing where it can be served."""
    path = path.rpartition(".")[0] if is_stack else path
    module: Any = modules[path]
    parent, other = modules[path.rpartition(".")[0]], served_by(module)
    if is_stack and site is None:
        why = why_not_run(module) or "of experts, how many rows one multiplies depends on the others"
        return f"is not served: {why}; expected experts that are known, and a store without invariant=True"
    if site is None or site.module is not module:
        return (
            f"is a {type(module).__qualname__}; a store serves what was torch.nn.Linear or Embedding when it was made"
        )
    # Of a copied model the classes are a store's, without a site.
    if BASES.get(type(module)) is not site.base or (other is not None and other.owner is not site.owner):
        return "is served by another AdapterStore; close() that one first"
    if "forward" in module.__dict__:
        return "has a forward of its own (such as accelerate's hooks), which goes first"
    if is_stack:
        return ""
    if any(_EXPERT.fullmatch(part) for part in path.split(".")):
        return "is an expert, which is sent some of the tokens; not served"
    if path.rpartition(".")[2] == _POSITIONS:
        return "is a table of positions, which are no rows of a batch; not served"
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        mend = "call torch.backends.mha.set_fastpath_enabled(False) first"
        return f"is not called by the fast path of TransformerEncoderLayer, which leaves the adapter out; {mend}"
    weight: Any = module.weight
    plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point()
    if not plain and not kind_of(module):
        return f"has a weight that is a {type(weight).__qualname__}, {weight.dtype}; not served"
    return ""


def _factors(site: Site, path: str, update: Update) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, K] and B [N, r], of a stack those of each expert."""
    if not isinstance(site, ExpertSite):
        return update.factors
    [stack] = [stack for stack in site.stacks if stack.name == path.rpartition(".")[2]]
    A, B, *_ = update.tensors.values()
    return factors_of_each(A, B, update.experts, by_columns=stack.by_columns, transposed=is_transposed(site.module))


def _pack(contents: Contents, parts: Parts, sites: Mapping[str, Site]) -> Rows:
    """Rank rows [rank, W] by class, zero where the adapter has nothing.

    A class has one scaling, its largest; where modules differ (alpha_pattern, rank_pattern) the ratio goes into B's
    rows. What does not fit the model's dtype is refused.
    """
    rows = {pool: pool.host_rows(part.rank) for pool, part in parts.items()}
    for path, update in contents.layers.items():
        site, (A, B) = sites[path], _factors(sites[path], path, update)
        of_class = parts[site.pool].scaling
        if update.scaling != of_class:
            B = B.to(torch.promote_types(B.dtype, torch.float32)) * (update.scaling / of_class)
        own = rows[site.pool]
        if update.experts:  # a page a rank row of each, expert by expert
            own = own.unflatten(0, (update.experts, -1))
        of_A, of_B = site.spans[path.rpartition(".")[2] if update.experts else ""]
        spans = [own[..., : update.r, span] for span in (of_A, of_B)]
        for span, factor in zip(spans, (A, B.mT), strict=True):
            span.copy_(factor)
        # Of the class's row no more than was written: with every layer's, the whole would be read once for each.
        if not all(math.isfinite(span.abs().amax().item()) for span in spans):
            raise AdapterFileError(f"the adapter of {path!r} has numbers that the model's {own.dtype} cannot hold")
    return rows
