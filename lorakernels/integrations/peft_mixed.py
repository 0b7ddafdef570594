"""PEFT's mixed batches (`adapter_names=`, another adapter for each row) as one multi-adapter product a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional as F

from lorakernels import ops
from lorakernels.integrations.peft_terms import adapter_terms, autocast_is_on, base_weight, is_plain, takes_dtypes
from lorakernels.member import cast
from lorakernels.nn.adapted import adapted_linear
from lorakernels.nn.mixed import SLICES, Slice, slices_pay
from lorakernels.nn.modules import parameter_of, runs_more_than_forward
from lorakernels.nn.siblings import from_group
from lorakernels.nn.terms import Term
from lorakernels.plan import BASE, BatchPlan
from lorakernels.quant.packed import Weight

BASE_NAME = "__base__"  # PEFT's, for rows without an adapter
INVARIANT = "_lora_invariant"  # of a layer: no row's bits are to depend on the other rows' adapters

# By the hook that hands a layer its names. PEFT registers one for each layer and each call of the model, or of
# `generate`, which is when adapters do not change; with the hook its pack goes.
_packs: WeakKeyDictionary[Any, _Pack] = WeakKeyDictionary()

_LARGEST = torch.finfo(torch.float32).max
_version_of = attrgetter("_version")
Adder = Callable[[torch.Tensor, torch.Tensor], None]  # y, x: adds to y in place


class _Pack:
    """The adapters of one layer that a list of names asks for, side by side, and whether they still are those.

    Between two products of a model the caches hold nothing of them, and to look at all there is to an adapter took
    29 µs a layer with eight. Left out is what nobody does while a model runs: writing into or replacing a weight's
    `.data`, giving its module another Parameter, or a hook. The next call of the model sees those too.
    """

    def __init__(
        self,
        layer: Any,
        weight: Weight,
        names: Sequence[str],
        there: Sequence[str],
        terms: Sequence[Term],
        dtype: torch.dtype,
        autocast: bool,
    ) -> None:
        self.names, self.weight, self.weight_dtype, self.autocast = names[:], weight, weight.dtype, autocast
        self.slots = tuple(there.index(name) if name in there else BASE for name in names)  # of each row
        self.ranks = tuple(term.A.shape[0] for term in terms)
        self.is_invariant = layer.__dict__.get(INVARIANT, False)
        # Kernels choose their blocks by the largest rank.
        R = max(layer.r.values() if self.is_invariant else self.ranks, default=0)
        empty = [torch.empty((0, 0), dtype=dtype, device=weight.device)]
        As = [_padded(cast(term.A, dtype), R) for term in terms]
        Bs = [cast(term.B, dtype).t() for term in terms]
        # A plan's scalings are numbers in float32; others go into B.
        into_B = [isinstance(term.scaling, torch.Tensor) or dtype is torch.float64 for term in terms]
        Bs = [B * term.scaling if into else B for B, term, into in zip(Bs, terms, into_B, strict=True)]
        self.scalings = tuple(1.0 if into else float(term.scaling) for term, into in zip(terms, into_B, strict=True))
        if self.is_invariant:  # and by the number of slots, of which each row then has one
            As, Bs = ([*each, *each[:1] * (len(names) - len(each))] for each in (As, Bs))
        self.A = torch.stack(As or empty)  # [S, R, K], zero past an adapter's rank
        # [S, N, R], views of [S, R, N]: a product of S small matrices is a third faster so.
        self.B = torch.stack([_padded(B, R) for B in Bs] or empty).mT
        self.only = None  # all rows' term, where there is one: looked up here, each view takes 1.5 µs
        if len(terms) == 1 and BASE not in self.slots and not self.is_invariant:
            self.only = Term(self.A[0], self.B[0], None, self.scalings[0], 0.0, None)
        biases: list[Any] = [None if term.bias is None else (term.bias * term.scaling).to(dtype) for term in terms]
        # What lora_bias adds to rows: [N] each.
        slots = enumerate(self.slots)
        self.biases = {row: biases[slot] for row, slot in slots if slot != BASE and biases[slot] is not None}
        # Of the last number of tokens a row, which is another one at each step of a `generate` without a cache.
        self.planned: tuple[int, BatchPlan | None] = (0, None)
        self.bound: tuple[int, Adder | None] = (0, None)  # what adds the update
        modules = layer._modules
        self.lora_A, self.lora_B = dict(modules["lora_A"]._modules), dict(modules["lora_B"]._modules)
        self.weights = [term.A for term in terms] + [term.B for term in terms]
        self.scaling = dict(layer.scaling)
        self.dropouts = [d for name in there if getattr(d := modules["lora_dropout"]._modules[name], "p", 0)]
        # A graph is of one call, and a scaling of its own or tensors without a version counter cannot be compared.
        self.may_be_kept = not (
            self.biases
            or torch.is_grad_enabled()
            or any(weight.is_inference() for weight in self.weights)
            or any(isinstance(scaling, torch.Tensor) for scaling in self.scaling.values())
        )
        # Whether its product may be one of its group's.
        several = bool(self.ranks) and self.only is None
        self.is_slice = self.may_be_kept and several and slices_pay(weight.device, dtype)
        if self.may_be_kept:
            self.versions = list(map(_version_of, self.weights))

    def is_for(self, layer: Any, x: torch.Tensor, names: Sequence[str], weight: Weight) -> bool:
        if self.names != names or weight.dtype is not self.weight_dtype:
            return False
        # A packed one is read anew at each call, and so is a view; of none is anything kept.
        if weight.device != self.weight.device or weight.shape != self.weight.shape:
            return False
        if torch.is_grad_enabled() or self.autocast != autocast_is_on(x):
            return False
        dtype = torch.get_autocast_dtype(x.device.type) if self.autocast else x.dtype
        return (
            self.A.dtype is dtype
            and list(map(_version_of, self.weights)) == self.versions
            and layer._modules["lora_A"]._modules == self.lora_A
            and layer._modules["lora_B"]._modules == self.lora_B
            and layer.scaling == self.scaling
            and not any([dropout.training for dropout in self.dropouts])
        )

    def update(self, x: torch.Tensor) -> Adder | None:
        tokens = x.numel() // (x.shape[0] * x.shape[-1])
        if tokens != self.bound[0]:
            self.bound = tokens, ops.bound_update(ops.as_matrix(x), self.A, self.B, self.plan(tokens))
        return self.bound[1]

    def plan(self, tokens: int) -> BatchPlan:
        before, plan = self.planned
        if plan is None or before != tokens:
            ranks = self.ranks
            if self.A.is_cpu and not self.is_invariant and self._pads_little(tokens):
                ranks = (max(ranks),) * len(ranks)
            device = self.A.device
            stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
            plan = _plan(self.slots, tokens, ranks, self.scalings, self.A.shape[1], self.is_invariant, device, stream)
            self.planned = tokens, plan
        return plan

    def _pads_little(self, tokens: int) -> bool:
        """Whether zeros up to the largest rank, with which all adapters are one product, cost less than a loop."""
        columns, S, R = self.A.shape[2] + self.B.shape[1], len(self.ranks), max(self.ranks)
        zeros = sum(R - rank for rank in self.ranks) * columns
        products = sum(R - self.ranks[slot] for slot in self.slots if slot != BASE) * columns * tokens
        return zeros <= S << 16 and products <= S << 18


def mixed_forward(layer: Any, x: torch.Tensor, names: Any) -> torch.Tensor | None:
    """x [rows, ..., K] to [rows, ..., N], each row by its own adapter; None where PEFT's own forward is to run.

    That is also where PEFT raises: on names that are too many or too few, merged adapters, DoRA.
    """
    found = _find(layer, x, names)
    return None if found is None else _run(layer, x, *found)


def mixed_call(layer: Any, x: torch.Tensor) -> Slice | None:
    """What a call through PEFT's hooks, which hand this layer its names, would do with x; None for one by itself."""
    hooks = _pre_hooks(layer)
    of_peft = all(type(hook) is partial and hook.func.__module__.startswith("peft.") for hook in hooks)
    if not hooks or not of_peft or layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return None
    found = None if "forward" in layer.__dict__ else _find(layer, x, hooks[-1].keywords.get("adapter_names"))
    return _slice(x, *found) if found is not None and found[0].is_slice else None


