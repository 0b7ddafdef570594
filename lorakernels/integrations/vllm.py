"""vLLM's LoRA by these kernels: a plugin that vLLM itself finds (`vllm.general_plugins`) and loads in each process.

vLLM asks its platform which class computes LoRA. The plugin answers with one made here: vLLM's own for that device, in
whose place the products of linear layers, of the embedding and of the logits are ours. All else stays vLLM's: MoE
layers, classifiers' full heads, what of it wants the maps on the device. Nothing here imports vLLM before it is asked.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from lorakernels import ops
from lorakernels.integrations import vllm_metrics, vllm_versions
from lorakernels.integrations.vllm_sources import unlike
from lorakernels.plan import BASE, BatchPlan

# vLLM's classes by their modules, and the parameters by which it calls what is replaced or called here. All may have
# **kwargs too; others than these would mean something that is not known here.
PARENTS = {"PunicaWrapperCPU": "punica_cpu", "PunicaWrapperGPU": "punica_gpu"}
_FOLDER = "vllm.lora.punica_wrapper"
_LINEAR = ("y", "x", "lora_a_stacked", "lora_b_stacked", "scale")
SIGNATURES: dict[str, tuple[str, ...]] = {
    "__init__": ("max_num_batched_tokens", "max_batches", "device"),
    "update_metadata": ("mapping", "lora_index_to_id", "max_loras", "vocab_size"),
    "_update_base_metadata": ("mapping", "lora_index_to_id", "max_loras", "vocab_size"),
    "add_shrink": ("y", "x", "lora_a_stacked", "scale"),
    "add_expand": ("y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs"),
    "add_lora_embedding": ("y", "x", "lora_b_stacked", "add_inputs"),
    "add_lora_linear": (*_LINEAR, "output_slices", "buffer"),
    "add_lora_logits": (*_LINEAR, "buffer"),
}

_log = logging.getLogger("vllm.lorakernels")  # under vllm's name its own handlers show it


def why_left_off() -> str | None:
    """Why the plugin does not fit the installed vLLM, which then computes LoRA by itself; None where it fits."""
    base = (f"{_FOLDER}.punica_base", "PunicaWrapperBase")
    return unlike({((f"{_FOLDER}.{module}", parent), base): SIGNATURES for parent, module in PARENTS.items()})


def register() -> None:
    """What vLLM calls in each of its processes: put our class in the place of the platform's, or say why not.

    Raises BackendError where adapters are to be kept by version and this vLLM cannot.
    """
    vllm_metrics.clear_at_exit()
    if os.environ.get(vllm_versions.ROOT):
        vllm_versions.install()
    reason = why_left_off()
    if reason is None:
        from vllm.platforms import current_platform

        try:
            given = str(current_platform.get_punica_wrapper())
        except NotImplementedError:  # a platform without LoRA
            return
        parent = given.rpartition(".")[2]
        if given.startswith(__name__):
            return
        if given == f"{_FOLDER}.{PARENTS.get(parent)}.{parent}":
            ours = f"{__name__}.LoRAKernels{parent}"
            type(current_platform).get_punica_wrapper = classmethod(lambda cls: ours)
            return
        reason = f"this platform has {given}; expected one of {', '.join(PARENTS)}"
    _log.warning("lorakernels is left off: %s", reason)


def __getattr__(name: str) -> type:
    """The classes, by whose names vLLM looks them up: made where vLLM is."""
    parent = name.removeprefix("LoRAKernels")
    if parent not in PARENTS or parent == name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return wrapper_over(getattr(importlib.import_module(f"{_FOLDER}.{PARENTS[parent]}"), parent))


@lru_cache(maxsize=8)
def wrapper_over(parent: type) -> type:
    """vLLM's class for a device with our products."""
    ours = _BoundWrapper if parent.__name__ == "PunicaWrapperCPU" else _Wrapper
    return type(f"LoRAKernels{parent.__name__}", (ours, parent), {"__module__": __name__})


