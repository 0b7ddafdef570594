"""Where the parts of a plan lie in its buffer, and how a batch that the host knows is written there by numpy."""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

TILE_HEIGHTS = (16, 64)
# Parts of the buffer start at multiples of 64 bytes.
_ALIGNMENT = 16
# So many copies may be under way, each from memory of its own.
_COPIES = 4


class PlanLayout(NamedTuple):
    """Where the parts of a plan's buffer begin, in elements. Slot `num_slots` stands for the base model, of rank 0."""

    ranks: int  # [num_slots + 1]
    starts: int  # [num_slots + 2]: the sorted tokens of slot s are starts[s] … starts[s + 1] - 1
    slots: int  # [max_tokens]: the slot of each token, num_slots for the base
    token_ranks: int  # [max_tokens]: the rank of that slot, so that a program of one token need not wait for its slot
    order: int  # [max_tokens]: tokens sorted by slot, in their own order within a slot
    tiles: tuple[int, ...]  # by TILE_HEIGHTS: [tiles, 3] of slot, first and end in `order`; first = end where unused
    size: int


@lru_cache(maxsize=256)
def plan_layout(num_slots: int, max_tokens: int) -> PlanLayout:
    sizes = [num_slots + 1, num_slots + 2, max_tokens, max_tokens, max_tokens]
    sizes += [3 * num_tiles(max_tokens, num_slots, height) for height in TILE_HEIGHTS]
    begins = [0]
    for size in sizes:
        begins.append(begins[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    ranks, starts, slots, token_ranks, order, *tiles, end = begins
    return PlanLayout(ranks, starts, slots, token_ranks, order, tuple(tiles), end)


def num_tiles(num_tokens: int, num_slots: int, height: int) -> int:
    """The most tiles of `height` tokens of one slot that so many tokens can fall into, however they are spread.

    A slot of n ≥ 1 tokens has 1 + (n - 1) // height of them, and at most min(num_slots + 1, num_tokens) have any.
    """
    segments = min(num_slots + 1, num_tokens)
    return segments + (num_tokens - segments) // height


class Staging:
    """Memory of the host from which a plan is copied to its device: pinned where that is a GPU, and then a ring.

    Args:
        like: the tensor that is copied into.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self._ring: deque[tuple[torch.Tensor, np.ndarray, torch.cuda.Event | None]] = deque()
        for _ in range(_COPIES if like.is_cuda else 1):
            memory = torch.zeros(like.shape, dtype=like.dtype, device="cpu")
            memory = memory.pin_memory() if like.is_cuda else memory
            self._ring.append((memory, memory.numpy(), torch.cuda.Event() if like.is_cuda else None))

    def next(self) -> np.ndarray:
        """Memory that no copy reads any more."""
        self._ring.rotate()
        _, numbers, copied = self._ring[0]
        if copied is not None:
            copied.synchronize()
        return numbers

    def copy_to(self, target: torch.Tensor) -> None:
        memory, _, copied = self._ring[0]
        target.copy_(memory, non_blocking=True)
        if copied is not None:
            copied.record(torch.cuda.current_stream(target.device))


def write_route(
    numbers: np.ndarray, num_slots: int, max_tokens: int, slots: np.ndarray, num_tokens: int, ranks: np.ndarray
) -> None:
    """Write a batch into `numbers`, memory such as a plan's buffer.

    slots [T ≤ num_tokens] are -1 … num_slots - 1, what follows them is the base's; ranks [num_slots], 0 where off.
    """
    layout, S, T = plan_layout(num_slots, max_tokens), num_slots, len(slots)
    effective = np.full(S + 1, S)  # of each slot, and at last of -1
    np.copyto(effective[:-1], np.arange(S), where=ranks != 0)
    slots = effective[slots]
    # Numbers of 16 bits are sorted by counting.
    order = np.argsort(slots.astype(np.uint16) if S < 1 << 16 else slots, kind="stable")
    counts = np.bincount(slots, minlength=S + 1)
    counts[S] += num_tokens - T
    ends = counts.cumsum()
    starts = ends - counts
    numbers[layout.ranks : layout.ranks + S] = ranks
    numbers[layout.starts : layout.starts + S + 1] = starts
    numbers[layout.starts + S + 1] = num_tokens
    token_ranks = numbers[layout.ranks : layout.ranks + S + 1][slots]  # the last, the base's, stays 0
    of_tokens = ((layout.slots, slots, S), (layout.token_ranks, token_ranks, 0))
    for begin, real, padding in (*of_tokens, (layout.order, order, np.arange(T, num_tokens))):
        numbers[begin : begin + T] = real
        numbers[begin + T : begin + num_tokens] = padding
    for height, begin in zip(TILE_HEIGHTS, layout.tiles, strict=True):
        count = num_tiles(num_tokens, S, height)
        tiles = numbers[begin : begin + 3 * count].reshape(count, 3)
        of_slot = (counts + (height - 1)) // height
        slot = np.repeat(np.arange(S + 1), of_slot)
        used = len(slot)
        first = np.arange(0, used * height, height) + (starts - height * (of_slot.cumsum() - of_slot))[slot]
        tiles[:used, 0] = slot
        tiles[:used, 1] = first
        tiles[:used, 2] = np.minimum(first + height, ends[slot])
        tiles[used:] = S, num_tokens, num_tokens