def _slice(x: torch.Tensor, pack: _Pack, weight: Weight, bias: torch.Tensor | None) -> Slice:
    return weight, bias, pack.A, pack.B, pack.plan(x.numel() // (x.shape[0] * x.shape[-1]))


def _find(layer: Any, x: torch.Tensor, names: Any) -> tuple[_Pack, Weight, torch.Tensor | None] | None:
    """The pack of these names, and the base's weight and bias."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if torch._C._get_tracing_state() is not None or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None  # a plan is made from lists on the host
    if layer._disable_adapters or layer.merged_adapters or not is_plain(x) or x.is_nested:
        return None
    if type(names) not in (list, tuple) or x.dim() < 2 or x.shape[0] != len(names) or not x.numel():
        return None
    base = layer._modules["base_layer"]
    weight: Any = parameter_of(base, "weight") if type(base) is torch.nn.Linear else None
    if not is_plain(weight):
        if isinstance(adapter_terms(layer, ()), str):
            return None  # no packed weight that can be read
        weight = base_weight(base)
    hook = _registration(layer, names)
    pack = None if hook is None else _packs.get(hook)
    if pack is None or runs_more_than_forward(base) or not pack.is_for(layer, x, names, weight):
        made = _packed(layer, x, names, weight)
        if made is None:
            return None
        pack = made
        if hook is not None and pack.may_be_kept:
            _packs[hook] = pack
    return pack, weight, parameter_of(base, "bias")


def _run(layer: Any, x: torch.Tensor, pack: _Pack, weight: Weight, own_bias: torch.Tensor | None) -> torch.Tensor:
    bias = own_bias
    if bias is not None and not isinstance(weight, torch.Tensor):
        bias = bias.to(x.dtype)
    if not pack.ranks:
        return ops.frozen_linear(x, weight, bias)
    if pack.only is not None:
        y = adapted_linear(x, weight, bias, [pack.only])
    else:
        grouped = from_group(layer, x, _slice(x, pack, weight, own_bias), SLICES) if pack.is_slice else None
        if grouped is not None:
            return grouped
        if pack.autocast:
            x, weight, bias = ops.autocast_arguments(x, weight, bias, torch.get_autocast_dtype(x.device.type))
        y = _product(pack, x, weight, bias)
    if pack.biases:
        rows, added = torch.tensor(list(pack.biases), device=y.device), torch.stack(list(pack.biases.values()))
        y = y.index_add(0, rows, added.view(len(rows), *[1] * (y.dim() - 2), -1).expand(-1, *y.shape[1:]))
    return y


def _product(pack: _Pack, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, ..., K] to [rows, ..., N]."""
    data = weight if isinstance(weight, torch.Tensor) else weight.data
    if not torch.is_grad_enabled() and ops.runs_directly(x, data):
        update = pack.update(x)
        if update is not None:
            y = ops.linear_to_edit(x, weight, bias)
            update(y, x.contiguous())
            return y
    matrix = ops.as_matrix(x)
    tokens = matrix.shape[0] // x.shape[0]
    apart = bias if ops.adds_bias_apart(x) else None
    biases = [None if apart is bias else bias]
    [y] = ops.multi_lora_linear(matrix, [weight], biases, [pack.A], [pack.B], pack.plan(tokens), 0.0, "auto")
    y = ops.as_output(y, x)
    return y if apart is None else y + apart


def _packed(layer: Any, x: torch.Tensor, names: Sequence[str], weight: Weight) -> _Pack | None:
    lora_A = layer._modules["lora_A"]._modules
    if not all(isinstance(name, str) for name in names):
        return None
    there = [name for name in dict.fromkeys(names) if name != BASE_NAME and name in lora_A]
    terms = adapter_terms(layer, there)
    if isinstance(terms, str) or any(term.p or term.magnitude is not None for term in terms):
        return None
    if not takes_dtypes(layer, x, weight, terms):
        return None
    autocast = autocast_is_on(x)
    dtype = x.dtype
    if autocast and torch.float64 not in (x.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(x.device.type)
    if not all(isinstance(term.scaling, torch.Tensor) or abs(term.scaling) <= _LARGEST for term in terms):
        return None
    return _Pack(layer, weight, names, there, terms, dtype, autocast)


def _padded(rows: torch.Tensor, rank: int) -> torch.Tensor:
    return rows if rows.shape[0] == rank else F.pad(rows, (0, 0, 0, rank - rows.shape[0]))


def _registration(layer: Any, names: Sequence[str]) -> Any:
    """The hook through which PEFT hands this layer these names, if one does: another one for every call.

    PEFT leaves the hooks of a call that raised, so the newest counts, and what others have kept goes.
    """
    for hook in reversed(_pre_hooks(layer)):
        if type(hook) is partial and hook.keywords.get("adapter_names") is names:
            found = hook if hook.func.__module__.startswith("peft.") else None
            if found is not None and found not in _packs:
                forget_packs(layer)
            return found
    return None


def forget_packs(layer: Any) -> None:
    """Drop what a layer keeps of calls that are over, but for the hooks that PEFT has left of them."""
    for hook in _pre_hooks(layer):
        if type(hook) is partial:
            _packs.pop(hook, None)


def _pre_hooks(layer: Any) -> list[Any]:
    return list(layer._forward_pre_hooks.values())  # a copy: another thread's call may register its own


@lru_cache(maxsize=8)
def _plan(
    slots: tuple[int, ...],
    tokens: int,
    ranks: tuple[int, ...],
    scalings: tuple[float, ...],
    max_rank: int,
    invariant: bool,
    device: torch.device,
    stream: int,
) -> BatchPlan:
    """The plan of rows of so many tokens each. Layers with the same adapters share it; it is never updated again.

    Of each stream its own, on which it is written and read.
    """
    with torch.inference_mode(False):
        spare = [0] * (len(slots) - len(ranks) if invariant else 0)
        sizes: dict[str, Any] = {"max_rank": max_rank, "invariant": tokens if invariant else False}
        plan = BatchPlan(len(ranks) + len(spare), len(slots) * tokens, **sizes, device=device)
        plan.update([slot for slot in slots for _ in range(tokens)], [*ranks, *spare], [*scalings, *spare])
    return plan
