"""An adapter is saved whole: whoever saves beside, and wherever the process is killed."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorakernels as lk
from lorakernels.files import peft, saving
from lorakernels.files.merge import merge_files

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval()


def adapted(alpha: float, seed: int) -> Any:
    model = lk.inject(plain(), lk.LoRAConfig(r=2, lora_alpha=alpha, target_modules=["0", "1"])).eval()
    torch.manual_seed(seed)
    for parameter in lk.trainable_parameters(model):
        nn.init.normal_(parameter)
    return model


def two() -> list[Any]:
    """Of the same shapes; and by their alphas it shows which configuration came with which weights."""
    return [adapted(3, 1), adapted(5, 2)]


def which(folder: Path, models: list[Any]) -> int:
    """The one of two adapters that a folder holds."""
    answer = lk.load_adapter(plain(), folder)(X)
    return [torch.equal(answer, model(X)) for model in models].index(True)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.startswith(".") or "partial" in path.name]


def killed(act: Callable[[], object], when: Callable[[int], None]) -> bool:
    """Run `act` in a process of its own, which `when` is to kill; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(0)
    when(child)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def killed_at(number: int, act: Callable[[], object]) -> bool:
    """Kill it at the line of that number among those of saving that it runs."""
    left = [number]

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in (saving.__file__, peft.__file__):
            return None
        left[0] -= event == "line"
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced() -> None:
        sys.settrace(trace)
        act()

    return killed(traced, lambda _: None)


def at_every_line(folder: Path, step: int, there: bool) -> int:
    models, tried, number = two(), 0, 0
    while True:
        own = folder / str(number) / "a"
        own.parent.mkdir()
        if there:
            own.mkdir(parents=True)
            (own / "README.md").write_text("mine")
            lk.save_adapter(models[0], own)
        if not killed_at(number, lambda own=own: lk.save_adapter(models[1], own)):
            break
        tried += 1
        if there:
            which(own, models)
            assert (own / "README.md").read_text() == "mine"
        else:
            assert not own.exists() or which(own, models) == 1
        lk.save_adapter(models[0], own)
        assert which(own, models) == 0 and not leftovers(folder)
        number += step
    assert which(own, models) == 1 and not leftovers(folder)
    return tried


@pytest.mark.parametrize("there", [True, False], ids=["there", "new"])
def test_killed_at_a_line_of_saving(there: bool, tmp_path: Path) -> None:
    assert at_every_line(tmp_path, 25, there) > 2


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["there", "new"])
def test_killed_at_every_line_of_saving(there: bool, tmp_path: Path) -> None:
    print(at_every_line(tmp_path, 1, there), "points, states wrong: 0")


def kills(folder: Path, number: int) -> list[int]:
    models, found, generator = two(), [], random.Random(3)
    for model in (models[1], models[0]):
        start = time.perf_counter()
        lk.save_adapter(model, folder)
        took = time.perf_counter() - start

    def forever() -> None:
        while True:
            for model in models:
                lk.save_adapter(model, folder)

    for _ in range(number):

        def when(child: int) -> None:
            time.sleep(generator.uniform(0, 4 * took + 0.02))
            os.kill(child, signal.SIGKILL)

        assert killed(forever, when)
        found.append(which(folder, models))
    lk.save_adapter(models[0], folder)
    assert not leftovers(folder)
    return found


def test_kill_9_while_two_adapters_are_saved_in_turn(tmp_path: Path) -> None:
    kills(tmp_path, 5)


@pytest.mark.slow
def test_kill_9_200_times(tmp_path: Path) -> None:
    found = kills(tmp_path / "a", 200)
    print(f"killed {len(found)} times: {found.count(0)} as one, {found.count(1)} as the other, 0 wrong")


