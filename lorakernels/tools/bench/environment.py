"""Where a result comes from."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from lorakernels.backend import interpreter_on

_ROOT = Path(__file__).resolve().parents[3]
_PACKAGES = ("torch", "triton", "peft", "unsloth", "lorafusion", "lorakernels")


def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions and commit, for a row of JSON."""
    on_gpu, in_checkout = device.type == "cuda", (_ROOT / ".git").exists()
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "threads": torch.get_num_threads(),
        "driver": _output("nvidia-smi --query-gpu=driver_version --format=csv,noheader --id=0") if on_gpu else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        # torch's own tells builds apart (2.13.0+cu130), which the package's metadata does not.
        "versions": {name: version_of(name) for name in _PACKAGES} | {"torch": torch.__version__},
        "interpreter": interpreter_on(),
        # Of the checkout that the package is in, marked when files were changed.
        "commit": _output("git describe --always --abbrev=40 --exclude=* --dirty=+changes") if in_checkout else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _output(command: str) -> str | None:
    try:
        done = subprocess.run(command.split(), cwd=_ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
