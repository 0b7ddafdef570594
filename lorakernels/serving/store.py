"""AdapterStore: many adapters for one model, on the device and in main memory, and batches that mix them."""

from __future__ import annotations

import itertools
import operator
import os
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lorakernels.adapters.folder import find_source
from lorakernels.backend import triton_problem
from lorakernels.config import check_rank
from lorakernels.nn import siblings
from lorakernels.nn.modules import unwrapped
from lorakernels.serving import sources
from lorakernels.serving.books import Books, Lease, Version
from lorakernels.serving.pools import ExpertSite, Site, Writer, find_sites
from lorakernels.serving.served import BASES, Batch, know, restore, running, serve
from lorakernels.serving.sources import Given
from lorakernels.serving.stats import StoreStats
from lorakernels.serving.uncalled import watched

# Ranks are 8 or 16 mostly, so that room for this many rows an adapter holds max_adapters of them.
_PAGES_AN_ADAPTER = 16


class AdapterStore:
    """Serves many adapters of one model, a batch of several at once.

    The modules that adapters reach change their class and nothing else: parameters, names, hooks and state dict stay,
    and outside `batch` they compute what they did, to the bit. `close` takes that back.

    All methods may be called from several threads.

    Args:
        model: on its device and in its dtype by now; A and B are kept in that dtype. Served are modules of exactly
            `torch.nn.Linear` and `torch.nn.Embedding`, packed and GPT-2's linears, and the experts that are known.
        max_adapters: how many adapters lie on the device at once.
        max_rank: the largest rank of one.
        num_pages: how many rank rows the adapters on the device have together, of each module; by default 16 for each
            of `max_adapters`, and never fewer than `max_rank`. A pool of them is made when a module is first reached.
        host_bytes: how much of main memory keeps adapters that may come to the device again.
        root: where folders must lie, after every symbolic link; relative ones are meant from there.
        invariant: what a row gets does not depend, to the bit, on which adapters the other rows of its batch have. That
            is slower on a CPU, where the same adapter's rows are then no longer multiplied together, and on a GPU,
            where there are no groups.
        group: whether on a GPU projections that one module calls with the same x (q, k, v; gate, up) are slices of one
            launch, where the same adapters reach them. They are found by the names that models give them.
        groups: further groups, each a list of names of one module's children: [["query_key", "value"]].

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is expected.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_adapters: int = 64,
        max_rank: int = 64,
        num_pages: int | None = None,
        host_bytes: int = 4 << 30,
        root: str | os.PathLike[str] | None = None,
        invariant: bool = False,
        group: bool = True,
        groups: Sequence[Sequence[str]] = (),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        check_rank(max_adapters, "max_adapters")
        check_rank(max_rank, "max_rank")
        if num_pages is None:
            num_pages = max(max_rank, _PAGES_AN_ADAPTER * max_adapters)
        check_rank(num_pages, "num_pages")
        if num_pages < max_rank:
            raise ValueError(f"num_pages is {num_pages}; expected at least max_rank={max_rank}")
        if isinstance(host_bytes, bool) or not isinstance(host_bytes, int) or host_bytes < 0:
            raise ValueError(f"host_bytes is {host_bytes!r}; expected a number of bytes, 0 for none")
        self.model: nn.Module = unwrapped(model)
        self.max_rank, self.invariant = max_rank, invariant
        self.root = None if root is None else Path(root).resolve(strict=True)
        self._owner = object()
        know(self.model)
        found_sites = find_sites(self.model, BASES, num_pages, self._owner)
        # How many rows an expert multiplies, and so a row's bits, depends on the other rows.
        self._sites = {p: one for p, one in found_sites.items() if not (invariant and isinstance(one, ExpertSite))}
        if not self._sites:
            raise ValueError(f"{type(model).__name__} has no torch.nn.Linear or torch.nn.Embedding to serve")
        linears = {site.module for site in self._sites.values() if site.base is not nn.Embedding}
        found = siblings.find(self.model, linears.__contains__, groups)
        self._groups = found if group and not invariant else {}
        self._hooks: list[RemovableHandle] = []
        self._pools = list(dict.fromkeys(site.pool for site in self._sites.values()))
        self._writers = {pool.writer for pool in self._pools}
        # Nothing it holds holds the store, so that one which nobody has any more goes at once.
        self._books = Books(max_adapters, host_bytes, partial(sources.read, self.model, self._sites, max_rank))
        sites = weakref.WeakSet(self._sites.values())  # a model may hold its store
        weakref.finalize(self, _let_go, sites, self._writers, self._hooks).atexit = False
        self._numbers = itertools.count()
        self._worker: ThreadPoolExecutor | None = None
        self._prefetches: dict[str, Future[None]] = {}

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """The first of two stores that goes would take the model from the other."""
        raise TypeError("an AdapterStore cannot be copied or pickled; make one for the copied model")

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Where the model that it serves holds it: the copied model has no store, and runs as the base."""
        if id(self.model) not in memo:
            self.__reduce_ex__(None)

    # -------------------------------------------------------------------------------------- adapters by name

    @property
    def names(self) -> list[str]:
        """The adapters that a batch may name."""
        with self._books.lock:
            return list(self._books.current)

    def load(self, name: str, folder: Given | None = None) -> None:
        """Read and check an adapter, give it a name, and bring it to the device where others may leave for it.

        All or nothing: when an error is raised, the names and what they mean are as they were. A name that is taken
        gets a new version; batches and leases under way keep the old one.

        Args:
            name: text without slashes.
            folder: with adapter_config.json and adapter_model.safetensors; by default root/name. Or a LoRAConfig and
                tensors by the keys of PEFT's files, which then stay in main memory until `evict`.

        Raises:
            AdapterFileError: the files are missing, broken, outside the root, do not fit the model, or hold what a
                batch of several cannot compute (DoRA, biases, modules_to_save).
            CapacityError: a rank is over max_rank; there is no room for what must have it: a pinned name, or tensors.
            ValueError: the name is malformed.
            TypeError: folder is neither a path nor a LoRAConfig and tensors.
        """
        self._put(name, folder, must_exist=False)

    def replace(self, name: str, folder: Given | None = None) -> None:
        """`load` for a name that there is: its next batch has the new version, those under way keep the old.

        Raises KeyError when there is none, and what `load` raises.
        """
        self._put(name, folder, must_exist=True)

    def evict(self, name: str) -> None:
        """Forget an adapter, pinned or not. What is in use goes with the end of its last batch or lease.

        Raises KeyError when there is none of that name.
        """
        with self._books.lock:
            self._books.find(name)
            self._prefetches.pop(name, None)
            self._books.forget(name)

    def pin(self, name: str) -> None:
        """Bring an adapter to the device and keep it there, its later versions too, until `unpin`.

        Raises KeyError when there is none of that name, and CapacityError when there is no room.
        """
        while True:
            with self.acquire(name) as lease, self._books.lock:
                if self._books.find(name) is lease.held:  # and no new version has come, which may be elsewhere
                    lease.held.pinned = True
                    return

    def unpin(self, name: str) -> None:
        """Let an adapter leave the device again. Raises KeyError when there is none of that name."""
        with self._books.lock:
            self._books.find(name).pinned = False

    def prefetch(self, name: str) -> None:
        """Begin to bring an adapter to the device, and return at once: a hint.

        Files are read by a thread, and copied on a stream of their own, which the next batch waits for on the device.
        Where it fails, the next use tries again, and raises what it then meets.

        Raises KeyError when there is none of that name.
        """
        with self._books.lock:
            self._books.find(name)
            pending = self._prefetches.get(name)
            if pending is None or pending.done():
                if self._worker is None:
                    self._worker = ThreadPoolExecutor(1, thread_name_prefix="lorakernels-prefetch")
                self._prefetches[name] = self._worker.submit(self._books.fetch, name)

    def stats(self) -> StoreStats:
        """Counts, bytes and times until now."""
        books = self._books
        with books.lock:
            on_device, in_host = books.on_device, books.in_host
            made = [pool for pool in self._pools if pool.memory is not None]
            return StoreStats(
                adapters=len(books.current),
                on_device=len(on_device),
                in_host=len(in_host),
                pinned=sum(version.pinned and not version.retired for version in on_device),
                in_use=len(books.in_use),
                hits=books.hits,
                misses=books.misses,
                reads=books.reads,
                evictions=books.evictions,
                loads=books.loads,
                load_seconds=books.load_seconds,
                device_bytes=sum(pool.num_pages * pool.page_bytes for pool in made),
                used_bytes=sum((pool.num_pages - len(pool.free)) * pool.page_bytes for pool in made),
                padded_bytes=sum(
                    self.max_rank * pool.per_rank * pool.page_bytes for version in on_device for pool in version.parts
                ),
                host_bytes=sum(version.nbytes for version in in_host),
            )

    # -------------------------------------------------------------------------------------- use

    @contextmanager
    def batch(self, rows: Sequence[str | Lease | None], *, lengths: Sequence[int] | None = None) -> Iterator[None]:
        """Within `with`, row i of what the model is called with has the adapter rows[i]: a name, a lease, or None.

        The first dimension of every x that reaches a served module must be a multiple of the rows: each is then as
        many successive ones, as `generate` repeats them for beams. None is the base model, to the bit; so is a batch
        of None alone, or of nothing. Of batches in each other the inner one counts. A batch is its thread's own (and
        its asyncio task's): open it in the thread that calls the model. A generator must not yield within one: what
        else runs in its thread while it waits would be in the batch.

        Args:
            rows: the adapters by row; those that are not on the device are brought there first.
            lengths: the number of tokens of each row, for rows that lie behind each other in x [1, T, K] or [T, K].

        Raises:
            KeyError: there is no adapter of a name.
            CapacityError: they do not fit the device together, or beside what is pinned and in use.
            AdapterFileError: one was to be read again, and its files are gone, or others.
            StaleBatchError: a lease was released; later, by a call or backward after the end of the batch.
            RuntimeError: a CUDA graph is being captured; at the end, modules that adapters reach were not called while
                their parents ran, so that rows would have answered as the base model's.
            TypeError, ValueError: rows or lengths are not what is expected.
        """
        numbers = _check_rows(rows, lengths)
        for writer in self._writers:
            writer.check_no_capture()
        self._await_prefetches([row for row in rows if isinstance(row, str)])
        versions: list[Version] = []
        try:
            slots = self._books.hold(rows, versions)
            for version in versions:
                for writer, written in version.written.items():
                    writer.before_reads(written)
            most = self.max_rank if self.invariant else None
            batch = Batch(slots, [version.routing() for version in versions], numbers, most)
            with watched(self.model, self._books, versions, batch), running(self._owner, batch):
                yield
        finally:
            with self._books.lock:
                try:
                    for writer in {writer for version in versions for writer in version.written}:
                        writer.after_reads()
                finally:
                    self._books.release(versions)

    def acquire(self, name: str) -> Lease:
        """Hold the version that a name means now, on the device, until the lease is released.

        Raises what `batch` does.
        """
        with self._books.lock:
            self._books.find(name)
        self._await_prefetches([name])
        held: list[Version] = []
        try:
            self._books.hold([name], held)
            return Lease(self._books, held[0])
        except BaseException:
            self._books.release(held)
            raise

    def close(self) -> None:
        """Give the model back as it was, and the memory. Raises RuntimeError while a batch or lease is open."""
        with self._books.lock:
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown()
        with self._books.lock:
            in_use = sorted({version.name for version in self._books.in_use})
            if in_use:
                raise RuntimeError(f"adapters are in use: {', '.join(in_use)}; end their batches and leases first")
            _restore(self._sites.values(), self._hooks)
            for writer in self._writers:
                if writer.stream is not None:
                    torch.cuda.synchronize(writer.device)  # kernels may be reading what is freed now
            for pool in self._pools:
                pool.drop()
            self._books.closed = True
            self._books.current.clear()
            self._books.versions.clear()

    def _put(self, name: str, given: Given | None, *, must_exist: bool) -> None:
        sources.check_name(name)
        sources.check_given(given)
        books = self._books
        with books.lock:
            books.check_open()
            if must_exist:
                books.find(name)
        start = time.perf_counter()
        source = given if isinstance(given, tuple) else find_source(name, given, self.root)
        contents, parts, rows = books.read(source)
        with books.lock:
            books.check_open()
            if must_exist:
                books.find(name)
            kept = None if isinstance(source, tuple) else source
            parents = {"": self.model, **contents.modules}
            paths = {path: sources.module_path(path, update) for path, update in contents.layers.items()}
            reached = {self._sites[path]: parents[own.rpartition(".")[0]] for path, own in paths.items()}
            books.add(Version(name, next(self._numbers), kept, parts, list(reached)), rows)
            books.reach(reached)
            for site in reached:
                serve(site)
            self._declare_groups(reached)
            books.count_load(start, reads=kept is not None)

    def _declare_groups(self, reached: Iterable[Site]) -> None:
        """Of the modules that adapters reach, where there are launches to spare, and no groups of others."""
        served = {site.module for site in reached if triton_problem(site.pool.writer.device, site.pool.dtype) is None}
        for parent in [parent for parent in self._groups if not served.isdisjoint(parent._modules.values())]:
            groups = self._groups.pop(parent)
            if not siblings.has_groups(parent):
                self._hooks += siblings.declare({parent: groups})

    def _await_prefetches(self, names: Sequence[str]) -> None:
        with self._books.lock:
            pending = [self._prefetches.pop(name) for name in set(names) if name in self._prefetches]
        for future in pending:
            if not future.cancel():  # what waits behind others in the queue this use does itself
                future.exception()  # whatever it was, this use tries again


