"""The table of cases of several LoRA linears of one x."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lorakernels import formula
from lorakernels.testing.cases import LinearCase, LinearInputs, leaves_of, make_inputs

Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class GroupCase(LinearCase):
    """One call of `lora_linear_group`: what its members share, and the sizes, scalings and dtypes of each."""

    tokens: tuple[int, ...] = (20,)
    K: int = 40
    Ns: tuple[int, ...] = (24, 16, 16)
    ranks: tuple[int, ...] = (8, 8, 8)
    scalings: tuple[float, ...] = (0.7, -0.4, 2.0, 0.5, 1.0)
    adapter_dtypes: tuple[torch.dtype | None, ...] = (None,) * 5  # None: x's own
    used: tuple[int, ...] = (0, 1, 2, 3, 4)  # members whose output somebody uses


_FLOAT32 = (torch.float32,) * 5
GROUP_CASES = (
    GroupCase("plain", Ns=(8, 24, 40)),
    GroupCase("two", Ns=(40, 40), ranks=(4, 4)),
    GroupCase("one", Ns=(40,), ranks=(8,)),
    GroupCase("five", Ns=(24, 8, 16, 16, 8), ranks=(4, 8, 2, 1, 3)),
    GroupCase("ranks_differ", ranks=(3, 17, 1)),
    GroupCase("odd_sizes", tokens=(21,), K=37, Ns=(29, 13, 3), ranks=(5, 2, 7)),
    GroupCase("several_blocks", tokens=(150,), K=136, Ns=(144, 72, 72), ranks=(40, 20, 20)),
    GroupCase("three_dimensions", tokens=(2, 5, 7)),
    GroupCase("one_dimension", tokens=()),
    GroupCase("one_token", tokens=(1,)),
    GroupCase("zero_tokens", tokens=(3, 0)),
    GroupCase("zero_tokens_dropout", tokens=(0,), dropout_p=0.1),
    GroupCase("no_bias", bias=False),
    GroupCase("one_scaling_zero", scalings=(0.7, 0.0, 2.0)),
    GroupCase("dropout", tokens=(19,), dropout_p=0.1),
    GroupCase("dropout_half_odd", tokens=(21,), K=43, Ns=(21, 5), ranks=(3, 4), dropout_p=0.5),
    GroupCase("adapter_float32", adapter_dtypes=_FLOAT32),
    GroupCase("adapter_float32_dropout", adapter_dtypes=_FLOAT32, dropout_p=0.2),
    GroupCase("adapter_dtypes_differ", adapter_dtypes=(torch.float16, torch.float32, None)),
    GroupCase("transposed", layout="transposed"),
    GroupCase("every_second", layout="every_second"),
    GroupCase("expanded", tokens=(6, 5), layout="expanded"),
    GroupCase("only_x", needs=("x",)),
    GroupCase("only_A", needs=("lora_A",), dropout_p=0.1),
    GroupCase("only_B", needs=("lora_B",)),
    GroupCase("only_bias", needs=("bias",)),
    GroupCase("weight_too", needs=("x", "weight", "lora_A", "lora_B", "bias")),
    GroupCase("first_unused", used=(1, 2), dropout_p=0.1),
    GroupCase("only_the_last_used", ranks=(8, 4, 3), used=(2,)),
)
# For compiled kernels, as LARGE_CASES of one linear.
LARGE_GROUP_CASES = (
    GroupCase("qkv", tokens=(2048,), K=4096, Ns=(4096, 1024, 1024), ranks=(16, 16, 16), bias=False),
    GroupCase("qkv_dropout", tokens=(2056,), K=2064, Ns=(2056, 520, 520), ranks=(16, 5, 8), dropout_p=0.1),
)


@dataclass
class GroupInputs:
    """The members' tensors, x that of the first, and the gradients that come back to the outputs."""

    x: torch.Tensor
    members: list[LinearInputs]

    def tensors(self) -> Results:
        """By name: x, weight.0, lora_A.0, and so on."""
        named = {
            f"{name}.{i}": tensor
            for i, member in enumerate(self.members)
            for name, tensor in member.tensors().items()
            if name != "x"
        }
        return {"x": self.x, **named}


def make_group_inputs(
    case: GroupCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> GroupInputs:
    """Random tensors of the case's layout, in memory that is NaN everywhere else."""
    each = zip(case.Ns, case.ranks, case.adapter_dtypes, strict=False)
    cases = [replace(case, N=N, r=r, adapter_dtype=of) for N, r, of in each]
    members = [make_inputs(member, dtype, device, seed=8 * seed + i) for i, member in enumerate(cases)]
    return GroupInputs(members[0].x, members)


def run_group_formula(case: GroupCase, inputs: GroupInputs, keep: torch.Tensor | None, dtype: torch.dtype) -> Results:
    """The y's and the gradients of one line a member in `dtype`, by torch's autograd, under the mask `keep` [M, K]."""
    leaves = leaves_of(inputs.tensors(), case.needs, dtype)
    if keep is not None:
        keep = keep.to(dtype).view(inputs.x.shape)
    ys = []
    for i, scaling in zip(range(len(case.Ns)), case.scalings, strict=False):
        weight, A, B = (leaves[f"{name}.{i}"] for name in ("weight", "lora_A", "lora_B"))
        ys.append(formula.lora_linear(leaves["x"], weight, A, B, leaves.get(f"bias.{i}"), scaling, keep))
    dys = [member.dy.to(dtype) for member in inputs.members]
    return collect(case, leaves, ys, dys)


def collect(case: GroupCase, leaves: Results, ys: list[torch.Tensor], dys: list[torch.Tensor]) -> Results:
    """The y's, and the gradients after one backward through those that the case uses."""
    pairs = [(ys[i], dys[i]) for i in case.used if i < len(ys) and ys[i].requires_grad]
    torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {**{f"y.{i}": y.detach() for i, y in enumerate(ys)}, **grads}
