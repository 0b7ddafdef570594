"""The kernel in Gluon, whose source runs here on a model of what it asks of Hopper: nothing else here can run it.

The model is as slow as the hardware may be: what is copied or multiplied is there when it is waited for and no sooner,
while what it overwrites is gone at once, and what it reads is read at the end. It knows one thread, and that all have
met where they must: before a copy overwrites what they have read, and after they have written what it reads.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import assume
from lorakernels.configs.table import forced_configs
from lorakernels.kernels import linear_expand_gluon as kernel
from lorakernels.kernels.launch import record_launches
from lorakernels.kernels.linear_expand import LowRank, linear_expand
from lorakernels.kernels.tiles import Epilogue, Matrix, transposed

BM, BN, BK, BR = 4, 8, 4, 2
NAN = float("nan")


class Tile:
    """Values in registers, which may be those of products that have not ended."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.products = values, []
        self.shape = values.shape
        self.type = SimpleNamespace(layout=None)

    def read(self) -> torch.Tensor:
        assert not self.products, "an accumulator is read while its products run"
        return self.values

    def __mul__(self, factor: float) -> Tile:
        return Tile(self.read() * factor)

    def to(self, dtype: Any) -> Tile:
        return self


class Shared:
    """Shared memory."""

    def __init__(self, machine: Machine, values: torch.Tensor) -> None:
        self.machine, self.values, self.shape = machine, values, values.shape

    def index(self, slot: int) -> Shared:
        return Shared(self.machine, self.values[slot])

    def permute(self, order: tuple[int, int]) -> Shared:
        return Shared(self.machine, self.values.permute(order))

    def reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        assert shape[0] * shape[1] <= self.values.numel()
        return Shared(self.machine, self.values.view(-1)[: shape[0] * shape[1]].view(shape))

    _reinterpret = reinterpret

    def store(self, tile: Tile) -> None:
        assert self.machine.met, "shared memory is written while another thread, or a copy, may read it"
        self.values.copy_(tile.read())
        self.machine.met = self.machine.fenced = False


class Barrier:
    def __init__(self) -> None:
        self.phase, self.expected, self.copies = 0, 0, []


class Barriers(list):
    index = list.__getitem__


