"""What Stability's code calls the modules of a UNet, by what diffusers calls them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

_BLOCK = re.compile(
    r"(?P<block>(?:down|up)_blocks\.\d{1,2})\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<at>\d{1,2})(?!\d)"
)
# What Stability's UNet calls what diffusers calls otherwise: whole modules first, then inside a block with a residual.
_ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OF_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_names(paths: Iterable[str]) -> dict[str, str]:
    """Of a UNet's modules as diffusers has them, what Stability's code (sgm, ldm) calls them, and so do SDXL's files.

    There a level's blocks follow each other in one list, each with its attention in it: `input_blocks.4.1` is the first
    attention of the second level, since the first has `conv_in` before it, two residuals and a downsampler.
    """
    paths = list(paths)
    sizes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for match in filter(None, map(_BLOCK.match, paths)):
        counts = sizes[match["block"]]
        counts[match["kind"]] = max(counts[match["kind"]], int(match["at"]) + 1)
    starts = dict(_ORIGINAL)
    for side, first, sampler, conv in (("down", 1, "downsamplers", "op"), ("up", 0, "upsamplers", "conv")):
        place, list_of = first, "input_blocks" if side == "down" else "output_blocks"
        for level in range(sum(block.startswith(side) for block in sizes)):
            block = f"{side}_blocks.{level}"
            for at in range(sizes[block]["resnets"]):
                starts[f"{block}.resnets.{at}"] = f"{list_of}.{place}.0"
                starts[f"{block}.attentions.{at}"] = f"{list_of}.{place}.1"
                place += 1
            if sizes[block][sampler]:
                # Down it is a block of its own, up it comes last in the one before.
                last = f"{place}.0" if side == "down" else f"{place - 1}.{2 if sizes[block]['attentions'] else 1}"
                starts[f"{block}.{sampler}.0.conv"] = f"{list_of}.{last}.{conv}"
                place += side == "down"
    names = {}
    for path in paths if any(path.startswith("down_blocks.") for path in paths) else ():
        start = next((path[:end] for end in _ends(path) if path[:end] in starts), None)
        if start is not None:
            rest = path[len(start) :].lstrip(".")
            inside = _OF_RESNET.get(rest, rest) if ".resnets." in start else rest
            names[path] = ".".join(filter(None, (starts[start], inside)))
    return names


def _ends(path: str) -> list[int]:
    """Where a name may end: at its dots, and whole."""
    return [match.start() for match in re.finditer(r"\.|$", path)]
