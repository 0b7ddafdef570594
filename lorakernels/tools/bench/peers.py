"""One training step, forward and backward, of each way to write the layer, on the same tensors.

Other projects' orders of products (`orders`) are measured as plain torch; the packages themselves where they are
installed.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from lorakernels.backend import resolve_impl
from lorakernels.configs.config import KernelConfig
from lorakernels.configs.table import choose_with_source, forced_configs, takes_few_tokens_form
from lorakernels.dropout import drop_threshold, inverse_keep
from lorakernels.functional import lora_linear
from lorakernels.tools.bench.orders import SCALING, LoRAFusionOrder, UnslothOrder
from lorakernels.tools.bench.peer import Peer, Results, Step, auto_why_not, kernels_why_not
from lorakernels.tools.bench.registry import Case


@dataclass
class Tensors:
    """x [M, K], weight [N, K], lora_A [r, K], lora_B [N, r] and the gradient dy [M, N] that comes back."""

    x: torch.Tensor
    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    dy: torch.Tensor

    @property
    def numbytes(self) -> int:
        tensors = (self.x, self.weight, self.lora_A, self.lora_B, self.dy)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def make_tensors(case: Case, device: torch.device | str, seed: int) -> Tensors:
    """Random tensors of the case, x, A and B needing gradients."""
    generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        plain = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return plain.mul_(scale).to(case.torch_dtype)

    return Tensors(
        x=randn(case.M, case.K).requires_grad_(),
        weight=randn(case.N, case.K, scale=case.K**-0.5),
        lora_A=randn(case.r, case.K, scale=case.K**-0.5).requires_grad_(),
        lora_B=randn(case.N, case.r, scale=case.r**-0.5).requires_grad_(),
        dy=randn(case.M, case.N),
    )


def _gradients(y: torch.Tensor, tensors: Tensors) -> Results:
    dx, dA, dB = torch.autograd.grad(y, (tensors.x, tensors.lora_A, tensors.lora_B), tensors.dy)
    return {"y": y.detach(), "x": dx, "lora_A": dA, "lora_B": dB}


def _step(layer: Callable[[Tensors], torch.Tensor]) -> Callable[[Case, Tensors], Step]:
    return lambda case, tensors: lambda: _gradients(layer(tensors), tensors)


# ------------------------------------------------------------------------------------------- frozen, plain


def _frozen(case: Case, tensors: Tensors) -> Step:
    def step() -> Results:
        y = torch.nn.functional.linear(tensors.x, tensors.weight)
        (dx,) = torch.autograd.grad(y, tensors.x, tensors.dy)
        return {"y": y.detach(), "x": dx}

    return step


def _plain(
    x: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, dropout: float
) -> torch.Tensor:
    # Named: on a CPU functional.dropout is three operations where a GPU makes one.
    adapted = torch.native_dropout(x, dropout, True)[0] if dropout else x
    low_rank = (adapted @ lora_A.mT) @ lora_B.mT
    return torch.nn.functional.linear(x, weight) + SCALING * low_rank


def _eager(case: Case, tensors: Tensors) -> Step:
    t = tensors
    return lambda: _gradients(_plain(t.x, t.weight, t.lora_A, t.lora_B, case.dropout), t)


@lru_cache(maxsize=1)
def _compiled_for(case: Case) -> Callable[..., torch.Tensor]:
    torch._dynamo.reset()  # it gives up after a few shapes of one function, and then runs eager torch
    return torch.compile(_plain, dynamic=False)


def _compiled(case: Case, tensors: Tensors) -> Step:
    compiled, t = _compiled_for(case), tensors
    return lambda: _gradients(compiled(t.x, t.weight, t.lora_A, t.lora_B, case.dropout), t)


# ------------------------------------------------------------------------------------------- ours


def _ours(impl: str, cublas: bool | None = None) -> Callable[[Case, Tensors], Step]:
    def make(case: Case, tensors: Tensors) -> Step:
        t = tensors

        def step() -> Results:
            with base_product(case, t.x.device, cublas):
                y = lora_linear(t.x, t.weight, t.lora_A, t.lora_B, scaling=SCALING, dropout_p=case.dropout, impl=impl)
                return _gradients(y, t)

        return step

    return make


def base_product(case: Case, device: torch.device, cublas: bool | None) -> AbstractContextManager[None]:
    """The base product by cuBLAS (True), by the kernel (False), or as the table says (None)."""
    config = _config(case, device)
    if cublas in (None, config.cublas):
        return nullcontext()
    return forced_configs({"linear_expand": dataclasses.replace(config, cublas=cublas)})


def _config(case: Case, device: torch.device) -> KernelConfig:
    """Of the base product; whoever records what a step asks for does not see this."""
    sizes = (case.M, case.N, case.K, case.r, case.itemsize)
    return choose_with_source("linear_expand", *sizes, device, case.aligned).config


def _general_why_not(case: Case, device: torch.device) -> str | None:
    if takes_few_tokens_form(case.M, case.r, case.itemsize):
        return f"{case.M} tokens are one kernel, which has the base product in it"
    return kernels_why_not(case, device)


def _kernel_graph(case: Case, device: torch.device) -> str:
    if takes_few_tokens_form(case.M, case.r, case.itemsize):
        return "fused"
    return "split" if _config(case, device).cublas else "fused"


def _auto_graph(case: Case, device: torch.device) -> str:
    on_triton = resolve_impl("auto", device, case.torch_dtype) == "triton"
    return _kernel_graph(case, device) if on_triton else "addmm"


def _our_keep(p: float) -> float:
    return inverse_keep(drop_threshold(p))


# ------------------------------------------------------------------------------------------- other orders


def _unsloth_order(tensors: Tensors) -> torch.Tensor:
    return UnslothOrder.apply(tensors.x, tensors.weight, tensors.lora_A, tensors.lora_B)


def _lorafusion_order(case: Case, tensors: Tensors) -> Step:
    t = tensors
    return lambda: _gradients(LoRAFusionOrder.apply(t.x, t.weight, t.lora_A, t.lora_B, case.dropout), t)


# ------------------------------------------------------------------------------------------- packages


def needs(module: str, cuda: bool = True, dropout: bool = True) -> Callable[[Any, torch.device], str | None]:
    """Why a package's peer cannot run; `dropout`: whether it has any."""

    def why_not(case: Any, device: torch.device) -> str | None:
        if not dropout and case.dropout:
            return "no dropout on its fast path"
        if importlib.util.find_spec(module) is None:
            return f"the package {module} is not installed"
        if cuda and device.type != "cuda":
            return f"the package {module} needs a GPU; the tensors are on {device.type}"
        return None

    return why_not


