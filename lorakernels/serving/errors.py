"""What a store raises where another type would say less."""

from __future__ import annotations

from collections.abc import Sequence


class CapacityError(RuntimeError):
    """There is no room for an adapter: on the device, in main memory, or under the rank limit.

    `pinned` and `in_use` name the adapters that hold the room on the device.
    """

    def __init__(self, message: str, pinned: Sequence[str] = (), in_use: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.pinned, self.in_use = list(pinned), list(in_use)


class StaleBatchError(RuntimeError):
    """A batch or a lease was used after its end, when its adapters may be gone."""
