"""What this machine has, what will run on it and why, what is missing, and whether the results are right."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorakernels import __version__
from lorakernels.backend import ENVIRONMENT, IMPLS, TRITON_DTYPES, explain_impl, interpreter_on
from lorakernels.configs.table_file import CACHE
from lorakernels.functional import lora_linear
from lorakernels.tools.bench.environment import cpu_name, version_of

VARIABLES = (ENVIRONMENT, CACHE, "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
PACKAGES = ("torch", "triton", "numpy", "safetensors", "rich", "tqdm")
OPTIONAL = {"peft": "peft", "transformers": "serve", "scikit-learn": "demo", "matplotlib": "demo"}  # and its extra
OLDEST = {"torch": (2, 11), "triton": (3, 6)}
ON_LINUX = ("triton",)

# Of the largest element of a result. Sound kernels stay near 1 rounding; unsound ones are off by thousands.
LIMIT_IN_ROUNDINGS = 16
M, K, N, R = 24, 80, 48, 5


@dataclass(frozen=True)
class Device:
    """A CPU (threads) or a GPU (compute capability)."""

    name: str
    model: str
    threads: int | None = None
    memory_gib: float | None = None
    capability: str | None = None


@dataclass(frozen=True)
class Choice:
    """The implementation of impl="auto" on a device; None where the call would raise `why`."""

    device: str
    dtype: str
    impl: str | None
    why: str


@dataclass(frozen=True)
class Problem:
    """Something missing or wrong, and how to mend it."""

    what: str
    mend: str


@dataclass(frozen=True)
class Check:
    """The largest error of lora_linear and its gradients against float64, of the largest element."""

    device: str
    dtype: str
    impl: str | None
    error: float | None
    limit: float
    why: str = ""

    @property
    def ok(self) -> bool:
        return self.error is not None and self.error <= self.limit


@dataclass(frozen=True)
class Diagnosis:
    """All that `lorakernels doctor` says."""

    versions: dict[str, str | None]
    environment: dict[str, str | None]
    interpreter: bool
    environment_valid: bool
    devices: tuple[Device, ...]
    choices: tuple[Choice, ...]
    problems: tuple[Problem, ...]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether the self-check passes on every device."""
        return all(check.ok for check in self.checks)


def examine() -> Diagnosis:
    """Look at this machine and run the self-check. Never raises for what is wrong with it."""
    versions = _versions()
    cpu = Device("cpu", cpu_name(), threads=torch.get_num_threads())
    devices = (cpu, *(_gpu(index) for index in range(torch.cuda.device_count())))
    choices = tuple(_choice(device.name, dtype) for device in devices for dtype in TRITON_DTYPES)
    return Diagnosis(
        versions=versions,
        environment={name: os.environ.get(name) for name in VARIABLES},
        interpreter=interpreter_on(),
        environment_valid=os.environ.get(ENVIRONMENT, "auto") in IMPLS,
        devices=devices,
        choices=choices,
        problems=tuple(_problems(versions, choices, has_gpu=len(devices) > 1)),
        checks=tuple(self_check(device.name, dtype) for device in devices for dtype in (torch.float32, torch.bfloat16)),
    )


def self_check(device: str, dtype: torch.dtype) -> Check:
    """A small lora_linear, forward and backward, as impl="auto" runs it on `device`."""
    limit = LIMIT_IN_ROUNDINGS * torch.finfo(dtype).eps
    name = str(dtype).removeprefix("torch.")
    impl = None
    try:
        impl = explain_impl("auto", torch.device(device), dtype)[0]
        return Check(device, name, impl, _error(device, dtype), limit)
    except Exception as error:  # whatever a driver or a compiler throws is the finding
        return Check(device, name, impl, None, limit, f"{type(error).__name__}: {error}")


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
        y = x @ weight.T + bias + 2 * (x @ A.T) @ B.T if exact else lora_linear(x, weight, A, B, bias=bias, scaling=2)
        return [y.detach(), *torch.autograd.grad(y, (x, A, B), dy.to(y))]

    expected = results([tensor.double() for tensor in tensors], exact=True)
    got = results([tensor.to(device, copy=True) for tensor in tensors], exact=False)
    # Not Python's max, which would lose a NaN.
    errors = [(g.cpu().double() - e).abs().max() / e.abs().max() for g, e in zip(got, expected, strict=True)]
    return torch.stack(errors).max().item()


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"lorakernels": __version__, "python": platform.python_version()}
    versions["platform"] = platform.platform()
    versions |= {name: version_of(name) for name in (*PACKAGES, *OPTIONAL)}
    versions["torch"] = torch.__version__
    versions["torch_cuda"] = torch.version.cuda
    versions["torch_rocm"] = torch.version.hip
    return versions


