"""What a GPU's multiprocessors hold, and how many blocks of a kernel that lets them run at once."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from lorakernels.configs.data_sheet import speed_of
from lorakernels.configs.heuristic import cdiv, next_power_of_two


@dataclass(frozen=True)
class Arch:
    """What one streaming multiprocessor (AMD: compute unit) holds. Memory in bytes, registers of 32 bits."""

    name: str
    target: GPUTarget
    shared_per_sm: int
    shared_granule: int = 128
    shared_reserved: int = 1024  # taken from shared_per_sm by each block besides its own
    registers_per_sm: int = 65536
    max_warps_per_sm: int = 64
    max_blocks_per_sm: int = 32
    tensor_memory_columns: int = 0
    sms: int = 132

    @property
    def shared_per_block(self) -> int:
        return speed_of(self.name).shared_per_block

    def blocks_per_sm(self, registers: int, shared: int, columns: int, warps: int) -> int:
        """How many blocks an SM holds at once: of so many registers a thread, bytes of shared memory and columns."""
        # Registers are handed out eight a lane, and a warp's come from one of the SM's four schedulers.
        warp_registers = cdiv(max(registers, 1), 8) * 8 * self.target.warp_size
        warps_by_registers = self.registers_per_sm // 4 // warp_registers * 4
        block_shared = cdiv(max(shared + self.shared_reserved, 1), self.shared_granule) * self.shared_granule
        limits = [self.max_blocks_per_sm, min(self.max_warps_per_sm, warps_by_registers) // warps]
        limits.append(self.shared_per_sm // block_shared)
        if columns:
            # Tensor memory comes in powers of two, from 32 columns.
            limits.append(self.tensor_memory_columns // max(32, next_power_of_two(columns)))
        return min(limits)


_ARCHS = (
    Arch("sm_80", GPUTarget("cuda", 80, 32), 164 << 10, sms=108),
    Arch("sm_90", GPUTarget("cuda", 90, 32), 228 << 10),
    Arch("sm_100", GPUTarget("cuda", 100, 32), 228 << 10, tensor_memory_columns=512, sms=148),
    Arch("gfx942", GPUTarget("hip", "gfx942", 64), 64 << 10, 512, 0, 131072, 32, sms=304),
)
ARCHS: dict[str, Arch] = {arch.name: arch for arch in _ARCHS}
