"""What a launch would take at best: a model of time from bytes, operations and waves of programs.

It ranks candidates so that the tuner measures few of them, and knows nothing of latency: it never replaces measuring.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorakernels.configs.config import KernelConfig
from lorakernels.configs.data_sheet import speed_of
from lorakernels.configs.device import Device
from lorakernels.configs.heuristic import cdiv
from lorakernels.configs.table import takes_one_pass

# Three assumptions, which no data sheet states: tiles that are read again come from L2 at twice the memory's bandwidth,
# a launch that waits for the one before costs two microseconds, and a tenth of what could overlap does not.
L2_OVER_MEMORY = 2.0
LAUNCH_SECONDS = 2e-6
NOT_OVERLAPPED = 0.1


@dataclass(frozen=True)
class Work:
    """What a launch has to do. `tile_bytes` is what programs read, `bytes` what memory must give and take at least."""

    programs: int
    flops: int  # a program
    bytes: int
    tile_bytes: int
    launches: int = 1


def work(operation: str, M: int, N: int, K: int, r: int, itemsize: int, config: KernelConfig, slots: int = 1) -> Work:
    """The work of one launch, with the planes that a split sum writes and reads."""
    if operation.startswith("multi_"):
        return _multi_work(operation, M, N, r, itemsize, config, slots)
    c = config
    blocks_m, blocks_n, blocks_r = cdiv(M, c.BLOCK_M), cdiv(N, c.BLOCK_N), cdiv(r, c.BLOCK_R)
    depth = cdiv(cdiv(K, c.BLOCK_K), c.SPLIT) * c.BLOCK_K  # of K, a program's part
    launches = 1 if c.SPLIT == 1 else 2
    if operation == "shrink":
        programs = blocks_m * blocks_r * c.SPLIT
        tiles = programs * (c.BLOCK_M + c.BLOCK_R) * depth * itemsize
        memory = (M * K + r * K) * itemsize + _sum_bytes(M * r, c.SPLIT, itemsize)
        return Work(programs, 2 * c.BLOCK_M * c.BLOCK_R * depth, memory, tiles, launches)
    if operation == "few_tokens":
        programs = blocks_m * blocks_n * c.SPLIT
        tiles = programs * (c.BLOCK_M + c.BLOCK_N + c.BLOCK_R) * depth * itemsize
        memory = (M * K + N * K + r * K + N * r) * itemsize + _sum_bytes(M * (N + r), c.SPLIT, itemsize)
        flops = 2 * c.BLOCK_M * ((c.BLOCK_N + c.BLOCK_R) * depth + c.BLOCK_N * c.BLOCK_R)
        return Work(programs, flops, memory, tiles, launches if launches == 1 else 3)
    if operation == "linear_expand":
        programs = blocks_m * blocks_n
        low_rank = blocks_r * c.BLOCK_R
        multiplied = cdiv(K, c.BLOCK_K) * c.BLOCK_K + low_rank
        memory = (M * K + N * K + (M + N) * r + M * N) * itemsize
        if c.cublas:  # torch's own product takes the same time whatever the config; the kernel reads y and writes it
            memory += 2 * M * N * itemsize
        tiles = programs * (c.BLOCK_M + c.BLOCK_N) * multiplied * itemsize
        return Work(programs, 2 * c.BLOCK_M * c.BLOCK_N * multiplied, memory, tiles, 2 if c.cublas else 1)
    if operation == "outer":  # dy's pass: z [M, N] is read for G [M, r] too, once where that costs less than planes
        one_pass = takes_one_pass(N, r, itemsize, c.BLOCK_N)
        programs = blocks_n * blocks_r * c.SPLIT
        rows = cdiv(blocks_m, c.SPLIT) * c.BLOCK_M
        products = 2 if one_pass else 1
        tiles = programs * rows * (c.BLOCK_N + c.BLOCK_R) * itemsize
        memory = (M * N * (1 if one_pass else 2) + M * r + N * r) * itemsize + _sum_bytes(N * r, c.SPLIT, 4)
        memory += _sum_bytes(M * r, blocks_n if one_pass else 1, itemsize)
        return Work(programs, products * 2 * c.BLOCK_N * c.BLOCK_R * rows, memory, tiles, launches + 1)
    raise ValueError(f"there is no operation {operation!r}")


def _multi_work(operation: str, T: int, cols: int, r: int, itemsize: int, config: KernelConfig, slots: int) -> Work:
    """For many adapters, all of rank r, with as many tokens each. What a token's form multiplies is not told apart."""
    c = config
    used = min(slots, T)
    tiles = used + (T - used) // c.BLOCK_M  # a plan's, less the base's
    blocks_n, blocks_r = cdiv(cols, c.BLOCK_N), cdiv(r, c.BLOCK_R)
    adapters, sums = used * r * cols * itemsize, 4 * T * r
    if operation == "multi_shrink":
        programs = tiles * blocks_r * c.SPLIT
        depth = cdiv(cdiv(cols, c.BLOCK_K), c.SPLIT) * c.BLOCK_K
        read = programs * (c.BLOCK_M + c.BLOCK_R) * depth * itemsize
        memory = T * cols * itemsize + adapters + sums * (1 if c.SPLIT == 1 else 2 * c.SPLIT + 1)
        return Work(programs, 2 * c.BLOCK_M * c.BLOCK_R * depth, memory, read, 1 if c.SPLIT == 1 else 2)
    if operation == "multi_expand":
        programs, depth = tiles * blocks_n, blocks_r * c.BLOCK_R
        read = programs * (c.BLOCK_M * (c.BLOCK_N * itemsize + 4 * depth) + c.BLOCK_N * depth * itemsize)
        memory = 2 * T * cols * itemsize + adapters + sums
        return Work(programs, 2 * c.BLOCK_M * c.BLOCK_N * depth, memory, read)
    if operation == "multi_outer":
        programs = blocks_n * blocks_r * used * c.SPLIT
        rows = cdiv(cdiv(cdiv(T, used), c.BLOCK_M), c.SPLIT) * c.BLOCK_M
        read = programs * rows * (c.BLOCK_N * itemsize + 4 * c.BLOCK_R)
        memory = T * cols * itemsize + sums + _sum_bytes(used * r * cols, c.SPLIT, itemsize)
        return Work(programs, 2 * c.BLOCK_N * c.BLOCK_R * rows, memory, read, 1 if c.SPLIT == 1 else 2)
    raise ValueError(f"there is no operation {operation!r}")


def _sum_bytes(elements: int, planes: int, itemsize: int) -> int:
    """Written, and where there are planes written and read in float32 first."""
    return elements * itemsize + (8 * elements * planes if planes > 1 else 0)


def seconds(work: Work, device: Device, itemsize: int, programs_per_sm: int = 1) -> float:
    """The longest of three, multiplying in whole waves, memory and L2, a part of the others, and the launches."""
    speed = speed_of(device.arch, device.name)
    slots = device.processors * programs_per_sm
    # Programs that share a multiprocessor share its speed, so a wave takes as long as all of them one after another.
    flops_per_sm = (speed.half if itemsize <= 2 else speed.single) / device.processors
    multiply = cdiv(work.programs, slots) * programs_per_sm * work.flops / flops_per_sm
    busy = min(1.0, work.programs / device.processors)
    memory = work.bytes / (speed.bandwidth * busy)
    cache = work.tile_bytes / (speed.bandwidth * L2_OVER_MEMORY * busy)
    longest = max(multiply, memory, cache)
    rest = multiply + memory + cache - longest
    return longest + NOT_OVERLAPPED * rest + work.launches * LAUNCH_SECONDS
