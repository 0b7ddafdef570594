"""The table of cases that every implementation of the LoRA linear is put through."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorakernels import formula
from lorakernels.dropout import drop_threshold, inverse_keep
from lorakernels.eager.dropout import draw_mask, philox_mask, unpack_mask
from lorakernels.testing.device import STUB
from lorakernels.testing.guards import laid_out

GRADIENTS = ("x", "weight", "lora_A", "lora_B", "bias", "row_scale")


@dataclass(frozen=True)
class LinearCase:
    """One call of `lora_linear`: sizes, layout, and what differs from the plain case."""

    name: str
    tokens: tuple[int, ...] = (37,)
    K: int = 48
    N: int = 40
    r: int = 8
    bias: bool = True
    bias_size: float = 1.0
    row_scale: bool = False
    scaling: float = 0.7
    dropout_p: float = 0.0
    adapter_dtype: torch.dtype | None = None  # None: x's own
    layout: str = "contiguous"
    needs: tuple[str, ...] = ("x", "lora_A", "lora_B", "bias", "row_scale")

    def __str__(self) -> str:
        return self.name


LINEAR_CASES = (
    LinearCase("plain"),
    LinearCase("three_dimensions", tokens=(2, 5, 7)),
    LinearCase("one_dimension", tokens=()),
    LinearCase("one_token", tokens=(1,)),
    LinearCase("zero_tokens", tokens=(3, 0)),
    LinearCase("zero_tokens_dropout", tokens=(0,), dropout_p=0.1),
    LinearCase("odd_sizes", tokens=(33,), K=51, N=29, r=5),
    LinearCase("primes", tokens=(37,), K=67, N=53, r=17),
    LinearCase("one_feature", K=1, N=1, r=1),
    LinearCase("rank_1", r=1),
    LinearCase("rank_3", r=3),
    LinearCase("rank_17", r=17),
    LinearCase("rank_64", r=64),
    LinearCase("rank_over_both_sizes", K=16, N=24, r=100),
    LinearCase("several_blocks", tokens=(150,), K=272, N=144, r=80),
    LinearCase("no_bias", bias=False),
    LinearCase("scaling_zero", scaling=0.0),
    LinearCase("scaling_negative", scaling=-1.5),
    LinearCase("scaling_large", scaling=64.0),
    LinearCase("dropout", tokens=(35,), K=80, dropout_p=0.1),
    LinearCase("dropout_half_odd", tokens=(41,), K=83, N=21, r=3, dropout_p=0.5),
    LinearCase("dropout_no_bias", K=20, bias=False, dropout_p=0.3, scaling=-0.3),
    LinearCase("adapter_float32", adapter_dtype=torch.float32),
    LinearCase("adapter_float32_dropout", tokens=(19,), adapter_dtype=torch.float32, dropout_p=0.2),
    LinearCase("adapter_float16", adapter_dtype=torch.float16),
    LinearCase("transposed", layout="transposed"),
    LinearCase("every_second", layout="every_second"),
    LinearCase("huge_strides", tokens=(3,), K=26, N=4, r=2, layout="huge_strides"),
    LinearCase("expanded", tokens=(6, 5), layout="expanded"),
    LinearCase("only_x", needs=("x",)),
    LinearCase("only_A", needs=("lora_A",), dropout_p=0.1),
    LinearCase("only_B", needs=("lora_B",)),
    LinearCase("only_bias", needs=("bias",)),
    LinearCase("x_and_B", needs=("x", "lora_B"), dropout_p=0.1),
    LinearCase("weight_too", needs=GRADIENTS),
    LinearCase("row_scale", row_scale=True),
    LinearCase("row_scale_no_bias", tokens=(3, 11), K=51, N=29, r=5, bias=False, row_scale=True),
    LinearCase("row_scale_dropout", tokens=(35,), K=40, r=17, row_scale=True, dropout_p=0.3),
    LinearCase("row_scale_adapter_float32", row_scale=True, adapter_dtype=torch.float32),
    LinearCase("row_scale_alone", row_scale=True, needs=("row_scale",), dropout_p=0.1),
    LinearCase("row_scale_frozen", row_scale=True, needs=("x", "lora_A", "lora_B", "bias"), layout="transposed"),
    LinearCase("row_scale_all", row_scale=True, needs=GRADIENTS, layout="every_second"),
    LinearCase("row_scale_scaling_zero", row_scale=True, scaling=0.0),
    LinearCase("row_scale_bias_large", tokens=(35,), K=80, row_scale=True, bias_size=100.0),
    LinearCase("row_scale_zero_tokens", tokens=(2, 0), row_scale=True),
)

# For compiled kernels: large enough for TMA, wgmma and every program of a device. Odd ones have edges in every tile.
LARGE_CASES = (
    LinearCase("headline", tokens=(8192,), K=4096, N=4096, r=16, bias=False),
    LinearCase("headline_dropout", tokens=(8192,), K=4096, N=4096, r=16, dropout_p=0.1, adapter_dtype=torch.float32),
    LinearCase("edges", tokens=(8200,), K=4112, N=4104, r=17),
    LinearCase("edges_dora_dropout", tokens=(2056,), K=1040, N=2056, r=16, row_scale=True, dropout_p=0.1),
    LinearCase("edges_transposed", tokens=(2056,), K=2064, N=2056, r=16, layout="transposed"),
    LinearCase("no_descriptors", tokens=(1031,), K=1021, N=1019, r=8, dropout_p=0.1),
    LinearCase("wide_rank", tokens=(2048,), K=2048, N=1024, r=200),
    LinearCase("few_tokens", tokens=(64,), K=4096, N=4096, r=16),
    LinearCase("few_tokens_dropout", tokens=(250,), K=4096, N=2048, r=33, dropout_p=0.1),
)


@dataclass
class LinearInputs:
    """The tensors of a case in one dtype, and the gradient that comes back to its output."""

    x: torch.Tensor
    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    bias: torch.Tensor | None
    row_scale: torch.Tensor | None
    dy: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {name: getattr(self, name) for name in GRADIENTS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def make_inputs(
    case: LinearCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> LinearInputs:
    """Random tensors of the case's layout, in memory that is NaN everywhere else."""
    where = generating(device)
    generator = torch.Generator(where).manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> torch.Tensor:
        if STUB:  # nobody looks at the numbers, which take longer than the launches
            return laid_out(torch.empty(shape, dtype=of), case.layout)
        return laid_out((torch.randn(shape, generator=generator, device=where) * scale).to(device, of), case.layout)

    adapter = case.adapter_dtype or dtype
    x = randn(*case.tokens, case.K)
    dy = randn(*case.tokens, case.N)
    row_scale = randn(case.N, of=torch.promote_types(dtype, torch.float32)) if case.row_scale else None
    if row_scale is not None:
        row_scale[:1] = 1  # which says nothing of the others
    return LinearInputs(
        x=x,
        weight=randn(case.N, case.K, scale=case.K**-0.5),
        lora_A=randn(case.r, case.K, scale=case.K**-0.5, of=adapter),
        lora_B=randn(case.N, case.r, scale=case.r**-0.5, of=adapter),
        bias=randn(case.N, scale=case.bias_size) if case.bias else None,
        row_scale=row_scale,
        dy=dy,
    )


