"""Tuning tables: which config a launch takes, and everything that is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import lorakernels as lk
from lorakernels.configs import table, table_file
from lorakernels.configs.config import KernelConfig
from lorakernels.configs.data_sheet import data_sheet
from lorakernels.configs.device import UNKNOWN, Device, assume, device_of, example_of
from lorakernels.configs.heuristic import FORMS, MULTI_OPERATIONS, OPERATIONS, Batch, heuristic
from lorakernels.configs.table import (
    choose,
    choose_with_source,
    clear,
    forced_configs,
    load_table,
    misfit,
    pipeline_bytes,
    record_choices,
)
from lorakernels.configs.table_file import Entry, Table, cache_folder, read_table, shipped_path, user_path, write_table
from lorakernels.plan_layout import TILE_HEIGHTS

H100 = example_of("sm_90")
CPU = torch.device("cpu")
TUNED = KernelConfig(BLOCK_M=32, BLOCK_K=128, BLOCK_R=16, SPLIT=2, num_warps=4, num_stages=3)
SHRINK = Entry("shrink", 4096, 512, 512, 16, 2, TUNED, {"microseconds": 1.0})

pytestmark = pytest.mark.usefixtures("own_tables")


@pytest.fixture
def on_h100(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that looks like a GPU to the table, so that the user's table counts; nothing runs on it."""
    monkeypatch.setattr(table, "device_of", lambda device: H100)
    return torch.device("cuda", 0)


def written(path: Path, *entries: Entry, device: Device = H100) -> Path:
    write_table(path, Table("", device.name, device.arch, list(entries), {"triton": "3.9.0", "torch": "2.13.0"}))
    return path


def shrink_choice(device: torch.device, M: int = 4096, r: int = 16, tma: bool = False) -> table.Choice:
    return choose_with_source("shrink", M, 512, 512, r, 2, device, tma)


# ------------------------------------------------------------------------------------------- configs as fields


def test_a_config_survives_json() -> None:
    config = KernelConfig(128, 256, 64, 16, 16, 1, 2, 8, 3, tma=True)
    assert KernelConfig.from_fields(json.loads(json.dumps(config.to_fields()))) == config
    assert KernelConfig.from_fields({}) == KernelConfig()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"BLOCK_Q": 16}, "field 'BLOCK_Q'; expected only BLOCK_M"),
        ({"BLOCK_M": 48}, "BLOCK_M is 48; expected a power of two from 16"),
        ({"BLOCK_M": 8}, "BLOCK_M is 8"),
        ({"BLOCK_N": 1024}, "BLOCK_N is 1024"),
        ({"BLOCK_K": -64}, "BLOCK_K is -64"),
        ({"BLOCK_R": "16"}, "BLOCK_R is '16'; expected int"),
        ({"BLOCK_M": 64.0}, "BLOCK_M is 64.0; expected int"),
        ({"BLOCK_M": True}, "BLOCK_M is True; expected int"),
        ({"tma": 1}, "tma is 1; expected bool"),
        ({"SPLIT": 0}, "SPLIT is 0; expected a number from 1"),
        ({"SPLIT": 65}, "SPLIT is 65"),
        ({"num_warps": 3}, "num_warps is 3; expected a power of two"),
        ({"num_warps": 32}, "num_warps is 32"),
        ({"num_stages": 99}, "num_stages is 99"),
        ({"PROGRAMS_PER_SM": 0}, "PROGRAMS_PER_SM is 0"),
        (["BLOCK_M"], "a config is list"),
        (None, "a config is NoneType"),
    ],
)
def test_a_wrong_config_is_refused(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^(config|a config)") as error:
        KernelConfig.from_fields(fields)
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------- files


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    read, problems = read_table(written(tmp_path / "new" / "t.json", SHRINK))
    assert (read.device, read.arch, problems) == (H100.name, "sm_90", [])
    assert read.entries == [SHRINK] and read.entries[0].measured == {"microseconds": 1.0}
    assert read.versions == {"triton": "3.9.0", "torch": "2.13.0"}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["t.json"]


def test_a_write_that_fails_leaves_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "t.json", SHRINK)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_table(path, Table("", H100.name, "sm_90", [dataclasses.replace(SHRINK, measured={"x": object()})]))
    assert path.read_bytes() == before and list(tmp_path.glob("*t.json*")) == [path]


