"""Servers that are started for a load test and stopped behind it, and adapters for them to serve."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lorakernels.backend import BackendError
from lorakernels.config import LoRAConfig
from lorakernels.files.checkpoint import Checkpoint
from lorakernels.files.peft import write_peft
from lorakernels.tools.serve import Server

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNTIL_UP = 900.0  # seconds


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextmanager
def running(server: Server, port: int, log: Path) -> Iterator[str]:
    """Its address, once it answers; it ends with the body, and what it says goes to `log`.

    Raises BackendError, with the end of the log, where it ends by itself or takes too long.
    """
    url = f"http://127.0.0.1:{port}"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            server.command, env=server.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
        try:
            until = time.monotonic() + UNTIL_UP
            while not _answers(url):
                if process.poll() is not None or time.monotonic() > until:
                    said = log.read_text(encoding="utf-8", errors="replace")[-1000:]
                    raise BackendError(f"the server does not answer (exit status {process.poll()}); it said: {said}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def write_random_adapter(model: Path, folder: Path, rank: int, seed: int) -> None:
    """An adapter of a model's projections that changes each weight by about half of its size; reads headers only.

    Raises ValueError where the model's files have none of these.
    """
    weights = {name.removesuffix(".weight"): one for name, one in Checkpoint(model).tensors.items()}
    chance = torch.Generator().manual_seed(seed)
    updates = {}
    for path, weight in weights.items():
        if path.rpartition(".")[2] in PROJECTIONS:
            N, K = weight.shape
            A, B = (torch.randn(shape, generator=chance) for shape in ((rank, K), (N, rank)))
            updates[path] = {"lora_A.weight": A / K**0.5, "lora_B.weight": B / (4 * rank**0.5)}
    if not updates:
        raise ValueError(f"{model} has no {', '.join(PROJECTIONS)}; give adapters by --adapter NAME=DIR")
    targets = sorted({path.rpartition(".")[2] for path in updates})
    write_peft(folder, LoRAConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), updates)
