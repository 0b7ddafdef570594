"""Kernels compiled here for a GPU that is elsewhere: Triton's compile cache, filled, packed, and checked."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from lorakernels.testing.driver import CACHE_FOR, COMPILED, key_of_cache

_MANIFEST = "lorakernels.json"
_GROUP = "__grp__"  # how Triton's cache calls the file that lists those of a kernel
_NEEDED = (".json", ".cubin", ".so")  # of a kernel that is found; the steps to it are only read by people
_SHIPPED = """
from lorakernels.testing import driver
driver.install({arch!r})
from lorakernels.tools.steps import shipped_launches
driver.replay(shipped_launches())
"""


def precompile(
    out: Path,
    arch: str = "sm_90",
    python: str | None = None,
    triton: str | None = None,
    command: Sequence[str] = (),
    work: Path | None = None,
) -> bool:
    """Fill a compile cache with all that `command` launches on a driver that only checks, and pack it into `out`.

    It is for the CPython `python` (cp312, or the path of one; this one's by default) and for this version of Triton
    (the installed one). Without a command it is what the shipped configs launch. What a command compiled before it
    failed is packed too. The archive is then unpacked elsewhere and the command run again: whether the command ended
    well and every kernel was found. A later call with the same folder `work` goes on with what lies there.

    Raises:
        BackendError: there is no C compiler. ValueError: `python` is neither a tag nor a program.
        CalledProcessError: there is no such wheel.
    """
    command = list(command) or [sys.executable, "-c", _SHIPPED.format(arch=arch)]
    with tempfile.TemporaryDirectory(prefix="lorakernels-") as name:
        scratch = work or Path(name)
        scratch.mkdir(parents=True, exist_ok=True)
        environment, target = _environment(scratch, python, triton)
        _run(command, scratch / "cache", environment)
        code = "from lorakernels.testing import driver; print(driver.key_of_cache())"
        key = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip()
        kernels = _pack(scratch / "cache", out, {"arch": arch, "key": key, **target})
        print(f"{out}: {kernels} kernels for {arch}, {out.stat().st_size / (1 << 20):.1f} MiB, {_text(target)}")
        unpack(out, Path(name) / "elsewhere")
        found, ended = _run(command, Path(name) / "elsewhere", environment)
    misses = {what: number for what, number in found.items() if what.startswith("miss")}
    anew = sum(misses.values())
    print(f"unpacked elsewhere: {sum(found.values()) - anew} found, {anew} compiled anew")
    for what, number in misses.items():
        print(f"  {what}: {number}")
    return ended and not misses and bool(found)


def unpack(archive: Path, folder: Path) -> str | None:
    """Put an archive's kernels into the compile cache `folder`; why this Triton will not find them, None if it will.

    Raises:
        ValueError: the file is no archive of `lorakernels precompile`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # First beside, then each file whole into its place: a module of Triton's that a process has loaded from there must
    # not change under it.
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")
            target = json.loads((scratch / _MANIFEST).read_text())
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ValueError(f"{archive} is no archive of lorakernels precompile: {error}") from None
        for path in [path for path in scratch.rglob("*") if path.is_file()]:
            place = folder / path.relative_to(scratch)
            if path.name.startswith(_GROUP):  # they hold absolute paths
                names = json.loads(path.read_text())["child_paths"]
                path.write_text(json.dumps({"child_paths": {each: str(place.parent / each) for each in names}}))
            place.parent.mkdir(exist_ok=True)
            path.replace(place)
    own = {"python": sys.implementation.cache_tag, "triton": metadata.version("triton")}
    if key_of_cache() == target["key"] and target["python"] == own["python"]:
        return None
    return f"it is for {_text(target)}, and this is {_text(own)}"


def _text(target: dict[str, str]) -> str:
    return f"triton {target['triton']} on {target['python']}"


def _environment(scratch: Path, python: str | None, triton: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """What a process that fills the cache is told, and for which CPython and Triton the cache is."""
    own_tag, own_triton = f"cp{sys.version_info[0]}{sys.version_info[1]}", metadata.version("triton")
    triton = triton or own_triton
    tag, program = _python(python) if python else (own_tag, sys.executable)
    # So that this package is found, and no interpreter is.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    if triton != own_triton:
        paths.insert(0, str(scratch / "triton"))
        if not (scratch / "triton").exists():
            _pip("install", "--target", paths[0], f"triton=={triton}")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if tag != own_tag:
        fill_for = {"libtriton": _libtriton(tag, triton, scratch / "wheels")}
        if program:
            code = "import sysconfig; print(sysconfig.get_path('include'), sysconfig.get_config_var('EXT_SUFFIX'))"
            fill_for["include"], fill_for["suffix"] = subprocess.check_output([program, "-c", code], text=True).split()
        else:
            print(f"there is no python of {tag} here, so no headers: Triton's C launchers will be compiled there")
        environment[CACHE_FOR] = json.dumps(fill_for)
    return environment, {"python": f"cpython-{tag[2:]}", "triton": triton}


def _pip(command: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", command, "-q", "--no-deps", *arguments], check=True)


def _python(python: str) -> tuple[str, str]:
    """The tag of a CPython, and its program, or nothing where there is none here."""
    if match := re.fullmatch(r"cp3(\d+)", python):
        return python, shutil.which(f"python3.{match[1]}") or ""
    if not shutil.which(python):
        raise ValueError(f"python is {python!r}; expected a tag such as cp312, or the path of a Python program")
    code = "import sys; print(f'cp{sys.version_info[0]}{sys.version_info[1]}')"
    return subprocess.check_output([python, "-c", code], text=True).strip(), python


def _libtriton(tag: str, triton: str, folder: Path) -> str:
    """The hash of libtriton.so of that CPython's wheel."""
    platforms = [f"--platform=manylinux_2_{minor}_{os.uname().machine}" for minor in (17, 27, 28, 34, 35)]
    options = ("--only-binary=:all:", f"--python-version={tag[2:]}", "--implementation=cp", *platforms)
    _pip("download", "-d", str(folder), *options, f"triton=={triton}")
    (wheel,) = folder.glob("triton-*.whl")
    with zipfile.ZipFile(wheel) as zipped:
        return hashlib.sha256(zipped.read("triton/_C/libtriton.so")).hexdigest()


def _run(command: Sequence[str], cache: Path, environment: dict[str, str]) -> tuple[Counter[str], bool]:
    """How often each kernel was found in this cache ("hit …") or compiled ("miss …"), and whether it did well."""
    log = cache.with_suffix(".log")
    log.unlink(missing_ok=True)
    cache.mkdir(exist_ok=True)
    status = subprocess.run(command, env=environment | {"TRITON_CACHE_DIR": str(cache), COMPILED: str(log)}).returncode
    if status:
        print(f"{' '.join(command)[:200]} ended with status {status}")
    return Counter(log.read_text(encoding="utf-8").splitlines()) if log.exists() else Counter(), status == 0


def _pack(cache: Path, out: Path, manifest: dict[str, str]) -> int:
    """How many kernels are in the archive: of each what is needed to launch it, with no path of this machine."""
    kernels = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w:xz") as tar:

        def add(name: str, content: str) -> None:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content.encode("ascii")))

        add(_MANIFEST, json.dumps(manifest))
        for path in sorted(path for path in cache.rglob("*") if path.is_file() and path.name.endswith(_NEEDED)):
            if path.name.startswith(_GROUP):
                names = [name for name in json.loads(path.read_text())["child_paths"] if name.endswith(_NEEDED)]
                add(str(path.relative_to(cache)), json.dumps({"child_paths": dict.fromkeys(names, "")}))
                kernels += 1
            else:
                tar.add(path, path.relative_to(cache))
    return kernels
