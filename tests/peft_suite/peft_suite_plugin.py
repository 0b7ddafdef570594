"""A pytest plugin for PEFT's own tests: keeps those about LoRA, writes outcomes as JSON, and accelerates if asked.

PEFT_SUITE_OUT is the folder for the JSON files. With PEFT_SUITE_ACCELERATE=1 every model takes `lorakernels.accelerate`
right after PEFT has put an adapter into it, and the calls that took the fused path are counted.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

OUT = Path(os.environ["PEFT_SUITE_OUT"])
ACCELERATE = os.environ.get("PEFT_SUITE_ACCELERATE") == "1"

# Of the parameter sets in an id such as `[Vanilla MLP 1 IA3-MLP-IA3Config-config_kwargs49]`, those of other methods.
CONFIG = re.compile(r"\b\w+Config\b")

outcomes: dict[str, str] = {}
counts = {"layers": 0, "fused calls": 0, "calls": 0}


class AllKnown(Counter[str]):
    def __contains__(self, key: object) -> bool:
        return True


def pytest_collection_finish() -> None:
    # PEFT's helper goes online for a model that it does not know from a test before, HF_HUB_OFFLINE or not.
    utils = sys.modules.get("tests.testing_utils")
    if utils is not None:
        utils._HUB_MODEL_ACCESSES = AllKnown()  # type: ignore[attr-defined]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def is_about_lora(item: pytest.Item) -> bool:
        configs = set(CONFIG.findall(item.name.partition("[")[2]))
        return not configs or "LoraConfig" in configs

    kept = [item for item in items if is_about_lora(item)]
    config.hook.pytest_deselected(items=[item for item in items if not is_about_lora(item)])
    items[:] = kept


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # The worst of set-up, call and tear-down.
    if report.outcome != "passed" or report.when == "call":
        outcomes[report.nodeid] = report.outcome if outcomes.get(report.nodeid) != "failed" else "failed"


def pytest_sessionfinish() -> None:
    """Under pytest-xdist the workers count and the controller has the outcomes; all of them write."""
    text = json.dumps({"outcomes": {} if "PYTEST_XDIST_WORKER" in os.environ else outcomes, "counts": counts})
    (OUT / f"{os.getpid()}.json").write_text(text, encoding="utf-8")


def pytest_configure() -> None:
    if ACCELERATE:
        accelerate_after_injection()
        count_fused_calls()


def accelerate_after_injection() -> None:
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTuner

    import lorakernels
    from lorakernels.integrations.peft import FusedLinear

    inject = BaseTuner.inject_adapter

    def inject_adapter(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        inject(self, model, *args, **kwargs)
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            before = sum(type(module) is FusedLinear for module in model.modules())
            lorakernels.accelerate(model)
            counts["layers"] += sum(type(module) is FusedLinear for module in model.modules()) - before

    BaseTuner.inject_adapter = inject_adapter


def count_fused_calls() -> None:
    from lorakernels.integrations import peft as integration

    fused = integration._fused_forward

    def fused_forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        y = fused(layer, x)
        if not torch.compiler.is_compiling():  # a counter in the graph would compile anew at every call
            counts["calls"] += 1
            counts["fused calls"] += y is not None
        return y

    integration._fused_forward = fused_forward
