"""LoRA on a stack of experts in plain torch. Same signatures as `kernels.experts`.

Rows are pairs of a token and an expert, sorted by expert. The frozen product is torch's grouped one. That of rank r is
a loop over the experts; or, in bfloat16, whose small products take a CPU longer than float32's, and where every expert
has few rows, one batched product in which each has as many rows as the longest.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property

import torch
from torch.nn import functional as F

from lorakernels.dropout import inverse_keep
from lorakernels.eager.dropout import draw_mask
from lorakernels.low_rank import add_expand, low_rank_dtype, outer, shrink
from lorakernels.member import cast, sum_rows
from lorakernels.route import ExpertRoute
from lorakernels.weight import multiply

# So many times the rows that there are may be padded to; one expert with most of the tokens would make it E times.
_MOST_PADDING = 4
_FEW_ROWS = 4  # of an expert, with which a loop is all overhead


def route(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`order`, `inverse` and `starts` of an `ExpertRoute`.

    Raises:
        ValueError: an expert is not one of 0 … num_experts - 1.
    """
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    if len(experts) and not 0 <= int(experts[0]) <= int(experts[-1]) < num_experts:
        wrong = int(experts[0]) if experts[0] < 0 else int(experts[-1])
        raise ValueError(f"top_k_index has expert {wrong}; expected 0 … {num_experts - 1}")
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    firsts = torch.arange(num_experts + 1, device=order.device, dtype=experts.dtype)
    return order, inverse, torch.searchsorted(experts, firsts, out_int32=True)


