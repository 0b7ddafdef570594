"""The ways to write the layer that are measured, by name, on the same tensors.

What an engine does once a batch for all layers (the plan, vLLM's metadata) is made beforehand; what is done again in
every layer is measured.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lorakernels.backend import BackendError, interpreter_on, resolve_impl
from lorakernels.configs.table import takes_few_tokens_form
from lorakernels.functional import lora_linear, multi_lora_linear
from lorakernels.ops import frozen_linear
from lorakernels.tools.bench.peer import SCALING, Layer, Peer, Tensors
from lorakernels.tools.bench.registry import Case


def _ours(impl: str, t: Tensors, paged: bool = True) -> Layer:
    if t.case.adapters is None:
        p = t.case.dropout
        return partial(lora_linear, t.x, t.base, *t.adapters[0], scaling=SCALING, dropout_p=p, impl=impl)
    factors = t.pages if paged else t.stacks
    return partial(multi_lora_linear, t.x, t.base, *factors, t.plan(paged), impl=impl)


def _ours_why_not(impl: str, case: Case, device: torch.device, general: bool = False) -> str | None:
    """Why `impl` cannot run, or says nothing of a GPU; `general`: or takes one kernel, which has the base product."""
    if general and takes_few_tokens_form(case.M, case.r, case.itemsize):
        return f"{case.M} tokens are one kernel, which has the base product in it"
    try:
        resolved = resolve_impl(impl, device, case.torch_dtype)
    except BackendError as error:
        return str(error)
    if resolved == "triton" and interpreter_on():
        return "kernels run in Triton's interpreter (TRITON_INTERPRET is set): its time says nothing about a GPU"
    return None


def _plain(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, dropout: float) -> Tensor:
    # Named: on a CPU functional.dropout is three operations where a GPU makes one.
    adapted = torch.native_dropout(x, dropout, True)[0] if dropout else x
    low_rank = (adapted @ lora_A.mT) @ lora_B.mT
    return linear(x, weight) + SCALING * low_rank


@lru_cache(maxsize=1)
def _compiled_for(case: Case) -> Callable[..., Tensor]:
    torch._dynamo.reset()  # it gives up after a few shapes of one function, and then runs eager torch
    return torch.compile(_plain, dynamic=False)


def _formula(t: Tensors, compiled: bool = False) -> Layer:
    function = _compiled_for(t.case) if compiled else _plain
    return partial(function, t.x, t.weight, *t.adapters[0], t.case.dropout)


def _loop(t: Tensors) -> Layer:
    """Each adapter's tokens are gathered, multiplied twice, and added back; slices where they lie together."""
    own = list(zip(t.rows, t.adapters, strict=True))

    def layer() -> Tensor:
        y = linear(t.x, t.weight)
        for rows, (A, B) in own:
            if isinstance(rows, slice):
                y[rows].addmm_(t.x[rows] @ A.t(), B.t(), alpha=SCALING)
            else:
                y.index_add_(0, rows, (t.x.index_select(0, rows) @ A.t()) @ B.t(), alpha=SCALING)
        return y

    return layer


def _bmm(t: Tensors) -> Layer:
    A, B = t.stacks

    def layer() -> Tensor:
        y = linear(t.x, t.weight)
        s = torch.bmm(A.index_select(0, t.slots), t.x[:, :, None])
        return y.add_(torch.bmm(B.index_select(0, t.slots), s)[:, :, 0], alpha=SCALING)

    return layer


def _bmm_why_not(case: Case, device: torch.device) -> str | None:
    copied = case.M * case.r * (case.K + case.N) * case.itemsize
    if copied > 8 << 30:
        return f"it would copy {copied / (1 << 30):.0f} GiB of adapters, one for every token"
    return None


