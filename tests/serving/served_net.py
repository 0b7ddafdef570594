"""A small net, adapters for it, and the oracle: each of them merged, in float64."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import lorakernels as lk
from lorakernels.config import scaling_of
from lorakernels.files.config_file import fields_of

VOCABULARY, WIDTH, INNER = 13, 8, 12
ALL = ("q_proj", "up", "down", "embed")
Adapter = tuple[lk.LoRAConfig, dict[str, torch.Tensor]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.down(torch.tanh(self.up(self.q_proj(h))))


class Net(nn.Module):
    """Every row [L] of ids on its own, so that a row alone and in a batch are the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def make_net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).requires_grad_(False).eval()


def make_ids(rows: int, length: int = 3) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length))


def make_adapter(net: nn.Module, seed: int, r: int = 4, targets: tuple[str, ...] = ALL, **fields: Any) -> Adapter:
    """Random factors for every module that `targets` names, by the keys of PEFT's files."""
    config = lk.LoRAConfig(r=r, lora_alpha=fields.pop("lora_alpha", 3), target_modules=list(targets), **fields)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, module in net.named_modules():
        leaf = path.rpartition(".")[2]
        if leaf in targets and isinstance(module, (nn.Linear, nn.Embedding)):
            rank = config.rank_pattern.get(path, r)
            of_embedding = isinstance(module, nn.Embedding)
            A, B = ("lora_embedding_A", "lora_embedding_B") if of_embedding else ("lora_A.weight", "lora_B.weight")
            N, K = module.weight.shape[::-1] if of_embedding else module.weight.shape
            options: Any = {"generator": generator, "dtype": module.weight.dtype}
            tensors[f"base_model.model.{path}.{A}"] = torch.randn(rank, K, **options) / 3
            tensors[f"base_model.model.{path}.{B}"] = torch.randn(N, rank, **options) / 3
    return config, tensors


def write(folder: Path, adapter: Adapter, **fields: Any) -> Path:
    config, tensors = adapter
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields_of(config)))
    save_file(tensors, folder / "adapter_model.safetensors")
    if fields:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def merged(net: nn.Module, adapter: Adapter | None) -> nn.Module:
    """The oracle: W + scaling · B A in the weights, in float64."""
    net = copy.deepcopy(net).double()
    if adapter is None:
        return net
    config, tensors = adapter
    for key, A in tensors.items():
        path, _, name = key.removeprefix("base_model.model.").partition(".lora_")
        if name in ("A.weight", "embedding_A"):
            B = tensors[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
            scaling = scaling_of(config.alpha_pattern.get(path, config.lora_alpha), len(A), config.use_rslora)
            update = scaling * B.double() @ A.double()
            net.get_submodule(path).weight.data += update.T if name == "embedding_A" else update
    return net


def alone(net: nn.Module, adapters: list[Adapter | None], ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([merged(net, adapter)(row[None]) for adapter, row in zip(adapters, ids, strict=True)])


def make_store(net: nn.Module, adapters: Mapping[str, Adapter | Path], **options: Any) -> lk.AdapterStore:
    store = lk.AdapterStore(net, **({"max_adapters": 4, "max_rank": 8} | options))
    for name, adapter in adapters.items():
        store.load(name, adapter)
    return store


def books(store: lk.AdapterStore) -> tuple[Any, ...]:
    """All that a failed call must leave as it was."""
    stats, current = store.stats(), store._books.current
    free = [sorted(pool.free) for pool in store._pools]
    pools = [None if pool.memory is None else pool.memory.clone() for pool in store._pools]
    kept = (
        stats.adapters,
        stats.on_device,
        stats.in_host,
        stats.pinned,
        stats.in_use,
        stats.used_bytes,
        stats.host_bytes,
    )
    return dict(current), kept, free, [None if memory is None else memory.tolist() for memory in pools]
