"""What vLLM answers, as JSON on the last line: run by `test_vllm.py`.

python vllm_answers.py PLUGINS FOLDER: without plugins an engine without LoRA and one with vLLM's own, else one with
LoRA by the plugin; FOLDER has a `model` and adapters `a0` to `a3`, two of which fit an engine at once.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

PROMPTS = [[(7 * i + 3 * j + 5) % 500 + 3 for j in range(5 + 3 * i)] for i in range(10)]
ADAPTERS = [None, 0, 1, 2, 3] * 2  # of each prompt


def answers(who: str, folder: str, dtype: str) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {} if who == "base" else {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "max_cpu_loras": 3}
    engine = LLM(
        f"{folder}/model", dtype=dtype, skip_tokenizer_init=True, enforce_eager=True, max_model_len=128, max_num_seqs=8,
        enable_prefix_caching=False, **options,
    )  # fmt: skip

    def asked(adapters: list[int | None], folders: dict[int, int], tokens: int = 12) -> list[Any]:
        requests = [
            None if a is None or who == "base" else LoRARequest(f"a{a}", a + 1, f"{folder}/a{folders.get(a, a)}")
            for a in adapters
        ]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=1)
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = [
            each.outputs[0] for each in engine.generate(prompts, sampling, lora_request=requests, use_tqdm=False)
        ]
        return [
            [list(each.token_ids), [max(p.logprob for p in step.values()) for step in each.logprobs]]
            for each in outputs
        ]

    found = {"mixed": asked(ADAPTERS, {}), "alone": asked([1] * 10, {}, 4)}
    if who != "base":
        for lora_id in engine.llm_engine.list_loras():
            engine.llm_engine.remove_lora(lora_id)
        found["reloaded"] = asked(ADAPTERS, {0: 3, 3: 0})
    return found


if __name__ == "__main__":
    plugins, folder = sys.argv[1:]
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"VLLM_PLUGINS": plugins, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    whose = [plugins] if plugins else ["base", "vllm"]
    print(json.dumps({f"{who} {d}": answers(who, folder, d) for who in whose for d in ("float32", "bfloat16")}))