def _needs(package: str, case: Case, device: torch.device, cuda: bool = False, dropout: bool = True) -> str | None:
    """Why a package's layer cannot run; `cuda`: it needs a GPU; `dropout`: it has some."""
    if not dropout and case.dropout:
        return "no dropout on its fast path"
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    if cuda and device.type != "cuda":
        return f"the package {package} needs a GPU; the tensors are on {device.type}"
    return None


def _peft(t: Tensors) -> Layer:
    """PEFT names an adapter for each sample: a token, or a sequence of tokens where an adapter's lie together."""
    import peft

    case, names = t.case, [f"adapter{slot}" for slot in range(len(t.adapters))]
    base: Any = torch.nn.Linear(case.K, case.N, bias=False, device="meta")
    base.weight = torch.nn.Parameter(t.weight, requires_grad=False)
    if not isinstance(t.base, Tensor):
        nn = importlib.import_module("bitsandbytes").nn
        base = nn.Linear4bit(case.K, case.N, bias=False, quant_type=case.base, compute_dtype=t.x.dtype, device="meta")
        weight = nn.Params4bit(t.weight, requires_grad=False, quant_type=case.base, compress_statistics=False)
        base.weight = weight._quantize(t.x.device)
    settings: dict[str, Any] = {"lora_dropout": case.dropout, "target_modules": ["0"]}
    configs = [peft.LoraConfig(r=r, lora_alpha=SCALING * r, **settings) for r in case.ranks]
    options: dict[str, Any] = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
    model = peft.get_peft_model(torch.nn.Sequential(base), configs[0], adapter_name=names[0], **options)
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config, **options)
    layer = model.base_model.model[0]
    for name, (A, B) in zip(names, t.adapters, strict=True):
        layer.lora_A[name].weight, layer.lora_B[name].weight = A, B
    if case.adapters is None:
        return lambda: layer(t.x)
    layer.eval()
    if case.together and case.M % case.adapters == 0:
        x = t.x.view(case.adapters, -1, case.K)
        return lambda: layer(x, adapter_names=names).view(case.M, case.N)
    of_tokens = [names[slot] for slot in t.slots.tolist()]
    return lambda: layer(t.x, adapter_names=of_tokens)


def _peft_why_not(case: Case, device: torch.device) -> str | None:
    if case.base == "dense":
        return _needs("peft", case, device)
    if case.base != "nf4" or case.adapters is not None:
        return "PEFT is measured over bitsandbytes' NF4 alone, and with one adapter"
    return _needs("peft", case, device) or _needs("bitsandbytes", case, device)


def _unsloth(t: Tensors) -> Layer:
    function = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    # It writes dx into no input here: only its q, k, v and MLP forms do.
    return lambda: function.apply(t.x[None], t.weight, None, *t.adapters[0], SCALING)[0]


def _lorafusion(t: Tensors) -> Layer:
    function = importlib.import_module("lorafusion.ops.lora_v1").fused_linear_lora
    # It draws from its own seed; ours makes a run repeatable.
    own = partial(function, t.x[None], t.weight, *t.adapters[0], SCALING, dropout_p=t.case.dropout)
    return lambda: own(seed=int(torch.initial_seed() % 1_000_000))[0]


def _vllm(t: Tensors) -> Layer:
    """vLLM's own operators on its stacks. They are not a public interface: where they changed, the row says so."""
    if t.x.is_cuda:
        return _vllm_triton(importlib.import_module("vllm.lora.ops.triton_ops"), t)
    ops, (A, B) = importlib.import_module("vllm.lora.ops.torch_ops"), t.stacks

    def layer() -> Tensor:
        y = linear(t.x, t.weight)
        s = torch.zeros(t.case.M, t.case.r, dtype=torch.float32)
        ops.bgmv_shrink(t.x, A, s, t.slots, SCALING)
        ops.bgmv_expand(s, B, y, t.slots, add_inputs=True)
        return y

    return layer


