"""What a peer is: one way to write an operation, and when it can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from lorakernels.backend import BackendError, interpreter_on, resolve_impl, triton_problem

Results = dict[str, torch.Tensor]  # y, and the gradients by name
Step = Callable[[], Results]
CaseT = TypeVar("CaseT", bound="HasDtype")
TensorsT = TypeVar("TensorsT")


class HasDtype(Protocol):
    @property
    def torch_dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Peer(Generic[CaseT, TensorsT]):
    """A way to write the layer. `make` prepares a step; `why_not` says why there is none for a case and device."""

    name: str
    label: str
    make: Callable[[CaseT, TensorsT], Step]
    why_not: Callable[[CaseT, torch.device], str | None] = lambda case, device: None
    graph: Callable[[CaseT, torch.device], str | None] = lambda case, device: None
    keep_scale: Callable[[float], float] = lambda p: 1 / (1 - p)
    adapted: bool = True
    by_default: Callable[[torch.device], bool] = lambda device: True


def kernels_why_not(case: HasDtype, device: torch.device) -> str | None:
    problem = triton_problem(device, case.torch_dtype)
    if problem is None and interpreter_on():
        return "kernels run in Triton's interpreter (TRITON_INTERPRET is set): its time says nothing about a GPU"
    return problem


def auto_why_not(case: HasDtype, device: torch.device) -> str | None:
    try:
        impl = resolve_impl("auto", device, case.torch_dtype)
    except BackendError as error:
        return str(error)
    return kernels_why_not(case, device) if impl == "triton" else None
