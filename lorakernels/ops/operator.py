"""An operator as one object, and what the operators share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch

from lorakernels.backend import resolve_impl
from lorakernels.eager import lora_linear as eager_lora_linear
from lorakernels.ops.flops import count_flops
from lorakernels.weight import linear

# `Library` and not `custom_op`: 2 µs a call where `custom_op` costs 9 (torch 2.13, CPU).
_library = torch.library.Library("lorakernels", "DEF")
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))

Cast = Callable[..., tuple[Any, ...]]


class Operator:
    """An operator of torch's registry: its schema, body, fake, rule under autocast and vmap, and FLOP formula.

    Called, it runs the body as a function where nobody watches (`runs_directly`), else it goes through the dispatcher:
    that takes 5 µs of a forward's 23 and 20 of a backward's 53 (a layer of 16 features on a CPU). To torch.compile it
    is always the operator.

    Args:
        schema: as torch writes it, without the namespace.
        body: what computes it. It may give None for a result that nobody asked for: the dispatcher, which knows no
            such result, then gives an empty tensor.
        fake: the same, of shapes alone.
        flops: its formula of shapes, for FlopCounterMode.
        cast: (dtype, *arguments) -> arguments: what autocast to a dtype makes of them; nothing if not given.
        vmap: (info, in_dims, *arguments) -> (results, out_dims).
        registered: the body in torch's registry, where that has to be another.
        reads: whether the body reads numbers of a tensor, of which meta tensors have none.
    """

    def __init__(
        self,
        schema: str,
        body: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        flops: Callable[..., int] | None = None,
        cast: Cast | None = None,
        vmap: Callable[..., Any] | None = None,
        registered: Callable[..., Any] | None = None,
        reads: bool = False,
    ) -> None:
        name = schema.partition("(")[0]
        _library.define(schema)
        _library.impl(name, _without_none(registered or body), "CompositeExplicitAutograd")
        torch.library.register_fake(f"lorakernels::{name}", _without_none(fake), lib=_library)
        if vmap is not None:
            torch.library.register_vmap(f"lorakernels::{name}", vmap, lib=_library)
        self.body, self.dispatch, self._reads = body, getattr(torch.ops.lorakernels, name), reads
        for device_type in ("cpu", "cuda"):
            self._under_autocast(name, device_type, cast)
        if flops is not None:
            count_flops(self.dispatch, flops)

    def pick(self, watched: Sequence[torch.Tensor]) -> Callable[..., Any]:
        """The body itself where nobody watches these tensors, else `dispatch`."""
        return self.body if runs_directly(*watched) and not (self._reads and watched[0].is_meta) else self.dispatch

    def __call__(self, watched: Sequence[torch.Tensor], *arguments: Any) -> Any:
        """Its results for `arguments`, of whose tensors `watched` has those that may be special."""
        return self.pick(watched)(*arguments)

    @staticmethod
    def _under_autocast(name: str, device_type: str, cast: Cast | None) -> None:
        """Run with autocast off: plain torch in the body would be cast again in eager mode, and not when compiled."""
        packet = getattr(torch.ops.lorakernels, name)
        key = getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")
        keys = torch._C.DispatchKeySet(key)

        def excluded(*arguments: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(keys):
                if cast is not None:
                    arguments = cast(torch.get_autocast_dtype(device_type), *arguments)
                return packet(*arguments)

        _library.impl(name, excluded, key.name)


def _without_none(body: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(body)
    def whole(first: Any, *rest: Any) -> Any:
        like = first if isinstance(first, torch.Tensor) else first[0]

        def filled(result: Any) -> Any:
            if isinstance(result, list):
                return [filled(each) for each in result]
            return like.new_empty((0,)) if result is None else result

        results = body(first, *rest)
        return tuple(map(filled, results)) if isinstance(results, tuple) else results

    return whole


def runs_directly(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether a body may be called as a function: nobody watches or changes what the dispatcher is given."""
    return (
        not torch.compiler.is_compiling()  # first: Dynamo does not trace what follows
        and _PLAIN.issuperset(map(type, (x, *others)))  # `all` of a generator takes three times as long
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and not (torch._C._is_any_autocast_enabled() and not x.is_meta and torch.is_autocast_enabled(x.device.type))
        and not torch._C._are_functorch_transforms_active()
    )


def implementation(impl: str, x: torch.Tensor) -> ModuleType:
    if resolve_impl(impl, x.device, x.dtype) == "torch":
        return eager_lora_linear
    from lorakernels.kernels import lora_linear as kernels_lora_linear

    return kernels_lora_linear


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """[tokens, features] of x of any leading shape; a copy only where its strides allow no view."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def as_output(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y [tokens, N], made from x [..., K] as a matrix, as [..., N].

    No view: autograd forbids editing in place a Function's output that is one, and one that was made without
    gradients where there are some.
    """
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))


def linear_to_edit(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """torch's linear, [..., N], contiguous and to be added to, where no gradient is kept.

    No view either, as `as_output`, whose operator takes 20 µs between the layers of a model; without a bias torch's own
    is none.
    """
    y = linear(x, weight, bias)
    if y._is_view():
        y = torch.ops.aten._unsafe_view(y, y.shape)
    return y.contiguous()


def adds_bias_apart(x: torch.Tensor) -> bool:
    """Whether torch's linear adds the bias to such an x's product by itself, with a rounding more."""
    return x.dim() > 2 and not x.is_contiguous()


def functorch_is_active() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_batched(dys: Iterable[torch.Tensor]) -> bool:
    """Whether a backward runs under autograd's own vmap (is_grads_batched=True, vectorize=True), which is not
    torch.func's: a kernel cannot be in it, nor an `out=`.
    """
    return not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_legacy_batchedtensor, dys))


def one_by_one(
    backward: Callable[..., Sequence[torch.Tensor | None]], dys: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """`backward` of gradients that autograd's own vmap has batched (`is_batched`): of each by itself."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batches = [torch._remove_batch_dim(dy, level, 1, 0) if is_batched((dy,)) else dy[None] for dy in dys]
    count = max(map(len, batches))
    rows = [backward(*dy) for dy in zip(*(each.expand(count, *each.shape[1:]) for each in batches), strict=True)]
    return [
        None if found[0] is None else torch._add_batch_dim(torch.stack(found), 0, level)
        for found in zip(*rows, strict=True)
    ]
