"""What LoRA costs in vLLM on a CPU: its own, and this package's plugin, beside the engine without LoRA.

python bench/vllm_lora.py [--rounds N]

A 4-layer Llama of width 512 in float32, all seven projections adapted, 4 adapters and the base. The three engines have
a process each and take turns, so that what else the machine does meets all of them. Times are the processes' own, on
one thread; the least and the median of each are compared. It needs vLLM, and transformers for the model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ENGINES = ("base", "vllm", "lorakernels")
# (requests, tokens of each prompt, tokens that are generated). Decode is the steps after the first.
CASES = {"prefill": (5, 128, 1), "first": (5, 16, 1), "decode": (5, 16, 33), "64 requests": (64, 32, 9)}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import lorakernels as lk

    sizes = {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16)).save_pretrained(folder / "model")
    for i in range(4):
        model = LlamaForCausalLM.from_pretrained(folder / "model")
        config = lk.LoRAConfig(r=8, target_modules=PROJECTIONS, init_lora_weights=False)
        lk.save_adapter(lk.inject(model, config), folder / f"a{i}")


def engine(who: str, folder: str) -> None:
    """Serve one engine: a case's name on stdin, its seconds on stdout."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    os.environ |= {"VLLM_PLUGINS": who, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {} if who == "base" else {"enable_lora": True, "max_loras": 4, "max_lora_rank": 8}
    llm = LLM(
        f"{folder}/model", dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=512,
        max_num_seqs=64, enable_prefix_caching=False, **options,
    )  # fmt: skip
    for line in sys.stdin:
        requests, length, tokens = CASES[line.strip()]
        prompts = [{"prompt_token_ids": [(7 * i + j) % 500 + 3 for j in range(length)]} for i in range(requests)]
        names = [i % 5 if options else 0 for i in range(requests)]
        loras = [LoRARequest(f"a{i}", i, f"{folder}/a{i - 1}") if i else None for i in names]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        began = time.process_time()
        llm.generate(prompts, sampling, lora_request=loras, use_tqdm=False)
        print("took", time.process_time() - began, flush=True)


def took(process: subprocess.Popen[str], case: str) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{case}\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("took "):
            return float(line.split()[1])
    raise RuntimeError("an engine has died")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("engine", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        engine(*arguments.engine)
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        processes = {}
        for who in ENGINES:
            command = [sys.executable, __file__, who, folder]
            processes[who] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        seconds: dict[str, dict[str, list[float]]] = {case: {who: [] for who in ENGINES} for case in CASES}
        for round in range(arguments.rounds + 1):
            for case in CASES:
                for who, process in processes.items():
                    took_now = took(process, case)
                    if round:  # the first warms up
                        seconds[case][who].append(took_now)
        for process in processes.values():
            process.terminate()
    for who in ENGINES:
        first = min(seconds["first"][who])
        seconds["decode"][who] = [each - first for each in seconds["decode"][who]]
    rows = {}
    for case in ("prefill", "decode", "64 requests"):
        of = seconds[case]
        for name, best in (("least", min), ("median", median)):
            base, own, ours = (best(of[who]) for who in ENGINES)
            rows[f"{case}, {name}"] = {"base_ms": base * 1e3, "vllm": own / base, "lorakernels": ours / base}
            print(
                f"{case:12} {name:7} base {base * 1e3:7.1f} ms, vLLM's LoRA {own / base:5.2f}, here {ours / base:5.2f}"
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
