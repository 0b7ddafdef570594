"""Every launch that the shipped configurations make: what the compile gate compiles."""

from __future__ import annotations

import itertools

import torch

from lorakernels.kernels import lora_linear, multi_lora
from lorakernels.kernels.launch import Launch, record_launches
from lorakernels.member import Member, training_step
from lorakernels.plan import BatchPlan

# float16 compiles to the same instructions as bfloat16, with the other operand type.
DTYPES = (torch.bfloat16, torch.float32)
# The few-token form with its smallest and largest block of rows, then the general form.
TOKENS = (1, 200, 8192)
# The narrowest and the widest BLOCK_R.
RANKS = (8, 64)
ALIGNED, ODD = (4096, 4096), (131, 97)
# Many adapters: tokens and slots of each form (a program a token, tiles of 16, tiles of 64), and the widths of q, k, v.
BATCHES = ((64, 64), (256, 32), (2048, 8))
QKV = (4096, 1024, 1024)


def shipped_launches() -> list[Launch]:
    """The launches of forward and backward over dtypes, forms, ranks, alignment and dropout, on meta tensors."""
    with record_launches() as launches:
        for dtype, M, r in itertools.product(DTYPES, TOKENS, RANKS):
            _step(dtype, dtype, M, r, ALIGNED, threshold=0, bias=True)
            _step(dtype, torch.float32, M, r, ALIGNED, threshold=6554, bias=False)
            _step(dtype, torch.float32, M, r, ALIGNED, threshold=0, bias=True, row_scale=True)
        for M in TOKENS:
            _step(torch.bfloat16, torch.bfloat16, M, 5, ODD, threshold=6554, bias=True, row_scale=True)
        for dtype, M in itertools.product(DTYPES, TOKENS[1:]):
            _group_step(dtype, M, 16, 4096, QKV, threshold=0)
            _group_step(dtype, M, 16, 4096, QKV, threshold=6554)
        _group_step(torch.bfloat16, TOKENS[-1], 5, 97, (131, 33, 33), threshold=6554)
        for T, num_slots in BATCHES:
            _multi_step(torch.bfloat16, T, num_slots, 16, 4096, QKV, paged=False, train=False)
            _multi_step(torch.bfloat16, T, num_slots, 64, 4096, (4096,), paged=True, train=False)
            _multi_step(torch.float32, T, num_slots, 16, 4096, (4096,), paged=T == 64, train=False)
        for dtype in DTYPES:
            _multi_step(dtype, *BATCHES[-1], 16, 4096, (4096,), paged=False, train=True, threshold=6554)
        _multi_step(torch.bfloat16, *BATCHES[-1], 64, 4096, QKV, paged=False, train=True)
        for T, num_slots in BATCHES:
            train = T > 64  # a program a token draws no dropout
            _multi_step(
                torch.bfloat16, T, num_slots, 64, 97, (131,), paged=False, train=train, threshold=6554 if train else 0
            )
    return launches


def _step(
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    M: int,
    r: int,
    sizes: tuple[int, int],
    *,
    threshold: int,
    bias: bool,
    row_scale: bool = False,
) -> None:
    N, K = sizes

    def meta(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    x, dy, scale = meta(M, K), meta(M, N), meta(N, of=torch.float32) if row_scale else None
    lora_A, lora_B = meta(r, K, of=adapter_dtype), meta(N, r, of=adapter_dtype)
    member = Member(meta(N, K), lora_A, lora_B, meta(N) if bias else None, scale, 0.5)
    if row_scale:
        lora_linear.grad_row_scale(dy, x, member.weight, (meta(M, r), lora_B), 0.5)
        lora_linear.project(member.weight, lora_A)
    training_step(lora_linear, x, [dy], [member], threshold, need_dbias=bias)


def _group_step(dtype: torch.dtype, M: int, r: int, K: int, Ns: tuple[int, ...], *, threshold: int) -> None:
    def meta(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    def factor(*shape: int) -> torch.Tensor:
        return meta(*shape, of=torch.float32)

    members = [Member(meta(N, K), factor(r, K), factor(N, r), scaling=0.5) for N in Ns]
    training_step(lora_linear, meta(M, K), [meta(M, N) for N in Ns], members, threshold)


def _multi_step(
    dtype: torch.dtype,
    T: int,
    num_slots: int,
    R: int,
    K: int,
    Ns: tuple[int, ...],
    *,
    paged: bool,
    train: bool,
    threshold: int = 0,
) -> None:
    def meta(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    num_pages = num_slots * R if paged else None
    plan = BatchPlan(num_slots, T, max_rank=R, num_pages=num_pages, device="meta").tensors
    x, weights = meta(T, K), [meta(N, K) for N in Ns]
    lora_As = [meta(num_slots * R, K) if paged else meta(num_slots, R, K) for _ in Ns]
    lora_Bs = [meta(num_slots * R, N) if paged else meta(num_slots, N, R) for N in Ns]
    seed = meta(1, of=torch.int64) if threshold else None
    thresholds = meta(num_slots + 1, of=torch.int32) if threshold else None
    _, s, mask = multi_lora.forward(
        x, weights, [None] * len(Ns), lora_As, lora_Bs, plan, keep_s=train, seed=seed, thresholds=thresholds
    )
    if train:
        dys = [meta(T, N) for N in Ns]
        multi_lora.backward(dys, x, weights, lora_As, lora_Bs, plan, s, mask, need_dx=True, need_dA=True, need_dB=True)
