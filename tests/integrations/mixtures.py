"""Small mixtures of every architecture whose experts are taken, without the models around them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable

import torch
from torch import nn

BOTH, FIRST, LAST = slice(None), slice(0, 1), slice(1, 2)  # of a mixture's targets
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

    def __init__(
        self,
        name: str,
        dtype: torch.dtype = torch.float64,
        implementation: str = "",
        experts: int = EXPERTS,
        inner: int = INNER,
        hidden: int = HIDDEN,
    ) -> None:
        super().__init__()
        block, config, number = MIXTURES[name]
        folder = f"transformers.models.{name}"
        settings = getattr(importlib.import_module(f"{folder}.configuration_{name}"), config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sizes = {key: {INNER: inner, HIDDEN: hidden}.get(value, value) for key, value in SIZES.items()}
            self.config = settings(**sizes, **{number: experts})
        default = "batched_mm" if dtype is torch.float64 else "grouped_mm"
        self.config._experts_implementation = implementation or default
        draw = torch.Generator().manual_seed(4)
        self.block = getattr(importlib.import_module(f"{folder}.modeling_{name}"), block)(self.config)
        for tensor in self.block.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) / 4)
        first = "gate_up_proj" if hasattr(self.block.experts, "gate_up_proj") else "up_proj"
        self.targets = [f"experts.{first}", "experts.down_proj"]
        self.to(dtype)

    @property
    def router(self) -> nn.Module:
        return getattr(self.block, "gate", None) or self.block.router

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x)
        y = y[0] if isinstance(y, tuple) else y
        return y.view(x.shape)  # Llama 4's is a matrix


def shake(model: nn.Module, seed: int = 6) -> None:
    """Give every adapter numbers of its own, none of them zero: the same in each model of the same names."""
    draw = torch.Generator().manual_seed(seed)
    for key, parameter in sorted(model.named_parameters()):
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=draw).to(parameter) / 3


def step(model: nn.Module, run: Callable[[torch.Tensor], torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """y, dx and every gradient."""
    model.zero_grad()
    parameter = next(model.parameters())
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).to(parameter.dtype).requires_grad_()
    y = (model if run is None else run)(x)
    torch.manual_seed(2)
    y.backward(torch.randn(y.shape).to(y))
    found = {"y": y.detach(), "dx": x.grad}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-14) -> None:
    """Each within `tolerance` of its largest element."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        reached = float(((found[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30)).detach())
        assert reached <= tolerance, (name, reached)
