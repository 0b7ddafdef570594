"""Adapted linears of one module that are called with the same x (q, k, v; gate, up): declared once, run as one.

`find` takes them from the names of a parent's children, and `declare` gives the parent two hooks. While the parent
runs, the first member that is called, the leader, computes all that can be computed in its way. The others find their
result when they are called with that very tensor, and take it only if all that it depends on is as it was; otherwise
they compute their own. Nothing is learned: the first pass decides as every other, and a region as when it is
recomputed.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from lorakernels.quant.packed import PackedWeight

Names = tuple[str, ...]
Part = tuple[Any, ...]

# What models call those children of one module that read the same x.
FAMILIES: tuple[Names, ...] = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, Phi, OPT, BART, Whisper, CLIP
    ("query", "key", "value"),  # BERT, RoBERTa, ViT
    ("q", "k", "v"),  # T5
    ("to_q", "to_k", "to_v"),  # diffusers
    ("add_q_proj", "add_k_proj", "add_v_proj"),  # diffusers, of the text beside the picture
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
    ("linear_q", "linear_k", "linear_v"),  # Conformers
    ("wq", "wk", "wv"),  # Llama as Meta has it
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek
    ("gate_proj", "up_proj"),  # Llama, Mistral, Qwen, Gemma
    ("gate", "up"),
    ("w1", "w3"),  # Llama as Meta has it, Mixtral
    ("wi_0", "wi_1"),  # T5 1.1
)
# Where a parent's own name, or the one that holds it, says that it attends to something else than it is called with,
# only keys and values are of one x.
_CROSS = re.compile(r"cross|encoder_attn|enc_?dec|encoder_decoder|\battn2\b|context_attn", re.IGNORECASE)
_PLAIN = (torch.Tensor, nn.Parameter)


class Way(NamedTuple):
    """How members are computed together: those that have an adapter each, or those of a batch of many."""

    call_of: Callable[[Any, torch.Tensor], Any]
    """What another member would do with x; None where it is to run by itself."""
    part_of: Callable[[torch.Tensor, Any, bool], Part | None]
    """All that y of such a call depends on, but x, and last what members must have in common; None for a call that no
    group has, or that would be no faster so. The flag says whether dropout may be shared."""
    run: Callable[[torch.Tensor, list[Part]], list[torch.Tensor]]
    """The y's. Raises TypeError or ValueError for a wrong argument, before anything has run."""


class _Result(NamedTuple):
    """What a leader has left for one of the others."""

    y: torch.Tensor
    of_x: list[Any]
    state: list[Any] | None
    made_of: Any  # kept, so that no other tensor gets its id


class _Scope:
    """A call of a parent that runs, within another's or not."""

    __slots__ = ("groups", "leaders", "mode", "outer", "parent", "results")

    def __init__(self, parent: nn.Module, groups: _Groups, outer: _Scope | None) -> None:
        self.parent, self.groups, self.outer = weakref.ref(parent), groups, outer
        self.mode = _mode()
        self.leaders: dict[Any, nn.Module] = {}
        self.results: dict[nn.Module, _Result] = {}


class _Thread(threading.local):
    scope: _Scope | None = None


_thread = _Thread()


