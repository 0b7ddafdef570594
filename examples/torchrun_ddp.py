"""An adapter trained by several processes: `torchrun --nproc_per_node 2 examples/torchrun_ddp.py [--fsdp]`."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lorakernels as lk


def build() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    return lk.inject(model, lk.LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear"))


alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
dist.init_process_group("gloo", **({} if "RANK" in os.environ else alone))  # torchrun sets RANK
rank, world = dist.get_rank(), dist.get_world_size()
model = build()
if "--fsdp" in sys.argv:
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[0], model[2], model):
        parallel = fully_shard(layer, mesh=mesh)
else:
    parallel = DistributedDataParallel(model)

torch.manual_seed(100 + rank)  # of its own data and dropout masks
target = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)) / 6
optimizer = torch.optim.AdamW(lk.trainable_parameters(parallel), lr=2e-2)
for step in range(60):
    x = torch.randn(64, 32)
    loss = (parallel(x) - x @ target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if rank == 0 and step % 10 == 0:
        print(f"step {step:2}: loss {loss.item():.3f}")

parallel.eval()
with torch.no_grad():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    losses = [0.0] * world
    dist.all_gather_object(losses, round((parallel(x) - x @ target).square().mean().item(), 5))

options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)  # whole, on rank 0
state = get_model_state_dict(parallel, options=options)
if rank == 0:
    whole = build()
    whole.load_state_dict(state, strict=False)
    print("loss on other data, by rank:", losses)
    print("saved in", lk.save_adapter(whole, "torchrun-adapter"))
dist.destroy_process_group()
