"""Where adapters lie on a device: pools of pages, a page one rank row of every module of a class.

Modules with one leaf name and shape (q_proj of every layer) are a class. Page p of its pool, row p of a memory
[num_pages, W], holds a rank row of all their A and B side by side, so an adapter of rank r takes r pages, in any order,
and nothing is padded to the largest rank: Sheng et al., "S-LoRA", arXiv 2311.03285, section 5.1. A module's A is the
view memory[:, a : a + K].
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lorakernels.adapters.targets import plain_modules
from lorakernels.nn.expert_layer import Stack
from lorakernels.nn.experts import is_mixture, is_transposed, stack_names, why_not_run
from lorakernels.nn.whole import in_turn
from lorakernels.quant.layers import weight_of

# Rows of A and B start at multiples of this many bytes.
_ALIGNMENT = 16


class Site:
    """A module that adapters may reach, and where its A and B lie in a page of its pool."""

    def __init__(self, path: str, module: nn.Module, base: type[nn.Module], owner: object) -> None:
        weight = weight_of(module)
        self.path, self.module, self.base, self.owner = path, module, base, owner
        self.N, self.K = weight.shape[::-1] if base is nn.Embedding else weight.shape
        self.begin_A = self.begin_B = 0
        self.is_seen = False  # a batch has called it
        self.pool: Pool
        # Views of the pool's memory, from its first use on.
        self.lora_A: torch.Tensor | None = None
        self.lora_B: torch.Tensor | None = None

    @property
    def spans(self) -> dict[str, tuple[slice, slice]]:
        """Where A and B lie in a page: by names where they are several."""
        return {"": (slice(self.begin_A, self.begin_A + self.K), slice(self.begin_B, self.begin_B + self.N))}

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copied or pickled model is nobody's to serve: it gets no site, and runs as the base."""
        return type(None), ()