def test_where_tables_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_path(H100) == tmp_path / "cache" / "tuning" / "nvidia-h100-80gb-hbm3.json"
    monkeypatch.delenv("LORAKERNELS_CACHE")
    for platform, variable in (("linux", "XDG_CACHE_HOME"), ("win32", "LOCALAPPDATA")):
        monkeypatch.setattr("sys.platform", platform)
        monkeypatch.setenv(variable, str(tmp_path))
        assert cache_folder() == tmp_path / "lorakernels"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "lorakernels"


@pytest.mark.parametrize("name", ["../../etc/passwd", "GPU / 2", "", "***", "a" * 10])
def test_a_slug_is_one_plain_name(name: str) -> None:
    slug = Device(name, "sm_90", 1).slug
    assert slug and all(c.isalnum() or c == "-" for c in slug)


def test_nothing_that_ships_is_invented() -> None:
    """A table that ships was measured: it names the device, and each entry has its time."""
    for path in (Path(table.__file__).parent / "tables").glob("*.json"):
        read, problems = read_table(path)
        assert not problems and Device(read.device, read.arch, 1).slug == path.stem
        assert all(entry.measured.get("microseconds", 0) > 0 for entry in read.entries)
        for e in read.entries:
            assert misfit(e.operation, e.config, e.r, e.itemsize, True, read.arch) is None


# ------------------------------------------------------------------------------------------- look-up


def test_the_order_of_what_counts(tmp_path: Path, on_h100: torch.device) -> None:
    default = heuristic("shrink", 4096, 512, 512, 16, 2, "sm_90", False)
    assert shrink_choice(on_h100) == (default, "heuristic") and default != TUNED
    shipped, user, loaded = (dataclasses.replace(TUNED, GROUP_M=group) for group in (1, 2, 3))
    path = tmp_path / "shipped" / "nvidia-h100-80gb-hbm3.json"
    written(path, dataclasses.replace(SHRINK, config=shipped))
    assert shrink_choice(on_h100) == (default, "heuristic")  # tables are read once
    clear()
    where = "entry M=4096 N=512 K=512 r=16"
    assert shrink_choice(on_h100) == (shipped, f"shipped table nvidia-h100-80gb-hbm3, {where}")
    written(user_path(H100), dataclasses.replace(SHRINK, config=user))
    clear()
    assert shrink_choice(on_h100) == (user, f"user table {user_path(H100)}, {where}")
    other = written(tmp_path / "other.json", dataclasses.replace(SHRINK, config=loaded))
    load_table(other)
    assert shrink_choice(on_h100) == (loaded, f"table {other}, {where}")
    assert choose("shrink", 4096, 512, 512, 16, 2, on_h100) == loaded
    with forced_configs({"shrink": default}):
        assert shrink_choice(on_h100) == (default, "forced")
    clear()
    assert shrink_choice(on_h100).config == user


def test_a_device_that_is_assumed_has_no_user(tmp_path: Path) -> None:
    written(user_path(H100), SHRINK)
    with assume("sm_90"):
        assert shrink_choice(CPU).source == "heuristic"
    written(shipped_path(H100), SHRINK)
    clear()
    with assume("sm_90"):
        assert shrink_choice(CPU).config == TUNED
    assert shrink_choice(CPU).source == "heuristic"


def test_the_gpu_at_hand_has_its_user_for_meta_tensors_too() -> None:
    written(user_path(H100), SHRINK)
    with assume(H100, here=True):
        assert shrink_choice(torch.device("meta")).config == TUNED
        with assume("sm_90"):
            assert shrink_choice(torch.device("meta")).source == "heuristic"
    assert shrink_choice(torch.device("meta")).config != TUNED


def test_what_is_asked_for_is_recorded() -> None:
    sizes = ("shrink", 4096, 512, 512, 16, 2)
    with assume("sm_90"), record_choices() as asked:
        config = choose(*sizes, CPU)
        with forced_configs({"shrink": TUNED}), record_choices() as inner:
            choose(*sizes, CPU)
        choose("multi_shrink", 64, 512, 512, 16, 2, CPU, batch=Batch(8))
    choose(*sizes, CPU)
    assert [(each.choice, each.operation) for each in inner] == [((TUNED, "forced"), "shrink")]
    assert asked[0] == (*sizes, False, None, (config, "heuristic"))
    assert [each.batch for each in asked] == [None, Batch(8)]


