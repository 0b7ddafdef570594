"""A call's launches, taken down once and run again on other tensors that look the same.

What a launcher decides follows from shapes, strides, dtypes and alignments, never from numbers on the device. So a
call that has been seen before is a list of steps: allocations, torch's own operators, kernels that are compiled and the
arguments that are no addresses. To run it takes no launcher, no choice of a config and nothing of Triton but its
launcher in C.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from triton import knobs
from triton.runtime import driver

from lorakernels import backend
from lorakernels.configs import table
from lorakernels.configs.device import device_of
from lorakernels.kernels.launch import (
    INTERPRETED,
    allows_tf32,
    is_captured,
    is_watched,
    on_device,
    taken_down_by,
)
from lorakernels.kernels.recording import NotTaped, Recording, join

P = ParamSpec("P")
T = TypeVar("T")
MOST = 2048  # tapes of one function, of 13 KB each; lengths of sequences may be many
interpreted_too = False  # the interpreter is for tests, of which most are of the launchers
_PLAIN, _LEAVES = frozenset((torch.Tensor, torch.nn.Parameter)), frozenset((type(None), bool, int, float, str))


def taped(function: Callable[P, T]) -> Callable[P, T]:
    """For a function of tensors, and of values that are compared by ==, that launches kernels and returns new tensors.

    The second call that looks the same is taken down, for of the first nobody knows whether it comes again. A tape
    holds no tensor.
    """
    tapes: dict[tuple[Any, ...], Tape | bool] = {}  # True: seen; False: cannot be taped

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if is_watched() or table.is_recorded() or _is_hooked():
            return function(*args, **kwargs)
        tensors: list[torch.Tensor] = []
        look: list[Any] = [table.generation, *kwargs]
        _look(args, tensors, look)
        _look(kwargs.values(), tensors, look)
        device = tensors[0].device
        if device.type != "cuda":
            if not (backend.launches_are_checked or (INTERPRETED and interpreted_too)):
                return function(*args, **kwargs)
            look.append(device_of(device))
        look += (device, allows_tf32(), is_captured(device))
        key = tuple(look)
        tape = tapes.get(key)
        if tape is None or tape is False:
            if len(tapes) >= MOST:
                tapes.clear()
            tapes.setdefault(key, True)
            return function(*args, **kwargs)
        if tape is not True:
            return tape.run(tensors)  # type: ignore[return-value]
        recording = Recording(tensors)
        with recording, taken_down_by(recording):
            result = function(*args, **kwargs)
        try:
            tapes[key] = Tape(device, *recording.tape(result))
        except NotTaped:
            tapes[key] = False
        return result

    return call


def _is_hooked() -> bool:
    """Whether Triton tells somebody of launches, such as a profiler."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any([getattr(hook, "calls", hook) for hook in hooks])


def _look(values: Iterable[Any], tensors: list[torch.Tensor], look: list[Any]) -> None:
    """All that launchers may decide by. Nested tuples and lists are gone through."""
    for value in values:
        kind = value.__class__
        if kind in _PLAIN or isinstance(value, torch.Tensor):
            tensors.append(value)
            look += (value.shape, value.stride(), value.dtype, value.get_device(), value.data_ptr() & 15)
        elif kind in _LEAVES or not isinstance(value, (tuple, list)):
            look += (value,)
        else:
            look += (kind, len(value))
            _look(value, tensors, look)


class Tape(NamedTuple):
    """Steps take addresses, tensors and streams: the current one's handle, the side one's, and both as torch's."""

    device: torch.device
    allocations: list[tuple[Any, ...]]  # size, stride, dtype
    steps: Callable[[list[int], list[torch.Tensor], list[Any]], Any]  # all of them; gives the result

    def run(self, tensors: list[torch.Tensor]) -> Any:
        device = self.device
        tensors += [
            torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype in self.allocations
        ]
        addresses = [tensor.data_ptr() for tensor in tensors]
        with on_device(device):
            index = device.index if device.type == "cuda" else 0
            streams: list[Any] = [None if INTERPRETED else driver.active.get_current_stream(index)]
            try:
                return self.steps(addresses, tensors, streams)
            finally:  # where a step raised too: what is freed now the side stream may still use
                if len(streams) > 1:
                    join(streams)
