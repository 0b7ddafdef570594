"""What vLLM's `/metrics` says of this package, by the client for Prometheus that vLLM has.

The engine runs beside the process that is asked: it is heard there where PROMETHEUS_MULTIPROC_DIR, prometheus_client's
own way, names a folder for all of them before they start, as `lorakernels serve` does.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorakernels import __version__

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_PREFIX = "lorakernels-metrics-"


def make_folder() -> str:
    """For the process that this one becomes, and those that it starts; `clear_at_exit` of that process clears it."""
    folder = Path(tempfile.gettempdir(), f"{_PREFIX}{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)  # of a former process of this number
    folder.mkdir(mode=0o700)
    return str(folder)


def clear_at_exit() -> None:
    folder = os.environ.get(FOLDER, "")
    if Path(folder).name == f"{_PREFIX}{os.getpid()}":
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


@lru_cache(maxsize=1)
def _client() -> Any:
    return importlib.import_module("prometheus_client") if importlib.util.find_spec("prometheus_client") else None


@lru_cache(maxsize=1)
def rows() -> tuple[Any, Any] | None:
    """Counters of the tokens without and with an adapter; None without the client, and in all but one worker of many.

    With them comes which version of this package computes LoRA.
    """
    client = _client()
    if client is None:
        return None
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    if get_tensor_model_parallel_rank() or not get_pp_group().is_first_rank:
        return None  # the others have the same tokens
    info = client.Gauge("lorakernels_build_info", "What computes LoRA here.", ["version"], multiprocess_mode="max")
    info.labels(__version__).set(1)
    counter = client.Counter("lorakernels_rows", "Tokens, by whether they had one.", ["adapter"])
    return counter.labels("none"), counter.labels("some")


@lru_cache(maxsize=1)
def loads() -> Any:
    """The counter of what became of requests to load an adapter; None without the client."""
    client = _client()
    if client is None:
        return None
    counter = client.Counter("lorakernels_adapter_loads", "Requests to load an adapter.", ["result"])
    for result in ("loaded", "reloaded", "unchanged", "refused"):
        counter.labels(result)
    return counter
