"""y = x Wᵀ + scale · S Bᵀ + bias for Hopper, pipelined across tiles: while a tile ends, the next one is loaded.

In Gluon, Triton's lower language, in which the program says itself what is copied, and when what it waits for is
there. It has been compiled and read, and has neither run on a GPU nor been measured: no heuristic chooses it, only a
table may, and the tuner compares it with plain torch before it writes one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lorakernels.configs.config import KernelConfig
from lorakernels.kernels.launch import launch
from lorakernels.kernels.tiles import Matrix, finish, load_tile, sized, tile_of

# Triton 3.9 has other names than 3.6.
_RENAMED = gl.constexpr(hasattr(tma, "async_load"))
tma_load = tma.async_load if _RENAMED.value else tma.async_copy_global_to_shared
tma_store = tma.async_store if _RENAMED.value else tma.async_copy_shared_to_global
all_threads = gl.barrier if _RENAMED.value else gl.thread_barrier


@gluon.jit
def slot_of(number, STAGES: gl.constexpr):
    """Where in the ring the blocks of x and W of product `number` lie; a program counts through all of its tiles."""
    return number % STAGES


@gluon.jit
def phase_of(number, STAGES: gl.constexpr):
    """The parity of the phase that their arrival ends at the slot's barrier, whose first phase is number 0."""
    return number // STAGES & 1


@gluon.jit
def _load(x_desc, w_desc, x_ring, w_ring, full, number, row, col, k, wanted, W_IS_NK: gl.constexpr):
    """Starts to load blocks `number` where `wanted`; all threads know that what lay in their slot has been read."""
    slot = slot_of(number, x_ring.shape[0])
    barrier = full.index(slot)
    # Whole blocks, for what lies outside the matrices is written as zeros and counted.
    mbarrier.expect(barrier, x_desc.block_type.nbytes + w_desc.block_type.nbytes, wanted)
    tma_load(x_desc, [row, k], barrier, x_ring.index(slot), wanted)
    if W_IS_NK:
        tma_load(w_desc, [col, k], barrier, w_ring.index(slot), wanted)
    else:
        tma_load(w_desc, [k, col], barrier, w_ring.index(slot), wanted)


@gluon.jit
def _multiply(acc, x_ring, w_ring, full, number, W_IS_NK: gl.constexpr):
    """Starts product `number`; when this returns the one before it has ended, in all threads, and its slot is free."""
    STAGES: gl.constexpr = x_ring.shape[0]
    slot = slot_of(number, STAGES)
    mbarrier.wait(full.index(slot), phase_of(number, STAGES))
    w = w_ring.index(slot)
    if W_IS_NK:
        w = w.permute((1, 0))
    acc = warpgroup_mma(x_ring.index(slot), w, acc, is_async=True)
    acc = warpgroup_mma_wait(1, (acc,))
    # Each group of four warps has waited for its own rows' product, and one thread of one group loads.
    all_threads()
    return acc


@gluon.jit
def _store(part, epilogue, y_desc, y_shared, row, col, N):
    """Finishes columns of a tile, and starts to store them."""
    part = finish(part, epilogue, col + gl.arange(0, part.shape[1], gl.SliceLayout(0, part.type.layout)), N, None)
    # The thread that has started the store before waits until that has read y_shared, and the others for that thread.
    # They also wait for one another's last product, whose operand B lay there.
    tma.store_wait(0)
    all_threads()
    y_shared.store(part.to(y_desc.dtype))
    # What a thread has written the copy engine sees after that thread's fence; it starts after all of them.
    fence_async_shared()
    all_threads()
    tma_store(y_desc, [row, col], y_shared)


