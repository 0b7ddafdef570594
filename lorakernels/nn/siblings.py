"""Adapted linears of one module that are called with the same x (q, k, v; gate, up), found by watching, run as one.

In a first pass of the parent each layer notes x. Where several of its children were called in turn with the same
tensor object, the first of them (the leader) from then on computes all by `lora_linear_group`, and the others find
their result when they are called with that object. They take it only if all that it depends on is as it was when it
was computed; otherwise they compute their own. A leader whose results are left behind never leads again.

Nothing is kept in the modules. What a leader leaves behind, because its parent ended early, goes with x, at the next
collection of garbage on the thread, or at the thread's next call of a layer that a group could hold.
"""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from lorakernels import functional
from lorakernels.configs.table import FEW_TOKENS
from lorakernels.nn.modules import runs_more_than_forward
from lorakernels.ops import small_linear

_PLAIN = (torch.Tensor, nn.Parameter)


class Call(NamedTuple):
    """One LoRA linear as it would run now: what `functional.lora_linear` is given behind x."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    scaling: float | torch.Tensor
    p: float  # dropout's; 0 where it is off


Describe = Callable[[Any, torch.Tensor], "Call | None"]  # what a layer would do with x; None: not one plain LoRA linear


class _Group:
    """A leader's siblings, in the order of their calls."""

    def __init__(self, members: list[tuple[weakref.ref[Any], Describe]], code: Any) -> None:
        self.members = members
        self.code = code  # of the function that calls them
        self.in_use = False
        self.dissolved = False


class _Run(NamedTuple):
    """Layers that were called in turn with one x."""

    x: weakref.ref[torch.Tensor]
    frame: int
    layers: list[tuple[weakref.ref[Any], Describe]]


class _Context(NamedTuple):
    """What else a result depends on."""

    grad: bool
    autocast: torch.dtype | None
    stream: int
    region: Any  # a checkpointed one, torch's own object
    again: bool  # it is recomputed


class _Stash:
    """The results that a leader has left for its siblings, and what they were made of."""

    def __init__(self, group: _Group, x: torch.Tensor, context: _Context, frame: int) -> None:
        self.group, self.context, self.of_x = group, context, _state((x,))
        self.frame = frame  # id of the call of the parent that runs
        self.left = len(group.members)
        # No reference to self in the callback: that would be a cycle, which keeps the results until it is collected.
        self.results: dict[Any, tuple[Call, Any, torch.Tensor]] = {}
        results = self.results
        self.x = weakref.ref(x, lambda _: results.clear())

    def take(self, layer: Any, x: torch.Tensor, call: Call, context: _Context) -> torch.Tensor | None:
        result = self.results.pop(weakref.ref(layer), None)
        if result is None or self.x() is not x or context != self.context or self.of_x != _state((x,)):
            return None
        if id(_caller()) != self.frame:
            return None
        made_of, state, y = result
        pairs = zip(call, made_of, strict=True)
        same = all(now is then or (isinstance(now, (int, float)) and now == then) for now, then in pairs)
        if not same or state != _state(call):
            return None
        self.left -= 1
        return y

    def drop(self) -> None:
        self.results.clear()
        if self.left and not self.context.again:  # a recomputation may end anywhere
            self.group.dissolved = True


class _Thread(threading.local):
    run: _Run | None = None
    stash: _Stash | None = None  # a collection of garbage may ask for it before a thread has more

    def __init__(self) -> None:
        self.groups: WeakKeyDictionary[nn.Module, _Group] = WeakKeyDictionary()  # by leader


_thread = _Thread()


def _drop_what_is_left(phase: str, info: dict[str, int]) -> None:
    """Where a parent ended early, by an exception, its results hold their graph, and that holds x."""
    stash = _thread.stash
    if phase == "start" and stash is not None:
        frame: Any = sys._getframe(1)
        while frame is not None and id(frame) != stash.frame:
            frame = frame.f_back
        if frame is None:
            _thread.stash = None