@pytest.mark.parametrize(("M", "nearest"), [(1, 16), (60, 16), (70, 256), (2000, 256), (2100, 16384), (1 << 20, 16384)])
def test_the_nearest_number_of_tokens_by_ratio(M: int, nearest: int, on_h100: torch.device) -> None:
    written(user_path(H100), *(dataclasses.replace(SHRINK, M=size) for size in (256, 16, 16384)))
    assert f"entry M={nearest} " in shrink_choice(on_h100, M).source


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, True),
        ({"r": 3}, True),  # padded to 16 as well
        ({"r": 17}, False),
        ({"N": 513}, False),
        ({"K": 256}, False),
        ({"itemsize": 4}, False),
    ],
)
def test_all_but_tokens_must_be_the_same(change: dict[str, int], found: bool, on_h100: torch.device) -> None:
    written(user_path(H100), SHRINK)
    sizes = {"M": 4096, "N": 512, "K": 512, "r": 16, "itemsize": 2} | change
    assert ("entry" in choose_with_source("shrink", **sizes, device=on_h100).source) == found


def test_a_look_up_is_made_once(on_h100: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    written(user_path(H100), SHRINK)
    first = shrink_choice(on_h100)
    monkeypatch.setattr(Table, "nearest", lambda *_: pytest.fail("looked up twice"))
    assert shrink_choice(on_h100) is first


def test_importing_and_an_unknown_device_read_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "read_table", lambda *_: pytest.fail("read a file"))
    monkeypatch.setattr(table_file, "user_path", lambda *_: pytest.fail("looked for a file"))
    assert device_of(CPU) == UNKNOWN and shrink_choice(CPU).source == "heuristic"


def test_a_gpu_that_no_table_knows_is_a_warning_once(on_h100: torch.device) -> None:
    with pytest.warns(RuntimeWarning) as caught:
        for M in (1, 2, 4096):
            assert shrink_choice(on_h100, M).source == "heuristic"
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "no tuning table of NVIDIA H100 80GB HBM3" in message and "see `lorakernels tune`" in message