class _Groups:
    """A parent's pre-hook. It has names and no modules: a copied or pickled model has groups of its own."""

    def __init__(self, groups: tuple[Names, ...], with_dropout: bool) -> None:
        self.groups, self.with_dropout = groups, with_dropout

    def __call__(self, parent: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():  # a compiled graph has no memory of earlier calls
            return
        if _thread.scope is not None:
            _close(parent, args)  # what an interrupt has left open, which runs no hook
            if _thread.scope is not None:
                _thread.scope.results.clear()  # lest those of an interrupted parent stay until it runs again
        _thread.scope = _Scope(parent, self, _thread.scope)


def _close(parent: nn.Module, args: Any, output: Any = None) -> None:
    """A parent's hook: forget its call, with all that has not been taken, and the calls within it."""
    if torch.compiler.is_compiling():
        return
    scope = _thread.scope
    while scope is not None and scope.parent() is not parent:
        scope = scope.outer
    if scope is not None:
        _thread.scope = scope.outer


def find(
    model: nn.Module, is_member: Callable[[nn.Module], bool], listed: Sequence[Sequence[str]] = ()
) -> dict[nn.Module, tuple[Names, ...]]:
    """The groups among each parent's children for which `is_member` holds: as listed, then by families of names.

    Raises:
        TypeError: `listed` is not a list of lists of names.
        ValueError: a list has fewer than two names, or no module has two members of these names.
    """
    if isinstance(listed, str) or not all(isinstance(n, (list, tuple)) and set(map(type, n)) <= {str} for n in listed):
        raise TypeError(f"groups is {listed!r}; expected a list of lists of names, such as [['q_proj', 'k_proj']]")
    wanted = [tuple(dict.fromkeys(names)) for names in listed]
    found: dict[nn.Module, tuple[Names, ...]] = {}
    unused = set(wanted)
    for path, parent in model.named_modules():
        free = {name: child for name, child in parent._modules.items() if child is not None and is_member(child)}
        crosses = bool(_CROSS.search(".".join(path.split(".")[-2:])))
        groups = []
        for names in (*wanted, *(names[1:] if crosses and len(names) == 3 else names for names in FAMILIES)):
            group = tuple(name for name in names if name in free)
            if len({free[name] for name in group}) > 1:  # not one layer under two names
                groups.append(group)
                unused.discard(names)
                for name in group:
                    del free[name]
        if groups:
            found[parent] = tuple(groups)
    if unused:
        raise ValueError(
            f"groups has {list(min(unused))}; expected the names of two or more adapted linear layers of one module"
        )
    return found


def declare(found: Mapping[nn.Module, tuple[Names, ...]], group: bool | None = None) -> list[RemovableHandle]:
    """Give these parents their groups, in the place of those they have; the hooks that do it.

    None: members with dropout stay apart. True: they share one mask, so a seed draws other masks than for each alone.
    False: there are no groups.
    """
    hooks: list[RemovableHandle] = []
    for parent, groups in found.items():
        forget(parent)
        if group is not False:
            hooks.append(parent.register_forward_pre_hook(_Groups(groups, group is True)))
            hooks.append(parent.register_forward_hook(_close, always_call=True))
    return hooks


def forget(parent: nn.Module) -> None:
    for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
        for key in [key for key, hook in hooks.items() if type(hook) is _Groups or hook is _close]:
            del hooks[key]
            parent._forward_hooks_always_called.pop(key, None)


def has_groups(parent: nn.Module) -> bool:
    return any(type(hook) is _Groups for hook in parent._forward_pre_hooks.values())


def from_group(layer: Any, x: torch.Tensor, call: Any, way: Way) -> torch.Tensor | None:
    """y [..., N] of this call as its group has made it, or makes it now; None where the layer is to run by itself."""
    if torch.compiler.is_compiling() or (scope := _thread.scope) is None:
        return None
    result = scope.results.pop(layer, None)
    part = way.part_of(x, call, scope.groups.with_dropout)
    if part is None:
        return None
    # Not in a region, or under a mode, that began within the parent: when it runs again the parent does not.
    if not _may_share(x) or scope.mode != _mode():
        return None
    if result is None:
        return _lead(scope, layer, x, part, way)
    return result.y if result.of_x == _state_of_x(x) and result.state == _state(*part) else None


def _may_share(x: torch.Tensor) -> bool:
    return not (
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or x.is_inference()
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _mode() -> tuple[Any, ...]:
    """Whether gradients are on, and the hooks of saved tensors: a checkpointed region has its own, in each run."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), None if top is None else top[0]


def _lead(scope: _Scope, layer: Any, x: torch.Tensor, part: Part, way: Way) -> torch.Tensor | None:
    """The leader's y, the others' results in the scope; None where now they cannot be computed together."""
    modules: dict[str, Any] = getattr(scope.parent(), "_modules", {})
    names = next((names for names in scope.groups.groups if any(modules.get(name) is layer for name in names)), None)
    # Where the others are called with another x than their leader was, each is by itself.
    if names is None or scope.leaders.setdefault((names, part[-1]), layer) is not layer:
        return None
    members: dict[Any, Part] = {layer: part}
    for sibling in (modules[name] for name in names if name in modules):
        if sibling not in members and (call := way.call_of(sibling, x)) is not None:
            other = way.part_of(x, call, scope.groups.with_dropout)
            if other is not None and other[-1] == part[-1]:
                members[sibling] = other
    if len(members) == 1:
        return None
    of_x, states = _state_of_x(x), [_state(*each) for each in members.values()]
    if of_x is None or None in states:
        return None
    try:
        ys = way.run(x, list(members.values()))
    except (TypeError, ValueError):  # an argument is wrong, and nothing has run: let the layer raise whose it is
        return None
    for (sibling, each), state, y in zip(members.items(), states, ys, strict=True):
        scope.results[sibling] = _Result(y, of_x, state, (x, each))
    return scope.results.pop(layer).y


def _state(*values: Any) -> list[Any] | None:
    """What tells one call from another; None where torch does not count changes, or tensors are no plain ones."""
    state: list[Any] = []
    try:
        for value in values:
            if isinstance(value, PackedWeight):  # of views that are made at each call
                for part in value:
                    state += (part._version, part.data_ptr()) if isinstance(part, torch.Tensor) else (part,)
            elif isinstance(value, torch.Tensor):
                if type(value) not in _PLAIN:
                    return None
                state += (id(value), value._version, value.data_ptr(), value.requires_grad)
            else:
                state.append(value)
    except RuntimeError:  # made in inference mode, or sparse
        return None
    return state


def _state_of_x(x: torch.Tensor) -> list[Any] | None:
    device = x.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    stream = torch._C._cuda_getCurrentRawStream(device.index) if x.is_cuda else 0
    return _state(x, autocast, stream)
