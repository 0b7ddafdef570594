"""Many adapters over several replicas with Ray Serve: a base model and an AdapterStore in each.

Ray sends a request to a replica that has its adapter already, where there is one; rows of different adapters that wait
together are one batch. `pip install "lorakernels[ray]"`, and a folder with an adapter's folder for each name:

    python examples/ray_serve.py BASE_MODEL ADAPTERS NAME...
"""

import asyncio
import os
import sys
from typing import Any

import ray
import torch
from ray import serve
from transformers import AutoModelForCausalLM

import lorakernels as lk

NEW_TOKENS = 8


@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0.5}, max_ongoing_requests=32)
class Replica:
    def __init__(self, base: str, root: str) -> None:
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(base).eval()
        self.store = lk.AdapterStore(self.model, max_adapters=8, max_rank=16, root=root)

    @serve.multiplexed(max_num_models_per_replica=8)
    async def adapter(self, name: str) -> str:  # once for each name: Ray remembers that it is here
        await asyncio.to_thread(self.store.load, name)
        return name

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.02)
    async def generate(self, asked: list[Any]) -> list[list[int]]:
        return await asyncio.to_thread(self._generate, asked)

    def _generate(self, asked: list[Any]) -> list[list[int]]:
        names, prompts = zip(*asked, strict=True)
        ids = torch.tensor(prompts)  # of one length here: pad real prompts, and give an attention mask
        with torch.inference_mode(), self.store.batch(names):
            tokens = self.model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        return tokens[:, ids.shape[1] :].tolist()

    async def __call__(self, prompt: list[int]) -> tuple[int, list[int]]:
        name = serve.get_multiplexed_model_id() or None
        if name is not None:
            await self.adapter(name)
        return os.getpid(), await self.generate((name, prompt))


if __name__ == "__main__":
    base, root, *names = sys.argv[1:]
    ray.init(log_to_driver=False)
    handle = serve.run(Replica.bind(base, root))
    for name in ["", *names]:
        process, tokens = handle.options(multiplexed_model_id=name).remote(list(range(1, 33))).result()
        print(f"{name or 'the base model'}, by process {process}: {tokens}")
