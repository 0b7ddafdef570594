"""What this machine has, what will run on it and why, what is missing, and whether the results are right."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorakernels import __version__, formula
from lorakernels.backend import ENVIRONMENT, IMPLS, TRITON_DTYPES, explain_impl, interpreter_on
from lorakernels.configs.table_file import CACHE
from lorakernels.functional import lora_linear
from lorakernels.integrations import vllm
from lorakernels.integrations.vllm_sources import installed_version
from lorakernels.tools.bench.environment import cpu_name, version_of

VARIABLES = (ENVIRONMENT, CACHE, "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
PACKAGES = ("torch", "triton", "numpy", "safetensors", "rich", "tqdm")
OPTIONAL = {"peft": "peft", "transformers": "serve", "scikit-learn": "demo", "matplotlib": "demo"}  # and its extra
OLDEST = {"torch": (2, 11), "triton": (3, 6)}
ON_LINUX = ("triton",)

# Of the largest element of a result. Sound kernels stay near 1 rounding; unsound ones are off by thousands.
LIMIT_IN_ROUNDINGS = 16
M, K, N, R = 24, 80, 48, 5
Row = dict[str, Any]
# What is said of a device, where it is known.
_FACTS = {"model": "{}", "threads": "{} threads", "memory_gib": "{} GiB", "capability": "capability {}"}


def examine() -> Row:
    """Look at this machine and run the self-check: all that `lorakernels doctor` says, ready for JSON.

    `ok` is whether the self-check passes on every device. Never raises for what is wrong with the machine.
    """
    versions: dict[str, str | None] = {"lorakernels": __version__, "python": platform.python_version()}
    versions |= {"platform": platform.platform(), **{name: version_of(name) for name in (*PACKAGES, *OPTIONAL)}}
    versions |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "torch_rocm": torch.version.hip}
    versions["vllm"] = installed_version()
    cpu = {"name": "cpu", "model": cpu_name(), "threads": torch.get_num_threads()}
    found = [cpu, *(_gpu(index) for index in range(torch.cuda.device_count()))]
    devices: list[Row] = [{"name": "", **dict.fromkeys(_FACTS)} | device for device in found]
    names = [device["name"] for device in devices]
    problems = [{"what": what, "mend": mend} for wrong, what, mend in _probes(versions, len(devices) > 1) if wrong]
    checks = [self_check(name, dtype) for name in names for dtype in (torch.float32, torch.bfloat16)]
    return {
        "ok": all(check["ok"] for check in checks),
        "versions": versions,
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "interpreter": interpreter_on(),
        "vllm_plugin": vllm.why_left_off() or f"fits vLLM {versions['vllm']}",
        "environment_valid": os.environ.get(ENVIRONMENT, "auto") in IMPLS,
        "devices": devices,
        "choices": [_choice(name, dtype) for name in names for dtype in TRITON_DTYPES],
        "problems": problems,
        "checks": checks,
    }


def self_check(device: str, dtype: torch.dtype) -> Row:
    """A small lora_linear, forward and backward, as impl="auto" runs it on `device`, against float64.

    `error` is the largest, of the largest element: a number, or text where it is no finite one.
    """
    check = _choice(device, dtype) | {"limit": LIMIT_IN_ROUNDINGS * torch.finfo(dtype).eps, "error": None, "ok": False}
    try:
        error = _error(device, dtype)
    except Exception as problem:  # whatever a driver or a compiler throws is the finding
        return check | {"why": f"{type(problem).__name__}: {problem}"}
    return check | {"why": "", "ok": error <= check["limit"], "error": error if math.isfinite(error) else str(error)}


def _error(device: str, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = [random(M, K), random(N, K) / K**0.5, random(R, K) / K**0.5, random(N, R), random(N)]
    dy = random(M, N)

    def results(inputs: list[torch.Tensor], exact: bool) -> list[torch.Tensor]:
        x, weight, A, B, bias = inputs
        for tensor in (x, A, B):
            tensor.requires_grad_()
        y = (formula.lora_linear if exact else lora_linear)(x, weight, A, B, bias=bias, scaling=2.0)
        return [y.detach(), *torch.autograd.grad(y, (x, A, B), dy.to(y))]

    expected = results([tensor.double() for tensor in tensors], exact=True)
    got = results([tensor.to(device, copy=True) for tensor in tensors], exact=False)
    # Not Python's max, which would lose a NaN.
    errors = [(g.cpu().double() - e).abs().max() / e.abs().max() for g, e in zip(got, expected, strict=True)]
    return torch.stack(errors).max().item()


def _gpu(index: int) -> Row:
    name = f"cuda:{index}"
    try:
        found = torch.cuda.get_device_properties(index)
    except RuntimeError as error:
        return {"name": name, "model": f"cannot be opened: {error}"}
    memory, capability = round(found.total_memory / 2**30, 1), f"{found.major}.{found.minor}"
    return {"name": name, "model": found.name, "memory_gib": memory, "capability": capability}


def _choice(device: str, dtype: torch.dtype) -> Row:
    """The implementation of impl="auto" on a device, and why; None where the call would raise `why`."""
    try:
        impl, why = explain_impl("auto", torch.device(device), dtype)
    except (ValueError, RuntimeError) as error:
        impl, why = None, str(error)
    return {"device": device, "dtype": str(dtype).removeprefix("torch."), "impl": impl, "why": why}


def _probes(versions: dict[str, str | None], has_gpu: bool) -> Iterator[tuple[object, str, str]]:
    """Whether something is missing or wrong, what it is, and how to mend it."""
    for package in PACKAGES:
        version, oldest = versions[package], OLDEST.get(package, (0,))
        needed, wanted = package not in ON_LINUX or platform.system() == "Linux", ".".join(map(str, oldest))
        old = version and tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < oldest
        yield version is None and needed, f"{package} is not installed", f"pip install {package}"
        upgrade = f'pip install --upgrade "{package}>={wanted}"'
        yield old, f"{package} {version} is older than {wanted}", upgrade
    value = os.environ.get(ENVIRONMENT, "auto")
    yield value not in IMPLS, f"{ENVIRONMENT} is {value!r}", f"unset it, or set one of {', '.join(IMPLS)}"
    interpreted = "Triton's interpreter is on: kernels run on the CPU"
    yield has_gpu and interpreter_on(), interpreted, "unset TRITON_INTERPRET"
    driver, built_for = shutil.which("nvidia-smi") or shutil.which("rocm-smi"), torch.version.cuda or torch.version.hip
    for_the_cpu = "a GPU driver is here, but torch is built for the CPU only"
    yield not has_gpu and driver and not built_for, for_the_cpu, "https://pytorch.org/get-started"
    hidden = f"see whether {Path(driver or '').name} lists one, and whether CUDA_VISIBLE_DEVICES hides it"
    yield not has_gpu and driver and built_for, "a GPU driver is here, but torch sees no GPU", hidden
    no_gpu = "no GPU: plain torch runs instead of the Triton kernels"
    yield not has_gpu and not driver, no_gpu, "run where there is one, for speed"
    for package, extra in OPTIONAL.items():
        missing = f"{package} is not installed (optional)"
        yield versions[package] is None, missing, f'pip install "lorakernels[{extra}]"'


def print_diagnosis(found: Row, console: Console | None = None) -> None:
    """What `examine` has found, for a terminal."""
    console = console or Console(highlight=False)
    environment = {name: value or "not set" for name, value in found["environment"].items()}
    environment["Triton's interpreter"] = "on" if found["interpreter"] else "off"
    environment["The plugin for vLLM"] = found["vllm_plugin"]
    sections: dict[str, Iterable[tuple[str, ...]]] = {
        "Versions": [(name, version or "-") for name, version in found["versions"].items()],
        "Environment": environment.items(),
        "Devices": [
            (device["name"], ", ".join(text.format(device[fact]) for fact, text in _FACTS.items() if device[fact]))
            for device in found["devices"]
        ],
        'What impl="auto" runs, and why': [
            (row["device"], row["dtype"], row["impl"] or "none", row["why"]) for row in found["choices"]
        ],
    }
    for title, rows in sections.items():
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(Text(title, "bold"))
        console.print(table)
        console.print()
    console.print("[bold]Missing, and the mend[/]" if found["problems"] else "[bold]Nothing is missing[/]")
    for problem in found["problems"]:
        console.print(Text(f"- {problem['what']}: ") + Text(problem["mend"], "cyan"))
    console.print("\n[bold]Self-check: lora_linear, forward and backward, against float64[/]")
    for check in found["checks"]:
        mark = Text("✓ ", "green") if check["ok"] else Text("✗ ", "red")
        result = check["why"]
        if check["error"] is not None:
            result = f"error {float(check['error']):.1e} of the largest element (limit {check['limit']:.1e})"
        console.print(mark + Text(f"{check['device']} {check['dtype']} {check['impl'] or 'none'}: {result}"))
    if not found["ok"]:
        console.print("\nFAILED: results on this machine are wrong, or do not come", style="bold red")
