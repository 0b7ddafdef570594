"""How the operators run on sharded tensors (`torch.distributed.tensor`): tensor parallelism.

Each layout below says, for one dimension of the device mesh, how every tensor of an operator lies over it; what it
does not name is replicated. A layout is right where the operator's result on the local pieces is the local piece
of the result (`Partial`: pieces that sum to it).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch

from lorakernels.dropout import drop_threshold
from lorakernels.when_imported import when_imported

Layout = dict[str, Any]  # placement by tensor

_FORWARD = (("x", "weight", "lora_A", "lora_B", "bias", "row_scale", "seed"), ("y", "s", "mask"))
_BACKWARD = (
    ("dy", "x", "weight", "lora_A", "lora_B", "row_scale", "s", "mask"),
    ("dx", "dweight", "dA", "dB", "dbias", "drow_scale"),
)
_MASK_BITS = 8


def register_shardings() -> None:
    """Register the layouts, now if DTensor is imported already, else when it is: `import lorakernels` stays light."""
    when_imported("torch.distributed.tensor", _register)


def draw_seed(x: Any) -> torch.Tensor:
    """Seeds for dropout on a DTensor x: int64 [ranks of its mesh], rank 0's on every rank.

    One broadcast a call: masks that differ from rank to rank would make what is called replicated differ. An
    operator takes the first seed of those that it is given, so that pieces of x each get a seed of their own, and
    copies of x the same.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = x.device_mesh
    seeds = torch.randint(-(2**63), 2**63 - 1, (mesh.size(),), dtype=torch.int64, device=x.device)
    return distribute_tensor(seeds, mesh, [Replicate()] * mesh.ndim)


def _layouts(lead: Sequence[int], columns: int, dropout: bool, ranks: int) -> list[Layout]:
    """The layouts for x [*lead, columns] over a mesh of that many ranks."""
    from torch.distributed.tensor import Partial, Shard

    last = Shard(len(lead))
    layouts: list[Layout] = [{}]
    # s and the mask are [tokens, ...]: a piece of x is a piece of them only along dim 0, and if dim 0 splits evenly.
    if len(lead) == 1 or (lead and lead[0] % ranks == 0):
        pieces = ("x", "seed", "y", "s", "mask", "dy", "dx")
        sums = ("dweight", "dA", "dB", "dbias", "drow_scale")
        layouts.append({name: Shard(0) for name in pieces} | {name: Partial() for name in sums})
    rows = {
        name: Shard(0) for name in ("weight", "lora_B", "bias", "row_scale", "dweight", "dB", "dbias", "drow_scale")
    }
    layouts.append({**rows, "y": last, "dy": last, "dx": Partial(), "dA": Partial()})
    # A mask may have a bit an element: its bytes split where x's columns do only in whole bytes.
    if not dropout or columns % (_MASK_BITS * ranks) == 0:
        pieces_of_x = {"x": last, "dx": last, "seed": Shard(0)}
        pieces_of_columns = {name: Shard(1) for name in ("weight", "lora_A", "mask", "dweight", "dA")}
        sums_over_columns = {name: Partial() for name in ("bias", "y", "s", "dB", "drow_scale")}
        layouts.append({**pieces_of_x, **pieces_of_columns, **sums_over_columns})
    return layouts


def _placements(
    layouts: list[Layout], names: tuple[tuple[str, ...], tuple[str, ...]], inputs: Sequence[Any], returned: set[str]
) -> list[tuple[list[Any], list[Any]]]:
    """The layouts as `register_sharding` takes them: those of the outputs and of the inputs.

    What nobody asked for is empty on every rank: shape (0,).
    """
    from torch.distributed.tensor import Replicate

    def is_nothing(name: str, spec: Any) -> bool:
        return name in ("s", "mask") and len(spec.shape) == 1

    input_names, output_names = names
    given = list(zip(input_names, inputs, strict=True))
    return [
        (
            [layout.get(name, Replicate()) if name in returned else Replicate() for name in output_names],
            [
                None if spec is None else Replicate() if is_nothing(name, spec) else layout.get(name, Replicate())
                for name, spec in given
            ],
        )
        for layout in layouts
    ]


def _forward(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    *inputs, scaling, dropout_p, _ = arguments
    x = inputs[0]
    dropout = scaling != 0 and drop_threshold(dropout_p) > 0
    returned = {"y"} | ({"s"} if scaling != 0 else set()) | ({"mask"} if dropout else set())
    layouts = _layouts(x.shape[:-1], x.shape[-1], dropout, x.mesh.size())
    return _placements(layouts, _FORWARD, inputs, returned)


def _backward(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    *inputs, _, _, needs, _ = arguments
    dy, weight, mask = inputs[0], inputs[2], inputs[7]
    layouts = _layouts(dy.shape[:-1], weight.shape[1], mask is not None and len(mask.shape) > 1, dy.mesh.size())
    return _placements(layouts, _BACKWARD, inputs, set(compress(_BACKWARD[1], needs)))


def _row_norm(weight: Any) -> list[tuple[list[Any], list[Any]]]:
    """By rows only: the norm is not linear, so a weight whose columns are sharded is gathered."""
    from torch.distributed.tensor import Replicate, Shard

    return [([Replicate()], [Replicate()]), ([Shard(0)], [Shard(0)])]


def _lora_weight_norm(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    from torch.distributed.tensor import Replicate, Shard

    by_rows = [Shard(0), Replicate(), Shard(0), Shard(0)]
    return [([Replicate()], [Replicate()] * 4 + [None, None]), ([Shard(0)], [*by_rows, None, None])]


def _register() -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    ops = torch.ops.lorakernels
    for op, strategy in (
        (ops.lora_linear.default, _forward),
        (ops.lora_linear_backward.default, _backward),
        (ops.row_norm.default, _row_norm),
        (ops.lora_weight_norm.default, _lora_weight_norm),
    ):
        register_sharding(op)(strategy)
        # DTensor keeps the layout of a call for the next one like it. What makes calls alike it takes from the
        # schema's integers; here it is every number and flag: they say which outputs there are.
        tensors = sum("Tensor" in str(argument.type) for argument in op._schema.arguments)
        schema_info = RuntimeSchemaInfo(tensors, needs_pytree=True)
        DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[op] = schema_info
