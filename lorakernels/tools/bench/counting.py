"""What a step really asks for: every torch operation and every kernel launch, with the bytes that it moves.

Kernels are recorded instead of started, so meta tensors will do. An operand counts once, as if tiles that several
programs read came out of L2, except a tall one that a kernel goes over several times, which its grid tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorakernels.backend import triton_installed
from lorakernels.eager import multi_lora as eager_multi_lora
from lorakernels.plan import PlanTensors

# These move nothing of their size, or only write.
_FREE = ("aten::_unsafe_view", "aten::lift_fresh", "aten::detach", "aten::scalar_tensor")
# These read or write the rows that they name, and no others: how often what is gathered or added is moved, and, for
# those that write, where it is among the arguments.
_GATHERS = ("aten::index", "aten::index_select")
_SCATTERS = {"aten::index_add_": (3, 3), "aten::index_put_": (2, 2)}
_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Counted:
    """One torch operation or kernel launch: its operands' shapes, and the bytes that it moves of each."""

    name: str
    operands: tuple[tuple[Shape, int], ...]
    flops: int = 0

    @property
    def bytes(self) -> int:
        return sum(moved for _, moved in self.operands)

    def tall(self, tokens: int, least: int) -> int:
        """Of `bytes` those of matrices with a row a token, of `least` columns or more."""
        sizes = [(shape[-2:], moved) for shape, moved in self.operands]
        return sum(n for s, n in sizes if len(s) == 2 and tokens in s and s[s[0] == tokens] >= least)


class _Operations(TorchDispatchMode):
    """Every operation of torch that is more than another view of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[Counted] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if func.is_view or name in _FREE or "empty" in name:
            return result
        if name == "aten::addmm" and (kwargs or {}).get("beta") == 0:
            args = args[1:]  # the first is not read
            name = "aten::mm"
        if name in _GATHERS:
            operands = _operands(result, 2)
        elif name in _SCATTERS:
            times, at = _SCATTERS[name]
            operands = _operands(args[at], times)
        else:
            operands = _operands((args, result), 1)
        self.counted.append(Counted(name, tuple(operands), _product_flops(name, args)))
        return result


def _product_flops(name: str, args: Any) -> int:
    if name not in _PRODUCTS:
        return 0
    left, right = args[_PRODUCTS[name]], args[_PRODUCTS[name] + 1]
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


@contextmanager
def count() -> Iterator[list[Counted]]:
    """Collect what happens inside the block, in order. Kernels are not started."""
    with _recorded() as launches, _Operations() as operations:
        counted: list[Counted] = []
        yield counted
    counted += operations.counted
    counted += map(_of_launch, launches)


def _recorded() -> AbstractContextManager[list[Any]]:
    if not triton_installed():  # then there are no kernels
        return nullcontext([])
    from lorakernels.kernels.launch import record_launches

    return record_launches()


def own_multi(
    x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, plan: PlanTensors, impl: str
) -> list[Counted]:
    """A forward of many adapters by the package's own "triton", counted on meta tensors, or "torch", which runs."""
    rest: dict[str, Any] = {"keep_s": False, "seed": None, "thresholds": None}
    with torch.no_grad():
        if impl == "torch":
            # What is read of the plan on the host is read once a batch, not once a layer.
            rest["where"] = eager_multi_lora.route(plan, x.shape[0])
            eager_multi_lora.forward(x, [weight], [None], [lora_A], [lora_B], plan, **rest)
            with count() as counted:
                eager_multi_lora.forward(x, [weight], [None], [lora_A], [lora_B], plan, **rest)
            return counted
        from lorakernels.kernels import multi_lora

        x, weight, lora_A, lora_B = (tensor.to("meta") for tensor in (x, weight, lora_A, lora_B))
        table = None if plan.page_table is None else plan.page_table.to("meta")
        plan = plan._replace(buffer=plan.buffer.to("meta"), scales=plan.scales.to("meta"), page_table=table)
        with count() as counted:
            multi_lora.forward(x, [weight], [None], [lora_A], [lora_B], plan, **rest)
    return counted


def torch_step(step: Callable[[], object]) -> list[Counted]:
    """Everything that a step of plain torch asks for."""
    with count() as counted:
        step()
    return counted


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


def _operands(value: Any, times: int) -> Iterator[tuple[Shape, int]]:
    """Shape and bytes of every tensor in a value, each moved so often."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _operands(each, times)
        return
    tensor = getattr(value, "base", value)  # a tensor descriptor's
    if isinstance(tensor, torch.Tensor) and times:
        yield tuple(tensor.shape), times * tensor.numel() * tensor.element_size()
