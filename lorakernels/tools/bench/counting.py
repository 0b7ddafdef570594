"""What a step really asks for: every torch operation and every kernel launch, with the bytes that it moves.

Kernels are recorded instead of started, so meta tensors will do. The rule is that of `formulas`: an operand counts
once, except a tall one that a kernel goes over several times, which its grid tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorakernels.backend import triton_installed
from lorakernels.dropout import drop_threshold
from lorakernels.eager import lora_linear as eager_lora_linear
from lorakernels.eager import multi_lora as eager_multi_lora
from lorakernels.member import Member, training_step
from lorakernels.plan import PlanTensors
from lorakernels.tools.bench.registry import Case

# These move nothing of their size, or only write.
_FREE = ("aten::_unsafe_view", "aten::lift_fresh", "aten::detach", "aten::scalar_tensor")
# These read or write the rows that they name, and no others: how often what is gathered or added is moved, and, for
# those that write, where it is among the arguments.
_GATHERS = ("aten::index", "aten::index_select")
_SCATTERS = {"aten::index_add_": (3, 3), "aten::index_put_": (2, 2)}
_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}


@dataclass(frozen=True)
class Counted:
    """One torch operation or kernel launch."""

    name: str
    bytes: int
    flops: int = 0


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
        results = result if isinstance(result, (tuple, list)) else (result,)
        if name in _GATHERS:
            moved = 2 * _numbytes(result)
        elif name in _SCATTERS:
            times, at = _SCATTERS[name]
            moved = times * _numbytes(args[at])
        else:
            moved = _numbytes((args, results))
        self.counted.append(Counted(name, moved, _product_flops(name, args)))
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
    counted += [Counted(_name(launch), _launch_bytes(launch)) for launch in launches]


def _recorded() -> AbstractContextManager[list[Any]]:
    if not triton_installed():  # then there are no kernels
        return nullcontext([])
    from lorakernels.kernels.launch import record_launches

    return record_launches()


def own_step(case: Case, impl: str) -> list[Counted]:
    """Forward and backward of the case by the package's own "triton" or "torch", on meta tensors.

    Called past the operators, inside which torch shows nothing.
    """

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=case.torch_dtype, device="meta")

    x, dy, threshold = meta(case.M, case.K), meta(case.M, case.N), drop_threshold(case.dropout)
    member = Member(meta(case.N, case.K), meta(case.r, case.K), meta(case.N, case.r), scaling=0.5)
    with count() as counted:
        training_step(eager_lora_linear if impl == "torch" else _kernels(), x, [dy], [member], threshold)
    return counted


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
        pages = None if plan.pages is None else plan.pages.to("meta")
        plan = plan._replace(buffer=plan.buffer.to("meta"), scales=plan.scales.to("meta"), pages=pages)
        with count() as counted:
            multi_lora.forward(x, [weight], [None], [lora_A], [lora_B], plan, **rest)
    return counted


def _kernels() -> ModuleType:
    from lorakernels.kernels import lora_linear

    return lora_linear


def torch_step(step: Callable[[], object]) -> list[Counted]:
    """Everything that a step of plain torch asks for."""
    with count() as counted:
        step()
    return counted


def _name(launch: Any) -> str:
    return launch.kernel.fn.__name__


# How often a kernel goes over an operand; 1 where it is not said. A launch has its grid and constexprs.
_ROUNDS: dict[str, Callable[[Any], dict[str, int]]] = {
    "shrink_kernel": lambda launch: {"x_ptr": launch.grid[1]},
    "outer_kernel": lambda launch: {
        "z_ptr": launch.grid[2],
        "mask_ptr": launch.grid[2],
        "t_ptr": launch.constexprs["WITH_OUT"],
        "q_ptr": launch.constexprs["WITH_P"],
    },
    "linear_expand_kernel": lambda launch: {
        "x_ptr": not launch.constexprs["HAS_BASE"],
        "w_ptr": not launch.constexprs["HAS_BASE"],
        "y_ptr": 1 + launch.constexprs["HAS_BASE"],
    },
    # Of one slice, whose adapters may have less than the largest rank: at most so often.
    "multi_shrink_kernel": lambda launch: {"xs": launch.grid[1]},
    "multi_shrink_token_kernel": lambda launch: {"xs": launch.grid[1]},
    "multi_expand_kernel": lambda launch: {"ys": 2},
    "multi_expand_token_kernel": lambda launch: {"ys": 2},
}


def _launch_bytes(launch: Any) -> int:
    rounds = _ROUNDS.get(_name(launch), lambda _: {})(launch)
    return sum(rounds.get(name, 1) * _numbytes(value) for name, value in launch.args.items())


def _numbytes(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(_numbytes(each) for each in value)
    tensor = getattr(value, "base", value)  # a tensor descriptor's
    return tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0
