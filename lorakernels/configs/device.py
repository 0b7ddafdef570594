"""What a device is called, and what of it the choice of a config depends on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Device:
    """A GPU: its marketing name, its architecture as the compiler calls it, and how many multiprocessors it has."""

    name: str
    arch: str
    processors: int

    @property
    def slug(self) -> str:
        """The name as part of a file's name: lower case, with dashes."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "unnamed"


# Where kernels are interpreted, or the architecture is not known: few programs, and nothing that needs new hardware.
UNKNOWN = Device("unknown", "unknown", 3)
_ARCH_EXAMPLES = {
    "sm_80": Device("NVIDIA A100-SXM4-80GB", "sm_80", 108),
    "sm_90": Device("NVIDIA H100 80GB HBM3", "sm_90", 132),
    "sm_100": Device("NVIDIA B200", "sm_100", 148),
    "gfx942": Device("AMD Instinct MI300X", "gfx942", 304),
}

# A thread its own, with whether it is here: `explain` may run beside another thread's training.
_assumed: ContextVar[tuple[Device, bool]] = ContextVar("assumed", default=(UNKNOWN, False))


def device_of(device: torch.device) -> Device:
    """The GPU that `device` is; the assumed one where there is none."""
    if device.type != "cuda":
        return _assumed.get()[0]
    return _cuda_device(torch.cuda.current_device() if device.index is None else device.index)


def example_of(arch: str) -> Device:
    """A device of this architecture. Raises ValueError for one that is not known."""
    if arch not in _ARCH_EXAMPLES:
        raise ValueError(f"unknown architecture {arch!r}; expected one of {', '.join(_ARCH_EXAMPLES)}")
    return _ARCH_EXAMPLES[arch]


@lru_cache(maxsize=64)
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.partition(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Device(properties.name, arch, properties.multi_processor_count)


def is_here() -> bool:
    """Whether the assumed GPU is one of this machine, so that its user's table counts."""
    return _assumed.get()[1]


@contextmanager
def assume(device: Device | str, here: bool = False) -> Iterator[None]:
    """Inside the block, tensors that are on no GPU count as on this one, or on one of this architecture.

    With `here` it is the GPU at hand. Other threads do not see it.
    """
    outer = _assumed.set((example_of(device) if isinstance(device, str) else device, here))
    try:
        yield
    finally:
        _assumed.reset(outer)
