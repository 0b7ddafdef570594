"""NF4 and FP4 as bitsandbytes has them (Dettmers et al., "QLoRA", arXiv 2305.14314): read from its layers, and made."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
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
    outer = state.state2
    nesting = (outer.blocksize, outer.code, outer.absmax, state.offset) if state.nested else None
    form = _form(state.quant_type, state.shape, state.blocksize, state.dtype)
    return _of_tensors(form, weight.data, state.absmax, nesting)


# What bitsandbytes saves beside a weight's numbers, behind its name: tensors, and a record of the rest, JSON as bytes,
# whose name ends in the weight's kind.
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
RECORD = ".quant_state.bitsandbytes__"


def saved_form(record: torch.Tensor) -> Form:
    """The form of a weight that bitsandbytes has saved, by its `RECORD`; raises ValueError for an unknown one."""
    fields = _fields(record)
    return _form(*(fields[name] for name in ("quant_type", "shape", "blocksize", "dtype")))


def read_saved(weight: torch.Tensor, record: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> PackedWeight:
    """A weight that bitsandbytes has saved: its numbers, its `RECORD`, and those of `PARTS` that there are.

    Raises ValueError for what is missing or does not fit together.
    """
    form, fields = saved_form(record), _fields(record)
    nested = any(name.startswith("nested") for name in parts)
    missing = [name for name in PARTS[: 4 if nested else 2] if name not in parts]
    table = torch.tensor(CODES[form.kind])
    if missing or parts["quant_map"].shape != table.shape or (parts["quant_map"] - table).abs().max() > 1e-6:
        raise ValueError(f"the base weight has no {', '.join(missing) or form.kind + ' in its quant_map'}")
    nesting = None
    if nested:
        offset = torch.tensor(float(fields["nested_offset"]))
        nesting = (fields["nested_blocksize"], parts["nested_quant_map"], parts["nested_absmax"], offset)
    return _of_tensors(form, weight, parts["absmax"], nesting)


def _fields(record: torch.Tensor) -> defaultdict[str, Any]:
    return defaultdict(lambda: None, json.loads(record.numpy().tobytes()))


def _form(kind: Any, shape: Any, block: Any, dtype: Any) -> Form:
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    known = kind in ("nf4", "fp4") and block in _BLOCKS and isinstance(dtype, torch.dtype)
    if not known or len(shape or ()) != 2:
        raise ValueError(
            f"the base weight is {kind} in blocks of {block}, of {dtype} {list(shape or ())}; expected nf4 or fp4 in "
            f"blocks of {_BLOCKS}, of a float dtype [out_features, in_features]"
        )
    N, K = shape
    return Form(kind, N, K, 0, block, dtype)


def _of_tensors(
    form: Form, weight: torch.Tensor, absmax: torch.Tensor, nesting: tuple[Any, ...] | None
) -> PackedWeight:
    data = weight.flatten().view(torch.uint8)
    count, blocks = -(-form.N * form.K // 2), -(-form.N * form.K // form.block)
    if data.numel() != count or absmax.shape != (blocks,) or absmax.device != data.device:
        raise ValueError(
            f"the base weight has {data.numel()} bytes on {data.device} and scales {list(absmax.shape)} on "
            f"{absmax.device}; expected {count} and [{blocks}] on one device, for [{form.N}, {form.K}] in blocks of "
            f"{form.block}. Where bitsandbytes saves a weight that it has packed again in evaluation, its scales are "
            "transposed: load the model anew"
        )
    if nesting is None:
        return PackedWeight(str(form), data, absmax)
    block, table, outer, offset = nesting
    if block != 256 or table.shape != (256,) or outer.numel() != -(-blocks // 256):
        raise ValueError(
            f"the scales of the base weight are nested in blocks of {block}, a table {list(table.shape)} and "
            f"{outer.numel()} scales of their own; expected 256, [256] and {-(-blocks // 256)}"
        )
    return PackedWeight(str(form), data, absmax, None, table, outer, offset)


@torch.no_grad()
def pack(weight: torch.Tensor, kind: str = "nf4", block: int = 64, nested: bool = False) -> PackedWeight:
    """weight [N, K] of any float dtype in blocks that run on over its rows, bit-equal to bitsandbytes' on a CPU.

    Each number becomes the nearest code times the largest magnitude of its block; one in the middle goes down. With
    `nested`, QLoRA's double quantisation, the scales become 8 bits each: what they differ from their mean by, as the
    nearest number of a table times the largest of 256. bitsandbytes on a CPU takes the second nearest for one in 270
    of them.
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
    packed = PackedWeight(str(Form(kind, N, K, 0, block, weight.dtype)), data, absmax)
    return _nested(packed) if nested else packed


def _nested(packed: PackedWeight) -> PackedWeight:
    offset = packed.scale.mean()
    table = _dynamic().to(packed.device)
    rest = packed.scale - offset
    blocks = torch.nn.functional.pad(rest, (0, -rest.numel() % 256)).view(-1, 256)
    absmax = blocks.abs().amax(1)
    scaled = (blocks / absmax.clamp(min=1e-38)[:, None]).flatten()[: rest.numel()]
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return packed._replace(scale=codes, table=table, absmax=absmax, offset=offset)


def _dynamic() -> torch.Tensor:
    """[256] float32, the dynamic tree of Dettmers et al., "8-bit optimizers" (arXiv 2110.02861): of seven powers of ten
    the means of 1, 2, … 64 equal parts of 0.1 … 1, with both signs; and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        means = (10.0 ** (i - 6) * ((edges[1:] + edges[:-1]) / 2)).tolist()
        values += [*means, *(-mean for mean in means)]
    return torch.tensor(sorted(values))
