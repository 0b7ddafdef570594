"""Steps on meta tensors: what they launch is recorded, to be compiled, counted or tuned."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import device_of
from lorakernels.configs.table import forced_configs
from lorakernels.member import Member, training_step
from lorakernels.plan import BatchPlan
from lorakernels.plan_layout import plan_layout
from lorakernels.quant.packed import CODES, Form, PackedWeight
from lorakernels.quant.stacks import PackedStack
from lorakernels.route import ExpertRoute

# float16 alone compiles to the same instructions as bfloat16, with the other operand type.
DTYPES = (torch.bfloat16, torch.float32)
# The few-token form with its smallest and largest block of rows, then the general form.
TOKENS = (1, 200, 8192)
# The narrowest and the widest BLOCK_R.
RANKS = (8, 64)
ALIGNED, ODD = (4096, 4096), (131, 97)
# Many adapters: tokens and slots of each form (a program a token, tiles of 16, tiles of 64), and the widths of q, k, v.
BATCHES = ((64, 64), (256, 32), (2048, 8))
QKV = (4096, 1024, 1024)
# Of experts: tokens, their choices, how many there are, hidden and inner features, whether the stacks are transposed.
# Qwen3-30B-A3B's in training and with few rows an expert and fewer, gpt-oss-20b's, and odd ones.
MIXTURES = (
    (4096, 8, 128, 2048, 768, False),
    (512, 8, 128, 2048, 768, False),
    (8, 8, 128, 2048, 768, False),
    (4096, 4, 32, 2880, 2880, True),
    (512, 3, 5, 97, 131, False),
)
PACKED = ("nf4-nested", "int4", "int8", "fp8")
_THRESHOLD = 6554  # of p = 0.1
# What no heuristic takes, and a table may.
_GLUON = KernelConfig(
    128, 256, 64, 16, num_warps=8, num_stages=4, tma=True, late=True, halves=True, dependent=True, gluon=True
)


def shipped_launches() -> list[Any]:
    """What the compile gate compiles: forward and backward over dtypes, forms, ranks, alignment and dropout."""
    from lorakernels.kernels import lora_linear
    from lorakernels.kernels.launch import as_if_captured, record_launches

    step, (N, K), (odd_N, odd_K), single = partial(layer_step, lora_linear), ALIGNED, ODD, torch.float32
    with record_launches() as launches:
        for dtype, M, r in itertools.product(DTYPES, TOKENS, RANKS):
            if dtype is not single:  # that step's kernels but for the row scale are the last one's
                step(dtype, M, K, [(N, r)], bias=True)
            step(dtype, M, K, [(N, r)], _THRESHOLD, factor_dtype=single)
            step(dtype, M, K, [(N, r)], factor_dtype=single, bias=True, row_scale=True)
        for M in TOKENS:
            step(torch.float16, M, K, [(N, 16)], _THRESHOLD, factor_dtype=single)
            step(torch.bfloat16, M, odd_K, [(odd_N, 5)], _THRESHOLD, bias=True, row_scale=True)
        for dtype, M, threshold in itertools.product(DTYPES, TOKENS[1:], (0, _THRESHOLD)):
            step(dtype, M, K, [(N, 16) for N in QKV], threshold, factor_dtype=single)
        step(torch.bfloat16, TOKENS[-1], odd_K, [(N, 5) for N in (odd_N, 33, 33)], _THRESHOLD, factor_dtype=single)
        for kind, M in [(PACKED[0], TOKENS[0]), *itertools.product(PACKED, TOKENS[1:])]:
            step(torch.bfloat16, M, K, [(N, 16)], factor_dtype=single, packed=kind)
        for dtype, kind in ((single, "nf4"), (torch.bfloat16, "mxfp4")):
            step(dtype, TOKENS[1], K, [(N, 16)], packed=kind)
        with as_if_captured():
            for M, r in itertools.product((1, 64), RANKS):
                step(torch.bfloat16, M, K, [(N, r)], bias=True)
                step(single, M, 2 * K, [(N // 4, r // 2)], bias=True, row_scale=True)
            for threshold in (0, _THRESHOLD):
                step(torch.float16, 64, K, [(N, 16)], threshold, factor_dtype=single, bias=True, row_scale=True)
            step(torch.bfloat16, 16, 2 * K + 1, [(N // 2 + 3, 5)], factor_dtype=single, bias=True, row_scale=True)
        if device_of(torch.device("meta")).arch == "sm_90":
            with forced_configs({"linear_expand": _GLUON}):
                step(torch.bfloat16, TOKENS[-1], K, [(N, 16)], factor_dtype=single, bias=True)
        for T, slots in BATCHES:
            multi_step(torch.bfloat16, T, slots, 16, 4096, QKV, train=False)
            multi_step(torch.bfloat16, T, slots, 64, 4096, (4096,), paged=True, train=False)
            multi_step(torch.float32, T, slots, 16, 4096, (4096,), paged=T == 64, train=False)
        multi_step(torch.bfloat16, *BATCHES[0], 16, 4096, (4096,), train=False, packed="nf4")
        for paged in (False, True):
            multi_step(torch.bfloat16, *BATCHES[0], 64, 4096, QKV, update=True, paged=paged)
        for dtype in DTYPES:
            multi_step(dtype, *BATCHES[-1], 16, 4096, (4096,), _THRESHOLD)
        multi_step(torch.float16, *BATCHES[-1], 16, 4096, (4096,), _THRESHOLD, factor_dtype=single)
        multi_step(torch.bfloat16, *BATCHES[-1], 64, 4096, QKV)
        for T, slots in BATCHES:
            train = T > 64  # a program a token draws no dropout
            multi_step(torch.bfloat16, T, slots, 64, 97, (131,), _THRESHOLD if train else 0, train=train)
        for mixture in MIXTURES:
            expert_step(torch.bfloat16, *mixture)
        expert_step(torch.bfloat16, *MIXTURES[0], _THRESHOLD)
        expert_step(torch.float16, *MIXTURES[0])
        for mixture in MIXTURES[:3]:
            expert_step(torch.float32, *mixture)
        for kind, mixture in itertools.product(("nf4-nested", "int8"), (MIXTURES[0], MIXTURES[2])):
            expert_step(torch.bfloat16, *mixture, packed=kind)
        expert_step(torch.float32, *MIXTURES[2], packed="nf4")
        for adapters, paged in ((64, True), (2, False)):
            expert_plan_step(*MIXTURES[0][:3], adapters, paged)
    return launches


def layer_step(
    implementation: ModuleType,
    dtype: torch.dtype,
    M: int,
    K: int,
    sizes: Sequence[tuple[int, int]],
    threshold: int = 0,
    *,
    factor_dtype: torch.dtype | None = None,
    bias: bool = False,
    row_scale: bool = False,
    packed: str = "",
    device: str = "meta",
) -> None:
    """A training step of one or several linears (N, r) of one x [M, K], by the kernels' `lora_linear` or eager's."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device=device)

    x, dys, own = empty(M, K), [empty(M, N) for N, _ in sizes], factor_dtype or dtype
    members = [
        Member(
            packed_weight(packed, N, K) if packed else empty(N, K), empty(r, K, of=own), empty(N, r, of=own),
            empty(N) if bias else None, empty(N, of=torch.float32) if row_scale else None, 0.5,
        )
        for N, r in sizes
    ]  # fmt: skip
    training_step(implementation, x, dys, members, threshold, need_dbias=bias)