class _Spans:
    """The rows of each expert, read on the host: on a CPU at little cost, elsewhere it waits for the device."""

    def __init__(self, where: ExpertRoute) -> None:
        starts = where.starts.tolist()
        self.sizes = [end - start for start, end in itertools.pairwise(starts)]
        self.present = [expert for expert, size in enumerate(self.sizes) if size]
        self.device = where.starts.device

    def each(self, rows: Sequence[torch.Tensor], stacks: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """Of each expert that has rows: those of tensors [P, …], and its own of stacks [E, …]."""
        parts = zip(self.sizes, *(t.split(self.sizes) for t in rows), *(t.unbind(0) for t in stacks), strict=True)
        return [part for size, *part in parts if size]  # type: ignore[misc]

    def pads(self, dtype: torch.dtype) -> bool:
        """Whether rows of this dtype are multiplied by the factors of all experts at once."""
        longest = max(self.sizes, default=0)
        if dtype is torch.float16 or len(self.present) * longest > _MOST_PADDING * sum(self.sizes):
            return False
        return bool(self.present) and (dtype is torch.bfloat16 or longest <= _FEW_ROWS)

    @cached_property
    def _places(self) -> torch.Tensor:
        """[P]: where each row lies among the padded ones."""
        sizes = torch.tensor(self.sizes, device=self.device)[self.present]
        padding = torch.arange(len(self.present), device=self.device) * max(self.sizes) - (sizes.cumsum(0) - sizes)
        return torch.arange(sum(self.sizes), device=self.device) + padding.repeat_interleave(sizes)

    def pad(self, rows: torch.Tensor) -> torch.Tensor:
        """[present, longest, K] of rows [P, K], zero past an expert's own."""
        longest = max(self.sizes)
        if len(self.present) * longest == rows.shape[0]:
            return rows.view(-1, longest, rows.shape[1])
        padded = rows.new_zeros(len(self.present) * longest, rows.shape[1])
        return padded.index_copy_(0, self._places, rows).view(-1, longest, rows.shape[1])

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        flat = padded.flatten(0, 1)
        return flat if flat.shape[0] == sum(self.sizes) else flat.index_select(0, self._places)

    def own(self, stack: torch.Tensor) -> torch.Tensor:
        """Of a stack [E, …] those experts that have rows."""
        if len(self.present) == len(self.sizes):
            return stack
        return stack.index_select(0, torch.tensor(self.present, device=stack.device))

    def put(self, stack: torch.Tensor, own: torch.Tensor) -> None:
        """Write into a stack, of zeros, what `own` takes of it."""
        if len(self.present) == len(self.sizes):
            stack.copy_(own)
        else:
            stack.index_copy_(0, torch.tensor(self.present, device=stack.device), own)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    bias: torch.Tensor | None,
    where: ExpertRoute,
    seed: torch.Tensor | None,
    threshold: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """y [P, N], S = D(x) Aᵀ [P, r], and the mask [P, K] uint8 (None without dropout), of x [P, K] sorted by expert.

    weight is [E, N, K], lora_A [E, r, K], lora_B [E, N, r] and bias [E, N].
    """
    spans = _Spans(where)
    y = _multiply(x, weight, where, spans)
    if bias is not None:
        for y_e, bias_e in spans.each([y], [bias]):
            y_e += bias_e
    mask, adapted = None, x
    if threshold:
        assert seed is not None
        mask = draw_mask(seed, x.shape[0], x.shape[1], threshold)
        adapted = mask.to(x.dtype).mul_(x)
    keep, dtype = inverse_keep(threshold), low_rank_dtype(x.dtype)
    if lora_A.shape[1] == 0:
        return y, x.new_empty((x.shape[0], 0), dtype=dtype), mask
    if spans.pads(x.dtype):
        A, B = rank_rows(spans.own(lora_A), dtype), rank_rows(spans.own(lora_B).mT, dtype)
        padded = torch.bmm(spans.pad(adapted), A.mT).mul_(keep)
        y.add_(spans.unpad(torch.bmm(padded, B)), alpha=scaling)
        return y, spans.unpad(padded).contiguous(), mask
    s = x.new_empty((x.shape[0], lora_A.shape[1]), dtype=dtype)
    A, B = rank_rows(lora_A, dtype), rank_rows(lora_B.mT, dtype)
    for x_e, y_e, s_e, A_e, B_e in spans.each([adapted, y, s], [A, B]):
        torch.mul(shrink(x_e, A_e), keep, out=s_e)
        add_expand(y_e, s_e, B_e.t(), scaling)
    return y, s, mask


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    where: ExpertRoute,
    s: torch.Tensor | None,
    mask: torch.Tensor | None,
    threshold: int,
    scaling: float,
    *,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx [P, K], dA [E, r, K] and dB [E, r, N], of which rows lie as those of lora_A and of lora_Bᵀ do."""
    spans, dtype = _Spans(where), low_rank_dtype(dy.dtype)
    dy = dy.contiguous()
    dx = _multiply(dy, weight.mT, where, spans) if need_dx else None
    dA = rank_room(lora_A, dtype).zero_() if need_dA else None
    dB = rank_room(lora_B.mT, dtype).zero_() if need_dB else None
    if lora_A.shape[1] == 0 or not (need_dx or need_dA or need_dB):
        return dx, dA, dB
    by = scaling * inverse_keep(threshold)
    kept = None if mask is None else mask.to(dy.dtype)
    adapted = x if kept is None or x is None else x * kept
    if spans.pads(dy.dtype):
        A, B = rank_rows(spans.own(lora_A), dtype), rank_rows(spans.own(lora_B).mT, dtype)
        dy_padded = spans.pad(dy)
        if need_dx or need_dA:
            g = torch.bmm(dy_padded, B.mT).mul_(by)
            if dx is not None:
                update = spans.unpad(torch.bmm(g, A))
                dx += update if kept is None else update * kept
            if dA is not None:
                assert adapted is not None
                spans.put(dA, torch.bmm(g.mT, spans.pad(adapted)))
        if dB is not None:
            assert s is not None
            spans.put(dB, torch.bmm(spans.pad(s).mT, dy_padded).mul_(scaling))
    else:
        A, B = rank_rows(lora_A, dtype), rank_rows(lora_B.mT, dtype)
        none = [None] * len(spans.present)
        rows = [none if t is None else [own for (own,) in spans.each([t], [])] for t in (adapted, s, kept, dx)]
        own_dA, own_dB = (none if t is None else [own for (own,) in spans.each([], [t])] for t in (dA, dB))
        for (dy_e, A_e, B_e), x_e, s_e, kept_e, dx_e, dA_e, dB_e in zip(
            spans.each([dy], [A, B]), *rows, own_dA, own_dB, strict=True
        ):
            if need_dx or need_dA:
                g = shrink(dy_e, B_e).mul_(by)
                if dx_e is not None:
                    add_expand(dx_e, g, A_e.t(), kept=kept_e)
                if dA_e is not None:
                    dA_e.copy_(outer(g, x_e))
            if dB_e is not None:
                torch.mul(outer(s_e, dy_e), scaling, out=dB_e)
    return dx, None if dA is None else cast(dA, lora_A.dtype), None if dB is None else cast(dB, lora_B.dtype)


def grad_base(
    dy: torch.Tensor, x: torch.Tensor | None, where: ExpertRoute, need_dbias: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dW [E, N, K] where there is an x [P, K], and dbias [E, N]: for experts that are trained themselves."""
    spans, E = _Spans(where), where.num_experts
    dW = None if x is None else dy.new_zeros((E, dy.shape[1], x.shape[1]))
    dbias = dy.new_zeros((E, dy.shape[1])) if need_dbias else None
    for expert, (dy_e,) in zip(spans.present, spans.each([dy], []), strict=True):
        if dbias is not None:
            dbias[expert] = sum_rows(dy_e)
    if dW is not None and x is not None:
        for dy_e, x_e, dW_e in spans.each([dy, x], [dW]):
            torch.mm(dy_e.t(), x_e, out=dW_e)
    return dW, dbias


def _multiply(x: torch.Tensor, weight: torch.Tensor, where: ExpertRoute, spans: _Spans) -> torch.Tensor:
    """[P, N] of x [P, K] sorted by expert and weight [E, N, K] of any strides."""
    if _takes_grouped(x, weight):
        return F.grouped_mm(x, weight.mT, offs=where.starts[1:])
    y = x.new_empty((x.shape[0], weight.shape[1]))
    for x_e, y_e, W_e in spans.each([x, y], [weight]):
        y_e.copy_(multiply(x_e, W_e))
    return y


def _takes_grouped(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch's grouped product takes these, and is not slow: a CPU's of float16 is, with a transposed weight."""
    if x.shape[0] == 0 or x.dtype is torch.float64 or (x.is_cpu and x.dtype is torch.float16):
        return False
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    matrices = (x, weight[0] if weight.stride(2) == 1 else weight[0].t())
    lines = [matrix.stride(0) for matrix in matrices] + [weight.stride(0), weight.shape[1]]  # and those of y
    return (
        all(matrix.stride(1) == 1 and matrix.data_ptr() % 16 == 0 for matrix in matrices)
        and all(line * x.element_size() % 16 == 0 for line in lines)
        and all(matrix.stride(0) >= matrix.shape[1] for matrix in matrices)
    )


def rank_rows(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of rank [E, r, columns] in `dtype`, whose columns or rows are contiguous.

    PEFT's B has the expert as its fastest dimension. As a transposed matrix it is copied 8 to 14 times faster than as
    three permuted dimensions; uncopied every element of an expert's would come from a sector of its own.
    """
    factor = cast(factor, dtype)
    if not _is_rank_major(factor):
        return factor
    E, r, columns = factor.shape
    return factor.permute(2, 1, 0).reshape(columns, r * E).t().contiguous().view(r, E, columns).transpose(0, 1)


def rank_room(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where the gradient of rows of rank goes: [E, r, columns], the ranks outermost in memory where `rank_rows` so
    copies, for PEFT's layout is then one transposed copy away.
    """
    E, r, columns = factor.shape
    if _is_rank_major(factor):
        return factor.new_empty((r, E, columns), dtype=dtype).transpose(0, 1)
    return factor.new_empty((E, r, columns), dtype=dtype)


def _is_rank_major(factor: torch.Tensor) -> bool:
    return factor.shape[0] > 1 and factor.stride(0) < factor.stride(1)
