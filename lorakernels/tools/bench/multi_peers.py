"""A forward of a batch whose tokens have different adapters, in each way to write it, on the same tensors.

What an engine does once a batch for all layers (the plan, vLLM's metadata) is made beforehand; what is done again in
every layer is measured.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from lorakernels.backend import resolve_impl
from lorakernels.functional import multi_lora_linear
from lorakernels.tools.bench.multi import MultiTensors, own_bytes, padded_bytes, paged_bytes
from lorakernels.tools.bench.orders import SCALING
from lorakernels.tools.bench.peer import Peer, Step, auto_why_not, kernels_why_not
from lorakernels.tools.bench.peers import needs, peft_linear
from lorakernels.tools.bench.registry import MultiCase

# A gather makes a copy of an adapter for every token; no more than this.
_MOST_GATHERED = 8 << 30


@dataclass(frozen=True)
class MultiPeer(Peer[MultiCase, MultiTensors]):
    """`adapter_bytes` is what the adapters take as this peer holds them."""

    adapter_bytes: Callable[[MultiCase], int] = own_bytes


def _step(layer: Callable[[], torch.Tensor]) -> Step:
    def step() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {"y": layer()}

    return step


def _frozen(case: MultiCase, tensors: MultiTensors) -> Step:
    return _step(lambda: torch.nn.functional.linear(tensors.x, tensors.weight))


def _ours(impl: str, paged: bool = True) -> Callable[[MultiCase, MultiTensors], Step]:
    def make(case: MultiCase, tensors: MultiTensors) -> Step:
        plan, (A, B) = tensors.plan(paged), (tensors.pages_A, tensors.pages_B) if paged else tensors.stacks
        return _step(lambda: multi_lora_linear(tensors.x, tensors.weight, A, B, plan, impl=impl))

    return make


def _loop(case: MultiCase, tensors: MultiTensors) -> Step:
    """Each adapter's tokens are gathered, multiplied twice, and added back; slices where they lie together."""
    x, own = tensors.x, list(zip(tensors.tokens, tensors.adapters, strict=True))

    def layer() -> torch.Tensor:
        y = torch.nn.functional.linear(x, tensors.weight)
        for tokens, (A, B) in own:
            if isinstance(tokens, slice):
                y[tokens].addmm_(x[tokens] @ A.t(), B.t(), alpha=SCALING)
            else:
                y.index_add_(0, tokens, (x.index_select(0, tokens) @ A.t()) @ B.t(), alpha=SCALING)
        return y

    return _step(layer)


def _gathered_bmm(case: MultiCase, tensors: MultiTensors) -> Step:
    (A, B), slots = tensors.stacks, tensors.slots

    def layer() -> torch.Tensor:
        y = torch.nn.functional.linear(tensors.x, tensors.weight)
        s = torch.bmm(A.index_select(0, slots), tensors.x[:, :, None])
        return y.add_(torch.bmm(B.index_select(0, slots), s)[:, :, 0], alpha=SCALING)

    return _step(layer)


def _gathered_why_not(case: MultiCase, device: torch.device) -> str | None:
    copied = case.M * case.r * (case.K + case.N) * case.itemsize
    if copied > _MOST_GATHERED:
        return f"it would copy {copied / (1 << 30):.0f} GiB of adapters, one for every token"
    return None


def _peft(case: MultiCase, tensors: MultiTensors) -> Step:
    """PEFT names an adapter for each sample: a token, or a sequence of tokens where an adapter's lie together."""
    names = [f"adapter{slot}" for slot in range(case.adapters)]
    layer = peft_linear(tensors.weight, dict(zip(names, tensors.adapters, strict=True))).eval()
    if case.together and case.M % case.adapters == 0:
        x = tensors.x.view(case.adapters, -1, case.K)
        return _step(lambda: layer(x, adapter_names=names).view(case.M, case.N))
    of_tokens = [names[slot] for slot in tensors.slots.tolist()]
    return _step(lambda: layer(tensors.x, adapter_names=of_tokens))


# ------------------------------------------------------------------------------------------- vLLM


def _vllm(case: MultiCase, tensors: MultiTensors) -> Step:
    """vLLM's own operators on its stacks. They are not a public interface: where they changed, the row says so."""
    if tensors.x.is_cuda:
        return _vllm_triton(importlib.import_module("vllm.lora.ops.triton_ops"), case, tensors)
    return _vllm_torch(importlib.import_module("vllm.lora.ops.torch_ops"), case, tensors)


def _vllm_triton(ops: ModuleType, case: MultiCase, tensors: MultiTensors) -> Step:
    x, (A, B) = tensors.x, tensors.stacks
    meta = ops.LoRAKernelMeta.make(case.adapters, case.M, device=x.device)
    meta.prepare_tensors(tensors.slots.int())
    # The second argument, which came later: launch for the adapters of this batch only.
    more: tuple[Any, ...] = (True,) if len(inspect.signature(meta.meta_args).parameters) > 1 else ()
    args = meta.meta_args(case.M, *more)

    def layer() -> torch.Tensor:
        y = torch.nn.functional.linear(x, tensors.weight)
        s = torch.empty(1, case.M, case.r, dtype=torch.float32, device=x.device)
        ops.lora_shrink(x, [A], s, *args, SCALING)
        ops.lora_expand(s, [B], y, *args, offset_start=0, add_inputs=True)
        return y

    return _step(layer)


def _vllm_torch(ops: ModuleType, case: MultiCase, tensors: MultiTensors) -> Step:
    x, (A, B) = tensors.x, tensors.stacks

    def layer() -> torch.Tensor:
        y = torch.nn.functional.linear(x, tensors.weight)
        s = torch.zeros(case.M, case.r, dtype=torch.float32)
        ops.bgmv_shrink(x, A, s, tensors.slots, SCALING)
        ops.bgmv_expand(s, B, y, tensors.slots, add_inputs=True)
        return y

    return _step(layer)


def _graph(case: MultiCase, device: torch.device) -> str:
    return resolve_impl("auto", device, case.torch_dtype)


_ROWS: tuple[MultiPeer, ...] = (
    MultiPeer("frozen", "frozen layer", _frozen, adapted=False, adapter_bytes=lambda case: 0),
    MultiPeer("ours-auto", "ours", _ours("auto"), auto_why_not, _graph, adapter_bytes=paged_bytes),
    MultiPeer(
        "ours-torch",
        "ours, plain torch",
        _ours("torch"),
        graph=lambda case, device: "torch",
        adapter_bytes=paged_bytes,
    ),
    MultiPeer(
        "ours-triton",
        "ours, Triton",
        _ours("triton"),
        kernels_why_not,
        graph=lambda case, device: "triton",
        adapter_bytes=paged_bytes,
    ),
    MultiPeer(
        "ours-stacks", "ours, padded stacks", _ours("auto", False), auto_why_not, _graph, adapter_bytes=padded_bytes
    ),
    MultiPeer("loop", "a loop over adapters", _loop),
    MultiPeer("bmm", "gathered, then bmm", _gathered_bmm, _gathered_why_not, adapter_bytes=padded_bytes),
    MultiPeer("peft", "PEFT", _peft, needs("peft", cuda=False)),
    MultiPeer("vllm", "vLLM's operators", _vllm, needs("vllm", cuda=False), adapter_bytes=padded_bytes),
)
MULTI_PEERS = {peer.name: peer for peer in _ROWS}