def generating(device: torch.device | str) -> torch.device:
    """Where random numbers are drawn: on a GPU itself, where large sizes take seconds less; else on the CPU."""
    device = torch.device(device)
    return device if device.type == "cuda" else torch.device("cpu")


def leaves_of(
    tensors: dict[str, torch.Tensor], needs: tuple[str, ...], dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The same memory, or copies in `dtype`; what comes before a dot in a name tells whether its gradient is needed."""
    leaves = {name: t.detach() if dtype is None else t.detach().to(dtype).clone() for name, t in tensors.items()}
    return {name: leaf.requires_grad_(name.partition(".")[0] in needs) for name, leaf in leaves.items()}


def keep_of(x: torch.Tensor, dropout_p: float, seed: int, impl: str) -> torch.Tensor | None:
    """Dropout's mask over 1 - p, in x's rows, as an operator draws it after `torch.manual_seed(seed)`."""
    if not dropout_p:
        return None
    torch.manual_seed(seed)
    drawn = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device)
    draw = draw_mask if impl == "torch" else philox_mask
    threshold = drop_threshold(dropout_p)
    mask = draw(drawn, x.shape[:-1].numel(), x.shape[-1], threshold)
    return unpack_mask(mask, x.shape[-1]) * inverse_keep(threshold)


def run_formula(
    case: LinearCase, inputs: LinearInputs, keep: torch.Tensor | None, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """y and the gradients of the one-line formula in `dtype`, by torch's autograd, under the mask `keep` [M, K]."""
    leaves = leaves_of(inputs.tensors(), case.needs, dtype)
    if keep is not None:
        keep = keep.to(dtype).view(inputs.x.shape)
    y = formula.lora_linear(**leaves, scaling=case.scaling, keep=keep)
    y.backward(inputs.dy.to(dtype))
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"y": y.detach(), **grads}