def _runs_vllms_own_kernels() -> bool:
    """Whether the model may have layers whose LoRA is vLLM's own, which wants its maps on the device."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    model = None if config is None else config.model_config
    if model is None or model.is_moe:
        if model is not None:
            _log.info("lorakernels: LoRA of the MoE layers stays vLLM's own")
        return True
    return model.runner_type != "generate"


class _Wrapper:
    """Stands before vLLM's class. The plans are padded to all the tokens there may be, as replays of graphs want it.

    A slot of vLLM's has max_lora_rank rows, zeros past its adapter's rank, and the scaling in its B.
    """

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)  # type: ignore[call-arg]
        config = kwargs["lora_config"]
        sizes = (config.max_loras, max_num_batched_tokens)
        self._tokens = BatchPlan(*sizes, max_rank=config.max_lora_rank, device=device)
        self._prompts = BatchPlan(*sizes, max_rank=config.max_lora_rank, device=device)
        # Read on the host where an operator runs: a graph without adapters then holds no kernel of theirs.
        self._no_adapter = torch.tensor([False], device="cpu")
        self._rows = vllm_metrics.rows()
        self._updates_parent = torch.device(device).type != "cpu" and _runs_vllms_own_kernels()

    def update_metadata(
        self, mapping: Any, lora_index_to_id: Sequence[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        parent: Any = super()
        update = parent.update_metadata if self._updates_parent else parent._update_base_metadata
        update(mapping, lora_index_to_id, max_loras, vocab_size)
        slot_of = {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id is not None}
        for plan, ids in ((self._tokens, mapping.index_mapping), (self._prompts, mapping.prompt_mapping)):
            plan.update_host([slot_of[i] if i > 0 else BASE for i in ids], self._capacity(plan, ids))
        bases, tokens = mapping.index_mapping.count(0), len(mapping.index_mapping)
        self._no_adapter[0] = bases == tokens
        if self._rows is not None:
            for counter, count in zip(self._rows, (bases, tokens - bases), strict=True):
                counter.inc(count)

    def _capacity(self, plan: BatchPlan, ids: Sequence[int]) -> int:
        return plan.max_tokens

    def add_shrink(self, y: Any, x: torch.Tensor, lora_a_stacked: Any, scale: float, **kwargs: Any) -> None:
        s = ops.multi_lora_shrink(_matrix(x), _stacks(lora_a_stacked), self._tokens, "auto")
        for target, of_slice in zip(y, s.unbind(0), strict=True):
            target.copy_(of_slice if scale == 1.0 else of_slice * scale)

    def add_expand(
        self,
        y: torch.Tensor,
        x: Any,
        lora_b_stacked: Any,
        output_slices: Sequence[int],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        s = x if isinstance(x, torch.Tensor) else torch.stack(list(x))
        outs = _columns(_matrix(y), output_slices, offset_start)
        self._expand(s, _stacks(lora_b_stacked), self._tokens, outs, add_inputs)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        self._expand(x[None], _stacks([lora_b_stacked]), self._tokens, [y], add_inputs)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        scale: float,
        output_slices: Sequence[int],
        *,
        buffer: Any = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        outs = _columns(_matrix(y), output_slices, 0)
        self._add(outs, _matrix(x), _stacks(lora_a_stacked), _stacks(lora_b_stacked), scale, self._tokens, add_inputs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: Any = None,
        **kwargs: Any,
    ) -> None:
        y, (A,), (B,) = _matrix(y), _stacks([lora_a_stacked]), _stacks([lora_b_stacked])
        N = min(y.shape[1], B.shape[1])  # either may be padded
        self._add([y[:, :N]], _matrix(x), [A], [B[:, :N]], scale, self._prompts, True)

    def _add(
        self,
        outs: list[torch.Tensor],
        x: torch.Tensor,
        As: list[torch.Tensor],
        Bs: list[torch.Tensor],
        scale: float,
        plan: BatchPlan,
        add_inputs: bool,
    ) -> None:
        if scale == 1.0:
            ops.multi_lora_add(outs, x, As, Bs, plan, self._no_adapter, add_inputs=add_inputs)
        else:  # which vLLM has in B
            self._expand(ops.multi_lora_shrink(x, As, plan, "auto") * scale, Bs, plan, outs, add_inputs)

    @staticmethod
    def _expand(
        s: torch.Tensor, Bs: list[torch.Tensor], plan: BatchPlan, outs: list[torch.Tensor], add_inputs: bool
    ) -> None:
        if not add_inputs:
            for out in outs:
                out.zero_()
        ops.multi_lora_expand(s, Bs, plan, outs, "auto")


class _Bound(NamedTuple):
    """What adds the update of one layer, for one routing and these very weights."""

    stacks: tuple[Any, Any]  # held, so that no other ones have their ids
    versions: list[int]
    add: Callable[[torch.Tensor, torch.Tensor], None]  # y, x

    def is_of(self, As: Any, Bs: Any) -> bool:
        return self.stacks[0] is As and self.stacks[1] is Bs and self.versions == _versions(As, Bs)


class _BoundWrapper(_Wrapper):
    """On a CPU, where vLLM makes no graph: what does not depend on x's numbers is looked up once a routing.

    Left out is a layer for which no adapter of the batch has weights: vLLM runs the embedding's and the logits' LoRA
    wherever LoRA is on.
    """

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._bound: dict[int, _Bound] = {}
        self._filled: dict[int, tuple[torch.Tensor, int, list[bool]]] = {}
        self._slots: set[int] = set()

    def update_metadata(
        self, mapping: Any, lora_index_to_id: Sequence[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        ids = {*mapping.index_mapping, *mapping.prompt_mapping}
        self._slots = {slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id in ids}
        self._bound.clear()

    def _capacity(self, plan: BatchPlan, ids: Sequence[int]) -> int:
        return len(ids)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        if not add_inputs or self._is_in_batch([lora_b_stacked]):
            super().add_lora_embedding(y, x, lora_b_stacked, add_inputs, **kwargs)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Any,
        lora_b_stacked: Any,
        scale: float,
        output_slices: Sequence[int],
        **options: Any,
    ) -> None:
        add_inputs = options.get("add_inputs", True)
        bound = self._bound.get(id(lora_a_stacked))
        if not (ops.runs_directly(y, x) and self._is_routed(y, x) and scale == 1.0 and add_inputs):
            bound = None
        elif bound is None or not bound.is_of(lora_a_stacked, lora_b_stacked):
            bound = self._bind(x, lora_a_stacked, lora_b_stacked, output_slices)
        if bound is not None:
            bound.add(y, x)
            return
        super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **options)

    def _is_routed(self, *matrices: torch.Tensor) -> bool:
        """Whether they lie flat, and have the rows of the batch that what is bound is for."""
        tokens = self._tokens.num_tokens
        return all(one.is_contiguous() and one.shape[:-1].numel() == tokens for one in matrices)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._is_in_batch([lora_a_stacked]):
            super().add_lora_logits(y, x, lora_a_stacked, lora_b_stacked, scale, **kwargs)

    def _bind(self, x: torch.Tensor, lora_a_stacked: Any, lora_b_stacked: Any, widths: Sequence[int]) -> _Bound | None:
        As, Bs, plan = _stacks(lora_a_stacked), _stacks(lora_b_stacked), self._tokens
        if x.dim() != 2 or x.shape[0] != plan.num_tokens or any(stack.is_inference() for stack in (*As, *Bs)):
            return None  # without a version counter nobody knows whether the weights still are these

        def by_adapter(y: torch.Tensor, x: torch.Tensor) -> None:
            ops.multi_lora_add(_columns(y, widths, 0), x, As, Bs, plan)

        add = ops.bound_updates(x, As, Bs, plan) if self._is_in_batch(lora_a_stacked) else _add_nothing
        versions = _versions(lora_a_stacked, lora_b_stacked)
        bound = _Bound((lora_a_stacked, lora_b_stacked), versions, add or by_adapter)
        self._bound[id(lora_a_stacked)] = bound
        return bound

    def _is_in_batch(self, stacks: Sequence[torch.Tensor]) -> bool:
        """Whether an adapter of the batch has weights in one of these stacks; looked up again when they are written."""
        for stack in stacks:
            if stack.is_inference():
                return True
            seen = self._filled.get(id(stack))
            if seen is None or seen[0] is not stack or seen[1] != stack._version:
                seen = self._filled[id(stack)] = (stack, stack._version, stack.flatten(1).any(1).tolist())
            if any(seen[2][slot] for slot in self._slots):
                return True
        return False


def _add_nothing(y: torch.Tensor, x: torch.Tensor) -> None:
    return None


def _versions(As: Sequence[torch.Tensor], Bs: Sequence[torch.Tensor]) -> list[int]:
    return [stack._version for stack in (*As, *Bs)]


def _matrix(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])


def _stacks(stacked: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """[S, 1, rows, columns] each, as vLLM has them, without the dimension of 1."""
    return [stack.squeeze(1) if stack.dim() == 4 else stack for stack in stacked]


def _columns(y: torch.Tensor, widths: Sequence[int], first: int) -> list[torch.Tensor]:
    outs = []
    for width in widths:
        outs.append(y[:, first : first + width])
        first += width
    return outs