class _OneLinear(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        N, K = weight.shape
        self.linear = torch.nn.Linear(K, N, bias=False, device="meta")
        self.linear.weight = torch.nn.Parameter(weight, requires_grad=False)


def peft_linear(
    weight: torch.Tensor, adapters: Mapping[str, tuple[torch.Tensor, torch.Tensor]], dropout: float = 0.0
) -> torch.nn.Module:
    """PEFT's layer around `weight`, with A [r, K] and B [N, r] of each adapter as its parameters."""
    import peft

    model: peft.PeftModel | None = None
    for name, (lora_A, _) in adapters.items():
        r = lora_A.shape[0]
        config = peft.LoraConfig(r=r, lora_alpha=SCALING * r, lora_dropout=dropout, target_modules=["linear"])
        if model is None:
            model = peft.get_peft_model(
                _OneLinear(weight), config, adapter_name=name, autocast_adapter_dtype=False, low_cpu_mem_usage=True
            )
        else:
            model.add_adapter(name, config, low_cpu_mem_usage=True)
    assert model is not None
    layer = model.base_model.model.linear
    for name, (lora_A, lora_B) in adapters.items():
        layer.lora_A[name].weight = torch.nn.Parameter(lora_A)
        layer.lora_B[name].weight = torch.nn.Parameter(lora_B)
    return layer


def _peft(case: Case, tensors: Tensors) -> Step:
    layer: Any = peft_linear(tensors.weight, {"default": (tensors.lora_A, tensors.lora_B)}, case.dropout)
    own = dataclasses.replace(tensors, lora_A=layer.lora_A["default"].weight, lora_B=layer.lora_B["default"].weight)
    return lambda: _gradients(layer(own.x), own)


def _unsloth(tensors: Tensors) -> torch.Tensor:
    function = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    # It writes dx into no input here: only its q, k, v and MLP forms do.
    y = function.apply(tensors.x[None], tensors.weight, None, tensors.lora_A, tensors.lora_B, SCALING)
    return y[0]


def _lorafusion(case: Case, tensors: Tensors) -> Step:
    function = importlib.import_module("lorafusion.ops.lora_v1").fused_linear_lora
    t = tensors

    def step() -> Results:
        # It draws from its own seed; ours makes a run repeatable.
        seed = int(torch.initial_seed() % 1_000_000)
        y = function(t.x[None], t.weight, t.lora_A, t.lora_B, SCALING, seed=seed, dropout_p=case.dropout)
        return _gradients(y[0], t)

    return step


def _always(graph: str) -> Callable[[Case, torch.device], str | None]:
    return lambda case, device: graph


_ROWS: tuple[Peer[Case, Tensors], ...] = (
    Peer("frozen", "frozen layer", _frozen, graph=_always("frozen"), adapted=False),
    Peer("ours-auto", "ours", _ours("auto"), auto_why_not, _auto_graph, _our_keep),
    Peer("ours-torch", "ours, plain torch", _ours("torch"), graph=_always("addmm"), keep_scale=_our_keep),
    Peer("ours-triton", "ours, Triton", _ours("triton"), kernels_why_not, _kernel_graph, _our_keep),
    Peer("ours-fused", "ours, fused", _ours("triton", False), _general_why_not, _always("fused"), _our_keep),
    Peer("ours-split", "ours, split", _ours("triton", True), _general_why_not, _always("split"), _our_keep),
    Peer("eager", "the formula in eager torch", _eager, graph=_always("plain")),
    # Building takes longer than measuring on a CPU.
    Peer("compile", "the formula, torch.compile", _compiled, by_default=lambda device: device.type == "cuda"),
    Peer("peft", "PEFT", _peft, needs("peft", cuda=False), _always("plain")),
    Peer(
        "unsloth-order",
        "Unsloth's order, in torch",
        _step(_unsloth_order),
        lambda case, device: "no dropout on its fast path" if case.dropout else None,
        _always("unsloth"),
    ),
    Peer("lorafusion-order", "LoRAFusion's order, in torch", _lorafusion_order),
    Peer("unsloth", "Unsloth", _step(_unsloth), needs("unsloth", dropout=False), _always("unsloth")),
    Peer("lorafusion", "LoRAFusion", _lorafusion, needs("lorafusion"), _always("lorafusion")),
)
PEERS = {peer.name: peer for peer in _ROWS}
