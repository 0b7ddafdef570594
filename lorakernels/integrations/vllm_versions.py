"""Adapters of vLLM's server by version: from under one root, and each as its files were when it was loaded.

vLLM keeps an adapter by a number and its path: it may answer from its prefix cache of files that are there no more
(vllm #42125, #30931), reads them at every use after a reload in place (vllm #41482), changes the weights under requests
that are being answered, and what has left its memory it reads again, whatever the files are by then. Here a version is
a copy of the files in a folder whose path says what they were (inode, times, size), and has a number of its own. All of
that is done in the process that answers HTTP; the engine's caches go by path and number, as they always do. In all
processes two requests' adapters are the same if their numbers are: vLLM compares names, so that of two versions in one
batch one would be loaded, and the engine would stop at the other.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import importlib
import os
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Set
from functools import cached_property
from pathlib import Path
from typing import Any

from lorakernels.adapters.folder import FILES, find_source, stamps_of
from lorakernels.backend import BackendError
from lorakernels.integrations import vllm_metrics
from lorakernels.integrations.vllm_sources import (
    FIELDS,
    TESTED,
    Class,
    Signatures,
    installed_version,
    source_of,
    unlike,
)
from lorakernels.when_imported import when_imported

ROOT = "LORAKERNELS_ADAPTER_ROOT"
RESOLVERS = ("VLLM_LORA_RESOLVER_CACHE_DIR", "VLLM_LORA_RESOLVER_HF_REPO_LIST")  # vLLM's, which load from elsewhere
KEPT = 3600.0  # seconds that a version stays when no name means it any more: requests may be going on with it

_REQUEST = "vllm.lora.request"
_SERVING = "vllm.entrypoints.openai.models.serving"
_LOADING = ("lora_name", "lora_path", "load_inplace", "is_3d_lora_weight")
_MADE = ("lora_name", "lora_int_id", "lora_path", "base_model_name", "load_inplace", "is_3d_lora_weight")
SIGNATURES: dict[tuple[Class, ...], Signatures] = {
    ((_SERVING, "OpenAIServingModels"),): {"load_lora_adapter": ("request", "base_model_name")},
    (("vllm.entrypoints.serve.lora.protocol", "LoadLoRAAdapterRequest"),): {FIELDS: _LOADING},
    ((_REQUEST, "LoRARequest"),): {FIELDS: _MADE, "__eq__": ("value",), "__hash__": ()},
}
# What the method that is wrapped does with its names, and what is in the key of a block of the prefix cache.
LINES = {
    _SERVING: ("if lora_name in self.lora_requests", "self.lora_requests[lora_name] = lora_request"),
    "vllm.v1.core.kv_cache_utils": ('return [("lora", lora_request.lora_name, lora_request.lora_path)]',),
}


def why_left_off() -> str | None:
    """Why versions cannot be kept with the installed vLLM; None where they can."""
    reason = unlike(SIGNATURES)
    if reason is None:
        for module, lines in LINES.items():
            for line in lines:
                if line not in source_of(module):
                    mend = f"use vLLM {' or '.join(TESTED)}, or serve without --adapter-root"
                    return f"{module} of vLLM {installed_version()} has no {line!r}: {mend}"
        for variable in RESOLVERS:
            if os.environ.get(variable):
                return f"{variable} is set, by which adapters come from outside the adapter root: unset it"
    return reason


def install() -> None:
    """Load adapters by version from under the folder that ROOT names, in this process, once it has the server."""
    reason, root = why_left_off(), Path(os.environ[ROOT]).resolve()
    if reason is None and not root.is_dir():
        reason = f"{ROOT}={root} is no folder"
    if reason is not None:
        raise BackendError(f"adapters cannot be kept by version: {reason}")
    when_imported(_REQUEST, _tell_versions_apart)
    when_imported(_SERVING, lambda: _replace_loading(root))


class Versions:
    """Copies of adapters' files under a temporary folder of this process, which goes when it ends."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._unnamed: dict[Path, float] = {}  # since when

    @cached_property
    def _made(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="lorakernels-adapters-", ignore_cleanup_errors=True)

    def take(self, path: str, named: Collection[str]) -> str:
        """The folder of the version that lies at `path` now; those go that are not `named` and have not been for long.

        Raises ValueError for what is no adapter under the root, and OSError where it cannot be read or kept. Neither
        tells a client where anything lies.
        """
        try:
            source = find_source("", path, self.root)
        except ValueError:
            raise ValueError(f"lora_path {path!r} leads out of the adapter root; expected a folder in it") from None
        if not all(os.path.isfile(source.folder / name) for name in FILES):
            raise ValueError(f"lora_path {path!r} has no {' and '.join(FILES)} under the adapter root; expected both")
        text = repr((source.folder, source.stamps))
        with self._lock:
            folder = Path(self._made.name)
            version = folder / hashlib.sha256(text.encode()).hexdigest()[:16] / source.folder.name
            self._clear({version, *map(Path, named)})
            if not version.is_dir():
                made = Path(tempfile.mkdtemp(dir=folder))
                try:
                    for name in FILES:
                        shutil.copyfile(source.folder / name, made / name)
                    if stamps_of(source.folder) != source.stamps:
                        raise ValueError(f"the files in {path!r} have changed while they were read: load them again")
                    version.parent.mkdir(exist_ok=True)
                    made.rename(version)
                finally:
                    shutil.rmtree(made, ignore_errors=True)
        return str(version)

    def _clear(self, named: Set[Path]) -> None:
        now = time.monotonic()
        there = {path for path in Path(self._made.name).glob("*/*") if path.is_dir()}
        self._unnamed = {path: self._unnamed.get(path, now) for path in there - named}
        for path, since in self._unnamed.items():
            if now - since > KEPT:
                shutil.rmtree(path.parent, ignore_errors=True)


