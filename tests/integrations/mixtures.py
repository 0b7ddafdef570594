"""Small mixtures of every architecture whose experts are taken, without the models around them."""

from __future__ import annotations

import importlib
import warnings

import torch
from torch import nn

HIDDEN, INNER, EXPERTS, TOP_K = 16, 24, 4, 2
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": INNER, "hidden_act": "silu"}
SIZES |= {"num_experts_per_tok": TOP_K, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
SIZES |= {"moe_shared_expert_intermediate_size": INNER, "norm_topk_prob": True}
MIXTURES: dict[str, tuple[str, str, str]] = {
    "qwen3_moe": ("Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig", "num_experts"),
    "mixtral": ("MixtralSparseMoeBlock", "MixtralConfig", "num_local_experts"),
    "gpt_oss": ("GptOssMLP", "GptOssConfig", "num_local_experts"),
    "deepseek_v3": ("DeepseekV3MoE", "DeepseekV3Config", "n_routed_experts"),
    "glm4_moe": ("Glm4MoeMoE", "Glm4MoeConfig", "n_routed_experts"),
    "granitemoe": ("GraniteMoeMoE", "GraniteMoeConfig", "num_local_experts"),
    "nemotron_h": ("NemotronHMoE", "NemotronHConfig", "n_routed_experts"),
    "llama4": ("Llama4TextMoe", "Llama4TextConfig", "num_local_experts"),
}


class Mixture(nn.Module):
    """One block; its output alone, of those that give the router's too. A CPU's grouped product takes no float64."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64, implementation: str = "", experts: int = EXPERTS):
        super().__init__()
        block, config, number = MIXTURES[name]
        folder = f"transformers.models.{name}"
        settings = getattr(importlib.import_module(f"{folder}.configuration_{name}"), config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.config = settings(**SIZES, **{number: experts})
        default = "batched_mm" if dtype is torch.float64 else "grouped_mm"
        self.config._experts_implementation = implementation or default
        draw = torch.Generator().manual_seed(4)
        self.block = getattr(importlib.import_module(f"{folder}.modeling_{name}"), block)(self.config)
        for tensor in self.block.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) / 4)
        self.to(dtype)

    @property
    def targets(self) -> list[str]:
        experts = self.block.experts
        first = "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"
        return [f"experts.{first}", "experts.down_proj"]

    @property
    def router(self) -> nn.Module:
        return getattr(self.block, "gate", None) or self.block.router

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x)
        y = y[0] if isinstance(y, tuple) else y
        return y.view(x.shape)  # Llama 4's is a matrix
