"""The arguments of the public functions: what is wrong is refused here, before any work.

One rule for all of them. A wrong type, of an argument or of a tensor's elements, is a TypeError; a wrong shape, length,
number or device is a ValueError, and a PlanError, which is one, where a batch does not fit its plan; what cannot run
here is a BackendError, which the operators raise. Each names the argument, what was given and what is expected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lorakernels import ops
from lorakernels.plan import BatchPlan, PlanError
from lorakernels.quant.packed import PackedWeight
from lorakernels.quant.stacks import PackedStack
from lorakernels.route import ExpertRoute

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def shape_of(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


# What is right is found inline below, without a call: these make the errors.


def no_tensor(name: str, given: Any, alternative: str = "") -> TypeError:
    return TypeError(f"{name} must be a tensor{alternative}; got {type(given).__name__}")


def _wrong_shape(
    name: str, given: torch.Tensor, expected: str, of: str, tensor: torch.Tensor, flipped: bool
) -> ValueError:
    hint = "; transposed?" if flipped else ""
    return ValueError(f"{name} is {shape_of(given)}; expected {expected}, for {of} {shape_of(tensor)}{hint}")


def _unlike(name: str, given: torch.Tensor, other: str, tensor: torch.Tensor, *, cast: bool = False) -> Exception:
    """For what has not the other's device, nor its dtype or with `cast` any float dtype."""
    if not given.is_floating_point():
        return TypeError(f"{name} is {shape_of(given)} {given.dtype}; expected a float dtype")
    if given.dtype is not tensor.dtype and not cast:
        return TypeError(
            f"{name} is {given.dtype}; expected {other}'s, {tensor.dtype} (only lora_A and lora_B may differ): cast "
            "one of them, or use torch.autocast"
        )
    return ValueError(
        f"{name} is on {given.device} and {other} on {tensor.device}; expected one device: move it with "
        f".to({other}.device)"
    )


def check_floats(name: str, given: Any) -> None:
    """A tensor of a dtype that is computed in."""
    if not isinstance(given, torch.Tensor):
        raise no_tensor(name, given)
    if given.dtype not in _FLOATS:
        expected = "float64, float32, float16 or bfloat16"
        raise TypeError(f"{name} is {shape_of(given)} {given.dtype}; expected {expected}")


def check_matrix(name: str, given: Any, expected: str) -> None:
    check_floats(name, given)
    if given.dim() != 2:
        raise ValueError(f"{name} is {shape_of(given)}; expected {expected}")


def check_weight(weight: Any) -> None:
    """[N, K], a tensor or packed."""
    if not isinstance(weight, PackedWeight):
        check_matrix("weight", weight, "[N, K]")


def check_alike(name: str, given: torch.Tensor, other: str, tensor: torch.Tensor) -> None:
    if given.dtype is not tensor.dtype or given.device != tensor.device:
        raise _unlike(name, given, other, tensor)


def check_base(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> None:
    """A linear layer and its input. A packed weight has no dtype that x could be unlike."""
    if not isinstance(x, torch.Tensor) or x.dtype not in _FLOATS:
        check_floats("x", x)
    packed = isinstance(weight, PackedWeight)
    if not packed and not isinstance(weight, torch.Tensor):
        raise no_tensor("weight", weight, " or a PackedWeight")
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"x {shape_of(x)} and weight {shape_of(weight)} do not fit: expected x [..., K] and weight [N, K] with the "
            "same K (weight as in torch.nn.Linear: [out_features, in_features])"
        )
    if (weight.dtype is not x.dtype and not packed) or weight.device != x.device:
        raise _unlike("weight", weight, "x", x)
    if bias is not None:
        if not isinstance(bias, torch.Tensor):
            raise no_tensor("bias", bias, " or None")
        if bias.shape != weight.shape[:1]:
            raise _wrong_shape("bias", bias, str([weight.shape[0]]), "weight", weight, False)
        if bias.dtype is not x.dtype or bias.device != x.device:
            raise _unlike("bias", bias, "x", x)


