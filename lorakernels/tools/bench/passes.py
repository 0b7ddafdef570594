"""The passes of the package's own kernels, from the configs that they would take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.table import choose, takes_few_tokens_form, takes_one_pass
from lorakernels.tools.bench.registry import Case

_SEED_BYTES = 8


@dataclass(frozen=True)
class Pass:
    """One kernel or torch product: bytes read and written, and those of them in matrices of a row a token."""

    name: str
    bytes: int
    tall: int
    flops: int = 0


@dataclass(frozen=True)
class Sizes:
    """Bytes of the matrices of a case."""

    case: Case

    def tall(self, features: int) -> int:
        return self.case.M * features * self.case.itemsize

    @property
    def x(self) -> int:
        return self.tall(self.case.K)

    @property
    def y(self) -> int:
        return self.tall(self.case.N)

    @property
    def s(self) -> int:
        return self.tall(self.case.r)

    @property
    def W(self) -> int:
        return self.case.N * self.case.K * self.case.itemsize

    @property
    def A(self) -> int:
        return self.case.r * self.case.K * self.case.itemsize

    @property
    def B(self) -> int:
        return self.case.N * self.case.r * self.case.itemsize

    @property
    def byte_mask(self) -> int:
        return self.case.M * self.case.K


def base_products(size: Sizes) -> tuple[Pass, Pass]:
    """The frozen layer's two products."""
    case = size.case
    tall, flops = size.x + size.y, 2 * case.M * case.N * case.K
    return Pass("x Wᵀ", tall + size.W, tall, flops), Pass("dy W", tall + size.W, tall, flops)


def rank_flops(case: Case, features: int) -> int:
    """Of a product of rank r over `features`, for every token."""
    return 2 * case.M * features * case.r


def own_passes(case: Case, device: torch.device, cublas: bool) -> list[Pass]:
    """Forward and backward by the kernels of this package; with `cublas` the base product is torch\'s own."""
    M, N, K, r = case.M, case.N, case.K, case.r
    size = Sizes(case)
    y_base, dx_base = base_products(size)
    over_K, over_N = rank_flops(case, K), rank_flops(case, N)
    mask = M * _cdiv(K, 8) if case.dropout else 0
    few = takes_few_tokens_form(M, r, case.itemsize)
    if few:
        forward = _few_tokens(case, device, y_base, N, K, over_K + over_N, mask + _SEED_BYTES if mask else 0, mask)
        dx = _few_tokens(case, device, dx_base, K, N, over_K + over_N, mask, mask)
    else:
        seed = _SEED_BYTES if mask else 0
        forward = [
            *_shrink(case, device, "S = D(x) Aᵀ", K, mask, seed),
            *_expand(y_base, "x Wᵀ + S Bᵀ", size.s + size.B, size.y, over_N, cublas, 0),
        ]
        dx = _expand(dx_base, "dy W + D'(G A)", size.s + size.A + mask, size.x, over_K, cublas, mask)
    return [*forward, *_dy_pass(case, device, need_g=not few), *_outer(case, device, "dA", K, mask=mask), *dx]


def _shrink(case: Case, device: torch.device, name: str, features: int, mask: int, seed: int) -> list[Pass]:
    """z [M, features] to [M, r]: a round for each block of ranks."""
    config = _config("shrink", case, device, features, features)
    rounds = _cdiv(case.r, config.BLOCK_R)
    tall = rounds * case.M * features * case.itemsize + mask
    read = tall + case.r * features * case.itemsize + seed
    flops = rank_flops(case, features)
    return _with_planes(Pass(name, read, tall, flops), [(config.SPLIT, case.M * case.r, case.itemsize)])


def _expand(base: Pass, name: str, operands: int, out: int, flops: int, cublas: bool, mask: int) -> list[Pass]:
    if cublas:
        return [base, Pass(name, operands + 2 * out, 2 * out + mask, flops)]
    return [with_more(base, name, operands, mask, flops)]


def _few_tokens(
    case: Case, device: torch.device, base: Pass, out: int, summed: int, flops: int, mask: int, tall_mask: int
) -> list[Pass]:
    """The whole layer; y [M, out] and S [M, r] are split into the same number of planes."""
    config = _config("few_tokens", case, device, out, summed)
    y = case.M * out
    # base counts y as written; its planes are counted below.
    written = y * case.itemsize
    adapters = case.r * (case.N + case.K) * case.itemsize
    one = Pass(
        f"{base.name}, whole", base.bytes - written + adapters + mask, base.tall - written + tall_mask, base.flops
    )
    one = replace(one, flops=one.flops + flops)
    planes = [(config.SPLIT, y, case.itemsize), (config.SPLIT, case.M * case.r, case.itemsize)]
    first, *rest = _with_planes(one, planes)
    # Of the planes, y's are tall.
    first = replace(first, tall=first.tall + (written if config.SPLIT == 1 else 4 * config.SPLIT * y))
    if rest:
        rest[0] = replace(rest[0], tall=rest[0].bytes)
    return [first, *rest]


def _dy_pass(case: Case, device: torch.device, need_g: bool) -> list[Pass]:
    config = _config("outer", case, device, case.N, case.N)
    one = need_g and takes_one_pass(case.N, case.r, case.itemsize, config.BLOCK_N)
    if one:
        return _outer(case, device, "G and dB", case.N, g=True)
    shrink = _shrink(case, device, "G = dy B", case.N, 0, 0) if need_g else []
    # B is handed to the kernel but not read.
    return [*shrink, *_outer(case, device, "dB", case.N)]


def _outer(case: Case, device: torch.device, name: str, features: int, g: bool = False, mask: int = 0) -> list[Pass]:
    """zᵀ t of z [M, features], with G = z B beside it when `g`: a round for each block of ranks."""
    config = _config("outer", case, device, features, features)
    rounds = _cdiv(case.r, config.BLOCK_R)
    narrow, vector = case.r * features, case.M * case.r
    tall = rounds * (case.M * features * case.itemsize + mask)
    read = tall + vector * case.itemsize + (narrow * case.itemsize if g else 0)
    planes = [(config.SPLIT, narrow, case.itemsize)]
    if g:
        planes.append((_cdiv(features, config.BLOCK_N), vector, case.itemsize))
    return _with_planes(Pass(name, read, tall, rank_flops(case, features) * (1 + g)), planes)


def _with_planes(first: Pass, results: Iterable[tuple[int, int, int]]) -> list[Pass]:
    """`first` writing its results of (planes, elements, itemsize); more than one plane are added by a second kernel."""
    sums = []
    for planes, numel, itemsize in results:
        if planes == 1:
            first = replace(first, bytes=first.bytes + numel * itemsize)
        else:
            first = replace(first, bytes=first.bytes + 4 * planes * numel)
            sums.append(Pass("sum of planes", (4 * planes + itemsize) * numel, 0))
    return [first, *sums]


def with_more(base: Pass, name: str, more_bytes: int, more_tall: int, more_flops: int) -> Pass:
    """A base product that does more on the way."""
    return Pass(name, base.bytes + more_bytes, base.tall + more_tall, base.flops + more_flops)


def _config(operation: str, case: Case, device: torch.device, N: int, K: int) -> KernelConfig:
    return choose(operation, case.M, N, K, case.r, case.itemsize, device)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