def _gpu(index: int) -> Device:
    name = f"cuda:{index}"
    try:
        properties = torch.cuda.get_device_properties(index)
    except RuntimeError as error:
        return Device(name, f"cannot be opened: {error}")
    memory = round(properties.total_memory / 2**30, 1)
    return Device(name, properties.name, memory_gib=memory, capability=f"{properties.major}.{properties.minor}")


def _choice(device: str, dtype: torch.dtype) -> Choice:
    name = str(dtype).removeprefix("torch.")
    try:
        return Choice(device, name, *explain_impl("auto", torch.device(device), dtype))
    except (ValueError, RuntimeError) as error:
        return Choice(device, name, None, str(error))


def _problems(versions: dict[str, str | None], choices: tuple[Choice, ...], has_gpu: bool) -> list[Problem]:
    problems = []
    for package in PACKAGES:
        version, oldest = versions[package], OLDEST.get(package)
        if version is None and (package not in ON_LINUX or platform.system() == "Linux"):
            problems.append(Problem(f"{package} is not installed", f"pip install {package}"))
        elif version is not None and oldest is not None and _numbers(version) < oldest:
            wanted = ".".join(map(str, oldest))
            mend = f'pip install --upgrade "{package}>={wanted}"'
            problems.append(Problem(f"{package} {version} is older than {wanted}", mend))
    value = os.environ.get(ENVIRONMENT, "auto")
    if value not in IMPLS:
        problems.append(Problem(f"{ENVIRONMENT} is {value!r}", f"unset it, or set one of {', '.join(IMPLS)}"))
    if has_gpu and interpreter_on():
        problems.append(Problem("Triton's interpreter is on: kernels run on the CPU", "unset TRITON_INTERPRET"))
    if not has_gpu:
        problems.append(_no_gpu())
    for package, extra in OPTIONAL.items():
        if versions[package] is None:
            problems.append(Problem(f"{package} is not installed (optional)", f'pip install "lorakernels[{extra}]"'))
    return problems


def _no_gpu() -> Problem:
    built_for = torch.version.cuda or torch.version.hip
    driver = shutil.which("nvidia-smi") or shutil.which("rocm-smi")
    if driver and not built_for:
        return Problem("a GPU driver is here, but torch is built for the CPU only", "https://pytorch.org/get-started")
    if driver:
        return Problem(
            "a GPU driver is here, but torch sees no GPU",
            f"see whether {Path(driver).name} lists one, and whether CUDA_VISIBLE_DEVICES hides it",
        )
    return Problem("no GPU: plain torch runs instead of the Triton kernels", "run where there is one, for speed")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def as_json(diagnosis: Diagnosis) -> str:
    """Every field of the diagnosis, and `ok`."""
    fields = asdict(diagnosis)
    fields["checks"] = [asdict(check) | {"ok": check.ok} for check in diagnosis.checks]
    # Strict JSON has no NaN.
    for row in fields["checks"]:
        if row["error"] is not None and not row["error"] < float("inf"):
            row["error"] = str(row["error"])
    return json.dumps({"ok": diagnosis.ok, **fields}, indent=2, allow_nan=False)


def print_diagnosis(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """The diagnosis for a terminal."""
    console = console or Console(highlight=False)
    _print_table(console, "Versions", [(name, version or "-") for name, version in diagnosis.versions.items()])
    environment = [(name, value or "not set") for name, value in diagnosis.environment.items()]
    _print_table(
        console, "Environment", [*environment, ("Triton's interpreter", "on" if diagnosis.interpreter else "off")]
    )
    _print_table(console, "Devices", [(device.name, _describe(device)) for device in diagnosis.devices])
    rows = [(c.device, c.dtype, c.impl or "none", c.why) for c in diagnosis.choices]
    _print_table(console, 'What impl="auto" runs, and why', rows)
    console.print("[bold]Missing, and the mend[/]" if diagnosis.problems else "[bold]Nothing is missing[/]")
    for problem in diagnosis.problems:
        console.print(Text(f"- {problem.what}: ") + Text(problem.mend, "cyan"))
    console.print()
    console.print("[bold]Self-check: lora_linear, forward and backward, against float64[/]")
    for check in diagnosis.checks:
        mark = Text("✓ ", "green") if check.ok else Text("✗ ", "red")
        found = check.why
        if check.error is not None:
            found = f"error {check.error:.1e} of the largest element (limit {check.limit:.1e})"
        console.print(mark + Text(f"{check.device} {check.dtype} {check.impl or 'none'}: {found}"))
    if not diagnosis.ok:
        console.print("\nFAILED: results on this machine are wrong, or do not come", style="bold red")


def _print_table(console: Console, title: str, rows: Sequence[tuple[str, ...]]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(Text(title, "bold"))
    console.print(table)
    console.print()


def _describe(device: Device) -> str:
    parts = [device.model]
    if device.threads is not None:
        parts.append(f"{device.threads} threads")
    if device.memory_gib is not None:
        parts.append(f"{device.memory_gib} GiB")
    if device.capability is not None:
        parts.append(f"capability {device.capability}")
    return ", ".join(parts)