def check_adapter(weight: Any, lora_A: Any, lora_B: Any) -> None:
    """One adapter of a weight [N, K]."""
    if not isinstance(lora_A, torch.Tensor):
        raise no_tensor("lora_A", lora_A)
    if not isinstance(lora_B, torch.Tensor):
        raise no_tensor("lora_B", lora_B)
    N, K = weight.shape
    if lora_A.dim() != 2 or lora_A.shape[1] != K or lora_A.shape[0] < 1:
        flipped = lora_A.dim() == 2 and lora_A.shape[0] == K
        raise _wrong_shape("lora_A", lora_A, f"[r, {K}] with r ≥ 1", "weight", weight, flipped)
    r, device = lora_A.shape[0], weight.device
    if lora_B.dim() != 2 or lora_B.shape[0] != N or lora_B.shape[1] != r:
        raise _wrong_shape("lora_B", lora_B, str([N, r]), "lora_A", lora_A, lora_B.shape == (r, N))
    if not lora_A.is_floating_point() or lora_A.device != device:
        raise _unlike("lora_A", lora_A, "weight", weight, cast=True)
    if not lora_B.is_floating_point() or lora_B.device != device:
        raise _unlike("lora_B", lora_B, "weight", weight, cast=True)


def check_stack(x: Any, weight: Any, bias: torch.Tensor | None) -> None:
    """Rows [M, K], and a stack of linear layers."""
    check_matrix("x", x, "[T, K]")
    is_packed = isinstance(weight, PackedStack)
    if not is_packed:
        check_floats("weight", weight)
    if weight.dim() != 3 or weight.shape[2] != x.shape[1]:
        flipped = weight.dim() == 3 and weight.shape[1] == x.shape[1]
        raise _wrong_shape("weight", weight, f"[E, N, {x.shape[1]}]", "x", x, flipped)
    if is_packed and weight.device != x.device:
        raise ValueError(f"weight is on {weight.device} and x on {x.device}; expected one device")
    if not is_packed:
        check_alike("weight", weight, "x", x)
    if bias is not None:
        if not isinstance(bias, torch.Tensor):
            raise no_tensor("bias", bias, " or None")
        if tuple(bias.shape) != tuple(weight.shape[:2]):
            raise _wrong_shape("bias", bias, str(list(weight.shape[:2])), "weight", weight, False)
        check_alike("bias", bias, "x", x)


def check_experts(x: Any, weight: Any, lora_A: Any, lora_B: Any, bias: torch.Tensor | None) -> None:
    """Rows [M, K], a stack of linear layers and an adapter of each."""
    check_stack(x, weight, bias)
    E, N, K = weight.shape
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(factor, torch.Tensor):
            raise no_tensor(name, factor)
        if not factor.is_floating_point() or factor.device != x.device:
            raise _unlike(name, factor, "x", x, cast=True)
    if lora_A.dim() != 3 or lora_A.shape[0] != E or lora_A.shape[2] != K or lora_A.shape[1] < 1:
        raise _wrong_shape("lora_A", lora_A, f"[{E}, r, {K}] with r ≥ 1", "weight", weight, False)
    r = lora_A.shape[1]
    if tuple(lora_B.shape) != (E, N, r):
        raise _wrong_shape("lora_B", lora_B, str([E, N, r]), "lora_A", lora_A, tuple(lora_B.shape) == (E, r, N))


def check_route(route: Any, x: torch.Tensor, num_experts: int | None, is_sorted: bool) -> None:
    """A route of these experts, for x [T, K], or sorted [T · top_k, K]."""
    if not isinstance(route, ExpertRoute):
        raise TypeError(f"route must be an ExpertRoute, from expert_route; got {type(route).__name__}")
    rows = route.order.shape[0] if is_sorted else route.num_tokens
    if x.shape[0] != rows or num_experts not in (None, route.num_experts):
        given = f"{x.shape[0]} rows" + (f" and {num_experts} experts" if num_experts else "")
        raise ValueError(
            f"there are {given}; expected {rows} rows and {route.num_experts} experts, of a route of "
            f"{route.num_tokens} tokens with {route.top_k} experts each (sorted_x={is_sorted})"
        )
    if route.order.device != x.device:
        raise ValueError(f"x is on {x.device} and the route on {route.order.device}; expected one device")


