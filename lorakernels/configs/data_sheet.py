"""What devices promise, from their makers' data sheets: throughput of matrix products, bandwidth, on-chip memory."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DataSheet:
    """Peaks in FLOP/s (dense, float32 accumulation) and bytes/s, and sizes in bytes."""

    name: str
    matches: str  # a whole word of the driver's name of the device
    arch: str  # as the compiler calls it
    half: float  # bfloat16 and float16
    single: float  # float32 without TF32
    bandwidth: float
    l2_bytes: int
    shared_per_block: int  # the most that a block may ask for
    source: str

    def peak(self, dtype: str) -> float:
        return self.half if dtype in ("bfloat16", "float16") else self.single

    def seconds(self, flops: float, moved: float, dtype: str) -> float:
        """The least for so many operations and bytes: the device's roofline."""
        return max(flops / self.peak(dtype), moved / self.bandwidth)


_SHEETS = (
    ("H200", "H200", "sm_90", 989.4e12, 66.9e12, 4.8e12, 50, 227, "NVIDIA H200 data sheet (SXM)"),
    ("H100", "H100", "sm_90", 989.4e12, 66.9e12, 3.35e12, 50, 227, "NVIDIA H100 data sheet (SXM)"),
    ("A100", "A100", "sm_80", 312e12, 19.5e12, 2.039e12, 40, 163, "NVIDIA A100 80GB data sheet (SXM)"),
    ("B200", "B200", "sm_100", 2250e12, 75e12, 7.7e12, 126, 227, "NVIDIA HGX B200 data sheet"),
    ("MI300X", "MI300X", "gfx942", 1307.4e12, 163.4e12, 5.3e12, 256, 64, "AMD Instinct MI300X data sheet"),
    ("RTX 4090", "4090", "sm_89", 165.2e12, 82.6e12, 1.008e12, 72, 99, "NVIDIA Ada GPU architecture, appendix A"),
)
# Devices that share such a word and have another data sheet: fewer processors, less or slower memory.
_OTHERS = re.compile(r"PCIe|NVL|40GB|64GB|Laptop|MIG|4090 D\b", re.IGNORECASE)
DATA_SHEETS = tuple(
    DataSheet(name, matches, arch, half, single, bandwidth, l2 << 20, shared << 10, source)
    for name, matches, arch, half, single, bandwidth, l2, shared, source in _SHEETS
)
# Of two devices of one architecture the slower stands for it.
_BY_ARCH = {sheet.arch: sheet for sheet in sorted(DATA_SHEETS, key=lambda sheet: -sheet.bandwidth)}
# A device that is not listed ranks candidates as an A100 does. Its shared memory is not guessed: a table that was
# measured there must not be refused.
_UNLISTED = replace(_BY_ARCH["sm_80"], name="unlisted", shared_per_block=227 << 10)


def data_sheet(device_name: str) -> DataSheet | None:
    """The data sheet of the device that the driver calls so; None when it is not in the table."""
    if _OTHERS.search(device_name):
        return None
    return next((sheet for sheet in DATA_SHEETS if re.search(rf"\b{sheet.matches}\b", device_name)), None)


def speed_of(arch: str) -> DataSheet:
    return _BY_ARCH.get(arch, _UNLISTED)
