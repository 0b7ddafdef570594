"""What this machine has, what will run on it and why, what is missing, and whether the results are right."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorakernels import __version__, formula
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

    def __str__(self) -> str:
        units = {"{} threads": self.threads, "{} GiB": self.memory_gib, "capability {}": self.capability}
        return ", ".join([self.model, *(text.format(value) for text, value in units.items() if value is not None)])


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
    versions: dict[str, str | None] = {"lorakernels": __version__, "python": platform.python_version()}
    versions |= {"platform": platform.platform(), **{name: version_of(name) for name in (*PACKAGES, *OPTIONAL)}}
    versions |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "torch_rocm": torch.version.hip}
    cpu = Device("cpu", cpu_name(), threads=torch.get_num_threads())
    devices = (cpu, *(_gpu(index) for index in range(torch.cuda.device_count())))
    return Diagnosis(
        versions=versions,
        environment={name: os.environ.get(name) for name in VARIABLES},
        interpreter=interpreter_on(),
        environment_valid=os.environ.get(ENVIRONMENT, "auto") in IMPLS,
        devices=devices,
        choices=tuple(_choice(device.name, dtype) for device in devices for dtype in TRITON_DTYPES),
        problems=tuple(Problem(what, mend) for wrong, what, mend in _probes(versions, len(devices) > 1) if wrong),
        checks=tuple(self_check(device.name, dtype) for device in devices for dtype in (torch.float32, torch.bfloat16)),
    )


def self_check(device: str, dtype: torch.dtype) -> Check:
    """A small lora_linear, forward and backward, as impl="auto" runs it on `device`."""
    check = Check(device, str(dtype).removeprefix("torch."), None, None, LIMIT_IN_ROUNDINGS * torch.finfo(dtype).eps)
    try:
        check = replace(check, impl=explain_impl("auto", torch.device(device), dtype)[0])
        return replace(check, error=_error(device, dtype))
    except Exception as error:  # whatever a driver or a compiler throws is the finding
        return replace(check, why=f"{type(error).__name__}: {error}")


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
    environment = {name: value or "not set" for name, value in diagnosis.environment.items()}
    environment["Triton's interpreter"] = "on" if diagnosis.interpreter else "off"
    sections: dict[str, Iterable[tuple[str, ...]]] = {
        "Versions": [(name, version or "-") for name, version in diagnosis.versions.items()],
        "Environment": environment.items(),
        "Devices": [(device.name, str(device)) for device in diagnosis.devices],
        'What impl="auto" runs, and why': [(c.device, c.dtype, c.impl or "none", c.why) for c in diagnosis.choices],
    }
    for title, rows in sections.items():
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(Text(title, "bold"))
        console.print(table)
        console.print()
    console.print("[bold]Missing, and the mend[/]" if diagnosis.problems else "[bold]Nothing is missing[/]")
    for problem in diagnosis.problems:
        console.print(Text(f"- {problem.what}: ") + Text(problem.mend, "cyan"))
    console.print("\n[bold]Self-check: lora_linear, forward and backward, against float64[/]")
    for check in diagnosis.checks:
        mark = Text("✓ ", "green") if check.ok else Text("✗ ", "red")
        found = check.why
        if check.error is not None:
            found = f"error {check.error:.1e} of the largest element (limit {check.limit:.1e})"
        console.print(mark + Text(f"{check.device} {check.dtype} {check.impl or 'none'}: {found}"))
    if not diagnosis.ok:
        console.print("\nFAILED: results on this machine are wrong, or do not come", style="bold red")
