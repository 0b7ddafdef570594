"""Ray Serve over AdapterStore: two replicas, one killed under load. It needs Ray: `pip install .[ray]`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakernels as lk

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

from ray import serve
from ray.exceptions import RayError
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

NAMES = ["alice", "bob", "carol"]
PROMPT = [1 + i * 7 % 255 for i in range(48)]
ATTEMPTS = 20


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[2] / "examples"), *sys.path])
    import ray_serve

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield ray_serve
    serve.shutdown()
    ray.shutdown()


def make_files(folder: Path) -> tuple[str, str]:
    """A base model, and three adapters of different ranks."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes))
    model.save_pretrained(folder / "base")
    for r, name in zip((4, 8, 16), NAMES, strict=True):
        config = lk.LoRAConfig(r=r, lora_alpha=4 * r, target_modules="all-linear", init_lora_weights=False)
        lk.save_adapter(lk.inject(model, config), folder / "adapters" / name)
        lk.unload(model)
    return str(folder / "base"), str(folder / "adapters")


def alone(base: str, root: str, new_tokens: int) -> dict[str, list[int]]:
    """What each adapter, and the base, answers by itself."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    answers = {}
    for name in ["", *NAMES]:
        if name:
            lk.load_adapter(model, Path(root, name))
        tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        answers[name] = tokens[0, len(PROMPT) :].tolist()
        lk.unload(model)
    return answers


async def ask(handle: Any, name: str) -> tuple[int, int, list[int]]:
    """Attempts, the replica's process, and the tokens."""
    for attempt in range(1, ATTEMPTS):
        try:
            return attempt, *await handle.options(multiplexed_model_id=name).remote(PROMPT)
        except RayError:
            await asyncio.sleep(0.5)
    return ATTEMPTS, *await handle.options(multiplexed_model_id=name).remote(PROMPT)


def test_no_answer_is_lost_or_wrong_when_a_replica_is_killed(example: Any, tmp_path: Path) -> None:
    base, root = make_files(tmp_path)
    right = alone(base, root, example.NEW_TOKENS)
    assert len(set(map(tuple, right.values()))) == 4
    serve.run(example.Replica.bind(base, root))
    handle = serve.get_deployment_handle("Replica", "default")
    names = ["", *NAMES] * 32  # more than two replicas take at once: some are in each when one is killed
    assert serve.status().applications["default"].deployments["Replica"].replica_states == {"RUNNING": 2}

    async def under_load() -> list[tuple[int, int, list[int]]]:
        _, victim, _ = await ask(handle, NAMES[0])
        tasks = [asyncio.ensure_future(ask(handle, name)) for name in names]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        os.kill(victim, signal.SIGKILL)
        return await asyncio.gather(*tasks)

    found = asyncio.run(under_load())
    assert [tokens for _, _, tokens in found] == [right[name] for name in names]
    assert any(attempts > 1 for attempts, _, _ in found)
