"""Adapters of vLLM's server by version: over a stand-in for what of vLLM's is relied on."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorakernels.adapters.folder import FILES
from lorakernels.backend import BackendError
from lorakernels.integrations import vllm, vllm_versions


class Engine:
    """The weights by the adapters' numbers; what has been dropped is read from its path again, as vLLM does."""

    def __init__(self) -> None:
        self.weights: dict[int, str] = {}
        self.reads = 0

    async def add_lora(self, request: Any) -> None:
        await asyncio.sleep(0)
        if request.lora_int_id not in self.weights or request.load_inplace:
            text = Path(request.lora_path, FILES[1]).read_text()
            if text == "bad":
                raise ValueError("these cannot be read")
            self.weights[request.lora_int_id] = text
            self.reads += 1

    def answer(self, request: Any) -> str:
        asyncio.run(self.add_lora(request))
        return self.weights[request.lora_int_id]


def write(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).write_text(text)


@pytest.fixture
def models(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("root/alice", "root/bob", "outside", "root-2/eve"):
        write(tmp_path / name, name)
    (tmp_path / "root" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    monkeypatch.setenv(vllm_versions.ROOT, str(tmp_path / "link"))
    vllm.register()
    vllm.register()
    return importlib.import_module(vllm_versions._SERVING).OpenAIServingModels(Engine())


def load(models: Any, name: str, path: str, in_place: bool = False) -> str:
    """Its answer, of an error behind a "-"."""
    protocol = importlib.import_module("vllm.entrypoints.serve.lora.protocol")
    request = protocol.LoadLoRAAdapterRequest(name, path, in_place)
    answer = asyncio.run(models.load_lora_adapter(request))
    return answer if isinstance(answer, str) else f"- {answer}"


@pytest.mark.parametrize("in_place", [True, False])
def test_a_name_that_is_loaded_again_is_another_version(models: Any, tmp_path: Path, in_place: bool) -> None:
    engine, alice = models.engine, tmp_path / "root" / "alice"
    assert load(models, "a", "alice") == "Success"
    first = models.lora_requests["a"]
    write(alice, "changed")
    assert engine.answer(first) == "root/alice"
    if not in_place:
        assert load(models, "a", "alice").startswith("- already loaded")
        del models.lora_requests["a"]
    assert load(models, "a", str(alice), in_place) == "Success"
    second = models.lora_requests["a"]
    assert len({first, second, replace(first)}) == 2  # of those in a batch
    keys = importlib.import_module("vllm.v1.core.kv_cache_utils")._gen_lora_extra_hash_keys
    assert keys(SimpleNamespace(lora_request=first)) != keys(SimpleNamespace(lora_request=second))
    shutil.rmtree(alice)
    engine.weights.clear()  # whatever is read again
    assert (engine.answer(first), engine.answer(second)) == ("root/alice", "changed")


def test_files_that_have_not_changed_are_not_read_again(models: Any, tmp_path: Path) -> None:
    load(models, "a", "alice")
    first = models.lora_requests["a"]
    assert not first.load_inplace  # or every use would read them
    assert "has these files already" in load(models, "a", "alice", in_place=True)
    assert models.lora_requests["a"] is first and models.engine.reads == 1
    stamp = os.stat(tmp_path / "root" / "alice" / FILES[1]).st_mtime_ns
    copied = tmp_path / "root" / "copied"
    write(copied, "root/other")  # of the same length
    os.utime(copied / FILES[1], ns=(stamp, stamp))
    shutil.move(copied / FILES[1], tmp_path / "root" / "alice" / FILES[1])
    assert load(models, "a", "alice", in_place=True) == "Success"
    assert models.engine.answer(models.lora_requests["a"]) == "root/other"


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("x", "../outside", "lora_path '../outside' leads out of the adapter root"),
        ("x", "../root-2/eve", "leads out"),
        ("x", "{tmp}/outside", "leads out"),
        ("x", "out", "leads out"),
        ("x", "alice\0", "leads out"),
        ("x", "nobody", "has no adapter_config.json and adapter_model.safetensors under the adapter root"),
        ("x", ".", "has no adapter_config.json"),
        ("x", "n" * 300, "has no adapter_config.json"),
        ("x", "", "must be provided"),
        ("", "alice", "must be provided"),
        ("a", "bob", "already loaded"),
    ],
)
def test_what_is_refused_changes_nothing(models: Any, tmp_path: Path, name: str, path: str, message: str) -> None:
    load(models, "a", "alice")
    before = dict(models.lora_requests)
    said = load(models, name, path.replace("{tmp}", str(tmp_path)))
    assert said.startswith("- ") and message in said
    assert models.lora_requests == before and models.engine.reads == 1


