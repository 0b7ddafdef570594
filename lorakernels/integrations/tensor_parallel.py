"""Tensor parallelism for `torch.distributed.tensor.parallel.parallelize_module`: LoRALinear by rows or by columns.

Megatron's split (Shoeybi et al., arXiv 1909.08053, section 3): a layer by columns of its output, the next by rows of
its input, and one reduction behind the two. Of the adapter, what lies along the sharded side is sharded with the
weight, and the other factor, which is small, is on every rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from lorakernels.nn.linear import LoRALinear

OLDEST_TORCH = "2.13"


class ColwiseLoRA(ColwiseParallel):
    """`ColwiseParallel` for LoRALinear too: each rank computes its share of the outputs.

    The base weight, its bias, lora_B and DoRA's magnitude are sharded by rows; lora_A and the input are whole on every
    rank. Arguments as for `ColwiseParallel`: by default the input is replicated and the output a local tensor,
    sharded along its last dimension. With dropout every rank draws the mask of rank 0.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LoRALinear):
            return super()._apply(module, device_mesh)
        return _distribute(module, device_mesh, self, Replicate(), _rows)


class RowwiseLoRA(RowwiseParallel):
    """`RowwiseParallel` for LoRALinear too: each rank takes its share of the inputs, and the outputs are summed.

    The base weight and lora_A are sharded by columns; lora_B, the bias and DoRA's magnitude are whole on every rank.
    Arguments as for `RowwiseParallel`: by default the input is sharded along its last dimension and the output a
    replicated local tensor. With dropout every rank draws a mask of its own for its inputs; in_features must then be
    a multiple of 8 times the ranks, or the weight is gathered at every call. DoRA gathers it at every call too, for
    the norm of its rows.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LoRALinear):
            return super()._apply(module, device_mesh)
        return _distribute(module, device_mesh, self, Shard(-1), _columns)


def _rows(name: str) -> Placement:
    """Where a parameter or a buffer of the layer lies when the outputs are sharded."""
    return Replicate() if _is_A(name) else Shard(0)


def _columns(name: str) -> Placement:
    """The same when the inputs are sharded."""
    return Shard(1) if _is_A(name) or name == "base_layer.weight" else Replicate()


def _is_A(name: str) -> bool:
    return name.startswith("lora_A.") or (name.startswith("lora_initial.") and name.endswith(".A"))


def _distribute(
    layer: LoRALinear, mesh: DeviceMesh, style: Any, wanted_input: Placement, placement_of: Any
) -> nn.Module:
    if torch.__version__ < OLDEST_TORCH:
        raise RuntimeError(
            f"tensor parallelism of LoRALinear needs torch {OLDEST_TORCH} or newer, and this is {torch.__version__}, "
            "where clip_grad_norm_ may leave gradients as they were that are sums over ranks"
        )
    if layer.merged:
        raise RuntimeError(
            f"adapters {layer.merged_adapters} are merged into the base weight; call unmerge() before "
            "parallelize_module"
        )

    def shard(tensor: torch.Tensor, name: str) -> torch.Tensor:
        return distribute_tensor(tensor.detach(), mesh, [placement_of(name)], src_data_rank=style.src_data_rank)

    def partition(prefix: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            sharded = nn.Parameter(shard(parameter, f"{prefix}.{name}"), parameter.requires_grad)
            module.register_parameter(name, sharded)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = shard(buffer, f"{prefix}.{name}")

    return distribute_module(
        layer,
        mesh,
        partition,
        partial(_prepare_input, style.input_layouts, (wanted_input,)),
        partial(_prepare_output, style.output_layouts, style.use_local_output),
    )


def _prepare_input(
    given: tuple[Placement, ...], wanted: tuple[Placement, ...], layer: nn.Module, inputs: Any, mesh: DeviceMesh
) -> Any:
    x, *others = inputs
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, given, run_check=False)
    return (x.redistribute(placements=wanted), *others)


def _prepare_output(wanted: tuple[Placement, ...], local: bool, layer: nn.Module, y: Any, mesh: DeviceMesh) -> Any:
    y = y.redistribute(placements=wanted)
    return y.to_local() if local else y
