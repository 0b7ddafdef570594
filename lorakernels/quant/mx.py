"""MXFP4: four bits a number and a power of two for each 32 of a row.

Open Compute Project, "OCP Microscaling Formats (MX) Specification", version 1.0 (2023), section 6.3.
"""

from __future__ import annotations

import torch

from lorakernels.quant.packed import Form, PackedWeight

BLOCK = 32
# Between two codes; where the upper one is even a number in the middle becomes it, so the bound lies a step below.
_BOUNDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_BOUNDS[1::2] = _BOUNDS[1::2].nextafter(torch.tensor(0.0))


@torch.no_grad()
def pack(weight: torch.Tensor) -> PackedWeight:
    """weight [N, K] of any float dtype: the largest of 32 numbers has the exponent of 4 … 6, the rest are rounded to
    the nearest code, and to the even one of two.
    """
    N, K = weight.shape
    rows = torch.nn.functional.pad(weight.float(), (0, -K % BLOCK)).view(N, -1, BLOCK)
    largest = rows.abs().amax(2)
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent - 3, -127).clamp(-127, 127)
    scaled = torch.ldexp(rows, -exponent[:, :, None]).view(N, -1)[:, :K].flatten()
    codes = torch.bucketize(scaled.abs(), _BOUNDS.to(weight.device)) + 8 * scaled.signbit()
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).to(torch.uint8)
    form = Form("mxfp4", N, K, 1, BLOCK, weight.dtype)
    return PackedWeight(str(form), codes[::2] << 4 | codes[1::2], (exponent + 127).to(torch.uint8))
