"""Layers whose weight is read and which are not called: an adapter there has no effect, and that is said."""

from __future__ import annotations

import gc
import re
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lorakernels as lk


class Fused(nn.Module):
    """q, k and v in one product of their weights, as diffusers' fuse_qkv_projections; the output by a call."""

    def __init__(self, fuse: bool = True) -> None:
        super().__init__()
        self.fuse = fuse
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.unused = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        if self.fuse:
            q, k, v = F.linear(x, torch.cat([layer.weight for layer in layers])).chunk(3, -1)
        else:
            q, k, v = (layer(x) for layer in layers)
        return self.o_proj(torch.tanh(q) * k + v)


class Model(nn.Module):
    def __init__(self, fuse: bool = True) -> None:
        super().__init__()
        self.attention, self.head = Fused(fuse), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x))


TARGETS = ["q_proj", "v_proj", "o_proj", "head", "unused.0"]


def test_the_first_pass_that_trains_tells_once() -> None:
    model = lk.inject(Model(), lk.LoRAConfig(target_modules=TARGETS), group=False)
    x = torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            model(x)
        model.eval()(x)
    model.train()
    with pytest.raises(RuntimeError):  # a pass that fails tells nothing
        model(torch.randn(3, 7))
    with pytest.warns(UserWarning, match="2 adapted layers were not called") as told:
        model(x)
    message = str(told[0].message)
    assert "attention.q_proj, attention.v_proj" in message and "o_proj" not in message
    assert "unused" not in message  # a list is called by nobody: of what is in it nothing is known
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.attention.children())
    assert not model._forward_hooks and not model._forward_pre_hooks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).sum().backward()


def test_a_model_that_calls_its_layers_tells_nothing() -> None:
    model = lk.inject(Model(fuse=False), lk.LoRAConfig(target_modules=TARGETS[:4]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(3, 8)).sum().backward()


def test_an_interrupt_and_other_models() -> None:
    """An interrupt runs no hook: the next watch takes its place, and nothing keeps the model."""
    model = lk.inject(Model(), lk.LoRAConfig(target_modules=TARGETS), group=False)
    model.head.register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(3, 8))
    other = lk.inject(Model(), lk.LoRAConfig(target_modules=TARGETS), group=False)
    with pytest.warns(UserWarning, match="2 adapted layers were not called"):
        other(torch.randn(3, 8))
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


def _interrupt(module: nn.Module, args: Any) -> None:
    raise KeyboardInterrupt


MAMBA = {"conv1d", "dt_proj", "out_proj"}
# What each reads, and one that it calls.
READERS: dict[str, tuple[set[str], str]] = {
    "MambaForCausalLM": (MAMBA, "in_proj"),
    "FalconMambaForCausalLM": (MAMBA, "in_proj"),
    "Mamba2ForCausalLM": ({"conv1d", "out_proj"}, "in_proj"),
    "BambaForCausalLM": ({"conv1d", "out_proj"}, "in_proj"),
    "Lfm2ForCausalLM": ({"conv"}, "in_proj"),
    "WavLMForXVector": ({"q_proj", "k_proj", "v_proj", "out_proj", "kernel"}, "intermediate_dense"),
}


def reader(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 16}
    attention = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    sizes |= {
        "MambaForCausalLM": {"state_size": 4},
        "FalconMambaForCausalLM": {"state_size": 4},
        "Mamba2ForCausalLM": {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1},
        "BambaForCausalLM": attention
        | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 4},
        "Lfm2ForCausalLM": attention | {"layer_types": ["conv"]},
        "WavLMForXVector": {"num_attention_heads": 2, "intermediate_size": 32, "num_conv_pos_embedding_groups": 2}
        | {"conv_dim": [8], "conv_stride": [5], "conv_kernel": [10], "tdnn_dim": [8], "tdnn_kernel": [1]}
        | {"num_feat_extract_layers": 1, "num_conv_pos_embeddings": 4, "tdnn_dilation": [1], "xvector_output_dim": 8},
    }[kind]
    config = re.sub("For[A-Z].*", "Config", kind)
    return getattr(transformers, kind)(getattr(transformers, config)(**sizes))


@pytest.mark.parametrize("kind", READERS)
def test_known_readers(kind: str) -> None:
    read, called = READERS[kind]
    model = reader(kind)
    for name in sorted(read):
        leaf = next(p for p, module in model.named_modules() if p.endswith(f".{name}") and not module._modules)
        with pytest.raises(ValueError, match="reads its weight and does not call it"):
            lk.inject(model, lk.LoRAConfig(target_modules=[leaf]))
    lk.inject(model, lk.LoRAConfig(target_modules="all-linear"))
    adapted = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, lk.LoRALinear)}
    assert called in adapted and not adapted & read


def test_a_file_for_what_is_read() -> None:
    model = reader("MambaForCausalLM")
    path = "backbone.layers.0.mixer.out_proj"
    tensors = {
        f"base_model.model.{path}.lora_A.weight": torch.zeros(2, 64),
        f"base_model.model.{path}.lora_B.weight": torch.zeros(32, 2),
    }
    store = lk.AdapterStore(model, max_rank=8)
    with pytest.raises(lk.AdapterFileError, match="reads its weight"):
        store.load("a", (lk.LoRAConfig(r=2, target_modules=["out_proj"]), tensors))
