"""Adapted linears of one module that are called with the same x (q, k, v; gate, up): declared once, run as one.

`find` takes them from the names of a parent's children, and `declare` gives the parent two hooks. While the parent
runs, the first member that is called, the leader, computes all by `lora_linear_group`. The others find their result
when they are called with that very tensor, and take it only if all that it depends on is as it was; otherwise they
compute their own. Nothing is learned: the first pass decides as every other, and a region as when it is recomputed.
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

from lorakernels import functional
from lorakernels.nn.modules import runs_more_than_forward
from lorakernels.ops import small_linear
from lorakernels.tuning.table import FEW_TOKENS

Names = tuple[str, ...]

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


class Call(NamedTuple):
    """One LoRA linear as it would run now: what `functional.lora_linear` is given behind x."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    scaling: float | torch.Tensor
    p: float  # dropout's; 0 where it is off


class _Context(NamedTuple):
    """What a result depends on beside tensors."""

    grad: bool
    hooks: Any  # of saved tensors, which a checkpointed region has: each run its own
    autocast: torch.dtype | None
    stream: int


class _Result(NamedTuple):
    """What a leader has left for one of the others, and what it was made of."""

    y: torch.Tensor
    x: torch.Tensor
    call: Call
    state: list[Any] | None
    context: _Context


class _Scope:
    """A call of a parent that runs."""

    def __init__(self, parent: nn.Module, groups: _Groups) -> None:
        self.parent, self.groups = weakref.ref(parent), groups
        self.mode = (torch.is_grad_enabled(), _saved_tensors_hooks())
        self.leaders: dict[Names, nn.Module] = {}
        self.results: dict[nn.Module, _Result] = {}
        self.outer: _Scope | None = None


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
        scope = _Scope(parent, self)
        if _thread.scope is not None:
            _thread.scope.results.clear()  # lest those of an interrupted parent stay until it runs again
            scope.outer = _thread.scope
        _thread.scope = scope


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


def declare(found: Mapping[nn.Module, tuple[Names, ...]], group: bool | None = None) -> None:
    """Give these parents their groups, in the place of those they have.

    None: members with dropout stay apart. True: they share one mask, so a seed draws other masks than for each alone.
    False: there are no groups.
    """
    for parent, groups in found.items():
        forget(parent)
        if group is not False:
            parent.register_forward_pre_hook(_Groups(groups, group is True))
            parent.register_forward_hook(_close, always_call=True)


def forget(parent: nn.Module) -> None:
    for hooks in (parent._forward_pre_hooks, parent._forward_hooks):
        for key in [key for key, hook in hooks.items() if type(hook) is _Groups or hook is _close]:
            del hooks[key]
            parent._forward_hooks_always_called.pop(key, None)


def has_groups(parent: nn.Module) -> bool:
    return any(type(hook) is _Groups for hook in parent._forward_pre_hooks.values())


def from_group(layer: Any, x: torch.Tensor, call: Call) -> torch.Tensor | None:
    """y [..., N] of this call as its group has made it, or makes it now; None where the layer is to run by itself.

    Layers have `group_call(x)`, which says what they would do with x; None where that is not one plain LoRA linear.
    """
    if torch.compiler.is_compiling():
        return None
    scope = _thread.scope
    if scope is None:
        return None
    result = scope.results.pop(layer, None)
    if result is None and not _may_join(scope, x, call):
        return None
    context = _context(x)
    # Not in a region, or under a mode, that began within the parent: when it runs again the parent does not.
    if context is None or (context.grad, context.hooks) != scope.mode:
        return None
    if result is None:
        return _lead(scope, layer, x, call, context)
    pairs = zip(call, result.call, strict=True)
    same = all(now is then or (isinstance(now, (int, float)) and now == then) for now, then in pairs)
    if same and result.x is x and result.context == context and result.state == _state(x, call):
        return result.y
    return None


def _may_join(scope: _Scope, x: torch.Tensor, call: Call) -> bool:
    """Whether a call may be one of a group, and would be faster so: few tokens and small layers are not."""
    if call.p and not scope.groups.with_dropout:
        return False
    if x.is_cuda:
        return x.numel() > FEW_TOKENS * x.shape[-1]
    return x.is_cpu and (call.p > 0 or x.numel() * call.weight.shape[0] >= small_linear.SMALL)


def _context(x: torch.Tensor) -> _Context | None:
    """None where results are not to be shared."""
    if (
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or x.is_inference()
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return None
    device = x.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    stream = torch._C._cuda_getCurrentRawStream(device.index) if x.is_cuda else 0
    return _Context(torch.is_grad_enabled(), _saved_tensors_hooks(), autocast, stream)


def _saved_tensors_hooks() -> Any:
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if top is None else top[0]


def _lead(scope: _Scope, layer: Any, x: torch.Tensor, call: Call, context: _Context) -> torch.Tensor | None:
    """The leader's y, the others' results in the scope; None where now they cannot be computed together."""
    modules: dict[str, Any] = getattr(scope.parent(), "_modules", {})
    names = next((names for names in scope.groups.groups if any(modules.get(name) is layer for name in names)), None)
    # Where the others are called with another x than their leader was, each is by itself.
    if names is None or scope.leaders.setdefault(names, layer) is not layer:
        return None
    calls: dict[Any, Call] = {layer: call}
    for sibling in (modules[name] for name in names if name in modules):
        if sibling not in calls and hasattr(sibling, "group_call") and not runs_more_than_forward(sibling):
            other = sibling.group_call(x)
            if other is not None and other.p == call.p and _may_join(scope, x, other):
                calls[sibling] = other
    states = [_state(x, each) for each in calls.values()]
    if len(calls) == 1 or None in states:
        return None
    weights, biases, As, Bs, scalings, _ = (list(values) for values in zip(*calls.values(), strict=True))
    try:
        y, *others = functional.lora_linear_group(
            x, weights, As, Bs, biases=biases, scalings=scalings, dropout_p=call.p
        )
    except (TypeError, ValueError):  # an argument is wrong, and nothing has run: let the layer raise whose it is
        return None
    for (sibling, each), state, made in zip(list(calls.items())[1:], states[1:], others, strict=True):
        scope.results[sibling] = _Result(made, x, each, state, context)
    return y


def _state(x: torch.Tensor, call: Call) -> list[Any] | None:
    """What tells that tensors were changed since; None where torch does not keep count, or they are no plain ones."""
    state: list[Any] = []
    for tensor in (x, *call):
        if isinstance(tensor, torch.Tensor):
            if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_inference():
                return None
            state += tensor._version, tensor.data_ptr(), tensor.requires_grad
    return state