def test_without_a_home_directory_there_is_no_user_table(
    tmp_path: Path, on_h100: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(shipped_path(H100), SHRINK)
    for name in ("LORAKERNELS_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.warns(RuntimeWarning, match=r"there is no user table: Could not .*; set LORAKERNELS_CACHE") as caught:
        for M in (1, 4096):
            assert shrink_choice(on_h100, M).source.startswith("shipped table")
    assert len(caught) == 1


def test_where_there_is_no_gpu_a_missing_table_is_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings(), assume("sm_90"):
        warnings.simplefilter("error")
        assert shrink_choice(CPU).source == "heuristic"


GOOD = {"format": 1, "device": H100.name, "arch": "sm_90", "entries": [SHRINK.to_fields()]}


def entry_with(**change: Any) -> dict[str, Any]:
    return GOOD | {"entries": [SHRINK.to_fields() | change]}


FOREIGN: dict[str, tuple[Any, str]] = {
    "empty": (b"", "is not JSON"),
    "cut off": (json.dumps(GOOD).encode()[:-40], "is not JSON"),
    "not text": (b"\xff\xfe\x00\x01", "is not JSON"),
    "nested": (b"[" * 200_000, "is not JSON"),
    "a list": ([GOOD], "holds a JSON list"),
    "a number": (1, "holds a JSON int"),
    "no format": ({"device": H100.name}, "has format None"),
    "another format": (GOOD | {"format": 2}, "has format 2; this version reads format 1"),
    "true is no format": (GOOD | {"format": True}, "has format True"),
    "no device": (GOOD | {"device": None}, "has device None"),
    "another device": (GOOD | {"device": "NVIDIA A100"}, "is for NVIDIA A100 (sm_90)"),
    "another architecture": (GOOD | {"arch": "sm_80"}, "(sm_80), not for"),
    "entries of no list": (GOOD | {"entries": {}}, "has entries of dict"),
    "an entry that is a number": (GOOD | {"entries": [7]}, "an entry is int"),
    "unknown operation": (entry_with(operation="attention"), "operation is 'attention'; expected one of shrink"),
    "operation of no name": (entry_with(operation=["shrink"]), "operation is ['shrink']"),
    "unknown field": (entry_with(flags=1), "has a field 'flags'"),
    "no tokens": (entry_with(M=0), "M is 0"),
    "a size of a wrong type": (entry_with(K=512.0), "K is 512.0"),
    "no config": (entry_with(config=None), "a config is NoneType"),
    "unknown field of the config": (entry_with(config={"BLOCK_Q": 1}), "'BLOCK_Q'"),
    "bad block": (entry_with(config={"BLOCK_M": 33}), "BLOCK_M is 33"),
    "measured of a wrong type": (entry_with(measured=3), "measured is int"),
    "too much shared memory": (entry_with(config={"BLOCK_M": 512, "BLOCK_K": 512, "num_stages": 8}), "shared memory"),
    "tma where there is none": (entry_with(config={"tma": True}), "tma is for linear_expand"),
    "cublas where there is none": (entry_with(config={"cublas": True}), "cublas is for linear_expand"),
    "a stream where there is none": (entry_with(config={"side_stream": True}), "side_stream is for outer"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_wrong_with_a_table_is_a_warning_once(case: str, on_h100: torch.device) -> None:
    content, message = FOREIGN[case]
    path = user_path(H100)
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    expected = heuristic("shrink", 4096, 512, 512, 16, 2, "sm_90", True)
    with pytest.warns(RuntimeWarning) as caught:
        assert shrink_choice(on_h100, tma=True) == (expected, "heuristic")
        for M in (1, 2, 4096):
            assert shrink_choice(on_h100, M).source == "heuristic"
    assert len(caught) == 1 and message in str(caught[0].message) and "lorakernels tune" in str(caught[0].message)


def test_a_bad_entry_does_not_take_the_others_along(on_h100: torch.device) -> None:
    path = user_path(H100)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(GOOD | {"entries": [{"operation": "attention"}, SHRINK.to_fields()]}))
    with pytest.warns(RuntimeWarning, match="1 of its entries are not used; entry 0"):
        assert shrink_choice(on_h100).config == TUNED


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)


def unreadable(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [huge, unreadable, a_pipe])
def test_what_is_no_file_to_read_is_a_warning(make: Callable[[Path], None], on_h100: torch.device) -> None:
    path = user_path(H100)
    path.parent.mkdir(parents=True)
    make(path)
    with pytest.warns(RuntimeWarning, match="table is not used"):
        assert shrink_choice(on_h100).source == "heuristic"


def test_a_file_that_may_not_be_read_is_a_warning(on_h100: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    written(user_path(H100), SHRINK)

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError("not for you")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.warns(RuntimeWarning, match="not for you"):
        assert shrink_choice(on_h100).source == "heuristic"


def test_load_table_refuses_and_changes_nothing(tmp_path: Path, on_h100: torch.device) -> None:
    load_table(written(tmp_path / "good.json", SHRINK))
    (tmp_path / "bad.json").write_text(json.dumps(entry_with(M=0)))
    with pytest.raises(ValueError, match=r"bad\.json: entry 0: M is 0"):
        load_table(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError, match="there is no tuning table at"):
        load_table(tmp_path / "absent.json")
    assert shrink_choice(on_h100).config == TUNED


FEW = KernelConfig(16, 64, 64, 16)
TMA = KernelConfig(128, 128, 64, 16, num_warps=8, num_stages=3, tma=True)
GLUON = KernelConfig(128, 256, 64, 16, num_warps=8, num_stages=4, tma=True, late=True, halves=True, gluon=True)


def test_the_file_knows_a_program_a_token() -> None:
    assert KernelConfig.from_fields({"BLOCK_M": 1}).BLOCK_M == 1
    assert (1, *TILE_HEIGHTS) == FORMS  # two units that may not import each other
    for wrong in ({"BLOCK_M": 2}, {"BLOCK_N": 1}, {"BLOCK_R": 1}):
        with pytest.raises(ValueError, match="from 16"):
            KernelConfig.from_fields(wrong)


MULTI = {
    "multi_shrink": KernelConfig(1, BLOCK_K=64, BLOCK_R=16, SPLIT=4),
    "multi_expand": KernelConfig(64, 128, BLOCK_R=16, num_warps=8),
    "multi_outer": KernelConfig(32, 64, BLOCK_R=16, SPLIT=2),
}


@pytest.mark.parametrize("operation", MULTI_OPERATIONS)
def test_many_adapters_take_the_nearest_tokens_and_slots(operation: str, on_h100: torch.device) -> None:
    def entry(T: int, slots: int, group: int) -> Entry:
        return Entry(operation, T, 512, 512, 16, 2, dataclasses.replace(MULTI[operation], GROUP_M=group), {}, slots)

    read, problems = read_table(written(user_path(H100), entry(64, 64, 1), entry(64, 2, 2), entry(4096, 64, 3)))
    assert [e.slots for e in read.entries] == [64, 2, 64] and not problems
    for T, slots, group in ((60, 50, 1), (100, 3, 2), (8192, 64, 3), (8192, 8, 3)):
        config, source = choose_with_source(operation, T, 512, 512, 9, 2, on_h100, batch=Batch(slots, 3))
        assert group == config.GROUP_M and source.startswith("user table") and " slots=" in source
    assert choose_with_source(operation, 64, 768, 768, 9, 2, on_h100, batch=Batch(64)).source == "heuristic"


def test_dropout_passes_over_a_program_a_token(on_h100: torch.device) -> None:
    """Not a warning: another call takes it."""
    tiles = KernelConfig(16, BLOCK_K=64, BLOCK_R=16)
    first = Entry("multi_shrink", 64, 512, 512, 16, 2, MULTI["multi_shrink"], {}, 64)
    written(user_path(H100), first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("multi_shrink", 64, 512, 512, 16, 2, on_h100, batch=Batch(64)).BLOCK_M == 1
        chosen = choose_with_source("multi_shrink", 64, 512, 512, 16, 2, on_h100, batch=Batch(64, tiles=True))
        assert chosen.source == "heuristic" and chosen.config.BLOCK_M == 16
        written(user_path(H100), first, dataclasses.replace(first, M=4096, config=tiles))
        clear()
        assert choose("multi_shrink", 64, 512, 512, 16, 2, on_h100, batch=Batch(64, tiles=True)) == tiles


@pytest.mark.parametrize(
    ("operation", "config", "r", "tma", "arch", "fits"),
    [
        ("few_tokens", FEW, 16, False, "sm_90", True),
        ("few_tokens", FEW, 17, False, "sm_90", False),  # it would leave out ranks
        ("shrink", FEW, 17, False, "sm_90", True),
        ("linear_expand", TMA, 16, True, "sm_90", True),
        ("linear_expand", TMA, 16, False, "sm_90", False),
        ("linear_expand", TMA, 16, True, "sm_80", False),
        ("linear_expand", dataclasses.replace(TMA, BLOCK_M=512, num_stages=1), 16, True, "sm_90", False),
        ("linear_expand", dataclasses.replace(TMA, BLOCK_N=256, num_stages=8), 16, True, "sm_90", False),
        ("linear_expand", GLUON, 16, True, "sm_90", True),
        ("linear_expand", GLUON, 16, True, "sm_100", False),
        ("linear_expand", GLUON, 16, False, "sm_90", False),
        ("linear_expand", dataclasses.replace(GLUON, late=False), 16, True, "sm_90", False),
        ("linear_expand", dataclasses.replace(GLUON, halves=False), 16, True, "sm_90", False),  # y's tile is too large
        ("linear_expand", dataclasses.replace(GLUON, num_stages=1), 16, True, "sm_90", False),
        ("linear_expand", dataclasses.replace(GLUON, BLOCK_M=64), 16, True, "sm_90", False),
        ("linear_expand", dataclasses.replace(GLUON, BLOCK_R=64), 16, True, "sm_90", False),
        ("shrink", KernelConfig(gluon=True), 16, True, "sm_90", False),
        ("linear_expand", KernelConfig(SPLIT=2), 16, False, "sm_90", False),
        ("linear_expand", KernelConfig(cublas=True), 16, False, "sm_80", True),
        ("few_tokens", dataclasses.replace(FEW, cublas=True), 16, False, "sm_90", False),
        ("outer", KernelConfig(side_stream=True), 16, False, "sm_90", True),
        ("few_tokens", dataclasses.replace(FEW, side_stream=True), 16, False, "sm_80", True),
        ("linear_expand", KernelConfig(late=True), 16, False, "sm_80", True),
        ("outer", KernelConfig(late=True), 16, False, "sm_90", False),
        ("linear_expand", dataclasses.replace(TMA, halves=True), 16, True, "sm_90", True),
        ("linear_expand", KernelConfig(halves=True), 16, True, "sm_90", False),
        ("linear_expand", dataclasses.replace(TMA, BLOCK_N=16, halves=True), 16, True, "sm_90", False),
        ("linear_expand", dataclasses.replace(TMA, dependent=True), 16, True, "sm_90", True),
        ("linear_expand", KernelConfig(dependent=True), 16, True, "sm_80", False),  # nor has AMD such launches
        ("shrink", KernelConfig(dependent=True), 16, True, "sm_90", False),
        ("multi_expand", KernelConfig(BLOCK_M=1, dependent=True), 16, False, "sm_90", True),
        ("shrink", KernelConfig(128, 64, 128, 16, num_stages=4), 16, False, "gfx942", False),
        ("shrink", KernelConfig(128, 64, 128, 16, num_stages=3), 16, False, "sm_86", True),
        ("shrink", KernelConfig(1), 16, False, "sm_90", False),
        ("multi_outer", KernelConfig(1), 16, False, "sm_90", False),
        ("multi_outer", KernelConfig(128), 16, False, "sm_90", True),
        ("multi_shrink", KernelConfig(1, SPLIT=4), 16, False, "sm_90", True),
        ("multi_shrink", KernelConfig(32), 16, False, "sm_90", False),  # a plan has no such tiles
        ("multi_shrink", KernelConfig(64, BLOCK_K=512, num_stages=8), 16, False, "sm_90", False),
        ("multi_expand", KernelConfig(16), 64, False, "sm_90", True),
        ("multi_expand", KernelConfig(16, SPLIT=2), 16, False, "sm_90", False),
        ("multi_expand", KernelConfig(16, tma=True), 16, True, "sm_90", False),
    ],
)
def test_what_fits(operation: str, config: KernelConfig, r: int, tma: bool, arch: str, fits: bool) -> None:
    assert (misfit(operation, config, r, 2, tma, arch) is None) == fits


def test_pipeline_bytes_by_hand() -> None:
    # Two of the three stages: the compiler finds 225,304 bytes on sm_90 with its epilogue, more than this.
    assert pipeline_bytes("linear_expand", KernelConfig(128, 256, 64, num_stages=3), 2) == 2 * (128 + 256) * 64 * 2
    assert pipeline_bytes("linear_expand", KernelConfig(cublas=True), 2) == 0
    assert pipeline_bytes("outer", KernelConfig(BLOCK_M=32, BLOCK_N=64, BLOCK_R=16, num_stages=2), 4) == 80 * 32 * 4


def test_rows_that_no_descriptor_takes_are_no_warning(on_h100: torch.device) -> None:
    written(user_path(H100), Entry("linear_expand", 4096, 512, 512, 16, 2, TMA))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_with_source("linear_expand", 4096, 512, 512, 16, 2, on_h100, False).source == "heuristic"
    assert choose("linear_expand", 4096, 512, 512, 16, 2, on_h100, True) == TMA


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
    ],
)
def test_a_data_sheet_is_of_that_device_alone(device: str, name: str | None) -> None:
    sheet = data_sheet(device)
    assert (sheet and sheet.name) == name


def test_every_heuristic_fits() -> None:
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for operation in OPERATIONS:
            for M, r, itemsize in ((1, 8, 2), (200, 64, 2), (8192, 64, 2), (200, 32, 4), (8192, 256, 4)):
                if operation == "few_tokens" and not table.takes_few_tokens_form(M, r, itemsize):
                    continue
                config = heuristic(operation, M, 4096, 4096, r, itemsize, arch, True)
                assert misfit(operation, config, r, itemsize, True, arch) is None
        for operation in MULTI_OPERATIONS:
            for T, slots, r, itemsize, tiles in ((1, 1, 8, 2, False), (64, 64, 64, 2, True), (8192, 8, 256, 4, True)):
                config = heuristic(operation, T, 97, 97, r, itemsize, arch, False, Batch(slots, 3, tiles))
                assert misfit(operation, config, r, itemsize, False, arch, tiles) is None


def test_explain_names_the_source(device: str) -> None:
    written(shipped_path(H100), dataclasses.replace(SHRINK, itemsize=4))
    x, weight, A = (torch.empty(size, device=device) for size in ((4096, 512), (64, 512), (16, 512)))
    with assume("sm_90"):
        kernels = lk.explain(x, weight, A, impl="triton").kernels
    assert kernels[0].endswith("(shipped table nvidia-h100-80gb-hbm3, entry M=4096 N=512 K=512 r=16)")
    assert kernels[1].startswith("sum_planes")  # of the entry's split
    assert kernels[2].startswith("linear_expand") and kernels[2].endswith("(heuristic)")