class ExpertSite(Site):
    """A mixture's experts: the A of both stacks beside each other, and so the B. A rank takes a page an expert."""

    def __init__(self, path: str, module: nn.Module, base: type[nn.Module], owner: object) -> None:
        self.path, self.module, self.base, self.owner = path, module, base, owner
        self.begin_A = self.begin_B = 0
        self.is_seen = False
        self.lora_A = self.lora_B = None
        self.stacks = [Stack(module, name) for name in stack_names(module)]
        self.num_experts = self.stacks[0].num_experts
        step = max(_ALIGNMENT // self.stacks[0].weight.dtype.itemsize, 1)
        self.sizes: dict[str, tuple[int, int]] = {}  # N and K of each
        self._begins: dict[str, tuple[int, int]] = {}
        self.N = self.K = 0
        for stack in self.stacks:
            weight = stack.weight.mT if is_transposed(module) else stack.weight
            self._begins[stack.name] = self.K, self.N
            _, N, K = weight.shape
            self.sizes[stack.name] = N, K
            self.N, self.K = self.N + -(-N // step) * step, self.K + -(-K // step) * step

    @property
    def spans(self) -> dict[str, tuple[slice, slice]]:
        spans = {}
        for name, (N, K) in self.sizes.items():
            A, B = (begin + own for begin, own in zip((self.begin_A, self.begin_B), self._begins[name], strict=True))
            spans[name] = slice(A, A + K), slice(B, B + N)
        return spans

    def pages(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A [pages, K] and B [pages, N] of each stack, once the pool is made."""
        memory: Any = self.pool.readable
        return {name: (memory[:, A], memory[:, B]) for name, (A, B) in self.spans.items()}


class Writer:
    """Orders writes to the pools of one device with the kernels that read them, and never makes the host wait.

    On CUDA every write is on one side stream, after all reads of batches that have ended. Elsewhere there is nothing to
    order.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._reads: dict[Any, torch.cuda.Event] = {}  # the last of each stream

    @contextmanager
    def writing(self) -> Iterator[None]:
        # Not as inference tensors: a batch outside inference mode could not save them for a backward.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self.stream):
            self.wait_for_reads()
            yield

    def wait_for_reads(self) -> None:
        """What the side stream does from now on, and whoever has memory of it next, comes after the reads so far."""
        if self.stream is not None:
            for event in self._reads.values():
                self.stream.wait_event(event)
            self._reads.clear()

    def check_no_capture(self) -> None:
        """Raise RuntimeError where the current stream captures a CUDA graph, which would keep a batch's memory."""
        if self.stream is not None and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, whose replays would read the plans and pages of this batch when they "
                "are another's; capture multi_lora_linear with a BatchPlan of your own, or run batches without graphs"
            )

    def written(self) -> torch.cuda.Event | None:
        """What a reader has to wait for: all writes until now."""
        return None if self.stream is None else self.stream.record_event()

    def before_reads(self, written: torch.cuda.Event | None) -> None:
        if written is not None:
            torch.cuda.current_stream(self.device).wait_event(written)

    def after_reads(self) -> None:
        if self.stream is not None:
            stream = torch.cuda.current_stream(self.device)
            self._reads[stream.cuda_stream] = stream.record_event()


class Pool:
    """The pages of the modules of one leaf name and shape. Their memory is made at its first use."""

    def __init__(self, name: str, dtype: torch.dtype, writer: Writer, num_pages: int, per_rank: int = 1) -> None:
        self.name, self.dtype, self.writer, self.num_pages = name, dtype, writer, num_pages * per_rank
        self.per_rank = per_rank  # how many pages a rank takes
        # Sites hold it; were that in turn, the memory would outlive its store until a collection.
        self.sites: weakref.WeakSet[Site] = weakref.WeakSet()
        self.width = 0
        self.memory: torch.Tensor | None = None
        self.free = list(range(self.num_pages))
        self.readable: torch.Tensor | None = None

    def add(self, site: Site) -> None:
        site.pool = self
        site.begin_A = self.width
        site.begin_B = self._aligned(site.begin_A + site.K)
        self.width = self._aligned(site.begin_B + site.N)
        self.sites.add(site)

    def _aligned(self, begin: int) -> int:
        step = max(_ALIGNMENT // self.dtype.itemsize, 1)
        return -(-begin // step) * step

    @property
    def page_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    def host_rows(self, rank: int) -> torch.Tensor:
        """Zeros [rank, W] in main memory, in pinned pages where the pool is on CUDA."""
        pin_memory = self.writer.stream is not None
        return torch.zeros(rank, self.width, dtype=self.dtype, device="cpu", pin_memory=pin_memory)

    def make(self) -> None:
        if self.memory is None:
            with self.writer.writing():
                memory = torch.zeros(self.num_pages, self.width, dtype=self.dtype, device=self.writer.device)
                # Counts its versions by itself: other adapters may be written between a forward and its backward.
                self.readable = memory.data
            for site in self.sites:
                site.lora_A = self.readable[:, site.begin_A : site.begin_A + site.K]
                site.lora_B = self.readable[:, site.begin_B : site.begin_B + site.N]
            self.memory = memory

    def drop(self) -> None:
        self.memory = self.readable = None
        for site in self.sites:
            site.lora_A = site.lora_B = None

    def take(self, rank: int, wanted: Sequence[int]) -> tuple[int, ...]:
        """`rank` free pages, as many as there must be: of those wanted, which are free, if they are enough.

        So most adapters have the same pages in all pools, which then share a plan. Low ones come first, so that most of
        an adapter lie together.
        """
        taken = (wanted if len(wanted) >= rank else sorted(self.free))[:rank]
        self.free = sorted(set(self.free) - set(taken))
        return tuple(taken)

    def write(self, pages: Sequence[int], rows: torch.Tensor) -> None:
        with self.writer.writing():
            for place, begin, end in self._runs(pages):
                place.copy_(rows[begin:end], non_blocking=True)

    def give_back(self, pages: Sequence[int]) -> None:
        """Zeroed: whoever came to read a page that is nobody's would find the base model, not another's adapter."""
        try:
            in_turn([(partial(self._zero, pages), None)])
        finally:
            self.free = [*self.free, *pages]

    def _zero(self, pages: Sequence[int]) -> None:
        with self.writer.writing():
            for place, *_ in self._runs(pages):
                place.zero_()

    def _runs(self, pages: Sequence[int]) -> Iterator[tuple[torch.Tensor, int, int]]:
        """The memory of each stretch of successive pages, with its begin and end in the list: a copy each."""
        assert self.memory is not None
        begin = 0
        for i in range(1, len(pages) + 1):
            if i == len(pages) or pages[i] != pages[i - 1] + 1:
                yield self.memory[pages[begin] : pages[begin] + i - begin], begin, i
                begin = i


def find_sites(
    model: nn.Module, bases: dict[type[nn.Module], type[nn.Module]], num_pages: int, owner: object
) -> dict[str, Site]:
    """Every module whose type is in `bases`, which says what it was by nature, under each of its names.

    Experts come under the names of their stacks.
    """
    by_module: dict[nn.Module, Site] = {}
    pools: dict[tuple[Any, ...], Pool] = {}
    writers: dict[torch.device, Writer] = {}
    sites: dict[str, Site] = {}
    for path, module in plain_modules(model):
        base = bases.get(type(module))
        mixture = is_mixture(module)
        if base is None or (mixture and why_not_run(module)):
            continue
        if module not in by_module:
            site = by_module[module] = (ExpertSite if mixture else Site)(path, module, base, owner)
            weights = [stack.weight for stack in site.stacks] if isinstance(site, ExpertSite) else [weight_of(module)]
            dtype, device = weights[0].dtype, weights[0].device
            name, shapes = path.rpartition(".")[2], tuple(tuple(weight.shape) for weight in weights)
            key = (name, base, shapes, dtype, device)
            if key not in pools:
                writer = writers.setdefault(device, Writer(device))
                pools[key] = Pool(name, dtype, writer, num_pages, getattr(site, "num_experts", 1))
            pools[key].add(site)
        site = by_module[module]
        sites |= {f"{path}.{name}" if name else path: site for name in site.spans}
    return sites
