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

PACKAGES = ("torch", "triton", "peft", "unsloth", "lorafusion", "lorakernels")


def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions and commit, for a row of JSON."""
    found: dict[str, Any] = {
        "device": cpu_name(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "driver": None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        # torch's own tells builds apart (2.13.0+cu130), which the package's metadata does not.
        "versions": {name: version_of(name) for name in PACKAGES} | {"torch": torch.__version__},
        "interpreter": interpreter_on(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return found


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


def _commit() -> str | None:
    """Of the checkout that the package is in, marked when files were changed; None outside one."""
    root = str(Path(__file__).resolve().parents[3])
    if not (Path(root) / ".git").exists():
        return None
    commit = _output("git", "-C", root, "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+changes" if _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no") else "")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
