"""Changes to a model that are made whole or not at all, whatever comes in the middle: no memory, or an interrupt.

Everything is made first: new modules, and the numbers that go into tensors that are there. Modules and records may
change at once, since their references come back when something is raised; tensors get their numbers at the end.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")
_CONTAINERS = frozenset((dict, OrderedDict, list, set))
Step = tuple[Callable[[], object], Callable[[], object] | None]  # what is done, and what undoes it


class _Change:
    """What a module was, and what is to be done to its tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.contents: list[tuple[Any, Any]] = []  # dicts, lists and sets, with a copy of each
        self.types: list[tuple[nn.Module, type]] = []
        self.needed_grad: list[tuple[torch.Tensor, bool]] = []
        self.own: set[int] = set()  # the tensors that are there
        self.steps: list[Step] = []
        self.done = False
        seen, left = {module}, [module]
        while left:  # `modules()` makes names too, which takes as long as all of this
            one = left.pop()
            attributes = one.__dict__
            self.types.append((one, type(one)))
            self.contents.append((attributes, attributes.copy()))
            for value in attributes.values():
                if type(value) in _CONTAINERS:
                    self.contents.append((value, value.copy() if value else ()))
                    if value and type(value) is dict:
                        self._remember_values(value)
            new = {child for child in attributes["_modules"].values() if child is not None} - seen
            seen |= new
            left += new

    def _remember_values(self, values: dict[Any, Any]) -> None:
        for value in values.values():
            if isinstance(value, torch.Tensor):
                self.own.add(id(value))
                if isinstance(value, nn.Parameter):
                    self.needed_grad.append((value, value.requires_grad))
            elif hasattr(value, "__dataclass_fields__") and hasattr(value, "__dict__"):  # an adapter's record
                fields = vars(value)
                self.contents.append((fields, fields.copy()))
                self.own.update(id(field) for field in fields.values() if isinstance(field, torch.Tensor))

    def restore(self) -> None:
        for one, kind in self.types:
            if type(one) is not kind:
                one.__class__ = kind
        for container, before in self.contents:
            if not before:
                container.clear()
            elif isinstance(container, dict):
                same = len(container) == len(before) and all(
                    name is other and value is old
                    for (name, value), (other, old) in zip(container.items(), before.items(), strict=True)
                )
                if not same:
                    container.clear()
                    container.update(before)
            elif isinstance(container, list):
                container[:] = before
            elif container != before:
                container.clear()
                container.update(before)
        for parameter, needed_grad in self.needed_grad:
            if parameter.requires_grad is not needed_grad:
                parameter.requires_grad_(needed_grad)

    def commit(self) -> None:
        def end() -> None:
            self.done = True

        in_turn([*self.steps, (end, None)])


class _Thread(threading.local):
    change: _Change | None = None


_thread = _Thread()


def whole(function: Callable[P, R]) -> Callable[P, R]:
    """Make what a function does to its first argument, a module, whole or nothing; within another it is a part of it.

    Tensors that the module has are changed through `write`, `put` and `later` alone.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        module: Any = args[0] if args else kwargs.get("model")
        if _thread.change is not None or not isinstance(module, nn.Module):
            return function(*args, **kwargs)
        change = _Change(module)
        try:
            try:
                _thread.change = change
                result = function(*args, **kwargs)
            finally:
                _thread.change = None
            with uninterrupted():
                change.commit()
            return result
        except BaseException:
            if not change.done:
                with uninterrupted():
                    change.restore()
            raise

    return wrapper


def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Give a tensor the numbers of another: at the end of the change that is made now, if it was there before."""
    if waits(tensor):
        later(functools.partial(_copy, tensor, value.detach().to(tensor.device, tensor.dtype)))
    else:
        _copy(tensor, value)


def put(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Give a parameter other memory, of another dtype or shape; when, as `write`."""
    act = functools.partial(setattr, parameter, "data", value)
    if waits(parameter):
        later(act)
    else:
        act()


def later(act: Callable[[], object], undo: Callable[[], object] | None = None) -> None:
    """Do this at the end of the change that is made now. It may be done twice, and changes nothing where it raises."""
    if _thread.change is None:
        act()
    else:
        _thread.change.steps.append((act, undo))


def waits(tensor: torch.Tensor) -> bool:
    """Whether what is written into a tensor waits for the end: in a change, where it was there before."""
    return _thread.change is not None and id(tensor) in _thread.change.own


@torch.no_grad()
def _copy(tensor: torch.Tensor, value: torch.Tensor) -> None:
    tensor.copy_(value)


def in_turn(steps: Iterable[Step]) -> None:
    """Do what each step says. One that fails is tried once more; where it fails again those before are undone.

    An interrupt is raised when all is done.
    """
    undos: list[Callable[[], object]] = []
    interrupt: BaseException | None = None
    for act, undo in steps:
        try:
            act()
        except BaseException as error:
            interrupt = interrupt if isinstance(error, Exception) else error
            try:
                act()
            except BaseException:
                for undo_one in reversed(undos):
                    undo_one()
                raise
        if undo is not None:
            undos.append(undo)
    if interrupt is not None:
        raise interrupt


class uninterrupted:
    """In the block nothing is interrupted: what SIGINT does comes after it.

    In other threads than the main one Python has no interrupts.
    """

    def __enter__(self) -> None:
        self.came: list[tuple[int, Any]] = []
        self.handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(self.handler):
            signal.signal(signal.SIGINT, lambda *call: self.came.append(call))
        else:
            self.handler = None

    def __exit__(self, *_: object) -> None:
        if callable(self.handler):
            signal.signal(signal.SIGINT, self.handler)
            if self.came:
                self.handler(*self.came[0])


class Lock:
    """A lock that its thread may take again; while it is held nothing is interrupted."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._blocks: list[uninterrupted] = []

    def __enter__(self) -> None:
        block = uninterrupted()
        block.__enter__()
        self._lock.acquire()
        self._blocks.append(block)

    def __exit__(self, *_: object) -> None:
        block = self._blocks.pop()
        self._lock.release()
        block.__exit__()
