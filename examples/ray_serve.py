"""Many adapters over several replicas, with Ray Serve.

Each replica holds the base model and an AdapterStore. Ray sends a request to a replica that has its adapter already,
where there is one, and rows of different adapters that wait together are one batch. Here two replicas answer 64
requests for three adapters and the base; one replica is killed meanwhile, and what it lost is asked again. Every answer
is compared with that adapter's alone. A tiny Llama made here stands for the base model.

    pip install "lorakernels[ray]"
    python examples/ray_serve.py
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.exceptions import RayError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorakernels as lk

NAMES = ["alice", "bob", "carol"]
NEW_TOKENS = 8
ATTEMPTS = 20


@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0.5}, max_ongoing_requests=32)
class Replica:
    """A base model and the adapters under `root`, a folder for each name."""

    def __init__(self, base: str, root: str) -> None:
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(base).eval()
        self.store = lk.AdapterStore(self.model, max_adapters=8, max_rank=16, root=root)

    @serve.multiplexed(max_num_models_per_replica=8)
    async def adapter(self, name: str) -> str:
        """Ray asks once for each name that comes here, and remembers that it is here."""
        await asyncio.to_thread(self.store.load, name)
        return name

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.02)
    async def generate(self, asked: list[tuple[str | None, list[int]]]) -> list[list[int]]:
        return await asyncio.to_thread(self._generate, asked)

    def _generate(self, asked: list[tuple[str | None, list[int]]]) -> list[list[int]]:
        names, prompts = zip(*asked, strict=True)
        ids = torch.tensor(prompts)  # of one length here: pad real prompts, and give an attention mask
        with torch.inference_mode(), self.store.batch(names):
            tokens = self.model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        return tokens[:, ids.shape[1] :].tolist()

    async def __call__(self, prompt: list[int]) -> tuple[int, list[int]]:
        """The replica's process, and the tokens."""
        name = serve.get_multiplexed_model_id() or None
        if name is not None:
            await self.adapter(name)
        return os.getpid(), await self.generate((name, prompt))


def make_files(folder: Path) -> tuple[str, str]:
    """A base model, and three adapters of different ranks."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes))
    model.save_pretrained(folder / "base")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for r, name in zip((4, 8, 16), NAMES, strict=True):
        lk.inject(model, lk.LoRAConfig(r=r, lora_alpha=4 * r, target_modules=targets, init_lora_weights=False))
        lk.save_adapter(model, folder / "adapters" / name)
        lk.unload(model)
    return str(folder / "base"), str(folder / "adapters")


def alone(base: str, root: str, prompt: list[int]) -> dict[str | None, list[int]]:
    """What each adapter, and the base, answers by itself."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    answers: dict[str | None, list[int]] = {}
    for name in [None, *NAMES]:
        if name is not None:
            lk.load_adapter(model, Path(root, name))
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        answers[name] = tokens[0, len(prompt) :].tolist()
        lk.unload(model)
    return answers


async def ask(handle: Any, name: str | None, prompt: list[int]) -> tuple[int, int, list[int]]:
    """Attempts, the replica's process, and the tokens."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return attempt, *await handle.options(multiplexed_model_id=name or "").remote(prompt)
        except RayError:
            if attempt == ATTEMPTS:
                raise
            await asyncio.sleep(0.5)
    raise AssertionError("unreachable")


async def load(handle: Any, right: dict[str | None, list[int]], prompt: list[int], requests: int) -> dict[str, Any]:
    names = [[None, *NAMES][i % 4] for i in range(requests)]
    _, victim, _ = await ask(handle, NAMES[0], prompt)
    tasks = [asyncio.ensure_future(ask(handle, name, prompt)) for name in names]
    bar = tqdm(total=requests, desc="requests", disable=None)
    for task in tasks:
        task.add_done_callback(lambda _: bar.update())
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    os.kill(victim, signal.SIGKILL)
    found = await asyncio.gather(*tasks, return_exceptions=True)
    bar.close()
    answers = [(name, one) for name, one in zip(names, found, strict=True) if not isinstance(one, BaseException)]
    return {
        "requests": requests,
        "lost": requests - len(answers),
        "wrong": sum(tokens != right[name] for name, (_, _, tokens) in answers),
        "asked again": sum(attempts > 1 for _, (attempts, _, _) in answers),
        "replicas": len({process for _, (_, process, _) in answers}),
    }


def main(requests: int = 64) -> dict[str, Any]:
    prompt = [1 + i * 7 % 255 for i in range(48)]
    with tempfile.TemporaryDirectory() as folder:
        base, root = make_files(Path(folder))
        right = alone(base, root, prompt)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
        try:
            serve.run(Replica.bind(base, root))
            handle = serve.get_deployment_handle("Replica", "default")
            told = asyncio.run(load(handle, right, prompt, requests))
        finally:
            serve.shutdown()
            ray.shutdown()
    print(told)
    return told


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    main(parser.parse_args().requests)