def test_a_new_folder_that_another_takes_for_abandoned_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, locked = [], saving.locked

    def late(folder: Path, *args: bool, **kwargs: bool) -> Any:
        if not taken:
            taken.append(folder)
            folder.rmdir()
        return locked(folder, *args, **kwargs)

    monkeypatch.setattr(saving, "locked", late)
    with saving.appearing(tmp_path / "a") as folder:
        (folder / "file").touch()
    assert taken and (tmp_path / "a" / "file").exists() and not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("there", "times"),
    [(True, 8), (False, 4), *(pytest.param(there, 40, marks=pytest.mark.slow) for there in (True, False))],
)
def test_three_threads_save_to_one_folder(there: bool, times: int, tmp_path: Path) -> None:
    """And a fourth reads all the while."""
    models, errors, folder, done = [*two(), adapted(7, 3)], [], tmp_path / "a", threading.Event()
    if there:
        lk.save_adapter(models[0], folder)

    def save(model: Any) -> None:
        try:
            for _ in range(times):
                lk.save_adapter(model, folder)
        except BaseException as error:
            errors.append(error)

    def read() -> None:
        try:
            while not done.is_set():
                if folder.exists():
                    which(folder, models)
        except BaseException as error:
            errors.append(error)

    savers = [threading.Thread(target=save, args=(model,)) for model in models]
    reader = threading.Thread(target=read)
    for thread in (*savers, reader):
        thread.start()
    for thread in savers:
        thread.join()
    done.set()
    reader.join()
    assert not errors and not leftovers(tmp_path)
    which(folder, models)


def test_a_user_may_edit_either_file(tmp_path: Path) -> None:
    models = two()
    lk.save_adapter(models[0], tmp_path)
    path = tmp_path / CONFIG
    path.write_text(path.read_text().replace('"lora_alpha": 3', '"lora_alpha": 5'))
    assert lk.load_adapter(plain(), tmp_path)[0].adapters["default"].lora_alpha == 5
    stray = tmp_path / f".{CONFIG}.{'0' * 64}"  # of weights that never came
    stray.write_text("{}")
    assert lk.load_adapter(plain(), tmp_path)[0].adapters["default"].lora_alpha == 5
    lk.save_adapter(models[1], tmp_path)
    assert which(tmp_path, models) == 1 and not leftovers(tmp_path)


@pytest.mark.parametrize("what", ["save", "merge"])
def test_a_full_disk(what: str, tmp_path: Path) -> None:
    """Of which a limit of a file's size is the like."""
    models = two()
    lk.save_adapter(models[0], tmp_path / "a")
    (tmp_path / "base").mkdir()
    save_file(plain().state_dict(), tmp_path / "base" / "model.safetensors")
    acts: list[Callable[[], object]] = [lambda: lk.save_adapter(models[1], tmp_path / "a")]
    acts += [lambda: lk.save_adapter(models[1], tmp_path / "new")]
    if what == "merge":
        acts = [lambda: merge_files(tmp_path / "base", tmp_path / "a", tmp_path / "new")]
    before = sorted(path.name for path in tmp_path.rglob("*"))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        for act in acts:
            with pytest.raises(OSError, match="File too large"):
                act()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before and which(tmp_path / "a", models) == 0


def test_what_a_killed_merge_has_left_goes_with_the_next(tmp_path: Path) -> None:
    lk.save_adapter(two()[0], tmp_path / "a")
    (tmp_path / "base").mkdir()
    save_file(plain().state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / ".mine.partial-x").mkdir()

    def merge(out: str = "out") -> None:
        merge_files(tmp_path / "base", tmp_path / "a", tmp_path / out)

    def killed_merge() -> None:
        saving._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        merge()

    assert killed(killed_merge, lambda _: None) and not (tmp_path / "out").exists()
    assert len(leftovers(tmp_path)) > 1
    with saving.appearing(tmp_path / "other"):  # at work, so it is let be
        merge("another")
        assert len(leftovers(tmp_path)) == 2
    assert leftovers(tmp_path) == [".mine.partial-x"]