def check_of_rows(name: str, given: Any, weight: Any) -> None:
    """A number a row of the weight."""
    if not isinstance(given, torch.Tensor):
        raise no_tensor(name, given)
    if given.shape != weight.shape[:1]:
        raise _wrong_shape(name, given, str([weight.shape[0]]), "weight", weight, False)
    if not given.is_floating_point() or given.device != weight.device:
        raise _unlike(name, given, "weight", weight, cast=True)


def number_of(scaling: float | torch.Tensor, lora_B: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The scaling as a number, and B, into which a tensor's goes: a [N, r] product that autograd and torch.compile see,
    without waiting for the value.
    """
    if isinstance(scaling, torch.Tensor):
        if scaling.numel() != 1:
            raise ValueError(f"scaling is a tensor of shape {shape_of(scaling)}; expected a number or one element")
        return 1.0, lora_B * scaling.reshape(()).to(lora_B)
    try:
        finite = -math.inf < scaling < math.inf  # math.isfinite of a dynamic float breaks the graph
    except TypeError:
        raise TypeError(f"scaling is {scaling!r}; expected a number, such as lora_alpha / r, or a tensor") from None
    if not finite:
        raise ValueError(f"scaling is {scaling}; expected a finite number, such as lora_alpha / r")
    return scaling, lora_B


def check_probability(dropout_p: float, expected: str = "a number") -> None:
    try:
        fits = 0.0 <= dropout_p < 1.0
    except TypeError:
        raise TypeError(f"dropout_p must be {expected}; got {type(dropout_p).__name__}") from None
    if not fits:
        raise ValueError(f"dropout_p is {dropout_p}; expected a probability in [0, 1)")


def check_probabilities(dropout_p: float | torch.Tensor, plan: BatchPlan) -> None:
    """One for all slots, or one each."""
    if not isinstance(dropout_p, torch.Tensor):
        return check_probability(dropout_p, "a number or a tensor")
    if tuple(dropout_p.shape) != (plan.num_slots,) or dropout_p.device != plan.device:
        raise ValueError(
            f"dropout_p is {shape_of(dropout_p)} on {dropout_p.device}; expected [{plan.num_slots}] on {plan.device}"
        )
    if dropout_p.device.type == "cpu" and not ((dropout_p >= 0) & (dropout_p < 1)).all():
        raise ValueError(f"dropout_p is {dropout_p.tolist()}; expected probabilities in [0, 1)")


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for x's device."""
    if not isinstance(x, torch.Tensor):
        raise no_tensor("x", x)
    if not torch._C._is_any_autocast_enabled():
        return False
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def under_autocast(
    x: torch.Tensor, weights: Sequence[Any], biases: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, list[Any], list[torch.Tensor | None]]:
    """What autocast makes of linear layers of one x."""
    dtype = torch.get_autocast_dtype(x.device.type)
    for tensors, name in ((weights, "weight"), (biases, "bias")):
        for tensor in tensors:
            if not (isinstance(tensor, (torch.Tensor, PackedWeight)) or (tensor is None and name == "bias")):
                raise no_tensor(name, tensor)
    cast = [ops.autocast_arguments(x, weight, bias, dtype) for weight, bias in zip(weights, biases, strict=True)]
    return cast[0][0], [weight for _, weight, _ in cast], [bias for *_, bias in cast]


def listed(name: str, given: Any) -> list[Any]:
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{name} must be a tensor or a list of them; got {type(given).__name__}")
    return list(given)


def slices_of(name: str, given: Any) -> tuple[list[Any], bool]:
    """Tensors of one argument as a list, and whether it was a tensor; [S, 1, …] as [S, …]."""
    kinds = (torch.Tensor, PackedWeight) if name == "weight" else torch.Tensor
    single = isinstance(given, kinds)
    tensors = [given] if single else listed(name, given)
    for tensor in tensors:
        if not isinstance(tensor, kinds):
            raise TypeError(f"{name} must be a tensor or a list of them; got a list with {type(tensor).__name__}")
    if not tensors:
        raise ValueError(f"{name} is an empty list; expected at least one tensor")
    return [t.squeeze(1) if t.dim() == 4 and t.shape[1] == 1 else t for t in tensors], single


def biases_of(given: Any, number: int) -> list[torch.Tensor | None]:
    if given is None:
        return [None] * number
    biases = [given] if isinstance(given, torch.Tensor) else listed("bias", given)
    for bias in biases:
        if not (bias is None or isinstance(bias, torch.Tensor)):
            raise TypeError(f"bias must be a tensor or a list of them and None; got a list with {type(bias).__name__}")
    return biases


def check_lengths(**lists: Sequence[Any]) -> None:
    """As many in each list."""
    if len({len(each) for each in lists.values()}) != 1:
        given = ", ".join(f"{name} {len(each)}" for name, each in lists.items())
        raise ValueError(f"there are of {given}; expected as many of each")


def check_plan(plan: BatchPlan, name: str, x: torch.Tensor, lead: Sequence[int]) -> None:
    """A plan for the tokens of x, whose shape is `lead`, on x's device."""
    if not isinstance(plan, BatchPlan):
        raise TypeError(f"plan must be a BatchPlan; got {type(plan).__name__}")
    if math.prod(lead) != plan.num_tokens:
        raise PlanError(
            f"{name} has {math.prod(lead)} tokens ({list(lead)}) and the plan was updated for {plan.num_tokens}: call "
            "plan.update with a slot for each of them"
        )
    if x.device != plan.device:
        raise PlanError(f"{name} is on {x.device} and the plan on {plan.device}: make the plan with device={x.device}")


def check_adapters(
    name: str,
    factors: list[torch.Tensor],
    plan: BatchPlan,
    other: str,
    x: torch.Tensor,
    features: list[int],
    *,
    is_B: bool,
) -> None:
    """The A's or B's of all adapters of a plan, of each slice, by the features that they read or write.

    They lie where `x` does, whose name is `other`.
    """
    first = factors[0]
    for factor, number in zip(factors, features, strict=True):
        if plan.num_pages is not None:
            fits = factor.dim() == 2 and factor.shape[0] >= plan.num_pages and factor.shape[1] == number
            expected = f"[pages, {number}] with at least {plan.num_pages} pages, as the plan has"
        else:
            S, R, N = (factor.shape[0], *factor.shape[1:][:: -1 if is_B else 1]) if factor.dim() == 3 else (0, 0, 0)
            fits = plan.num_slots <= S and plan.max_rank <= R and number == N
            shape = f"[S, {number}, R]" if is_B else f"[S, R, {number}]"
            expected = f"{shape} with S ≥ {plan.num_slots} and R ≥ {plan.max_rank}, the plan's num_slots and max_rank"
            if fits and first.shape[2 if is_B else 1] != R:
                raise ValueError(f"{name} is {shape_of(first)} and {shape_of(factor)}; expected one R for all slices")
        if not fits:
            raise PlanError(f"{name} is {shape_of(factor)}; expected {expected} ({'N' if is_B else 'K'} = {number})")
        if not factor.is_floating_point() or factor.device != x.device:
            raise _unlike(name, factor, other, x, cast=True)
        if factor.dtype != first.dtype:
            raise TypeError(f"{name} is {first.dtype} and {factor.dtype}; expected one dtype for all slices")


def check_one_rank(lora_A: torch.Tensor, lora_B: torch.Tensor, plan: BatchPlan) -> None:
    if plan.num_pages is None and lora_A.shape[1] != lora_B.shape[2]:
        raise ValueError(f"lora_A is {shape_of(lora_A)} and lora_B {shape_of(lora_B)}; expected one R for both")


def refuse_gradient(name: str, tensors: list[torch.Tensor]) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{name} has no gradient: use multi_lora_linear, or call it under torch.no_grad()")