def packed_weight(kind: str, N: int, K: int) -> PackedWeight:
    """One on the meta device, of a format, or with "-nested" of one whose scales are packed too."""
    kind, _, nested = kind.partition("-")
    meta, block = partial(torch.empty, device="meta"), {"mxfp4": 32}.get(kind, 64) if kind in CODES else K
    form = Form(kind, N, K, 0 if kind in ("nf4", "fp4") else 1, block, torch.bfloat16)
    scale = meta((N, K // block), dtype=torch.uint8 if nested or kind == "mxfp4" else torch.float32)
    if kind not in CODES:
        return PackedWeight(str(form), meta((N, K), dtype=torch.int8 if kind == "int8" else torch.float8_e4m3fn), scale)
    data, zero = meta((N, K // 2), dtype=torch.uint8), meta(scale.shape) if kind == "int4" else None
    outer = (meta(256), meta(-(-scale.numel() // 256)), meta(())) if nested else ()
    return PackedWeight(str(form), data, scale, zero, *outer)


def multi_step(
    dtype: torch.dtype,
    T: int,
    slots: int,
    R: int,
    K: int,
    Ns: Sequence[int],
    threshold: int = 0,
    *,
    factor_dtype: torch.dtype | None = None,
    paged: bool = False,
    train: bool = True,
    update: bool = False,
    packed: str = "",
) -> None:
    """A forward, or a training step, or the update alone, of slices of widths Ns for many adapters, by the kernels."""
    from lorakernels.kernels import multi_lora

    def meta(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    plan = BatchPlan(slots, T, max_rank=R, num_pages=slots * R if paged else None, device="meta").tensors
    x, dys = meta(T, K), [meta(T, N) for N in Ns]
    weights: list[Any] = [packed_weight(packed, N, K) if packed else meta(N, K) for N in Ns]
    own = factor_dtype or dtype
    As = [meta(slots * R, K, of=own) if paged else meta(slots, R, K, of=own) for _ in Ns]
    Bs = [meta(slots * R, N, of=own) if paged else meta(slots, N, R, of=own) for N in Ns]
    if update:
        multi_lora.add(x, As, Bs, plan, dys)
        return
    seed, thresholds = (meta(1, of=torch.int64), meta(slots + 1, of=torch.int32)) if threshold else (None, None)
    _, s, mask = multi_lora.forward(
        x, weights, [None] * len(Ns), As, Bs, plan, keep_s=train, seed=seed, thresholds=thresholds
    )
    if train:
        multi_lora.backward(dys, x, weights, As, Bs, plan, s, mask, need_dx=True, need_dA=True, need_dB=True)


def expert_step(
    dtype: torch.dtype,
    T: int,
    top_k: int,
    num_experts: int,
    hidden: int,
    inner: int,
    transposed: bool,
    threshold: int = 0,
    *,
    packed: str = "",
) -> None:
    """A training step of a mixture's two projections with PEFT's factors of rank 16, by the kernels."""
    from lorakernels.kernels import experts

    meta, r = partial(torch.empty, device="meta", dtype=dtype), 16
    order, inverse, starts, plan = experts.route(meta((T, top_k), dtype=torch.int64), num_experts)
    where = ExpertRoute(order, inverse, starts, plan, top_k)
    seed = meta(1, dtype=torch.int64) if threshold else None
    for N, K in ((2 * inner, hidden), (hidden, inner)):
        x, dy = meta(T * top_k, K), meta(T * top_k, N)
        weight: Any = meta(num_experts, K, N).mT if transposed else meta(num_experts, N, K)
        if packed:
            weight = PackedStack(packed_weight(packed, num_experts * N, K), num_experts)
        bias = meta(num_experts, N) if transposed else None
        A, B = meta(num_experts, r, K), meta(N, r, num_experts).permute(2, 0, 1)
        _, s, mask = experts.forward(x, weight, A, B, bias, where, seed, threshold, 0.5)
        experts.backward(dy, x, weight, A, B, where, s, mask, threshold, 0.5, need_dx=True, need_dA=True, need_dB=True)


def expert_plan_step(T: int, top_k: int, num_experts: int, adapters: int, paged: bool) -> None:
    """The plan of a batch of many adapters of a mixture, by the kernels."""
    from lorakernels.kernels import expert_route

    meta = partial(torch.empty, device="meta")
    order, _, _, route = expert_route.route(meta((T, top_k), dtype=torch.int64), num_experts)
    layout, S, P = plan_layout(num_experts, T * top_k), num_experts * adapters, T * top_k
    options: dict[str, Any] = {"max_rank": 16, "num_pages": 1 << 16 if paged else None}
    plan = BatchPlan(S, P, **options, device="meta")
    ranks, scalings = meta(adapters, dtype=torch.int64), meta(adapters)
    table = meta(S, 16, dtype=torch.int32) if paged else None
    expert_route.route_adapters(
        plan.tensors, plan.masked, route[layout.slots : layout.slots + P], order, top_k, num_experts,
        meta(T, dtype=torch.int32), ranks, scalings, table, 1 << 16, 16,
    )  # fmt: skip
