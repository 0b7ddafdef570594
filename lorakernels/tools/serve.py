"""vLLM's OpenAI server with the plugin: its options from ours, and its process in the place of this one."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakernels.backend import BackendError
from lorakernels.integrations import vllm

SERVER = "vllm.entrypoints.openai.api_server"
PLUGINS = "VLLM_PLUGINS"  # vLLM's: which of those it finds it loads; all if unset
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
MOST_SLOTS = 8


def vllm_command(
    model: str,
    adapters: Sequence[str],
    *,
    max_adapters: int | None,
    max_rank: int | None,
    options: Mapping[str, object],
    own: Sequence[str],
) -> list[str]:
    """What starts the server.

    Args:
        model: a folder with config.json, or what vLLM takes in its place.
        adapters: NAME=DIR each, a folder of PEFT's files.
        max_adapters: how many may be in one batch; as there are, up to 8, if None.
        max_rank: the largest rank; the adapters' largest, or 16 without any, if None.
        options: vLLM's by name, such as port; those that are None are left to vLLM.
        own: what goes to vLLM as it is.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        BackendError: the plugin does not fit it.
        ValueError, OSError: an adapter is not there, or its rank is over max_rank.
    """
    reason = vllm.why_left_off()
    if reason is not None:
        raise ModuleNotFoundError(reason) if vllm.installed_version() is None else BackendError(reason)
    if Path(model).is_dir() and not Path(model, "config.json").is_file():
        raise ValueError(f"--model {model} has no config.json; expected a model's folder, as save_pretrained writes it")
    folders: dict[str, str] = {}
    for text in adapters:
        name, _, folder = text.partition("=")
        if not name or not folder or name in folders:
            raise ValueError(
                f"--adapter {text}; expected NAME=DIR with a name of its own, such as alice=adapters/alice"
            )
        folders[name] = folder
    ranks = {name: _rank(folder) for name, folder in folders.items()}
    largest = max(ranks.values(), default=16)
    limit = largest if max_rank is None else max_rank
    for name, rank in ranks.items():
        if rank > limit:
            raise ValueError(f"adapter {name} has rank {rank}, over --max-rank {limit}: give --max-rank {largest}")
    room = next((rank for rank in RANKS if rank >= limit), None)
    if room is None or limit < 1:
        raise ValueError(f"the largest rank is {limit}; vLLM takes 1 … {RANKS[-1]}")
    slots = max(1, min(len(folders), MOST_SLOTS)) if max_adapters is None else max_adapters
    if slots < 1:
        raise ValueError(f"--max-adapters is {slots}; expected at least 1")
    command = [sys.executable, "-m", SERVER, "--model", model, "--enable-lora"]
    command += ["--max-loras", str(slots), "--max-lora-rank", str(room)]
    if folders:
        command += ["--lora-modules", *(f"{name}={folder}" for name, folder in folders.items())]
    for name, value in options.items():
        if value is not None:
            command += [f"--{name}", str(value)]
    return [*command, *own]


def serve(command: list[str]) -> None:
    """Say what starts, and become it."""
    plugins = os.environ.get(PLUGINS)
    if plugins is not None and "lorakernels" not in plugins.split(","):
        os.environ[PLUGINS] = ",".join(filter(None, (plugins, "lorakernels")))
    print(f"vLLM {vllm.installed_version()} with LoRA by lorakernels:\n  {shlex.join(command)}", flush=True)
    os.execv(command[0], command)


def _rank(folder: str) -> int:
    file = Path(folder, "adapter_config.json")
    config = json.loads(file.read_text(encoding="utf-8"))
    ranks: list[Any] = []
    if isinstance(config, dict):
        pattern = config.get("rank_pattern") or {}
        ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [pattern])]
    if not ranks or not all(isinstance(rank, int) for rank in ranks):
        raise ValueError(f"{file} has no rank; expected PEFT's adapter_config.json, with a whole number as r")
    return max(ranks)
