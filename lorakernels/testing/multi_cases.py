"""The table of cases of many adapters in one batch, and their oracle: a loop over tokens, each with its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakernels import formula
from lorakernels.plan import BatchPlan
from lorakernels.testing.cases import generating, leaves_of
from lorakernels.testing.guards import laid_out

Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class MultiCase:
    """One call of `multi_lora_linear`: who is in the batch, sizes, layout."""

    name: str
    T: int = 23
    ranks: tuple[int, ...] = (8, 3, 0, 5, 1)
    scalings: tuple[float, ...] | None = None
    batch: str = "random"  # random, grouped, in_order, in_turn, each_its_own, or rows of one slot: rows 0 -1 2
    R: int = 8
    K: int = 40
    Ns: tuple[int, ...] = (24,)
    lead: tuple[int, ...] | None = None
    bias: bool = True
    dropout_p: tuple[float, ...] | float = 0.0
    adapter_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    paged: bool = False
    spare: int = 0  # slots of the stacks past the plan's
    needs: tuple[str, ...] = ("x", "lora_A", "lora_B", "bias")

    def __str__(self) -> str:
        return self.name


MULTI_CASES = (
    MultiCase("mixed_ranks"),
    MultiCase("grouped", batch="grouped"),
    MultiCase("in_turn", T=20, batch="in_turn"),
    MultiCase("each_its_own", T=6, ranks=(4, 8, 1, 7, 2, 3), batch="each_its_own"),
    MultiCase("all_one_adapter", T=70, batch="rows 3"),
    MultiCase("one_token", T=1, batch="rows 0"),
    MultiCase("one_token_of_the_base", T=1, batch="rows -1"),
    MultiCase("one_slot", ranks=(8,)),
    MultiCase("all_base", batch="rows -1"),
    MultiCase("all_empty_slots", ranks=(0, 0)),
    MultiCase("empty", T=0),
    MultiCase("three_dimensions", T=24, lead=(2, 3, 4)),
    MultiCase("odd_sizes", T=33, ranks=(5, 17, 2), R=19, K=37, Ns=(29,)),
    MultiCase("one_feature", T=9, ranks=(1, 1), R=1, K=1, Ns=(1,)),
    MultiCase("several_blocks", T=70, ranks=(40, 7), R=40, K=70, Ns=(50,)),
    MultiCase("scalings", scalings=(0.0, -2.0, 1.0, 0.1, 16.0), bias=False),
    MultiCase("three_slices", T=17, Ns=(24, 20, 17)),
    MultiCase("two_slices_only_x", Ns=(24, 24), needs=("x",)),
    MultiCase("only_A", needs=("lora_A",)),
    MultiCase("only_B", needs=("lora_B",)),
    MultiCase("weight_too", needs=("x", "weight", "lora_A", "lora_B", "bias")),
    MultiCase("adapter_float32", adapter_dtype=torch.float32),
    MultiCase("adapter_float16", adapter_dtype=torch.float16),
    MultiCase("transposed", layout="transposed"),
    MultiCase("every_second", Ns=(24, 16), layout="every_second"),
    MultiCase("layered_stacks", layout="layered"),
    MultiCase("spare_slots", spare=2),
    MultiCase("huge_strides", T=5, ranks=(2, 1, 2), R=2, K=61, Ns=(4,), layout="huge_strides"),
    MultiCase("pages", paged=True),
    MultiCase("pages_slices_odd", T=19, K=29, Ns=(23, 5), paged=True, adapter_dtype=torch.float32),
    MultiCase("dropout", dropout_p=0.3),
    MultiCase("dropout_by_slot", T=30, K=43, Ns=(20, 9), dropout_p=(0.5, 0.0, 0.1, 0.9, 0.25)),
    MultiCase("dropout_pages", K=21, dropout_p=0.5, paged=True, batch="grouped"),
)

_QKV: dict[str, Any] = {"K": 4096, "Ns": (4096, 1024, 1024), "R": 16}
# For compiled kernels, as LARGE_CASES of one linear: decode with an adapter a token and with shared ones, prefill.
LARGE_MULTI_CASES = (
    MultiCase("decode_64", T=64, ranks=(16,) * 64, batch="each_its_own", paged=True, **_QKV),
    MultiCase("decode_64_stacks", T=64, ranks=(16,) * 64, batch="each_its_own", **_QKV),
    MultiCase("decode_8", T=64, ranks=(16, 8, 4, 16, 16, 3, 16, 1), batch="in_turn", paged=True, **_QKV),
    MultiCase("prefill", T=1100, ranks=(16, 8, 0, 16), batch="in_order", **_QKV),
    MultiCase("train_dropout", T=600, ranks=(16, 8, 0, 16), K=1040, Ns=(2056,), R=16, dropout_p=0.1),
)


@dataclass
class MultiInputs:
    """The tensors of a case, its plan, and the gradients that come back to its outputs."""

    x: torch.Tensor
    weight: list[torch.Tensor]
    lora_A: list[torch.Tensor]
    lora_B: list[torch.Tensor]
    bias: list[torch.Tensor]
    dys: list[torch.Tensor]
    token_slots: torch.Tensor
    slot_ranks: torch.Tensor
    slot_scalings: torch.Tensor
    page_table: torch.Tensor | None
    plan: BatchPlan

    def tensors(self) -> Results:
        """By name and slice: x, weight.0, weight.1, …"""
        named = {"x": self.x}
        for name in ("weight", "lora_A", "lora_B", "bias"):
            named |= {f"{name}.{i}": tensor for i, tensor in enumerate(getattr(self, name))}
        return named

    def update(self) -> None:
        self.plan.update(self.token_slots, self.slot_ranks, self.slot_scalings, self.page_table)


def make_multi_inputs(
    case: MultiCase, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> MultiInputs:
    """Random tensors, in memory that is NaN everywhere else; past its rank an adapter is NaN too."""
    generator, where = torch.Generator().manual_seed(seed), generating(device)
    normal = torch.Generator(where).manual_seed(seed + 1)
    S, T, R, K = len(case.ranks), case.T, case.R, case.K
    unit = max(K, 1) ** -0.5

    def randn(*shape: int, scale: float = 1.0, of: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(shape, generator=normal, device=where) * scale).to(device, of)

    slots, token = torch.randint(-1, S, (T,), generator=generator), torch.arange(T)
    if case.batch == "grouped":
        slots = slots.sort(descending=True).values
    elif case.batch == "in_order":
        slots = token * S // max(T, 1)
    elif case.batch == "in_turn":
        slots = token % S
    elif case.batch == "each_its_own":
        slots = torch.randperm(S, generator=generator)[:T]
    elif case.batch.startswith("rows"):
        rows = torch.tensor([int(slot) for slot in case.batch.split()[1:]])
        slots = rows.repeat_interleave(T // len(rows))
    ranks = torch.tensor(case.ranks, dtype=torch.int32)
    scalings = torch.tensor(case.scalings or [0.5 + 0.25 * s for s in range(S)])
    table = None
    num_pages = None
    if case.paged:
        num_pages = S * R + 3
        # Page 0, which a plan has past a rank, is somebody's.
        others = torch.randperm(num_pages - 1, generator=generator)[: S * R - 1] + 1
        table = torch.cat([torch.zeros(1), others]).view(S, R).int()
        table.masked_fill_(torch.arange(R) >= ranks[:, None], 1 << 30)
    plan = BatchPlan(S, T + 5, max_rank=R, num_pages=num_pages, device=device)
    lead = (T,) if case.lead is None else case.lead
    adapter = case.adapter_dtype or dtype
    As, Bs = [], []
    ranks_of_stack = torch.tensor([*case.ranks, *[0] * case.spare], device=device)
    for N in case.Ns:
        A = randn(S + case.spare, R, K, scale=unit, of=adapter)
        B = randn(S + case.spare, N, R, scale=R**-0.5, of=adapter)
        past = torch.arange(R, device=device) >= ranks_of_stack[:, None]
        A.masked_fill_(past[:, :, None], float("nan"))
        B.masked_fill_(past[:, None, :], float("nan"))
        if num_pages is not None and table is not None:
            A, B = _paged(A, table, num_pages), _paged(B.mT, table, num_pages)
        As.append(laid_out(A, case.layout))
        Bs.append(laid_out(B, case.layout))
    activations = "every_second" if case.layout == "every_second" else "contiguous"
    inputs = MultiInputs(
        x=laid_out(randn(*lead, K), activations),
        weight=[laid_out(randn(N, K, scale=unit), activations) for N in case.Ns],
        lora_A=As,
        lora_B=Bs,
        bias=[randn(N) for N in case.Ns] if case.bias else [],
        dys=[laid_out(randn(*lead, N), activations) for N in case.Ns],
        token_slots=slots.int().to(device),
        slot_ranks=ranks.to(device),
        slot_scalings=scalings.to(device),
        page_table=None if table is None else table.to(device),
        plan=plan,
    )
    inputs.update()
    return inputs


def _paged(stack: torch.Tensor, table: torch.Tensor, num_pages: int) -> torch.Tensor:
    """[S, R, columns] as pages; those of no slot's rank are NaN."""
    pages = stack.new_full((num_pages, stack.shape[2]), float("nan"))
    held = (table < num_pages).to(stack.device)
    pages[table.to(stack.device)[held].long()] = stack[held]
    return pages


