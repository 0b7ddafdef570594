"""What a step really asks for: every torch operation and every kernel launch, with the bytes that it moves.

Kernels are recorded instead of started, so meta tensors will do. An operand counts once, as if tiles that several
programs read came out of L2, except a tall one that a kernel goes over several times, which its grid tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorakernels.backend import triton_installed

# These move nothing of their size, or only write.
_FREE = ("_unsafe_view", "lift_fresh", "detach", "detach_", "scalar_tensor", "resolve_conj", "resolve_neg")
# These read or write the rows that they name, and no others: how often what is gathered or added is moved, and where it
# is among the arguments (None: the result).
_OF_ROWS = {"index": (2, None), "index_select": (2, None), "index_add_": (3, 3), "index_put_": (2, 2)}


@dataclass(frozen=True)
class Counted:
    """One torch operation or kernel launch: its operands' shapes, and the bytes that it moves of each."""

    name: str
    operands: tuple[tuple[tuple[int, ...], int], ...]

    @property
    def bytes(self) -> int:
        return sum(moved for _, moved in self.operands)


class _Operations(TorchDispatchMode):
    """Every operation of torch that is more than another view of its input, those in our operators' bodies too."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[Counted] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            if func.namespace == "lorakernels":
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
            # In such a body those come whole that elsewhere came in their parts.
            if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        result, name = func(*args, **kwargs), func._schema.name.removeprefix("aten::")
        if func.is_view or name in _FREE or "empty" in name:
            return result
        if name == "addmm" and kwargs.get("beta") == 0:
            args = args[1:]  # the first is not read
        times, at = _OF_ROWS.get(name, (1, None))
        moved = (args, result) if times == 1 else result if at is None else args[at]
        self.counted.append(Counted(name, tuple(_operands(moved, times))))
        return result


@contextmanager
def count() -> Iterator[list[Counted]]:
    """Collect what happens inside the block, in order: operations, then launches. Kernels are not started."""
    recorded: Any = nullcontext([])
    if triton_installed():  # else there are no kernels
        from lorakernels.kernels.launch import record_launches

        recorded = record_launches()
    counted: list[Counted] = []
    with recorded as launches, _Operations() as operations:
        yield counted
    counted += operations.counted
    counted += map(_of_launch, launches)


# How often a kernel goes over an operand; 1 where it is not said. A launch has its grid and constexprs.
_ROUNDS: dict[str, Callable[[Any], dict[str, int]]] = {
    "shrink_kernel": lambda launch: {"x": launch.grid[1]},
    "outer_kernel": lambda launch: {"z": launch.grid[2], "mask_ptr": launch.grid[2]},
    "linear_expand_kernel": lambda launch: {
        "pairs": not launch.constexprs["HAS_BASE"],
        "y_ptr": 1 + launch.constexprs["HAS_BASE"],
    },
    # Of one slice, whose adapters may have less than the largest rank: at most so often.
    "multi_shrink_kernel": lambda launch: {"xs": launch.grid[1]},
    "multi_shrink_token_kernel": lambda launch: {"xs": launch.grid[1]},
    "multi_expand_kernel": lambda launch: {"ys": 2},
    "multi_expand_token_kernel": lambda launch: {"ys": 2},
}


def _of_launch(launch: Any) -> Counted:
    name = launch.kernel.fn.__name__
    rounds = _ROUNDS.get(name, lambda _: {})(launch)
    operands = (each for arg, value in launch.args.items() for each in _operands(value, rounds.get(arg, 1)))
    return Counted(name, tuple(operands))


def _operands(value: Any, times: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Shape and bytes of every tensor in a value, each moved so often."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _operands(each, times)
        return
    tensor = getattr(value, "base", value)  # a tensor descriptor's
    if isinstance(tensor, torch.Tensor) and times:
        yield tuple(tensor.shape), times * tensor.numel() * tensor.element_size()
