"""What devices promise: dense matrix throughput and memory bandwidth, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

# The shares of the data sheet that predictions assume: a large matrix product reaches about 65 % of the dense 16-bit
# peak, a copy 82 to 100 % of the bandwidth. They are assumptions, the same for every device.
GEMM_SHARE = 0.65
MEMORY_SHARES = (0.82, 1.0)


@dataclass(frozen=True)
class DataSheet:
    """Peaks in FLOP/s (dense, float32 accumulation) and bytes/s."""

    name: str
    matches: tuple[str, ...]  # parts of the name that the driver gives
    half: float  # bfloat16 and float16
    single: float  # float32 without TF32
    bandwidth: float
    l2_bytes: int
    source: str

    def peak(self, dtype: str) -> float:
        return self.half if dtype in ("bfloat16", "float16") else self.single


DATA_SHEETS = (
    DataSheet("H200", ("H200",), 989.4e12, 66.9e12, 4.8e12, 50 << 20, "NVIDIA H200 data sheet (SXM)"),
    DataSheet("H100", ("H100",), 989.4e12, 66.9e12, 3.35e12, 50 << 20, "NVIDIA H100 data sheet (SXM)"),
    DataSheet("A100", ("A100",), 312e12, 19.5e12, 2.039e12, 40 << 20, "NVIDIA A100 80GB data sheet (SXM)"),
    DataSheet("MI300X", ("MI300X",), 1307.4e12, 163.4e12, 5.3e12, 256 << 20, "AMD Instinct MI300X data sheet"),
    DataSheet("RTX 4090", ("4090",), 165.2e12, 82.6e12, 1.008e12, 72 << 20, "NVIDIA Ada GPU architecture, appendix A"),
)


def data_sheet(device_name: str) -> DataSheet | None:
    """The data sheet of the device that the driver calls so; None when it is not in the table."""
    return next((sheet for sheet in DATA_SHEETS if any(part in device_name for part in sheet.matches)), None)
