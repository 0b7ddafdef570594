"""int4 by groups of columns, with a float zero and scale each: made, and read from HQQ's layers.

W = (q - zero) · scale. Float zeros are what QA-LoRA merges into (Xu et al., arXiv 2309.14717).
"""

from __future__ import annotations

from typing import Any

import torch

from lorakernels.quant.packed import Form, PackedWeight


@torch.no_grad()
def pack(weight: torch.Tensor, group: int = 64) -> PackedWeight:
    """weight [N, K] of any float dtype, from the least to the largest number of each group of a row in 15 steps."""
    N, K = weight.shape
    if group < 1 or K % group:
        raise ValueError(f"groups of {group}; expected a divisor of the weight's {K} columns")
    rows = weight.float().view(N, K // group, group)
    low, high = rows.aminmax(dim=2, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-8)
    zero = -low / scale
    codes = (rows / scale + zero).round().clamp(0, 15).to(torch.uint8).view(N, K)
    if K % 2:
        codes = torch.cat([codes.flatten(), codes.new_zeros(N % 2)])
    pairs = codes.flatten()
    form = Form("int4", N, K, 1, group, weight.dtype)
    return PackedWeight(str(form), pairs[::2] << 4 | pairs[1::2], scale[:, :, 0], zero[:, :, 0])


def read_hqq(layer: Any) -> PackedWeight:
    """The weight of an `hqq.core.quantize.HQQLinear` of 4 bits with groups along its columns, whose tensors it shares.

    Raises ValueError for what is packed otherwise.
    """
    meta = layer.meta
    N, K = meta["shape"]
    group = meta["group_size"] or K
    given = {"nbits": meta["nbits"], "axis": meta["axis"], "packing": meta["packing"]}
    if given != {"nbits": 4, "axis": 1, "packing": "4bit_u8"} or meta.get("quant_scale") or meta.get("quant_zero"):
        raise ValueError(
            f"the base weight is HQQ's with {given}; expected 4 bits, axis=1 and 4bit_u8, its scales and zeros not "
            "quantised"
        )
    if K % group or N * K // group % 2:
        raise ValueError(
            f"the base weight is HQQ's, [{N}, {K}] in groups of {group}; expected an even number of whole groups"
        )
    form = Form("int4", N, K, 1, group, layer.compute_dtype, halves=True)
    scale, zero = meta["scale"].view(N, -1), meta["zero"].view(N, -1)
    return PackedWeight(str(form), layer.W_q.data.view(torch.uint8).flatten(), scale, zero)