def _tell_versions_apart() -> None:
    Request: Any = importlib.import_module(_REQUEST).LoRARequest

    def is_same(self: Any, value: object) -> bool:
        return isinstance(value, Request) and self.lora_int_id == value.lora_int_id

    Request.__eq__, Request.__hash__ = is_same, lambda self: hash(self.lora_int_id)


def _replace_loading(root: Path) -> None:
    serving: Any = importlib.import_module(_SERVING)
    Models = serving.OpenAIServingModels
    plain = Models.load_lora_adapter
    if plain.__module__ == __name__:
        return
    versions, loads = Versions(root), vllm_metrics.loads()
    locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        known = self.lora_requests.get(request.lora_name)
        answer = await load(self, request, base_model_name)
        now = self.lora_requests.get(request.lora_name)
        if not isinstance(answer, str):
            result = "refused"
        else:
            result = "unchanged" if now is known else "reloaded" if known else "loaded"
        if loads is not None:
            loads.labels(result).inc()
        return answer

    async def load(self: Any, request: Any, base_model_name: str | None) -> Any:
        name, held = request.lora_name, self.lora_requests
        if not name or not request.lora_path:
            return await plain(self, request, base_model_name)  # which says what is missing
        async with locks[name]:
            if name in held and not request.load_inplace:
                return await plain(self, request, base_model_name)
            named = [each.lora_path for each in held.values()]
            try:
                folder = await asyncio.to_thread(versions.take, request.lora_path, named)
            except (ValueError, OSError) as error:
                said = f"the adapter cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
                return serving.create_error_response(message=said, err_type="InvalidUserInput")
            known = held.get(name)
            if known and (known.lora_path, known.is_3d_lora_weight) == (folder, request.is_3d_lora_weight):
                return f"Success: LoRA adapter '{name}' has these files already."
            # To vLLM it is a new name, for which it takes a new number; what the name meant stays until that is loaded.
            beside = copy.copy(self)
            beside.lora_requests = {other: held[other] for other in held if other != name}
            wanted = request.model_copy(update={"lora_path": folder, "load_inplace": False})
            answer = await plain(beside, wanted, base_model_name)
            if name in beside.lora_requests:
                held[name] = beside.lora_requests[name]
            return answer

    Models.load_lora_adapter = load_lora_adapter
