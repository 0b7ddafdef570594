"""Training over two processes (gloo, CPU) gives the gradients of one process."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lorakernels as lk

WORLD = 2

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


def model() -> nn.Module:
    """Two adapted layers with a B that is not zero; the base is frozen."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    lk.inject(net, lk.LoRAConfig(r=3, target_modules="all-linear"))
    for parameter in lk.trainable_parameters(net):
        nn.init.normal_(parameter, std=0.3)
    return net


def batch() -> torch.Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(1))


def loss(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return net(x).square().mean()


def gradients_of_one_process() -> dict[str, torch.Tensor]:
    net = model()
    loss(net, batch()).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def start(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)


def leave() -> None:
    """After the last assertion, and past torch's teardown, which aborts now and then where gloo's threads still run."""
    dist.barrier()
    os._exit(0)


def share_of(rank: int) -> torch.Tensor:
    return batch().chunk(WORLD)[rank]


def ddp(rank: int, folder: str) -> None:
    start(rank, folder)
    net = DistributedDataParallel(model())
    loss(net, share_of(rank)).backward()
    expected = gradients_of_one_process()
    found = {name.removeprefix("module."): p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name])
    leave()


def fsdp2(rank: int, folder: str) -> None:
    start(rank, folder)
    net = model()
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in net:
        if isinstance(layer, lk.LoRALinear):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    loss(net, share_of(rank)).backward()
    expected = gradients_of_one_process()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad.full_tensor(), expected[name])
    state = copy.copy(net.state_dict())
    assert all(torch.equal(state[name].full_tensor(), p) for name, p in model().state_dict().items())
    leave()


@pytest.mark.parametrize("way", [ddp, fsdp2])
def test_gradients_equal_those_of_one_process(way, tmp_path: Path) -> None:
    mp.spawn(way, args=(str(tmp_path),), nprocs=WORLD)
