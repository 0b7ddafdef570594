"""Which token of a batch uses which adapter, as tensors on the device: what the multi-adapter kernels are routed by.

Everything lies in one int32 buffer of a fixed address, so that a launch takes one pointer and a CUDA graph that was
captured with a plan follows its updates.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from lorakernels.plan_layout import TILE_HEIGHTS, PlanLayout, Staging, num_tiles, plan_layout, write_route

BASE = -1


class PlanError(ValueError):
    """A batch that does not fit its plan: an unknown slot, too many tokens, a rank over the limit."""


class PlanTensors(NamedTuple):
    """A plan as operators take it."""

    buffer: torch.Tensor  # int32, see PlanLayout
    scales: torch.Tensor  # [num_slots + 1] float32
    page_table: torch.Tensor | None  # [num_slots + 1, max_rank] int32; the last row, the base's, is 0
    num_slots: int
    max_tokens: int
    unit: int = 0  # tokens that plain torch multiplies at a time; 0: all of an adapter

    @property
    def layout(self) -> PlanLayout:
        return plan_layout(self.num_slots, self.max_tokens)

    def part(self, begin: int, length: int) -> torch.Tensor:
        return self.buffer[begin : begin + length]


class BatchPlan:
    """Routes each token of a batch to its own adapter; made once, updated for every batch.

    `update` writes in place and never makes the host wait for the device, so that it may run between replays of a
    CUDA graph, or be captured in one: then of tensors on the device, as lists must not be given while a graph is
    captured. Launches are sized by the number of tokens and slots, never by what is in them.

    Args:
        num_slots: how many adapters can be told apart; slots are 0 … num_slots - 1.
        max_tokens: the largest batch.
        max_rank: the largest rank of a slot; stacks of adapters must hold as many.
        num_pages: makes a plan for paged adapters, whose rank rows are pages 0 … num_pages - 1 of a pool.
        invariant: what is added to a token does not depend, to the bit, on the adapters of the others: it is slower in
            plain torch, which multiplies each token by itself then; or each row where this is the number of tokens of a
            row. The kernels' blocks are chosen by the sizes of the plan and of the batch alone, so that for them every
            plan is. Not where dropout is drawn.
        device: where; torch's default device if None.

    Raises:
        ValueError: a size is not a positive integer.
    """

    def __init__(
        self,
        num_slots: int,
        max_tokens: int,
        *,
        max_rank: int = 64,
        num_pages: int | None = None,
        invariant: bool | int = False,
        device: torch.device | str | int | None = None,
    ) -> None:
        sizes = {"num_slots": num_slots, "max_tokens": max_tokens, "max_rank": max_rank}
        if num_pages is not None:
            sizes["num_pages"] = num_pages
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 1 << 30:
                raise ValueError(f"{name} is {size!r}; expected a positive integer below 2³⁰")
        self.num_slots, self.max_tokens, self.max_rank, self.num_pages = num_slots, max_tokens, max_rank, num_pages
        if not isinstance(invariant, int) or invariant < 0:
            raise ValueError(f"invariant is {invariant!r}; expected True, False or the number of tokens of a row")
        self.unit = int(invariant)
        self.layout = plan_layout(num_slots, max_tokens)
        tiles = num_tiles(max_tokens, num_slots, TILE_HEIGHTS[0])
        most = max(num_slots + 2, max_tokens, max_rank, tiles)
        self._page_table = None
        with torch.inference_mode(False):  # inference tensors could not be updated outside that mode
            # In one piece, for `update_host` to copy at once.
            self._whole = torch.zeros(self.layout.size + num_slots + 1, dtype=torch.int32, device=device)
            self.device = self._whole.device
            if num_pages is not None:
                self._page_table = torch.zeros(num_slots + 1, max_rank, dtype=torch.int32, device=self.device)
            self._iota = torch.arange(most, device=self.device)
            self.masked = torch.zeros(2, dtype=torch.int64, device=self.device)
            """What was masked where the host does not look: unknown tokens, refused slots."""
        self._host_checks = self.device.type == "cpu"
        self._staging: Staging | None = None
        self.num_tokens = 0
        self.version = 0
        self._is_in_graph = False  # a replay of which updates the plan, and its version stays
        self._snapshots: dict[Any, PlanTensors] = {}  # of this version, by the CUDA stream that makes and reads them
        self._set_views()
        self.on_host: Any = None
        """What an operator has read of this version on the host; None after an update."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy stages in memory of its own."""
        return {**self.__dict__, "_staging": None, "on_host": None, "_snapshots": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_views()  # pickle makes a memory of each

    def _set_views(self) -> None:
        with torch.inference_mode(False):
            self._buffer = self._whole[: self.layout.size]
            self._scales = self._whole[self.layout.size :].view(torch.float32)
        sizes = self.num_slots, self.max_tokens, self.unit
        self.tensors = PlanTensors(self._buffer, self._scales, self._page_table, *sizes)
        """The plan as it is now and will be after every update: the same memory."""

    def __repr__(self) -> str:
        pages = "" if self.num_pages is None else f", num_pages={self.num_pages}"
        return (
            f"BatchPlan({self.num_slots}, {self.max_tokens}, max_rank={self.max_rank}{pages}, "
            f"device={str(self.device)!r}): {self.num_tokens} tokens, version {self.version}"
        )

    def snapshot(self) -> PlanTensors:
        """The plan of this version, which no update changes: for a backward that may come later.

        One copy a version, and a CUDA stream: another stream would not wait until it is made.
        """
        if torch.compiler.is_compiling() or self._is_in_graph or self._is_capturing():
            return self._copied()  # a graph that is replayed must copy what it then finds
        if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
            return self._copied()  # tensors of a mode or transform, which may not outlive it
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else None
        kept = self._snapshots.get(stream)
        if kept is None or kept.buffer.is_inference():
            kept = self._snapshots[stream] = self._copied()
        return kept

    @torch.no_grad()
    def update(
        self,
        token_slots: torch.Tensor | Sequence[int],
        slot_ranks: torch.Tensor | Sequence[int],
        slot_scalings: torch.Tensor | Sequence[float],
        page_table: torch.Tensor | None = None,
    ) -> None:
        """Route a new batch.

        On a CPU everything is checked before anything changes. Elsewhere the host does not wait to see the numbers:
        a token of an unknown slot, and every token of a slot whose rank, scaling or pages are out of range, is given
        the base model, and counted for `check`.

        Args:
            token_slots: [T] int32 or int64, T ≤ max_tokens: the slot of each token, -1 for the base model alone. A
                CUDA graph was captured for one T: for fewer tokens fill up with -1.
            slot_ranks: [num_slots] integers in 0 … max_rank; 0 is an empty slot, whose tokens are the base model's.
            slot_scalings: [num_slots] numbers. 0 switches a slot off, as rank 0 does.
            page_table: [num_slots, max_rank] int32, of a plan with num_pages: the page of each rank row. What is past
                a slot's rank is not looked at.

        Raises:
            PlanError: a shape does not fit; on a CPU, a slot, rank, scaling or page is out of range.
            TypeError: a dtype is wrong.
        """
        slots = self.as_tensor("token_slots", token_slots, torch.int32)
        ranks = self.as_tensor("slot_ranks", slot_ranks, torch.int32)
        scalings = self.as_tensor("slot_scalings", slot_scalings, torch.float32)
        if slots.dim() != 1 or slots.shape[0] > self.max_tokens:
            raise PlanError(
                f"token_slots is {list(slots.shape)}; expected [T] with T ≤ {self.max_tokens}: split the batch, "
                "or make a plan with a larger max_tokens"
            )
        self._check_slots(ranks, scalings)
        self.check_pages(page_table)
        unknown = (slots < BASE) | (slots >= self.num_slots)
        refused = (ranks < 0) | (ranks > self.max_rank) | ~scalings.isfinite()
        if page_table is not None and self.num_pages is not None:
            in_use = self._iota[: self.max_rank] < ranks[:, None]
            refused |= (in_use & ((page_table < 0) | (page_table >= self.num_pages))).any(1)
        if self._host_checks and unknown.any():
            self._refuse_token(unknown.to(torch.uint8), slots)
        if self._host_checks and refused.any():
            slot = int(refused.to(torch.uint8).argmax())
            self._refuse(slot, int(ranks[slot]), float(scalings[slot]))
        self.rewrite(slots.shape[0])
        off = refused | (scalings == 0)
        base = unknown | (slots < 0)
        self._route(slots.masked_fill(base, self.num_slots), ranks.masked_fill(off, 0), scalings.masked_fill(off, 0))
        if page_table is not None and self._page_table is not None:
            self._page_table[:-1].copy_(page_table.masked_fill(~in_use | refused[:, None], 0))
        self.masked += torch.stack([unknown.sum(), refused.sum()])

    def update_host(
        self,
        token_slots: Sequence[int] | np.ndarray,
        capacity: int | None = None,
        slot_ranks: Sequence[int] | np.ndarray | None = None,
        slot_scalings: Sequence[float] | np.ndarray | None = None,
        page_table: np.ndarray | None = None,
    ) -> None:
        """`update` from numbers that the host knows, as a serving engine does: one copy, and no launch on the device.

        Args:
            token_slots: [T] integers, T ≤ capacity: the slot of each token, -1 for the base model alone.
            capacity: the plan is then of so many tokens, those after T of the base: of as many as a CUDA graph was
                captured for, or `max_tokens`. T if None.
            slot_ranks: as `update` takes them; `max_rank` for each slot if None, as for stacks with zeros past a rank.
            slot_scalings: as `update` takes them; 1 for each slot if None.
            page_table: as `update` takes it, of a plan with num_pages, in a copy of its own.

        Raises:
            PlanError: a shape does not fit, or a slot, rank, scaling or page is out of range.
            TypeError: a dtype is wrong.
            RuntimeError: a CUDA graph is being captured, a replay of which would copy old numbers.
        """
        if self._is_capturing():
            raise RuntimeError("update_host cannot be captured in a CUDA graph: call it before, or use update")
        S = self.num_slots
        slots = _integers("token_slots", token_slots)
        num_tokens = len(slots) if capacity is None else capacity
        if slots.ndim != 1 or not len(slots) <= num_tokens <= self.max_tokens:
            expected = f"[T] with T ≤ capacity ≤ {self.max_tokens}, the plan's max_tokens"
            raise PlanError(f"token_slots is {list(slots.shape)} and capacity {capacity}; expected {expected}")
        if len(slots) and not BASE <= np.minimum.reduce(slots) <= np.maximum.reduce(slots) < S:
            self._refuse_token((slots < BASE) | (slots >= S), slots)
        ranks, scalings = self._host_ranks(slot_ranks, slot_scalings)
        pages = self._host_pages(page_table, ranks)
        if self._staging is None:
            self._staging = Staging(self._whole)
        numbers = self._staging.next()
        write_route(numbers, S, self.max_tokens, slots, num_tokens, ranks)
        numbers[self.layout.size : -1].view(np.float32)[:] = scalings
        self.rewrite(num_tokens)
        self._staging.copy_to(self._whole)
        if pages is not None and self._page_table is not None:
            self._page_table[:-1].copy_(torch.from_numpy(pages))

    def rewrite(self, num_tokens: int) -> PlanTensors:
        """The memory of another batch, of so many tokens, into which whoever asks writes it."""
        self._snapshots, self.on_host = {}, None
        self._is_in_graph |= self._is_capturing()
        self.num_tokens = num_tokens
        self.version += 1
        return self.tensors

    def check(self) -> None:
        """Raise PlanError if an update since the last check masked a token or a slot. Makes the host wait."""
        tokens, slots = self.masked.tolist()
        self.masked.zero_()
        if tokens or slots:
            raise PlanError(
                f"updates since the last check gave the base model to {tokens} tokens of unknown slots (expected -1 or "
                f"0 … {self.num_slots - 1}) and to {slots} slots with a rank over {self.max_rank} or below 0, a "
                "scaling that is not finite, or a page outside the pool"
            )

    def _route(self, slots: torch.Tensor, slot_ranks: torch.Tensor, slot_scalings: torch.Tensor) -> None:
        layout, iota, S, T = self.layout, self._iota, self.num_slots, slots.shape[0]
        self._write(layout.ranks, slot_ranks)
        self._scales[:S].copy_(slot_scalings)
        ranks = self._buffer[layout.ranks : layout.ranks + S + 1]
        token_ranks = ranks.index_select(0, slots)
        slots = slots.masked_fill(token_ranks == 0, S)
        # Sorting numbers that hold slot and token at once is stable and gives both back.
        in_order = torch.sort(slots.long() * self.max_tokens + iota[:T]).values
        starts = torch.searchsorted(in_order, iota[: S + 2] * self.max_tokens)
        self._write(layout.slots, slots)
        self._write(layout.token_ranks, token_ranks)
        self._write(layout.order, in_order % self.max_tokens)
        self._write(layout.starts, starts)
        for height, begin in zip(TILE_HEIGHTS, layout.tiles, strict=True):
            tiles_of_slot = (starts[1:] - starts[:-1] + (height - 1)) // height
            ends = tiles_of_slot.cumsum(0)
            tile = iota[: num_tiles(T, S, height)]
            slot = torch.searchsorted(ends, tile, right=True).clamp_(max=S)
            first = starts[slot] + (tile - (ends - tiles_of_slot)[slot]) * height
            end = torch.minimum(first + height, starts[slot + 1])
            self._write(begin, torch.stack([slot, torch.minimum(first, end), end], 1).view(-1))

    def _write(self, begin: int, values: torch.Tensor) -> None:
        self._buffer[begin : begin + len(values)].copy_(values)

    def as_tensor(self, name: str, values: torch.Tensor | Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        """Numbers as `update` takes them, on the plan's device, without waiting for it. Raises as `update` does."""
        if not isinstance(values, torch.Tensor):
            host = _host_tensor(name, values, dtype)
            if self.device.type == "cuda":  # a copy from pages that are not pinned would wait for the device
                return host.pin_memory().to(self.device, non_blocking=True)
            return host.to(self.device)
        if values.device != self.device:
            raise PlanError(f"{name} is on {values.device} and the plan on {self.device}: move it there first")
        if dtype.is_floating_point and values.is_floating_point():
            return values.to(dtype)  # before anyone asks whether it is finite
        if dtype.is_floating_point or values.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} is {values.dtype}; expected {dtype}")
        return values

    def check_pages(self, page_table: Any) -> None:
        """Its dtype, shape and device. Raises as `update` does."""
        if (page_table is None) != (self.num_pages is None):
            raise PlanError("page_table is for plans with num_pages, which need it in every update")
        if page_table is None:
            return
        if not isinstance(page_table, torch.Tensor):
            raise TypeError(f"page_table must be a tensor, int32 on {self.device}; got {type(page_table).__name__}")
        if tuple(page_table.shape) != (self.num_slots, self.max_rank):
            raise PlanError(f"page_table is {list(page_table.shape)}; expected {[self.num_slots, self.max_rank]}")
        if page_table.dtype not in (torch.int32, torch.int64) or page_table.device != self.device:
            raise TypeError(f"page_table is {page_table.dtype} on {page_table.device}; expected int32 on {self.device}")

    def _host_ranks(self, slot_ranks: Any, slot_scalings: Any) -> tuple[np.ndarray, np.ndarray]:
        """Ranks, 0 where a slot is off, and scalings of `update_host`."""
        ranks, scalings = np.full(self.num_slots, self.max_rank), np.ones(self.num_slots, dtype=np.float32)
        if slot_ranks is not None:
            ranks = _integers("slot_ranks", slot_ranks)
        if slot_scalings is not None:
            scalings = _host_tensor("slot_scalings", slot_scalings, torch.float32).numpy()
        if slot_ranks is None and slot_scalings is None:
            return ranks, scalings
        self._check_slots(ranks, scalings)
        for slot in np.flatnonzero((ranks < 0) | (ranks > self.max_rank) | ~np.isfinite(scalings)):
            self._refuse(int(slot), int(ranks[slot]), float(scalings[slot]))
        return np.where(scalings == 0, 0, ranks), scalings

    def _host_pages(self, page_table: np.ndarray | None, ranks: np.ndarray) -> np.ndarray | None:
        """The pages of `update_host`, 0 past each slot's rank."""
        if (page_table is None) != (self.num_pages is None):
            raise PlanError("page_table is for plans with num_pages, which need it in every update")
        if page_table is None or self.num_pages is None:
            return None
        if page_table.shape != (self.num_slots, self.max_rank):
            raise PlanError(f"page_table is {list(page_table.shape)}; expected {[self.num_slots, self.max_rank]}")
        pages = np.where(np.arange(self.max_rank) < ranks[:, None], page_table, 0)
        wrong = ((pages < 0) | (pages >= self.num_pages)).any(1)
        if wrong.any():
            self._refuse(int(wrong.argmax()), 0, 1.0)
        return pages.astype(np.int32)

    def _check_slots(self, ranks: Any, scalings: Any) -> None:
        for name, numbers in (("slot_ranks", ranks), ("slot_scalings", scalings)):
            if tuple(numbers.shape) != (self.num_slots,):
                raise PlanError(f"{name} is {list(numbers.shape)}; expected [{self.num_slots}], a number a slot")

    def _refuse_token(self, unknown: Any, slots: Any) -> NoReturn:
        token = int(unknown.argmax())
        most = self.num_slots - 1
        raise PlanError(f"token {token} has slot {int(slots[token])}; expected -1 (the base model) or 0 … {most}")

    def _refuse(self, slot: int, rank: int, scaling: float) -> NoReturn:
        if not 0 <= rank <= self.max_rank:
            raise PlanError(f"slot {slot} has rank {rank}; expected 0 … {self.max_rank}, the plan's max_rank")
        if not math.isfinite(scaling):
            raise PlanError(f"slot {slot} has scaling {scaling}; expected a finite number, such as lora_alpha / r")
        raise PlanError(f"slot {slot} has a page outside 0 … {(self.num_pages or 0) - 1}, the pool's pages")

    def _copied(self) -> PlanTensors:
        page_table = None if self._page_table is None else self._page_table.clone()
        buffer, scales = self._buffer.clone(), self._scales.clone()
        return self.tensors._replace(buffer=buffer, scales=scales, page_table=page_table)

    def _is_capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _host_tensor(name: str, values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """A list as int64 or float32; integers are good floats, floats no integers."""
    try:
        if dtype.is_floating_point:
            return torch.tensor(values, dtype=torch.float64, device="cpu").to(dtype)
        made = torch.tensor(values, device="cpu")
    except torch.OutOfMemoryError:  # a RuntimeError, and no fault of the numbers
        raise
    except (OverflowError, RuntimeError, ValueError) as error:
        raise PlanError(f"{name} is no list of numbers in range: {error}") from error
    except TypeError as error:
        raise TypeError(f"{name} is no list of numbers: {error}") from error
    if made.numel() and (made.is_floating_point() or made.is_complex() or made.dtype is torch.bool):
        raise TypeError(f"{name} has numbers of {made.dtype}; expected {dtype}")
    return made.long()


def _integers(name: str, values: Sequence[int] | np.ndarray) -> np.ndarray:
    if not isinstance(values, np.ndarray):
        try:
            return np.asarray(array("q", values))  # half the time of numpy's own reading
        except OverflowError as error:
            raise PlanError(f"{name} is no list of numbers in range: {error}") from error
        except TypeError as error:
            raise TypeError(f"{name} is no list of integers: {error}") from error
    if values.dtype.kind not in "iu":
        raise TypeError(f"{name} is {values.dtype}; expected integers")
    return values
