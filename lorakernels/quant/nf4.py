"""NF4 and FP4 as bitsandbytes has them (Dettmers et al., "QLoRA", arXiv 2305.14314): read from its layers, and made."""

from __future__ import annotations

from typing import Any

import torch

from lorakernels.quant.packed import CODES, Form, PackedWeight

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def read_bitsandbytes(weight: Any) -> PackedWeight:
    """The weight of a `bitsandbytes.nn.Linear4bit`, whose tensors are views of its own.

    Raises ValueError for one that is not packed yet, or that bitsandbytes has packed again for its own kernels.
    """
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise ValueError(
            "the base weight is a bitsandbytes.nn.Params4bit that is not quantised yet: move the layer to its device "
            "first, which packs it"
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "the base weight has been packed again by bitsandbytes for its own CPU kernels "
            "(quant_state.packing_format_for_cpu), which its forward in evaluation does: its numbers are rounded, and "
            "dequantising or training on it gives wrong results; load the model anew, and adapt it before any forward"
        )
    N, K = state.shape
    if state.quant_type not in ("nf4", "fp4") or state.blocksize not in _BLOCKS:
        raise ValueError(
            f"the base weight is {state.quant_type} in blocks of {state.blocksize}; expected nf4 or fp4 in blocks of "
            f"{_BLOCKS}"
        )
    data, blocks = weight.data.view(torch.uint8).flatten(), -(-N * K // state.blocksize)
    if data.numel() != -(-N * K // 2) or state.absmax.numel() != blocks or state.absmax.device != data.device:
        raise ValueError(
            f"the base weight has {data.numel()} bytes on {data.device} and {state.absmax.numel()} scales on "
            f"{state.absmax.device}; expected {-(-N * K // 2)} and {blocks} on one device, for [{N}, {K}] in blocks of "
            f"{state.blocksize}"
        )
    form = Form(state.quant_type, N, K, 0, state.blocksize, state.dtype)
    if not state.nested:
        return PackedWeight(str(form), data, state.absmax)
    outer = state.state2
    if outer.blocksize != 256:
        raise ValueError(f"the scales of the base weight are nested in blocks of {outer.blocksize}; expected 256")
    return PackedWeight(str(form), data, state.absmax, None, outer.code, outer.absmax, state.offset)


@torch.no_grad()
def pack(weight: torch.Tensor, kind: str = "nf4", block: int = 64) -> PackedWeight:
    """weight [N, K] of any float dtype in blocks that run on over its rows, bit-equal to bitsandbytes' on a CPU.

    Each number becomes the nearest code times the largest magnitude of its block; one in the middle goes down.
    """
    if kind not in ("nf4", "fp4") or block not in _BLOCKS:
        raise ValueError(f"{kind} in blocks of {block}; expected nf4 or fp4 in blocks of {_BLOCKS}")
    N, K = weight.shape
    flat = weight.reshape(-1).float()
    whole = flat.numel() // block * block
    blocks = flat[:whole].view(-1, block)
    absmax = blocks.abs().amax(1) if whole else flat.new_empty(0)
    parts = [(blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1).flatten()]
    if whole < flat.numel():
        rest = flat[whole:]
        largest = rest.abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, largest[None]])
        parts.append((rest / largest).clamp(-1, 1))
    scaled = torch.cat(parts)
    codes = torch.tensor(CODES[kind], device=weight.device)
    order = codes.argsort()  # FP4 has two zeros, and what rounds to them may become either
    places = order[torch.bucketize(scaled, (codes[order[1:]] + codes[order[:-1]]) / 2)].to(torch.uint8)
    if places.numel() % 2:
        places = torch.cat([places, places.new_tensor([0 if kind == "fp4" else 7])])
    data = places[::2] << 4 | places[1::2]
    return PackedWeight(str(Form(kind, N, K, 0, block, weight.dtype)), data, absmax)