class Machine:
    """One program's multiprocessor, and the names that the kernel finds in its module."""

    def __init__(self, program: int, programs: int) -> None:
        self.met, self.fenced, self.stores, self.num_loads = False, True, [], 0
        layout: Any = lambda *_: None  # noqa: E731
        constant = SimpleNamespace(get_default_for=layout)
        self.gl = SimpleNamespace(
            program_id=lambda _: program, num_programs=lambda _: programs, num_warps=lambda: 8, int64="barriers",
            cdiv=lambda a, b: -(-a // b), arange=lambda start, end, layout: torch.arange(start, end),
            static_range=range, static_assert=lambda fits: None, float32=None, constexpr=None,
            zeros=lambda shape, *_: Tile(torch.zeros(shape)), convert_layout=lambda acc, _: acc,
            reshape=lambda acc, shape: acc.read().reshape(shape), permute=torch.permute,
            split=lambda halves: [Tile(half) for half in halves.unbind(-1)],
            allocate_shared_memory=self.allocate, NVMMASharedLayout=constant,
            **dict.fromkeys(("SliceLayout", "NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout"), layout),
        )  # fmt: skip
        self.mbarrier = SimpleNamespace(init=self.init, expect=self.expect, wait=self.wait, MBarrierLayout=lambda: None)
        self.tma = SimpleNamespace(store_wait=self.store_wait)

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        if dtype == "barriers":
            return Barriers(Barrier() for _ in range(shape[0]))
        return Shared(self, torch.full(shape, NAN))

    def init(self, barrier: Barrier, count: int) -> None:
        assert count == 1
        self.met = False

    def all_threads(self) -> None:
        self.met = True

    def fence(self) -> None:
        self.fenced = True

    def expect(self, barrier: Barrier, num_bytes: int, wanted: bool) -> None:
        if wanted:
            assert self.met and not barrier.expected, "a barrier's phase has not ended, and gets other bytes"
            barrier.expected = num_bytes

    def load(self, desc: Any, at: list[int], barrier: Barrier, into: Shared, wanted: bool) -> None:
        if wanted:
            assert self.met, "a thread may still read what a copy overwrites"
            into.values.fill_(NAN)
            block = torch.zeros(desc.block_shape)
            inside = desc.base[at[0] : at[0] + block.shape[0], at[1] : at[1] + block.shape[1]]
            block[: inside.shape[0], : inside.shape[1]] = inside
            barrier.copies.append((into.values, block))
            self.num_loads += 1

    def wait(self, barrier: Barrier, phase: int) -> None:
        if barrier.phase & 1 == phase:
            assert barrier.expected == sum(2 * block.numel() for _, block in barrier.copies) > 0, "waits for ever"
            for target, block in barrier.copies:
                target.copy_(block)
            barrier.phase, barrier.expected, barrier.copies = barrier.phase + 1, 0, []

    def mma(self, a: Any, b: Shared, acc: Tile, is_async: bool = False) -> Tile:
        assert is_async or (self.met and self.fenced), "B is read before all of it is there"
        a = a.read() if isinstance(a, Tile) else a.values
        acc.products.append((a, b.values))
        return acc if is_async else self.mma_wait(0, (acc,))

    def mma_wait(self, pending: int, accs: tuple[Tile]) -> Tile:
        (acc,) = accs
        while len(acc.products) > pending:
            a, b = acc.products.pop(0)
            acc.values = acc.values + a @ b
        self.met = False
        return acc

    def store(self, desc: Any, at: list[int], tile: Shared) -> None:
        assert self.met and self.fenced, "a copy reads what not all threads have written"
        self.stores.append((desc.base, at, tile.values))

    def store_wait(self, pending: int) -> None:
        for y, at, values in self.stores[: len(self.stores) - pending]:
            inside = y[at[0] : at[0] + values.shape[0], at[1] : at[1] + values.shape[1]]
            assert not inside.isfinite().any(), "a tile is stored twice"
            inside.copy_(values[: inside.shape[0], : inside.shape[1]])
        self.stores = self.stores[len(self.stores) - pending :]
        self.met = False


def tile_of(tile: int, M: int, N: int, block_m: int, block_n: int, group_m: int) -> tuple[int, int]:
    assert 0 <= tile < -(-M // block_m) * -(-N // block_n)
    return divmod(tile, -(-N // block_n))


def load_tile(matrix: Matrix, rows: torch.Tensor, cols: torch.Tensor) -> Tile:
    at = rows[:, None] * matrix.strides[0] + cols[None, :] * matrix.strides[1]
    inside = (rows[:, None] < matrix.rows) & (cols[None, :] < matrix.cols)
    return Tile(torch.where(inside, matrix.ptr.values[at * inside], 0.0))


def finish(part: Tile, epilogue: Epilogue, cols: torch.Tensor, N: int, split: None) -> Tile:
    inside = cols < N
    return Tile(part.read() + torch.where(inside, epilogue.bias[cols * inside], 0.0))


def pointer(matrix: torch.Tensor) -> Any:
    flat = torch.as_strided(matrix, (matrix.untyped_storage().nbytes() // 4,), (1,))
    return SimpleNamespace(values=flat, dtype=SimpleNamespace(element_ty=SimpleNamespace(primitive_bitwidth=16)))


def names(K: int = 192, *, r: int = 16, more: int = 0, **options: Any) -> list[str]:
    """What linear_expand launches, with a config in Gluon."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    config = KernelConfig(128, 256, 64, num_warps=8, num_stages=4, tma=True, late=True, halves=True, gluon=True)
    pairs = [(empty(256, K), empty(512, K)) for _ in range(1 + more)]
    with assume("sm_90"), forced_configs({"linear_expand": config}), record_launches() as launches:
        linear_expand(*pairs[0], empty(256, r), empty(512, r), more=pairs[1:], **options)
    return [launch.kernel.fn.__name__ for launch in launches]


def test_what_it_cannot_do_falls_to_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    gluon, other = ["linear_expand_gluon_kernel"], ["linear_expand_tma_kernel"]
    monkeypatch.setattr("lorakernels.kernels.linear_expand.interpreter_on", lambda: True)
    assert names() == other
    monkeypatch.setattr("lorakernels.kernels.linear_expand.interpreter_on", lambda: False)
    assert names() == names(K=136) == names(bias=torch.empty(512, device="meta")) == gluon
    assert names(K=128) == names(more=1) == names(mask=torch.empty(256, 64, device="meta")) == other
    assert names(r=0) == other and names(K=129) == ["linear_expand_kernel"]
    assert names(dot=torch.empty(256, 512, device="meta"))[0] == "linear_expand_tma_kernel"


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("halves", [False, True])
def test_a_model_of_the_hardware_gives_the_formula(stages: int, halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("slot_of", "phase_of", "_load", "_multiply", "_store"):
        monkeypatch.setattr(kernel, name, getattr(kernel, name).fn)
    monkeypatch.setattr(kernel, "tile_of", tile_of)
    monkeypatch.setattr(kernel, "load_tile", load_tile)
    monkeypatch.setattr(kernel, "finish", finish)
    monkeypatch.setattr(kernel, "sized", lambda m, rows, cols: Matrix(m.ptr, rows, cols, m.strides))
    waits: list[str] = []
    monkeypatch.setattr(
        kernel,
        "tl",
        SimpleNamespace(extra=SimpleNamespace(cuda=SimpleNamespace(gdc_wait=lambda: waits.append("wait")))),
    )
    sizes = itertools.product((BM - 1, 3 * BM), (BN, 2 * BN + 3), ((stages - 2) * BK + 1, (2 * stages + 1) * BK))
    for (M, N, K), programs, R, w_is_nk in itertools.product(sizes, (1, 2, 5), (1, 5), (True, False)):
        num_tiles = -(-M // BM) * -(-N // BN)
        programs = min(programs, num_tiles)
        x, weight, s, B, bias = (torch.randn(shape) for shape in ((M, K), (N, K), (M, R), (N, R), (N,)))
        y, w = torch.full((M, N), NAN), weight if w_is_nk else weight.t().contiguous()

        def desc(base: torch.Tensor, *block: int) -> Any:
            of = SimpleNamespace(nbytes=2 * block[0] * block[1])
            return SimpleNamespace(base=base, block_shape=block, block_type=of, dtype=None, layout=None)

        blocks = -(-K // BK)
        for program in range(programs):
            machine = Machine(program, programs)
            for name, model in {
                **{"gl": machine.gl, "mbarrier": machine.mbarrier, "tma": machine.tma, "tma_load": machine.load},
                **{"tma_store": machine.store, "all_threads": machine.all_threads, "fence_async_shared": machine.fence},
                **{"warpgroup_mma": machine.mma, "warpgroup_mma_wait": machine.mma_wait},
            }.items():
                monkeypatch.setattr(kernel, name, model)
            b = transposed(B)
            kernel.linear_expand_gluon_kernel.fn(
                desc(x, BM, BK), desc(w, *((BN, BK) if w_is_nk else (BK, BN))), desc(y, BM, BN // (1 + halves)),
                LowRank(Matrix(pointer(s), None, R, s.stride()), Matrix(pointer(B), *b[1:]), None, 0.5),
                Epilogue(None, bias), M, K, w_is_nk, True, halves, True, stages, BM, BN, BK, BR, 1,
            )  # fmt: skip
            mine = len(range(program, num_tiles, programs))
            assert not machine.stores and machine.num_loads == 2 * blocks * mine and len(waits) == mine
            waits.clear()
        torch.testing.assert_close(y, x @ weight.t() + 0.5 * (s @ B.t()) + bias)
