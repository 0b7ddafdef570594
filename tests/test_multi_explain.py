"""What a call tells of itself: which kernels it takes, and, for many adapters, how many operations it counts for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

pytest.importorskip("triton")

import lorakernels as lk
from lorakernels.configs.device import assume
from lorakernels.kernels import lora_linear, multi_lora
from lorakernels.kernels.launch import Launch, record_launches
from lorakernels.member import Member, training_step
from lorakernels.testing.multi_cases import MultiCase, make_multi_inputs


@pytest.mark.parametrize(
    ("tokens", "slots", "Ns", "dropout_p", "forms"),
    [
        (48, 64, (24,), 0.0, {1}),
        (48, 64, (40, 24), 0.3, {1, 16}),  # dropout, and the sum of two slices in dx
        (100, 8, (40, 24), 0.0, {16}),
        (512, 8, (24,), 0.3, {64}),
    ],
)
def test_explain_tells_what_is_launched(
    tokens: int, slots: int, Ns: tuple[int, ...], dropout_p: float, forms: set[int], device: str
) -> None:
    plan = lk.BatchPlan(slots, tokens, max_rank=8, device=device)
    x, dys = torch.empty(tokens, 32, device=device), [torch.empty(tokens, N, device=device) for N in Ns]
    weights = [torch.empty(N, 32, device=device) for N in Ns]
    As = [torch.empty(slots, 8, 32, device=device) for _ in Ns]
    Bs = [torch.empty(slots, N, 8, device=device) for N in Ns]
    seed = torch.zeros(1, dtype=torch.int64, device=device) if dropout_p else None
    thresholds = torch.zeros(slots + 1, dtype=torch.int32, device=device) if dropout_p else None
    with record_launches() as launches:
        _, s, mask = multi_lora.forward(
            x, weights, [None] * len(Ns), As, Bs, plan.tensors, keep_s=True, seed=seed, thresholds=thresholds
        )
        needs = {"need_dx": True, "need_dA": True, "need_dB": True}
        multi_lora.backward(dys, x, weights, As, Bs, plan.tensors, s, mask, **needs)
    given = (x, weights, As) if len(Ns) > 1 else (x, weights[0], As[0])
    explanation = lk.explain(*given, plan=plan, dropout_p=dropout_p, impl="triton")
    base, *kernels = explanation.kernels
    assert explanation.impl == "triton" and f"{tokens} tokens of at most {slots} adapters" in base
    told_as_launched(kernels, launches)
    of_tokens = [launch for launch in launches if launch.kernel.__name__.startswith(("multi_shrink", "multi_expand"))]
    assert len(of_tokens) == 4 and {launch.config.BLOCK_M for launch in of_tokens} == forms
    told = [line for line in kernels if line.startswith(("multi_shrink", "multi_expand"))]
    for line, launch in zip(told, of_tokens, strict=True):
        height = launch.config.BLOCK_M
        assert ("a program a token" if height == 1 else f"tiles of {height} tokens of one slot") in line


def told_as_launched(lines: Sequence[str], launches: Sequence[Launch]) -> None:
    """A line for each launch, in order, with its config and where that comes from."""
    assert len(lines) == len(launches)
    for line, launch in zip(lines, launches, strict=True):
        assert f"{line.partition(' ')[0]}_kernel" == launch.kernel.__name__
        assert f": {launch.config} (" in line and line.endswith(")")


@pytest.mark.parametrize("row_scale", [False, True])
def test_explain_tells_of_groups_and_dora(row_scale: bool, device: str) -> None:
    x, sizes = torch.empty(512, 64, device=device), (48, 16)
    members = [
        Member(*(torch.empty(s, device=device) for s in ((N, 64), (4, 64), (N, 4))), None, torch.ones(N, device=device))
        for N in sizes
    ]
    members = members if row_scale else [member._replace(row_scale=None) for member in members]
    with record_launches() as launches:
        training_step(lora_linear, x, [torch.empty(512, N, device=device) for N in sizes], members)
    weights, As = [member.weight for member in members], [member.lora_A for member in members]
    kernels = lk.explain(x, weights, As, row_scale=row_scale, impl="triton").kernels
    own = [line for line in kernels if "norm" not in line]
    if row_scale:  # the gradient of each row scale, first in the backward
        assert len(kernels) - len(own) >= 2
        backward = next(i for i, line in enumerate(own) if "(backward)" in line)
        assert [line.partition(" ")[0] for line in own[backward:][:1]] == ["linear_expand"]
        return
    told_as_launched(own, launches)
    with pytest.raises(ValueError, match="expected one A for each weight"):
        lk.explain(x, weights, As[:1], impl="triton")


def _off_by_8_bytes(rows: int, cols: int) -> torch.Tensor:
    return torch.empty(rows, cols + 8, dtype=torch.bfloat16)[:, 4 : cols + 4]


def _plain(rows: int, cols: int) -> torch.Tensor:
    return torch.empty(rows, cols, dtype=torch.bfloat16)


def _part_of_longer_rows(rows: int, cols: int) -> torch.Tensor:
    return _plain(rows, cols + 4)[:, :cols]


def _stored_transposed(rows: int, cols: int) -> torch.Tensor:
    return _plain(cols, rows).t()


@pytest.mark.parametrize(
    ("M", "N", "K", "r", "make_x", "make_weight", "tma"),
    [
        (512, 1024, 512, 16, _plain, _plain, [True, True]),
        (512, 512, 1024, 16, _off_by_8_bytes, _plain, [False, True]),
        (512, 1024, 512, 16, _plain, _off_by_8_bytes, [False, False]),
        (512, 1024, 512, 16, _plain, _stored_transposed, [True, True]),
        (512, 1024, 512, 16, _stored_transposed, _plain, [False, True]),
        (512, 1020, 512, 16, _plain, _plain, [False, False]),
        (512, 512, 1020, 16, _plain, _plain, [False, False]),
        (512, 512, 1020, 16, _part_of_longer_rows, _part_of_longer_rows, [True, False]),
        (1024, 4096, 512, 256, _plain, _plain, [True, True]),  # dy is read twice
        (16, 1024, 512, 16, _plain, _plain, []),
    ],
)
def test_explain_tells_both_directions_as_they_are_launched(
    M: int,
    N: int,
    K: int,
    r: int,
    make_x: Callable[[int, int], torch.Tensor],
    make_weight: Callable[[int, int], torch.Tensor],
    tma: list[bool],
    device: str,
) -> None:
    with assume("sm_90"), torch.device(device):
        x, weight, dy, A, B = make_x(M, K), make_weight(N, K), _plain(M, N), _plain(r, K), _plain(N, r)
        with record_launches() as launches:
            training_step(lora_linear, x, [dy], [Member(weight, A, B)])
        kernels = lk.explain(x, weight, A, impl="triton").kernels
    told_as_launched(kernels, launches)
    assert ["linear_expand_tma" in i.kernel.__name__ for i in launches if "linear" in i.kernel.__name__] == tma


def test_gradients_of_more_slots_than_a_grid_has_rows() -> None:
    S, T, R, K = 70_000, 128, 8, 64
    plan = lk.BatchPlan(S, T, max_rank=R, device="meta").tensors
    x, dy, W, s = (torch.empty(size, device="meta") for size in ((T, K), (T, K), (K, K), (1, T, R)))
    A, B = torch.empty(S, R, K, device="meta"), torch.empty(S, K, R, device="meta")
    with record_launches() as launches:
        multi_lora.backward([dy], x, [W], [A], [B], plan, s, None, need_dx=True, need_dA=True, need_dB=True)
    assert all(max(launch.grid[1:], default=1) <= 65_535 for launch in launches)


@pytest.mark.parametrize("paged", [False, True])
def test_flops_are_the_most_that_a_batch_may_take(paged: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    case = MultiCase("counted", Ns=(24, 20), paged=paged, bias=False)
    inputs = make_multi_inputs(case, torch.float32)
    plan, A, B = inputs.plan, inputs.lora_A, inputs.lora_B
    T, R, K, N = case.T, plan.max_rank if paged else case.R, case.K, sum(case.Ns)

    def counted(call: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    ys: list[torch.Tensor] = []
    forward = 2 * T * (N * K + R * (N + 2 * K))
    for tensor in (inputs.x, *A, *B):
        tensor.requires_grad_()
    assert counted(lambda: ys.extend(lk.multi_lora_linear(inputs.x, inputs.weight, A, B, plan))) == forward
    assert counted(lambda: torch.autograd.backward(ys, inputs.dys)) == 2 * T * (N * K + R * 2 * (N + 2 * K))
    for tensor in (inputs.x, *A):
        tensor.requires_grad_(False)
    ys = list(lk.multi_lora_linear(inputs.x, inputs.weight, A, B, plan))
    assert counted(lambda: torch.autograd.backward(ys, inputs.dys)) == 2 * T * R * N  # dB alone
    with torch.no_grad():
        assert counted(lambda: lk.lora_shrink(inputs.x, A, plan)) == 2 * T * R * 2 * K
        s, outs = lk.lora_shrink(inputs.x, A, plan), [torch.zeros(T, n) for n in case.Ns]
        assert counted(lambda: lk.lora_expand(s, B, plan, out=outs)) == 2 * T * R * N
