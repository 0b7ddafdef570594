"""What a launch would take at best: a model of time from bytes, operations and waves of programs.

It ranks candidates so that the tuner measures few of them, and knows nothing of latency: it never replaces measuring.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorakernels.tuning.config import KernelConfig
from lorakernels.tuning.device import Device
from lorakernels.tuning.heuristic import cdiv


@dataclass(frozen=True)
class Speed:
    """What a device's maker states. Bytes a second, dense operations a second, bytes of shared memory a block."""

    bandwidth: float
    flops_16: float  # bfloat16 and float16 on the matrix units
    flops_32: float  # float32, exact
    shared_per_block: int


_A100 = Speed(2.039e12, 312e12, 19.5e12, 163 << 10)
_H100 = Speed(3.35e12, 989.4e12, 66.9e12, 227 << 10)
_B200 = Speed(7.7e12, 2250e12, 75e12, 227 << 10)
_MI300X = Speed(5.3e12, 1307.4e12, 163.4e12, 64 << 10)
# Of NVIDIA's data sheets: A100 (80 GB, SXM), H100 and H200 (SXM), HGX B200; and AMD's of the MI300X (OAM).
_BY_NAME = {
    "A100": _A100,
    "H200": Speed(4.8e12, 989.4e12, 66.9e12, 227 << 10),
    "H100": _H100,
    "B200": _B200,
    "MI300X": _MI300X,
}
_BY_ARCH = {"sm_80": _A100, "sm_90": _H100, "sm_100": _B200, "gfx942": _MI300X}
# A device that is not listed ranks candidates as an A100 does. Its shared memory is not guessed: a table that was
# measured there must not be refused.
_UNKNOWN = Speed(_A100.bandwidth, _A100.flops_16, _A100.flops_32, 227 << 10)

# Three assumptions, which no data sheet states: tiles that are read again come from L2 at twice the memory's bandwidth,
# a launch that waits for the one before costs two microseconds, and a tenth of what could overlap does not.
L2_OVER_MEMORY = 2.0
LAUNCH_SECONDS = 2e-6
NOT_OVERLAPPED = 0.1


def speed_of(arch: str, name: str = "") -> Speed:
    """By the device's name where that is known, else by its architecture."""
    named = (speed for part, speed in _BY_NAME.items() if part in name)
    return next(named, _BY_ARCH.get(arch, _UNKNOWN))


@dataclass(frozen=True)
class Work:
    """What a launch has to do. `tile_bytes` is what programs read, `bytes` what memory must give and take at least."""

    programs: int
    flops: int  # a program
    bytes: int
    tile_bytes: int
    launches: int = 1


def work(operation: str, M: int, N: int, K: int, r: int, itemsize: int, config: KernelConfig) -> Work:
    """The work of one launch, with the planes that a split sum writes and reads."""
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
        one_pass = c.BLOCK_N >= N or 8 * r < itemsize * c.BLOCK_N
        programs = blocks_n * blocks_r * c.SPLIT
        rows = cdiv(blocks_m, c.SPLIT) * c.BLOCK_M
        products = 2 if one_pass else 1
        tiles = programs * rows * (c.BLOCK_N + c.BLOCK_R) * itemsize
        memory = (M * N * (1 if one_pass else 2) + M * r + N * r) * itemsize + _sum_bytes(N * r, c.SPLIT, 4)
        memory += _sum_bytes(M * r, blocks_n if one_pass else 1, itemsize)
        return Work(programs, products * 2 * c.BLOCK_N * c.BLOCK_R * rows, memory, tiles, launches + 1)
    raise ValueError(f"there is no operation {operation!r}")


def _sum_bytes(elements: int, planes: int, itemsize: int) -> int:
    """Written, and where there are planes written and read in float32 first."""
    return elements * itemsize + (8 * elements * planes if planes > 1 else 0)


def seconds(work: Work, device: Device, itemsize: int, programs_per_sm: int = 1) -> float:
    """The longest of three, multiplying in whole waves, memory and L2, a part of the others, and the launches."""
    speed = speed_of(device.arch, device.name)
    slots = device.processors * programs_per_sm
    # Programs that share a multiprocessor share its speed, so a wave takes as long as all of them one after another.
    flops_per_sm = (speed.flops_16 if itemsize <= 2 else speed.flops_32) / device.processors
    multiply = cdiv(work.programs, slots) * programs_per_sm * work.flops / flops_per_sm
    busy = min(1.0, work.programs / device.processors)
    memory = work.bytes / (speed.bandwidth * busy)
    cache = work.tile_bytes / (speed.bandwidth * L2_OVER_MEMORY * busy)
    longest = max(multiply, memory, cache)
    rest = multiply + memory + cache - longest
    return longest + NOT_OVERLAPPED * rest + work.launches * LAUNCH_SECONDS


def pipeline_bytes(operation: str, config: KernelConfig, itemsize: int) -> int:
    """The shared memory that a launch takes at least: its loop's tiles, once for each stage but the last."""
    c = config
    tiles = {
        "shrink": (c.BLOCK_M + c.BLOCK_R) * c.BLOCK_K,
        "linear_expand": 0 if c.cublas else (c.BLOCK_M + c.BLOCK_N) * c.BLOCK_K,
        "few_tokens": (c.BLOCK_M + c.BLOCK_N + c.BLOCK_R) * c.BLOCK_K,
        "outer": (c.BLOCK_N + c.BLOCK_R) * c.BLOCK_M,
    }
    return tiles.get(operation, 0) * itemsize * (c.num_stages - 1)
