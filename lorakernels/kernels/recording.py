"""What a call does, taken down while it does it: a `Tape`'s allocations, and Python for its steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorakernels.configs import table
from lorakernels.kernels.launch import fork

_ALIGNMENT = 256  # bytes, of what lies in one allocation; kernels are compiled for multiples of 16
_aten = torch.ops.aten
_ALLOCATES = frozenset(
    (_aten.new_empty.default, _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default)
)


class NotTaped(Exception):
    """The call does what no tape can repeat."""


@dataclass
class _Root:
    """A tensor that others lie in: an argument, an allocation or what an operator gave."""

    tensor: torch.Tensor
    begin: int
    end: int
    slot: int = -1  # in a tape's tensors
    offset: int = 0  # from there, in bytes
    alone: bool = False  # it has an allocation of its own


class _Op(NamedTuple):
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[_Root]  # none where it wrote into an argument


class _Launch(NamedTuple):
    run: Any
    args: dict[str, Any]
    ahead: tuple[Any, ...]  # of the arguments: the grid, and what follows the stream; none in the interpreter
    beside: bool


class Recording(TorchDispatchMode):
    """What a call does, while it does it. Everything is kept until the end, so that no address is given out twice."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.roots = [_root(tensor, alone=True) for tensor in inputs]
        self.events: list[_Op | _Launch | str] = []
        self.num_inputs, self.launching, self.beside, self.problem = len(inputs), False, False, False
        self.generation = table.generation

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if self.launching or (function.is_view and all(map(self._is_known, _tensors(result)))):
            return result
        self.problem |= any([tensor.device != self.roots[0].tensor.device for tensor in _tensors(result)])
        if function in _ALLOCATES:
            self.roots.append(_root(result))
            return result
        results = result if isinstance(result, tuple) else (result,)
        roots = []
        for each in results:
            if not isinstance(each, torch.Tensor):
                self.problem = True  # a number of which Python knows now, or a list
            elif not self._is_known(each):
                roots.append(_root(each, alone=True))
        self.roots += roots
        self.events.append(_Op(function, args, kwargs, roots))
        # A shape that follows from numbers would be this call's in the launches that follow.
        strange = len(roots) not in (0, len(results)) or torch.Tag.dynamic_output_shape in function.tags
        self.problem |= self.beside or strange
        return result

    def hold(self, tensor: torch.Tensor) -> None:
        """A tensor that outlives every call."""
        if not self._is_known(tensor):
            self.roots.append(_root(tensor, alone=True))

    def _is_known(self, tensor: torch.Tensor) -> bool:
        return any(root.begin <= tensor.data_ptr() < root.end for root in self.roots)

    def launch(self, kernel: Any, args: dict[str, Any], options: dict[str, Any]) -> None:
        self.launching = True  # the interpreter runs operators of torch
        compiled = kernel.run(**args, **options)
        self.launching = False
        if compiled is None:
            self.events.append(_Launch(functools.partial(kernel.run, **options), args, (), self.beside))
        else:
            args = {name: args[name] for name in kernel.arg_names}
            grid = (*options["grid"], 1, 1)[:3]
            # As Triton's own `run` does, without its hooks: two calls and a dict, 2 µs.
            handles = (compiled.function, compiled.packed_metadata, None, None, None)
            self.events.append(_Launch(compiled, args, (grid, handles), self.beside))

    def forked(self) -> None:
        self.events.append("fork(t[0].device, s)")

    def joined(self) -> None:
        self.events.append("join(s)")

    @contextmanager
    def aside(self, side: AbstractContextManager[object]) -> Iterator[None]:
        with side:
            self.beside = True
            try:
                yield
            finally:
                self.beside = False

    def tape(self, result: Any) -> tuple[list[tuple[Any, ...]], Any]:
        """Size, stride and dtype of each allocation; and what runs all steps with addresses, tensors and streams."""
        if self.problem or self.generation != table.generation:  # a config was refused on the way
            raise NotTaped
        allocated = [root for root in self.roots[self.num_inputs :] if not root.alone]
        given = [root for event in self.events if isinstance(event, _Op) for root in event.results]
        for tensor in _tensors([result, *(event[1:3] for event in self.events if isinstance(event, _Op))]):
            if tensor.numel():
                self._find(tensor).alone = True
        allocations: list[tuple[Any, ...]] = []
        room = 0
        for slot, root in enumerate(self.roots[: self.num_inputs]):
            root.slot = slot
        for root in allocated:
            if root.alone:
                root.slot = self.num_inputs + len(allocations)
                allocations.append((root.tensor.shape, root.tensor.stride(), root.tensor.dtype))
            else:
                root.offset, room = room, room + -(-(root.end - root.begin) // _ALIGNMENT) * _ALIGNMENT
        if room:
            for root in allocated:
                root.slot = root.slot if root.alone else self.num_inputs + len(allocations)
            allocations.append(((room,), (1,), torch.uint8))
        for slot, root in enumerate(given, self.num_inputs + len(allocations)):
            root.slot = slot
        written = _Written(self._find)
        lines = [written.step(event) for event in self.events]
        return allocations, written.function([*lines, written.of(result, written.result)])

    def _find(self, tensor: torch.Tensor) -> _Root:
        """The one root that the tensor lies in. Addresses do not tell arguments that overlap, and what is empty."""
        begin, end = _extent(tensor)
        found = [root for root in self.roots if root.begin <= begin < root.end and end <= root.end]
        if len(found) != 1:
            raise NotTaped
        return found[0]


class _Written:
    """Python for steps: an expression for each, over the addresses `p`, the tensors `t` and the constants `c`."""

    def __init__(self, find: Callable[[torch.Tensor], _Root]) -> None:
        self.find, self.constants = find, list[Any]()

    def function(self, expressions: Sequence[str]) -> Any:
        names = {
            "c": self.constants,
            "view": _view,
            "described": _described,
            "keep": _keep,
            "fork": _fork,
            "join": join,
        }
        return eval(f"lambda p, t, s: ({', '.join(expressions)},)[-1]", names)

    def constant(self, value: Any) -> str:
        if value is None or type(value) in (int, bool):
            return repr(value)
        self.constants.append(value)
        return f"c[{len(self.constants) - 1}]"

    def address(self, tensor: torch.Tensor) -> str:
        if tensor.numel() == 0:
            return "0"
        root = self.find(tensor)
        if root.slot < 0:  # held
            self.constants.append(tensor)
            return str(tensor.data_ptr())
        offset = root.offset + tensor.data_ptr() - root.begin
        return f"p[{root.slot}] + {offset}" if offset else f"p[{root.slot}]"

    def tensor(self, tensor: torch.Tensor) -> str:
        if tensor.numel() == 0:
            return self.constant(tensor.new_empty(tensor.shape))
        root = self.find(tensor)
        if root.slot < 0:
            return self.constant(tensor)
        offset = root.offset + tensor.data_ptr() - root.begin
        whole, look = root.tensor, (tensor.shape, tensor.stride(), tensor.dtype)
        if root.alone and offset == 0 and look == (whole.shape, whole.stride(), whole.dtype):
            return f"t[{root.slot}]"
        return f"view(t[{root.slot}], {offset}, {self.constant(look)})"

    def result(self, tensor: torch.Tensor) -> str:
        return self.tensor(tensor) if tensor.numel() else f"{self.tensor(tensor)}.clone()"

    def of(self, value: Any, read: Callable[[torch.Tensor], str], named: bool = False) -> str:
        """`value` with its tensors read anew; with `named` tuples keep their type."""
        if isinstance(value, torch.Tensor):
            return read(value)
        if _is_descriptor(value):
            return f"described({self.constant(_described(value, None))}, {self.tensor(value.base)})"
        if not isinstance(value, (tuple, list)) or not _tensors(value):
            return self.constant(value)
        inner = ", ".join(self.of(each, read, named) for each in value)
        if isinstance(value, list):
            return f"[{inner}]"
        return f"{self.constant(type(value))}({inner})" if named and hasattr(value, "_fields") else f"({inner},)"

    def step(self, event: Any) -> str:
        if isinstance(event, str):
            return event
        if isinstance(event, _Op):
            args = [self.of(each, self.tensor) for each in event.args]
            args += [f"{name}={self.of(each, self.tensor)}" for name, each in event.kwargs.items()]
            made = f"{self.constant(event.function)}({', '.join(args)})"
            return f"keep({made}, p, t)" if event.results else made
        if event.ahead:
            grid, handles = event.ahead
            args = [*map(str, grid), f"s[{int(event.beside)}]", *map(self.constant, handles)]
            args += [self.of(each, self.address) for each in event.args.values()]
            self.constants.append(event.run)  # which is unloaded where nobody holds it
            return f"{self.constant(event.run.run)}({', '.join(args)})"
        args = [f"{name}={self.of(each, self.tensor, True)}" for name, each in event.args.items()]
        return f"{self.constant(event.run)}({', '.join(args)})"


def _tensors(values: Any) -> list[torch.Tensor]:
    """All in nested tuples, lists and dicts."""
    if isinstance(values, torch.Tensor):
        return [values]
    if _is_descriptor(values):
        return [values.base]
    if isinstance(values, dict):
        values = list(values.values())
    return [tensor for each in values for tensor in _tensors(each)] if isinstance(values, (tuple, list)) else []


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte, and the end of the last. What has no element has no place."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum([(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def _root(tensor: torch.Tensor, alone: bool = False) -> _Root:
    return _Root(tensor, *_extent(tensor), alone=alone)


def _view(base: torch.Tensor, offset: int, look: tuple[Any, ...]) -> torch.Tensor:
    """What lies `offset` bytes from `base`, of this size, stride and dtype."""
    size, stride, dtype = look
    if dtype is base.dtype:
        return base.as_strided(size, stride, base.storage_offset() + offset // dtype.itemsize)
    first = (base.storage_offset() * base.element_size() + offset) // dtype.itemsize
    return torch.empty(0, dtype=dtype, device=base.device).set_(base.untyped_storage(), first, size, stride)


def _is_descriptor(value: Any) -> bool:
    return hasattr(value, "block_shape")  # Triton's or Gluon's, which share no class


def _described(descriptor: Any, base: Any) -> Any:
    """The descriptor of another tensor, past the checks of its constructor."""
    new = object.__new__(type(descriptor))
    new.__dict__.update(descriptor.__dict__)
    new.base = base
    return new


def _keep(result: Any, addresses: list[int], tensors: list[torch.Tensor]) -> None:
    for tensor in result if isinstance(result, tuple) else (result,):
        tensors.append(tensor)
        addresses.append(tensor.data_ptr())


def _fork(device: torch.device, streams: list[Any]) -> None:
    current, side = fork(device)
    streams[1:] = [side.cuda_stream, current, side]


def join(streams: list[Any]) -> None:
    _, _, current, side = streams
    del streams[1:]
    current.wait_stream(side)