gc.callbacks.append(_drop_what_is_left)
# What was decided for each leader in a checkpointed region: its recomputation, maybe on another thread, must save the
# same tensors and draw the same random numbers.
_decided: WeakKeyDictionary[Any, WeakKeyDictionary[nn.Module, _Group | None]] = WeakKeyDictionary()


def switch(layer: Any, group: bool | None) -> None:
    """Let a layer be computed with its siblings: None where it has no dropout, True with dropout too, False never.

    With dropout a group has one mask, so a seed draws other masks than for each layer alone.
    """
    layer.__dict__.pop("group_siblings", None)
    if group is not None:  # the value of its class
        layer.group_siblings = group


def _may_group(layer: Any, call: Call) -> bool:
    return layer.group_siblings is not False and (call.p == 0 or layer.group_siblings is True)


def from_group(layer: Any, x: torch.Tensor, call: Call, describe: Describe) -> torch.Tensor | None:
    """y [..., N] of this call as its group has made it, or makes it now; None where the layer is to run by itself.

    `layer.group_siblings` is what `switch` has set; `describe` says what a sibling of the same kind would do.
    """
    # Dynamo goes no further: a compiled graph has no memory of earlier calls.
    if torch.compiler.is_compiling() or type(x) not in _PLAIN or not (_may_group(layer, call) and _pays(x, call)):
        return None
    thread = _thread
    context = _context(x, call)
    if thread.stash is not None:
        if context is not None:
            y = thread.stash.take(layer, x, call, context)
            if y is not None:
                if not thread.stash.left:
                    thread.stash = None
                return y
        if context is None or thread.stash.x() is not x:
            thread.stash.drop()
            thread.stash = None
    if context is None:
        thread.run = None
        return None
    group = _group_of(layer, context)
    if group is None:
        if not context.again:
            _note(layer, x, describe)
        return None
    thread.run = None
    return _lead(group, layer, x, call, context)


def _pays(x: torch.Tensor, call: Call) -> bool:
    """Whether a group would be faster: few tokens and small layers are as fast one by one."""
    if x.is_cuda:
        return x.numel() > FEW_TOKENS * x.shape[-1]
    return x.is_cpu and (call.p > 0 or x.numel() * call.weight.shape[0] >= small_linear.SMALL)


def _context(x: torch.Tensor, call: Call) -> _Context | None:
    """What a result of this call depends on beside tensors; None where results are not to be shared.

    Also where a region that is run twice could decide otherwise the second time, see `_region`: without gradients
    but with dropout, as checkpointing runs its first time in its older form.
    """
    if (
        x.layout is not torch.strided
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or x.is_inference()
        or torch.is_inference_mode_enabled()
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return None
    region, again = None, False
    grad = torch.is_grad_enabled()
    if grad:
        found = _region()
        if found is None:
            return None
        region, again = found
        # One backward for several outputs: of an x that has no backward of its own, users may run one output's after
        # another's, which frees what is kept.
        if not again and (x.is_leaf or torch._C._current_graph_task_id() != -1):
            return None
    elif call.p:
        return None
    device = x.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    stream = torch._C._cuda_getCurrentRawStream(device.index) if x.is_cuda else 0
    return _Context(grad, autocast, stream, region, again)


def _region() -> tuple[Any, bool] | None:
    """The checkpointed region that runs, and whether it is recomputed; (None, False) outside.

    None where saved tensors go through hooks of anybody else's, or regions are nested: what runs twice there is not
    known. Checkpointing counts the tensors that are saved in both runs.
    """
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if top is None:
        return None, False
    pack = getattr(top[0], "_torchdynamo_orig_callable", top[0])
    if getattr(pack, "__module__", None) != "torch.utils.checkpoint":
        return None
    cells = zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True)
    names = {name: cell.cell_contents for name, cell in cells}
    if "target_frame_ref" in names:
        region = names["target_frame_ref"]()
        return None if region is None else (region, True)
    if "frame" not in names:
        return None
    torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        nested = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    finally:
        torch._C._autograd._push_saved_tensors_default_hooks(*top)
    return None if nested else (names["frame"], False)


