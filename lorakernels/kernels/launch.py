"""The one place where a kernel is started, so that launches can be recorded instead of run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from lorakernels.backend import interpreter_on
from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import device_of
from lorakernels.configs.heuristic import TMA_ARCHS
from lorakernels.configs.table import strike_out

INTERPRETED = interpreter_on()  # of the kernels, which are imported with this
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for: what the compile report compiles, and what bench counts.

    The first of its arguments is, or begins with, a tensor on the device.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constexprs: dict[str, Any]
    config: KernelConfig

    @property
    def tensor(self) -> torch.Tensor:
        return first_tensor(self.args)


_as_captured: ContextVar[bool] = ContextVar("as_captured", default=False)
# A thread its own: what is recorded is not run, and `explain` may be asked beside another thread's training.
_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)
_taken_down: ContextVar[Any] = ContextVar("taken_down", default=None)  # by a `tape`, which runs what it takes down


def input_precision(x: torch.Tensor) -> str:
    """How float32 products are made: exactly, unless torch was told that TF32 will do.

    Of float16 x those with float32 factors: as exactly as its own numbers are, and for gradients `dot_factor` needs no
    more. Moot for bfloat16.
    """
    if x.dtype is torch.float16:
        return "ieee" if device_of(x.device).arch.startswith("gfx") else "tf32"
    if x.dtype is not torch.float32 or not x.is_cuda:
        return "ieee"
    return "tf32" if allows_tf32() else "ieee"


def allows_tf32() -> bool:
    """Whether torch was told that TF32 will do for float32 products."""
    # The older reading raises once the newer setting was used.
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def compile_options(config: KernelConfig, constexprs: dict[str, Any]) -> dict[str, Any]:
    """What the compiler is told. Fused multiply-adds are asked for by name: their default changes in triton 3.10.

    A kernel that does not wait for the launch ahead of it is never started before that has ended.
    """
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return (
        options | {"launch_pdl": True} if constexprs.get("DEPENDENT") else options
    )  # AMD's compiler does not know its name


def may_depend(device: torch.device) -> bool:
    """Whether a kernel may start before the one ahead of it has ended: programmatic dependent launch, CUDA guide 4.5.

    It asks for Hopper or Blackwell; in the interpreter kernels run in order.
    """
    return not INTERPRETED and device_of(device).arch in TMA_ARCHS


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` takes 2.2 µs on the host, where a launch has three of them."""
    return -(-a // b)


def first_tensor(args: dict[str, Any]) -> torch.Tensor:
    """Of a launch: the first argument, or what is first in it."""
    value = next(iter(args.values()))
    while not isinstance(value, torch.Tensor):
        value = value[0] if isinstance(value, tuple) else value.base  # a descriptor's
    return value


_BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R", "GROUP_M")
_blocks_of: dict[Any, tuple[str, ...]] = {}  # by the kernel's function: a JITFunction's own hash takes 1 µs


def _blocks(kernel: Any, config: KernelConfig) -> dict[str, Any]:
    """What the kernel takes of its config."""
    names = _blocks_of.get(kernel.fn)
    if names is None:
        names = _blocks_of[kernel.fn] = tuple(name for name in _BLOCKS if name in kernel.arg_names)
    return {name: getattr(config, name) for name in names}


def launch(
    kernel: Any, grid: tuple[int, ...], args: dict[str, Any], constexprs: dict[str, Any], config: KernelConfig
) -> None:
    """Start `kernel` on `grid`. Block sizes that `constexprs` does not have are the config's.

    A grid with no programs starts nothing: CUDA refuses it.
    """
    constexprs = _blocks(kernel, config) | constexprs
    if (recorded := _recorded.get()) is not None:
        recorded.append(Launch(kernel, grid, args, constexprs, config))
        return
    if 0 in grid:
        return
    device, tape = first_tensor(args).device, _taken_down.get()
    options = {"grid": grid, "warmup": False, **compile_options(config, constexprs)}
    with on_device(device):
        try:
            # `kernel[grid](…)` would gather the arguments once more, 2 µs of 45.
            if tape is None:
                kernel.run(**args, **constexprs, **options)
            else:
                tape.launch(kernel, args | constexprs, options)
        except (OutOfResources, PTXASError) as error:  # before anything has run
            raise _DoesNotFit(config, device) from error


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton starts kernels on the current device, which need not be the tensors'."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


class _DoesNotFit(Exception):
    """A kernel needs more of a block, with this config, than the device has."""

    def __init__(self, config: KernelConfig, device: torch.device) -> None:
        super().__init__(f"{config} does not fit {device}")
        self.config, self.device = config, device


def retried(operation: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """For what chooses a config of `operation` and launches its kernel: a tuned config that does not fit is no error.

    What a table is refused for is estimated, and only a launch knows. It is then made again from its beginning, for
    grids and buffers follow from the config, which the table is asked for anew.
    """

    def decorate(launcher: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(launcher)
        def retrying(*args: P.args, **kwargs: P.kwargs) -> T:
            refused = None
            while True:
                try:
                    return launcher(*args, **kwargs)
                except _DoesNotFit as misfit:
                    why, again = misfit.__cause__, misfit.config == refused
                    assert why is not None
                    # What comes back though it is struck out is the heuristic's.
                    if again or not strike_out(operation, misfit.config, misfit.device, str(why)):
                        raise why from None
                    refused = misfit.config

        return retrying

    return decorate


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect this thread's launches inside the block instead of starting them; meta tensors will do."""
    recorded: list[Launch] = []
    outer = _recorded.set(recorded)
    try:
        # Else a GPU's backward has a thread of its own.
        with torch.autograd.set_multithreading_enabled(False):
            yield recorded
    finally:
        _recorded.reset(outer)


def lasting(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, which outlives every call: a tape may hold it."""
    if (tape := _taken_down.get()) is not None:
        tape.hold(tensor)
    return tensor


def is_watched() -> bool:
    """Whether this thread's launches are recorded, or taken down."""
    return _recorded.get() is not None or _taken_down.get() is not None


@contextmanager
def taken_down_by(tape: Any) -> Iterator[None]:
    """Inside the block this thread's launches run, by way of `tape`, which is told of each fork and join."""
    outer = _taken_down.set(tape)
    try:
        yield
    finally:
        _taken_down.reset(outer)


@contextmanager
def as_if_captured() -> Iterator[None]:
    """Launch what a CUDA graph would hold: for who records launches, or compares with a graph's results."""
    outer = _as_captured.set(True)
    try:
        yield
    finally:
        _as_captured.reset(outer)


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph is being made of the current stream's launches."""
    return _as_captured.get() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


@contextmanager
def side_stream(device: torch.device, enabled: bool) -> Iterator[AbstractContextManager[object]]:
    """Yields the context in which launches go beside those of the current stream; at the end both meet again.

    Captured in a CUDA graph it is a fork and a join. Memory that the side stream allocates may be used and freed on
    the current one: the next fork waits for it, and streams that fork have one each. Off a CUDA device nothing
    happens.
    """
    if not enabled or device.type != "cuda":
        yield nullcontext()
        return
    tape = _taken_down.get()
    current, side = fork(device)
    if tape is not None:
        tape.forked()
    try:
        yield torch.cuda.stream(side) if tape is None else tape.aside(torch.cuda.stream(side))
    finally:
        current.wait_stream(side)
        if tape is not None:
            tape.joined()


def fork(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The current stream, and its side stream, which waits for it."""
    current = torch.cuda.current_stream(device)
    side = _side(device.index, current.cuda_stream)
    side.wait_stream(current)
    return current, side


@functools.lru_cache(maxsize=64)
def _side(index: int, current: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)