def _vllm_triton(ops: ModuleType, t: Tensors) -> Layer:
    """By `ops`, vLLM's `triton_ops`."""
    M, (A, B) = t.case.M, t.stacks
    meta = ops.LoRAKernelMeta.make(len(t.adapters), M, device=t.x.device)
    meta.prepare_tensors(t.slots.int())
    # The second argument, which came later: launch for the adapters of this batch only.
    more: tuple[Any, ...] = (True,) if len(inspect.signature(meta.meta_args).parameters) > 1 else ()
    args = meta.meta_args(M, *more)

    def layer() -> Tensor:
        y = linear(t.x, t.weight)
        s = torch.empty(1, M, t.case.r, dtype=torch.float32, device=t.x.device)
        ops.lora_shrink(t.x, [A], s, *args, SCALING)
        ops.lora_expand(s, [B], y, *args, offset_start=0, add_inputs=True)
        return y

    return layer


_auto, _triton = (partial(_ours_why_not, impl) for impl in ("auto", "triton"))
_general = partial(_ours_why_not, "triton", general=True)
_ROWS = (
    Peer(
        "frozen",
        "frozen layer",
        lambda t: partial(frozen_linear, t.x, t.base, None),
        adapter_bytes=lambda _: 0,
        adapted=False,
        packed=True,
    ),
    Peer("ours-auto", "ours", partial(_ours, "auto"), _auto, adapter_bytes=Case.paged_bytes, packed=True),
    Peer("ours-torch", "ours, plain torch", partial(_ours, "torch"), adapter_bytes=Case.paged_bytes, packed=True),
    Peer("ours-triton", "ours, Triton", partial(_ours, "triton"), _triton, adapter_bytes=Case.paged_bytes, packed=True),
    Peer("ours-fused", "ours, fused", partial(_ours, "triton"), _general, many=False, cublas=False, packed=True),
    Peer("ours-in-order", "ours, in order", partial(_ours, "triton"), _triton, many=False, in_order=True, packed=True),
    Peer("ours-split", "ours, split", partial(_ours, "triton"), _general, many=False, cublas=True, packed=True),
    Peer(
        "ours-stacks",
        "ours, padded stacks",
        partial(_ours, "auto", paged=False),
        _auto,
        True,
        Case.padded_bytes,
        packed=True,
    ),
    Peer("eager", "the formula in eager torch", _formula, many=False),
    # Building takes longer than measuring on a CPU.
    Peer("compile", "the formula, compiled", partial(_formula, compiled=True), many=False, counted=False, on_cpu=False),
    Peer("peft", "PEFT", _peft, _peft_why_not, packed=True),
    Peer("unsloth", "Unsloth", _unsloth, partial(_needs, "unsloth", cuda=True, dropout=False), False, counted=False),
    Peer("lorafusion", "LoRAFusion", _lorafusion, partial(_needs, "lorafusion", cuda=True), False, counted=False),
    Peer("loop", "a loop over adapters", _loop, many=True),
    Peer("bmm", "gathered, then bmm", _bmm, _bmm_why_not, True, Case.padded_bytes),
    Peer("vllm", "vLLM's operators", _vllm, partial(_needs, "vllm"), True, Case.padded_bytes, counted=False),
)
PEERS = {peer.name: peer for peer in _ROWS}


def choose_peers(names: str | None, many: bool, device: torch.device) -> list[Peer]:
    """Those among the named, joined by commas ("torch" is short for "ours-torch"), that are of a batch of many adapters
    or of one adapter, after the frozen layer; None: the usual.

    Raises:
        ValueError: there is no such peer.
    """
    if names is None:
        chosen = [name for name, peer in PEERS.items() if peer.on_cpu or device.type == "cuda"]
    else:
        chosen = ["frozen", *(name if name in PEERS else f"ours-{name}" for name in names.split(","))]
    for name in chosen:
        if name not in PEERS:
            name = name.removeprefix("ours-")
            raise ValueError(f"there is no implementation {name!r}; there are: {', '.join(PEERS)}")
    return [PEERS[name] for name in dict.fromkeys(chosen) if PEERS[name].many in (None, many)]