def adapter_of(inputs: MultiInputs, leaves: Results, i: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, K] and B [N, rank] of one slot and slice, nothing past its rank."""
    rank = int(inputs.slot_ranks[slot])
    A, B = leaves[f"lora_A.{i}"], leaves[f"lora_B.{i}"]
    if inputs.page_table is not None:
        pages = inputs.page_table[slot, :rank].long()
        return A[pages], B[pages].t()
    if A.dim() == 4:
        A, B = A[:, 0], B[:, 0]
    return A[slot, :rank], B[slot, :, :rank]


def run_loop(
    case: MultiCase, inputs: MultiInputs, keep: torch.Tensor | None, dtype: torch.dtype, groups: Sequence[Sequence[int]]
) -> Results:
    """The ys and gradients in `dtype` by torch's autograd, one product for each of `groups` of tokens of one slot.

    `keep` [T, K] is dropout's mask over 1 - p of each token's slot. `groups` of one token each are the oracle; grouped
    by slot it is what plain torch would do.
    """
    leaves = leaves_of(inputs.tensors(), case.needs, dtype)
    x = leaves["x"].view(-1, case.K)
    ys = []
    for i, N in enumerate(case.Ns):
        y = x.new_zeros(x.shape[0], N)
        for tokens in groups:
            index, slot = torch.tensor(tokens, device=x.device), int(inputs.token_slots[tokens[0]])
            weight, bias = leaves[f"weight.{i}"], leaves.get(f"bias.{i}")
            if slot < 0:
                rows = torch.nn.functional.linear(x[index], weight, bias)
            else:
                A, B = adapter_of(inputs, leaves, i, slot)
                kept = None if keep is None else keep[index].to(dtype)
                scaling = float(inputs.slot_scalings[slot])
                rows = formula.lora_linear(x[index], weight, A, B, bias, scaling, kept)
            y = y.index_copy(0, index, rows)
        ys.append(y)
    loss = sum((y * dy.to(dtype).reshape(y.shape)).sum() for y, dy in zip(ys, inputs.dys, strict=True))
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    results = {f"y.{i}": y.detach() for i, y in enumerate(ys)}
    results |= {name: torch.zeros_like(leaf) for name, leaf in wanted.items()}
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        results |= {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}
    return results


def by_token(inputs: MultiInputs) -> list[list[int]]:
    return [[t] for t in range(len(inputs.token_slots))]


def by_slot(inputs: MultiInputs) -> list[list[int]]:
    slots = inputs.token_slots.tolist()
    return [[t for t, other in enumerate(slots) if other == slot] for slot in sorted(set(slots))]