def _restore(sites: Iterable[Site], hooks: Iterable[RemovableHandle]) -> None:
    for site in sites:
        restore(site)
    for hook in hooks:
        hook.remove()


def _let_go(sites: Iterable[Site], writers: Iterable[Writer], hooks: Iterable[RemovableHandle]) -> None:
    """When nobody has the store any more: its pools are freed next, on the streams that wrote them."""
    _restore(sites, hooks)
    for writer in writers:
        writer.wait_for_reads()


def _check_rows(rows: Sequence[str | Lease | None], lengths: Sequence[int] | None) -> list[int] | None:
    """The lengths as numbers of Python's own; raises for what a batch cannot be of."""
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise TypeError(f"rows is {rows!r}; expected a list with a name, a lease or None for each row")
    for row in rows:
        if row is not None and not isinstance(row, (str, Lease)):
            raise TypeError(f"a row is {row!r}; expected an adapter's name, a lease, or None for the base model")
    if lengths is None:
        return None
    if isinstance(lengths, str) or not isinstance(lengths, Sequence):
        raise TypeError(f"lengths is {lengths!r}; expected a list with the number of tokens of each row")
    try:
        numbers = [-1 if isinstance(n, bool) else operator.index(n) for n in lengths]
    except TypeError:  # of fractions, and of what is no number
        numbers = []
    if len(numbers) != len(rows) or any(n < 0 for n in numbers):
        raise ValueError(f"lengths is {list(lengths)}; expected {len(rows)} numbers of tokens, one for each row")
    return numbers