def test_a_load_that_fails_leaves_what_the_name_meant(models: Any, tmp_path: Path) -> None:
    load(models, "a", "alice")
    held = models.lora_requests["a"]
    write(tmp_path / "root" / "alice", "bad")
    assert load(models, "a", "alice", in_place=True) == "- these cannot be read"
    assert models.lora_requests["a"] is held and models.engine.answer(held) == "root/alice"


def test_loads_at_once(models: Any, tmp_path: Path) -> None:
    protocol = importlib.import_module("vllm.entrypoints.serve.lora.protocol")

    async def both(names: str) -> list[Any]:
        wanted = (protocol.LoadLoRAAdapterRequest(name, "alice") for name in names)
        return await asyncio.gather(*map(models.load_lora_adapter, wanted))

    assert asyncio.run(both("abcd")) == ["Success"] * 4  # one folder
    assert len({models.lora_requests[name].lora_path for name in "abcd"}) == 1
    assert sorted(map(str, asyncio.run(both("xx")))) == ["Success", "already loaded"]


def test_versions_that_nothing_means_go_after_a_while(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for turn in range(3):
        write(tmp_path / "root" / "alice", f"turn {turn}")
        load(models, "a", "alice", in_place=True)
        paths.append(Path(models.lora_requests["a"].lora_path))
        if turn == 1:
            assert all(path.is_dir() for path in paths)
            monkeypatch.setattr(vllm_versions, "KEPT", -1.0)
    assert [path.is_dir() for path in paths] == [False, True, True]


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        ("entrypoints/openai/models/serving.py", "request, base_model_name=None", "request", "takes .*expected"),
        ("entrypoints/serve/lora/protocol.py", "is_3d_lora_weight", "kind", "LoadLoRAAdapterRequest.its fields"),
        ("lora/request.py", "lora_int_id: int", "number: int", "LoRARequest.its fields .*use vLLM 0.32.0"),
        ("v1/core/kv_cache_utils.py", ", lora_request.lora_path", "", "has no 'return .*use vLLM 0.32.0"),
        ("entrypoints/openai/models/serving.py", "class Open", "class Closed", "no class OpenAIServingModels"),
    ],
)
def test_another_vllm_is_refused_at_the_start(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str, reason: str
) -> None:
    source = (stand_in / file).read_text()
    assert old in source
    (stand_in / file).write_text(source.replace(old, new))
    monkeypatch.setenv(vllm_versions.ROOT, str(tmp_path))
    with pytest.raises(BackendError, match=reason):
        vllm.register()


def test_nothing_is_wrapped_without_a_root_and_no_resolver_goes_round_it(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        vllm.register()
    models = importlib.import_module(vllm_versions._SERVING).OpenAIServingModels
    assert models.load_lora_adapter.__module__ == vllm_versions._SERVING and not caplog.records
    monkeypatch.setenv(vllm_versions.ROOT, str(tmp_path / "nowhere"))
    with pytest.raises(BackendError, match="nowhere is no folder"):
        vllm.register()
    monkeypatch.setenv(vllm_versions.RESOLVERS[0], "/elsewhere")
    with pytest.raises(BackendError, match=r"_CACHE_DIR is set, by which .*: unset it"):
        vllm.register()