@gluon.jit(do_not_specialize=["M"])
def linear_expand_gluon_kernel(
    x_desc,
    w_desc,
    y_desc,
    low_rank,
    epilogue,
    M,
    K,  # at least STAGES - 1 blocks, for so many of the next tile are loaded while this one ends
    W_IS_NK: gl.constexpr,
    B_IS_NR: gl.constexpr,  # whether B's ranks, and not its features, lie side by side
    HALVES: gl.constexpr,
    DEPENDENT: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Programs stay and take tile after tile, at least one each."""
    R, N = low_rank.b.rows, low_rank.b.cols
    s, b = low_rank.s, low_rank.b
    s, b = sized(s, M, R), Matrix(b.ptr, N, R, (b.strides[1], b.strides[0]))
    AHEAD: gl.constexpr = STAGES - 1
    WARPS: gl.constexpr = gl.num_warps()
    factor: gl.constexpr = s.ptr.dtype.element_ty
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    # The accumulator for products of S: the same registers, but an instruction takes 32 bytes of a row of S.
    R_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [WARPS, 1], [16, BLOCK_N, 256 // factor.primitive_bitwidth]
    )
    S_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, R_LAYOUT, 32 // factor.primitive_bitwidth)
    B_LAYOUT: gl.constexpr = (
        gl.BlockedLayout([1, 8], [16, 2], [WARPS, 1], [1, 0])
        if B_IS_NR
        else gl.BlockedLayout([8, 1], [32, 1], [1, WARPS], [0, 1])
    )
    B_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_R], factor)

    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    W_SHAPE: gl.constexpr = [STAGES, BLOCK_N, BLOCK_K] if W_IS_NK else [STAGES, BLOCK_K, BLOCK_N]
    w_ring = gl.allocate_shared_memory(w_desc.dtype, W_SHAPE, w_desc.layout)
    y_shared = gl.allocate_shared_memory(y_desc.dtype, [BLOCK_M, BLOCK_N // (1 + HALVES)], y_desc.layout)
    # Four stages leave no room for both.
    gl.static_assert(BLOCK_R * factor.primitive_bitwidth * (1 + HALVES) <= BLOCK_M * 16)
    if _RENAMED:
        b_shared = y_shared.reinterpret(factor, [BLOCK_N, BLOCK_R], B_SHARED)
    else:
        b_shared = y_shared._reinterpret(factor, [BLOCK_N, BLOCK_R], B_SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)  # the one arrival is that of the thread that loads
    all_threads()

    num_tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    num_blocks = gl.cdiv(K, BLOCK_K)
    pid_m, pid_n = tile_of(gl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
    for k in gl.static_range(AHEAD):
        _load(x_desc, w_desc, x_ring, w_ring, full, k, row, col, k * BLOCK_K, True, W_IS_NK)
    number = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        wanted = tile + gl.num_programs(0) < num_tiles
        next_tile = min(tile + gl.num_programs(0), num_tiles - 1)  # past the last there are no coordinates
        next_m, next_n = tile_of(next_tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        next_row, next_col = next_m * BLOCK_M, next_n * BLOCK_N
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, LAYOUT)
        # Blocks number + AHEAD go where those of product number - 1 lay. The last products load the next tile's first.
        for k in range(AHEAD, num_blocks):
            acc = _multiply(acc, x_ring, w_ring, full, number, W_IS_NK)
            _load(x_desc, w_desc, x_ring, w_ring, full, number + AHEAD, row, col, k * BLOCK_K, True, W_IS_NK)
            number += 1
        for k in gl.static_range(AHEAD):
            acc = _multiply(acc, x_ring, w_ring, full, number, W_IS_NK)
            k_next = k * BLOCK_K
            _load(x_desc, w_desc, x_ring, w_ring, full, number + AHEAD, next_row, next_col, k_next, wanted, W_IS_NK)
            number += 1

        if DEPENDENT:
            tl.extra.cuda.gdc_wait()
        rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, S_LAYOUT))
        cols = col + gl.arange(0, BLOCK_N, gl.SliceLayout(1, B_LAYOUT))
        acc = gl.convert_layout(acc, R_LAYOUT)
        for r in range(0, R, BLOCK_R):
            s_tile = load_tile(s, rows, r + gl.arange(0, BLOCK_R, gl.SliceLayout(0, S_LAYOUT)))
            s_tile = (s_tile.to(gl.float32) * low_rank.scale).to(factor)
            b_tile = load_tile(b, cols, r + gl.arange(0, BLOCK_R, gl.SliceLayout(0, B_LAYOUT)))
            # As in _store: y of the tile before, or B of the ranks before, has been read by now.
            tma.store_wait(0)
            all_threads()
            b_shared.store(b_tile.to(factor))
            fence_async_shared()
            all_threads()
            acc = warpgroup_mma(s_tile, b_shared.permute((1, 0)), acc)  # waits for itself, and so for all before it
        if HALVES:
            first, second = gl.split(gl.permute(gl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            _store(first, epilogue, y_desc, y_shared, row, col, N)
            _store(second, epilogue, y_desc, y_shared, row, col + BLOCK_N // 2, N)
        else:
            _store(acc, epilogue, y_desc, y_shared, row, col, N)
        row, col = next_row, next_col
    tma.store_wait(0)  # shared memory is another program's when this one ends


def _descriptor(x: torch.Tensor, *block: int) -> Any:
    """As `descriptor`, with the layout that its blocks have in shared memory."""
    dtype = gl.bfloat16 if x.dtype is torch.bfloat16 else gl.float16
    return TensorDescriptor.from_tensor(x, list(block), gl.NVMMASharedLayout.get_default_for(list(block), dtype))


def linear_expand_gluon(
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    low_rank: Any,
    epilogue: Any,
    grid: tuple[int],
    constexprs: dict[str, Any],
    config: KernelConfig,
) -> None:
    """y [M, N] of x [M, K] and w, [N, K] or [K, N] as constexprs' W_IS_NK says, all three fit for descriptors."""
    c = config
    args = {
        "x_desc": _descriptor(x, c.BLOCK_M, c.BLOCK_K),
        "w_desc": _descriptor(w, *((c.BLOCK_N, c.BLOCK_K) if constexprs["W_IS_NK"] else (c.BLOCK_K, c.BLOCK_N))),
        "y_desc": _descriptor(y, c.BLOCK_M, c.BLOCK_N // (1 + c.halves)),
        "low_rank": low_rank,
        "epilogue": epilogue,
        "M": x.shape[0],
        "K": x.shape[1],
    }
    constexprs = constexprs | {"B_IS_NR": low_rank.b.strides[0] == 1, "HALVES": c.halves, "STAGES": c.num_stages}
    launch(linear_expand_gluon_kernel, grid, args, constexprs, config)
