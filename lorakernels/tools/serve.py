"""vLLM's OpenAI server with the plugin: its options from ours, and its process in the place of this one."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lorakernels.adapters.folder import find_source
from lorakernels.backend import BackendError
from lorakernels.integrations import vllm, vllm_metrics, vllm_versions
from lorakernels.integrations.vllm_sources import MISSING, installed_version

SERVER = "vllm.entrypoints.openai.api_server"
PLUGINS = "VLLM_PLUGINS"  # vLLM's: which of those it finds it loads; all if unset
UPDATES = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"  # vLLM's: whether adapters may be loaded by a request, from anywhere
TOWERS = "--enable-tower-connector-lora"  # vLLM's: what a tower made of an image is kept by the adapter's name
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
MOST_SLOTS = 8


class Server(NamedTuple):
    """What starts one."""

    command: list[str]
    environment: dict[str, str]
    without_lora: list[str]  # the same model's server


def server(
    model: str,
    adapters: Sequence[str],
    *,
    root: str | None,
    max_adapters: int | None,
    max_rank: int | None,
    options: Mapping[str, object],
    own: Sequence[str],
) -> Server:
    """vLLM's, with LoRA by these kernels.

    Args:
        model: a folder with config.json, or what vLLM takes in its place.
        adapters: NAME=DIR each, a folder of PEFT's files.
        root: the folder under which they must lie, and those that are loaded later; None for anywhere.
        max_adapters: how many may be in one batch; as there are, up to 8, if None.
        max_rank: the largest rank; the adapters' largest, or 16 without any, if None.
        options: vLLM's by name, such as port; those that are None are left to vLLM.
        own: what goes to vLLM as it is.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        BackendError: the plugin, or what keeps adapters by version under a root, does not fit it.
        ValueError, OSError: an adapter is not there or outside the root, or its rank is over max_rank.
    """
    reason = vllm.why_left_off() or (vllm_versions.why_left_off() if root else None)
    if reason is not None:
        raise ModuleNotFoundError(reason) if reason == MISSING else BackendError(reason)
    if Path(model).is_dir() and not Path(model, "config.json").is_file():
        raise ValueError(f"--model {model} has no config.json; expected a model's folder, as save_pretrained writes it")
    environment = dict(os.environ)
    if (plugins := environment.get(PLUGINS)) is not None and "lorakernels" not in plugins.split(","):
        environment[PLUGINS] = ",".join(filter(None, (plugins, "lorakernels")))
    if root is not None:
        if not root or not Path(root).is_dir():
            raise ValueError(f"--adapter-root {root!r} is no folder; expected one with the adapters' folders in it")
        if TOWERS in own:
            raise ValueError(f"{TOWERS} has a cache that does not know versions; expected no --adapter-root with it")
        environment |= {vllm_versions.ROOT: str(Path(root).resolve()), UPDATES: "1"}
    folders: dict[str, str] = {}
    for text in adapters:
        name, _, folder = text.partition("=")
        if not name or not folder or name in folders:
            raise ValueError(
                f"--adapter {text}; expected NAME=DIR with a name of its own, such as alice=adapters/alice"
            )
        if root is not None:
            folder = str(find_source(name, Path(folder).resolve(), Path(root).resolve()).folder)
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
    slots = max_adapters
    if slots is None:
        slots = MOST_SLOTS if root else max(1, min(len(folders), MOST_SLOTS))
    if slots < 1:
        raise ValueError(f"--max-adapters is {slots}; expected at least 1")
    start = [sys.executable, "-m", SERVER, "--model", model]
    lora = ["--enable-lora", "--max-loras", str(slots), "--max-lora-rank", str(room)]
    if folders:
        lora += ["--lora-modules", *(f"{name}={folder}" for name, folder in folders.items())]
    named = [[f"--{name}", str(value)] for name, value in options.items() if value is not None]
    rest = [*chain(*named), *own]
    return Server([*start, *lora, *rest], environment, [*start, *rest])


def serve(server: Server) -> None:
    """Say what starts, and become it."""
    print(f"vLLM {installed_version()} with LoRA by lorakernels:\n  {shlex.join(server.command)}", flush=True)
    if vllm_metrics.FOLDER not in server.environment:
        server.environment[vllm_metrics.FOLDER] = vllm_metrics.make_folder()
    os.execve(server.command[0], server.command, server.environment)


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
