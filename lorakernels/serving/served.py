"""Modules that ask, at each call, whether a batch of several adapters is running, and which token is whose."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lorakernels import ops
from lorakernels.experts import expert_plan
from lorakernels.functional import multi_lora_embedding
from lorakernels.nn.experts import ExpertPages, is_mixture, run_experts, why_not_run
from lorakernels.nn.mixed import Slice, mixed_linear
from lorakernels.nn.modules import parameter_of, runs_more_than_forward
from lorakernels.plan import BatchPlan
from lorakernels.quant.layers import is_linear, weight_of
from lorakernels.route import ExpertRoute
from lorakernels.serving.errors import StaleBatchError
from lorakernels.serving.pools import Pool, Site

# Shapes of x whose plans a batch keeps: prefill and decode are two; without a cache of keys every step has its own.
_KEPT_PLANS = 32
# Plans are made for ranks in powers of two from here on, so that few kernels are compiled.
_LEAST_RANK = 16
# Of one adapter: its pages and scaling by pool.
Routing = Mapping[Pool, tuple[tuple[int, ...], float]]


class _Route:
    """The adapters of a batch in pools where they have the same pages and scalings, and the plans made for them."""

    def __init__(
        self, device: torch.device, adapters: Sequence[tuple[Sequence[int], float]], least_rank: int = _LEAST_RANK
    ) -> None:
        self.device, self.adapters, self.least_rank = device, adapters, least_rank
        self.plans: dict[torch.Size, BatchPlan] = {}
        self._of_experts: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def plan(self, token_slots: torch.Tensor, unit: int) -> BatchPlan:
        slots, table = self._on_device(token_slots, 1)
        sizes: dict[str, Any] = {"max_rank": table.shape[1], "num_pages": self.num_pages, "invariant": unit}
        plan = BatchPlan(len(self.adapters), len(token_slots), **sizes, device=self.device)
        plan.update(slots, *self._ranks_and_scalings(1), table)
        return plan

    def expert_plan(self, token_slots: torch.Tensor, route: ExpertRoute, invariant: bool) -> BatchPlan:
        """The plan of the rows of a route; what does not depend on it is kept."""
        key = (len(token_slots), route.num_experts)
        if key not in self._of_experts:
            self._of_experts[key] = self._on_device(token_slots, route.num_experts)
        slots, table = self._of_experts[key]
        numbers = self._ranks_and_scalings(route.num_experts)
        return expert_plan(route, slots, *numbers, table, num_pages=self.num_pages, invariant=invariant)

    @property
    def num_pages(self) -> int:
        return max((max(pages) for pages, _ in self.adapters if pages), default=0) + 1

    def _ranks_and_scalings(self, experts: int) -> tuple[list[int], list[float]]:
        return [len(pages) // experts for pages, _ in self.adapters], [scaling for _, scaling in self.adapters]

    def _on_device(self, token_slots: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots, and the pages [experts · adapters, width] of each expert's rank rows."""
        ranks, _ = self._ranks_and_scalings(experts)
        width = max(self.least_rank, 1 << (max(ranks) - 1).bit_length())
        on_gpu = self.device.type == "cuda"
        table = torch.zeros(experts, len(ranks), width, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        for slot, (pages, _) in enumerate(self.adapters):
            table[:, slot, : ranks[slot]] = torch.tensor(pages, dtype=torch.int32, device="cpu").view(experts, -1)
        token_slots = token_slots.pin_memory() if on_gpu else token_slots
        slots, table = (t.to(self.device, non_blocking=on_gpu) for t in (token_slots, table.flatten(0, 1)))
        return slots, table


class Batch:
    """Which row has which adapter, and until its end the plans for every shape of x that has come by."""

    def __init__(
        self,
        slots: Sequence[int],
        adapters: Sequence[Routing],
        lengths: Sequence[int] | None,
        max_rank: int | None = None,
    ) -> None:
        """With the store's `max_rank` no row's bits depend on which adapters the others have."""
        self.closed = False
        self.called: set[Site] | None = None  # where somebody asks
        self.outer: Batch | None = None  # the one that counts when this has ended
        self.slots = torch.tensor(slots, dtype=torch.int32, device="cpu")
        self.lengths = None if lengths is None else list(lengths)
        self.is_invariant = max_rank is not None
        if max_rank is not None:  # kernels choose their blocks by the number of adapters and by the largest rank
            adapters = [*adapters, *[{}] * (len(slots) - len(adapters))]
            least_rank = max(_LEAST_RANK, 1 << (max_rank - 1).bit_length())
        else:
            least_rank = _LEAST_RANK
        self._whole: torch.Size | None = None  # the last leading shape that was not flat
        self._flat: dict[int, str] = {}  # numbers of tokens of flat x before that, and who got them
        self._routes: dict[Pool, _Route] = {}
        shared: dict[Any, _Route] = {}  # one plan for all pools where the adapters have the same pages
        for pool in dict.fromkeys(pool for adapter in adapters for pool in adapter):
            found = [adapter.get(pool, ((), 0.0)) for adapter in adapters]
            key = (pool.writer.device, *found)
            self._routes[pool] = shared.setdefault(key, _Route(pool.writer.device, found, least_rank))

    def check_open(self, site: Site) -> None:
        if self.closed:
            raise StaleBatchError(
                f"module {site.path!r} was called, or is in a backward, for a batch that has ended; call the model "
                "and backward within `with`"
            )

    def expert_plans(self, site: Site, tokens: int, times: int = 1) -> Callable[[ExpertRoute], BatchPlan] | None:
        """What plans a route of so many tokens, `times` one after the other; None as of `plan`."""
        lead = torch.Size([tokens])
        route = self._route(site, lead)
        if route is None or not tokens:
            return None
        return partial(route.expert_plan, self._token_slots(site, lead).repeat(times), invariant=self.is_invariant)

    def plan(self, site: Site, lead: torch.Size) -> BatchPlan | None:
        """The plan for x of leading shape `lead`, or None where the base model's forward is what is asked for."""
        route = self._route(site, lead)
        if route is None:
            return None
        plan = route.plans.get(lead)
        if plan is None and lead.numel():
            token_slots = self._token_slots(site, lead)
            same = (plan for plan in route.plans.values() if plan.num_tokens == len(token_slots))
            unit = 0
            if self.is_invariant:  # rows of one length are multiplied whole
                unit = len(token_slots) // len(self.slots) if self.lengths is None else 1
            plan = next(same, None) or route.plan(token_slots, unit)
            if len(route.plans) >= _KEPT_PLANS:
                del route.plans[next(iter(route.plans))]
            route.plans[lead] = plan
        return plan

    def _route(self, site: Site, lead: torch.Size) -> _Route | None:
        self.check_open(site)
        if self.called is not None and not site.is_seen:
            self.called.add(site)
        site.pool.writer.check_no_capture()
        if len(lead) > 1 and len(self.slots) and lead[0] % len(self.slots) == 0:  # positions [1, T] are no rows
            for tokens, path in self._flat.items():
                _refuse_some(path, tokens, lead)
            self._flat, self._whole = {}, lead
        return self._routes.get(site.pool)

    def kept_plan(self, site: Site, lead: torch.Size) -> BatchPlan | None:
        """The plan for x of leading shape `lead` that another module of the same adapters has asked for."""
        route = self._routes.get(site.pool)
        return None if route is None else route.plans.get(lead)

    def _token_slots(self, site: Site, lead: torch.Size) -> torch.Tensor:
        tokens, rows = lead.numel(), len(self.slots)
        if self.lengths is not None:
            if tokens != sum(self.lengths):
                raise ValueError(
                    f"module {site.path!r} got {tokens} tokens ({list(lead)}); expected {sum(self.lengths)}, "
                    "the sum of the batch's lengths"
                )
            return self.slots.repeat_interleave(torch.tensor(self.lengths, device="cpu"))
        first = lead[0] if lead else 1
        if len(lead) == 1 and self._whole:
            _refuse_some(site.path, tokens, self._whole)
        elif len(lead) == 1 and tokens != rows > 1:
            if site.base is nn.Embedding:
                raise ValueError(
                    f"module {site.path!r} got {tokens} ids in one dimension for a batch of {rows} names, before any "
                    "module that got rows: they may be positions, which are no rows of a batch; load adapters that "
                    "leave it out, or give a name, or None, for each of the ids (lengths= for packed sequences)"
                )
            self._flat.setdefault(tokens, site.path)
        if first % rows:
            raise ValueError(
                f"module {site.path!r} got x of leading shape {list(lead)} for a batch of {rows} names; expected a "
                "multiple of them first: give a name, or None, for each row (lengths= for packed sequences)"
            )
        return self.slots.repeat_interleave(tokens // rows)


def _refuse_some(path: str, tokens: int, whole: torch.Size) -> None:
    """Raise ValueError where a flat x is neither of all tokens nor of one for each row (a pooler's)."""
    if tokens not in (whole.numel(), whole[0]):
        raise ValueError(
            f"module {path!r} got {tokens} tokens where others got {list(whole)}: it is sent some of the tokens (an "
            "expert) or positions [T], and whose they are cannot be known; load adapters that leave it out"
        )


_Batches = Mapping[object, Batch]
# Of each thread and task its own, by store: a draft model and its target have one each.
_batches: ContextVar[_Batches] = ContextVar("lorakernels_batches", default=MappingProxyType({}))


@contextmanager
def running(owner: object, batch: Batch) -> Iterator[None]:
    if "torch._dynamo" in sys.modules:
        _leave_uncompiled()
    try:
        batch.outer = _open(_batches.get().get(owner))
        _batches.set({**_batches.get(), owner: batch})
        yield
    finally:
        # Not `reset`: the end may come in another order than the beginning, or in another context.
        batch.closed = True
        now = dict(_batches.get())
        top = _open(now.pop(owner, None))
        if top is not None:
            now[owner] = top
        _batches.set(now)


def is_running(batch: Batch) -> bool:
    """Whether this thread's calls are of this batch."""
    return batch in _batches.get().values()


def _open(batch: Batch | None) -> Batch | None:
    while batch is not None and batch.closed:
        batch = batch.outer
    return batch


def _plan(site: Site | None, lead: torch.Size) -> BatchPlan | None:
    batch = None if site is None else _batches.get().get(site.owner)
    return None if batch is None or site is None else batch.plan(site, lead)


def _within(y: torch.Tensor, site: Site) -> torch.Tensor:
    """y, whose backward raises once its batch has ended: the pages may be another adapter's by then."""
    if y.requires_grad:
        batch = _batches.get()[site.owner]
        y.register_hook(lambda _: batch.check_open(site))
    return y


class _Served(nn.Module):
    _lora_site: Site | None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Of a copy, or of what is in a file: the module as it is without a store."""
        state = {name: value for name, value in self.__dict__.items() if name != "_lora_site"}
        return object.__new__, (BASES[type(self)],), state


class _ServedMatrix(_Served):
    """A linear that a store has switched: within a batch each token has its own adapter's update."""

    def mixed_call(self, x: torch.Tensor) -> Slice | None:
        """What a call would do with x, of which others of the same adapters have been told; None where it is to come.

        It is no call: one that never comes is still missed.
        """
        site: Any = self.__dict__.get("_lora_site")
        if site is None or type(self) is not _SERVED[site.base] or runs_more_than_forward(self):
            return None
        batch = _batches.get().get(site.owner)
        plan = None if batch is None else batch.kept_plan(site, x.shape[:-1])
        return None if plan is None else _slice(self, site, plan)


def _slice(module: nn.Module, site: Any, plan: BatchPlan) -> Slice:
    # Of torch's own type, served, `weight_of` asks for what it may else be.
    weight = parameter_of(module, "weight") if site.base is nn.Linear else weight_of(module)
    return weight, parameter_of(module, "bias"), site.lora_A, site.lora_B, plan


class ServedLinear(_ServedMatrix, nn.Linear):
    """A `torch.nn.Linear` that a store has switched."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        site: Any = self.__dict__.get("_lora_site")
        plan = _plan(site, x.shape[:-1])
        if plan is None:
            return nn.Linear.forward(self, x)  # not super(): a kept bound forward may outlive the class
        return _within(mixed_linear(x, _slice(self, site, plan), self), site)


class ServedEmbedding(_Served, nn.Embedding):
    """A `torch.nn.Embedding` that a store has switched."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        site: Any = self.__dict__.get("_lora_site")
        plan = _plan(site, ids.shape)
        if plan is None:
            return nn.Embedding.forward(self, ids)
        return _within(multi_lora_embedding(ids, parameter_of(self, "weight"), site.lora_A, site.lora_B, plan), site)


class _ServedOther(_ServedMatrix):
    """A linear of another class, packed or GPT-2's, that a store has switched; its own class is made by `know`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        site: Any = self.__dict__.get("_lora_site")
        plan = _plan(site, x.shape[:-1])
        if plan is not None:
            return _within(mixed_linear(x, _slice(self, site, plan), self), site)
        weight, bias = weight_of(self), parameter_of(self, "bias")
        if isinstance(weight, torch.Tensor):
            return BASES[type(self)].forward(self, x)  # as ServedLinear, to the bit
        return ops.frozen_linear(x, weight, None if bias is None else bias.to(x.dtype))


class _ServedExperts(_Served):
    """A mixture's experts that a store has switched; its own class is made by `know`."""

    def forward(self, hidden: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        site: Any = self.__dict__.get("_lora_site")
        batch = None if site is None else _batches.get().get(site.owner)
        plans = None
        if batch is not None:  # without a router each expert has all tokens
            times = 1 if routing else site.num_experts
            plans = batch.expert_plans(site, len(hidden) // times, times)
        if plans is None:
            return BASES[type(self)].forward(self, hidden, *routing)  # as ServedLinear, to the bit
        if why := why_not_run(self):
            raise RuntimeError(f"the adapters of {site.path!r} cannot be run: {why}")
        return _within(run_experts(self, ExpertPages(site.pages(), plans), hidden, *routing), site)


_SERVED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: ServedLinear, nn.Embedding: ServedEmbedding}


@lru_cache(maxsize=1)
def _leave_uncompiled() -> None:
    """Dynamo would compile a served module anew for nearly every batch. Only where it is there: it brings Triton."""
    for served in _SERVED.values():
        served.forward = torch.compiler.disable(served.forward)  # type: ignore[method-assign]


# What a module was, by what it is.
BASES = {base: base for base in _SERVED} | {served: base for base, served in _SERVED.items()}


def know(model: nn.Module) -> None:
    """Make the classes for the linear layers of a model that are not torch's, and for its experts."""
    kinds: dict[type, type] = {type(module): _ServedOther for module in model.modules() if is_linear(module)}
    kinds |= {type(module): _ServedExperts for module in model.modules() if is_mixture(module)}
    for base in kinds.keys() - set(BASES):
        served = type(f"Served{base.__name__}", (kinds[base], base), {})
        if "torch._dynamo" in sys.modules:
            served.forward = torch.compiler.disable(served.forward)  # type: ignore[attr-defined]
        _SERVED[base] = served
        BASES.update({base: base, served: base})


def served_by(module: nn.Module) -> Site | None:
    return module.__dict__.get("_lora_site")


def serve(site: Site) -> None:
    """Switch a module: its parameters, buffers, hooks and names stay."""
    site.module._lora_site = site  # type: ignore[assignment]
    site.module.__class__ = _SERVED[site.base]


def restore(site: Site) -> None:
    if served_by(site.module) is site:
        if type(site.module) is _SERVED[site.base]:  # not where a parametrization or FSDP has put a class on top
            site.module.__class__ = site.base
        del site.module._lora_site