def _group_of(layer: Any, context: _Context) -> _Group | None:
    """The group that this layer leads now. In a checkpointed region the first decision stands."""
    group = _thread.groups.get(layer)
    if group is not None and group.dissolved:
        group = None
    if context.region is None:
        return group
    decided = _decided.get(context.region)
    if context.again:
        return None if decided is None else decided.get(layer)
    if decided is None:
        decided = _decided[context.region] = WeakKeyDictionary()
    return decided.setdefault(layer, group)


def _lead(group: _Group, layer: Any, x: torch.Tensor, call: Call, context: _Context) -> torch.Tensor | None:
    """The leader's y, the others' in the thread's stash; None where now they cannot be computed together."""
    caller = _caller()
    if caller is None or caller.f_code is not group.code:
        return None
    if not _is_plain(call):
        return None
    siblings, calls = [layer], [call]
    for reference, describe in group.members:
        sibling = reference()
        if sibling is None or runs_more_than_forward(sibling):
            return None
        described = describe(sibling, x)
        if described is None or described.p != call.p or not (_may_group(sibling, described) and _pays(x, described)):
            return None
        if not _is_plain(described):
            return None
        siblings.append(sibling)
        calls.append(described)
    states = [_state(each) for each in calls]
    if None in states:
        return None
    weights, biases, As, Bs, scalings, _ = (list(values) for values in zip(*calls, strict=True))
    stash = _Stash(group, x, context, id(caller))
    group.in_use = True
    try:
        y, *others = functional.lora_linear_group(
            x, weights, As, Bs, biases=biases, scalings=scalings, dropout_p=call.p
        )
    except (TypeError, ValueError):  # an argument is wrong, and nothing has run: let the layer raise whose it is
        group.dissolved = True
        return None
    for sibling, made_of, state, other in zip(siblings[1:], calls[1:], states[1:], others, strict=True):
        stash.results[weakref.ref(sibling)] = (made_of, state, other)
    _thread.stash = stash
    return y


def _note(layer: Any, x: torch.Tensor, describe: Describe) -> None:
    """Remember this call; with those of the same x before it, it may make a group."""
    thread = _thread
    run, this, caller = thread.run, (weakref.ref(layer), describe), _caller()
    if caller is None:
        thread.run = None
        return
    follows = run is not None and run.x() is x and run.frame == id(caller)
    if run is None or not follows or any(reference() is layer for reference, _ in run.layers):
        thread.run = _Run(weakref.ref(x), id(caller), [this])
        return
    run.layers.append(this)
    leader = run.layers[0][0]()
    known = None if leader is None else thread.groups.get(leader)
    if leader is None or (known is not None and (known.in_use or known.dissolved)):
        return
    # Only of one module, in its own method: elsewhere anything may happen between two calls.
    names = caller.f_locals
    parent = names.get("self")
    if type(names) is dict and caller.f_code.co_flags & inspect.CO_OPTIMIZED:
        names.clear()  # before Python 3.13 a copy, which would hold all of them until the function returns
    children = list(parent._modules.values()) if isinstance(parent, nn.Module) else []
    if all(any(reference() is child for child in children) for reference, _ in run.layers):
        thread.groups[leader] = _Group(run.layers[1:], caller.f_code)


def _is_plain(call: Call) -> bool:
    return all(
        type(value) in _PLAIN and value.layout is torch.strided for value in call if isinstance(value, torch.Tensor)
    )


_CALLS = (nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__)


def _caller() -> Any:
    """The frame that called the layer; None where it was not called as a module."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code not in _CALLS:
        frame = frame.f_back
    while frame is not None and frame.f_code in _CALLS:
        frame = frame.f_back
    return frame


def _state(values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What tells that tensors were changed since; None where torch does not keep count."""
    try:
        return tuple(
            (value._version, value.data_ptr(), value.requires_grad)
            for value in values
            if isinstance(value, torch.Tensor)
        )
    except RuntimeError:  # made in inference mode
        return None
