"""lorakernels: low-rank adapters (LoRA) in fused Triton kernels, and in plain torch where there is no GPU.

Names load when they are first used: `import lorakernels` itself starts neither Triton nor CUDA.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakernels.adapters.combine import add_weighted_adapter as add_weighted_adapter
    from lorakernels.adapters.held import trainable_parameters as trainable_parameters
    from lorakernels.adapters.hotswap import hotswap_adapter as hotswap_adapter
    from lorakernels.adapters.hotswap import prepare_for_hotswap as prepare_for_hotswap
    from lorakernels.adapters.inject import inject as inject
    from lorakernels.adapters.load import load_adapter as load_adapter
    from lorakernels.adapters.quantize import quantize as quantize
    from lorakernels.adapters.save import save_adapter as save_adapter
    from lorakernels.adapters.switch import delete_adapter as delete_adapter
    from lorakernels.adapters.switch import merge as merge
    from lorakernels.adapters.switch import set_adapter as set_adapter
    from lorakernels.adapters.switch import set_scale as set_scale
    from lorakernels.adapters.switch import unload as unload
    from lorakernels.adapters.switch import unmerge as unmerge
    from lorakernels.backend import BackendError as BackendError
    from lorakernels.config import LoRAConfig as LoRAConfig
    from lorakernels.experts import combine_experts as combine_experts
    from lorakernels.experts import expert_lora_linear as expert_lora_linear
    from lorakernels.experts import expert_plan as expert_plan
    from lorakernels.experts import expert_route as expert_route
    from lorakernels.experts import multi_expert_lora_linear as multi_expert_lora_linear
    from lorakernels.explanation import explain as explain
    from lorakernels.files.reading import AdapterFileError as AdapterFileError
    from lorakernels.functional import lora_expand as lora_expand
    from lorakernels.functional import lora_linear as lora_linear
    from lorakernels.functional import lora_linear_group as lora_linear_group
    from lorakernels.functional import lora_shrink as lora_shrink
    from lorakernels.functional import multi_lora_linear as multi_lora_linear
    from lorakernels.integrations.peft import accelerate as accelerate
    from lorakernels.integrations.peft import restore as restore
    from lorakernels.nn.conv import LoRAConv1d as LoRAConv1d
    from lorakernels.nn.conv import LoRAConv2d as LoRAConv2d
    from lorakernels.nn.conv import LoRAConv3d as LoRAConv3d
    from lorakernels.nn.embedding import LoRAEmbedding as LoRAEmbedding
    from lorakernels.nn.linear import LoRALinear as LoRALinear
    from lorakernels.plan import BatchPlan as BatchPlan
    from lorakernels.serving.store import AdapterStore as AdapterStore

__version__ = "0.1.0"

_HOMES = {
    "lora_linear": "lorakernels.functional",
    "lora_linear_group": "lorakernels.functional",
    "explain": "lorakernels.explanation",
    "BatchPlan": "lorakernels.plan",
    "lora_shrink": "lorakernels.functional",
    "lora_expand": "lorakernels.functional",
    "multi_lora_linear": "lorakernels.functional",
    "expert_lora_linear": "lorakernels.experts",
    "expert_route": "lorakernels.experts",
    "combine_experts": "lorakernels.experts",
    "expert_plan": "lorakernels.experts",
    "multi_expert_lora_linear": "lorakernels.experts",
    "LoRALinear": "lorakernels.nn.linear",
    "LoRAEmbedding": "lorakernels.nn.embedding",
    "LoRAConv1d": "lorakernels.nn.conv",
    "LoRAConv2d": "lorakernels.nn.conv",
    "LoRAConv3d": "lorakernels.nn.conv",
    "LoRAConfig": "lorakernels.config",
    "inject": "lorakernels.adapters.inject",
    "trainable_parameters": "lorakernels.adapters.held",
    "merge": "lorakernels.adapters.switch",
    "quantize": "lorakernels.adapters.quantize",
    "unmerge": "lorakernels.adapters.switch",
    "unload": "lorakernels.adapters.switch",
    "set_adapter": "lorakernels.adapters.switch",
    "set_scale": "lorakernels.adapters.switch",
    "delete_adapter": "lorakernels.adapters.switch",
    "add_weighted_adapter": "lorakernels.adapters.combine",
    "hotswap_adapter": "lorakernels.adapters.hotswap",
    "prepare_for_hotswap": "lorakernels.adapters.hotswap",
    "save_adapter": "lorakernels.adapters.save",
    "load_adapter": "lorakernels.adapters.load",
    "AdapterStore": "lorakernels.serving.store",
    "accelerate": "lorakernels.integrations.peft",
    "restore": "lorakernels.integrations.peft",
    "AdapterFileError": "lorakernels.files.reading",
    "BackendError": "lorakernels.backend",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorakernels' has no attribute {name!r}; it has: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
