"""Where memory runs out or an interrupt comes, a model is as before or as after: at every torch operator and line."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lorakernels as lk
from lorakernels.adapters import held
from lorakernels.integrations import peft as peft_layers
from lorakernels.nn import whole
from lorakernels.nn.base import Adapter
from lorakernels.testing.failing import FailAt

PACKAGE = os.path.dirname(lk.__file__)
IDS = torch.tensor([[1, 4, 0], [3, 2, 5]])
ERRORS = (MemoryError, torch.OutOfMemoryError, KeyboardInterrupt)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head((self.q_proj(x) * self.k_proj(x)).mean(1))

    def save_pretrained(self, *_: Any) -> None: ...


PLAIN = ["embed", "conv", "q_proj", "k_proj"]
PISSA = {"init_lora_weights": "pissa", "target_modules": ["q_proj", "k_proj", "conv"]}
DORA, HEAD = {"use_dora": True}, {"modules_to_save": ["head"]}
BIASES = {"bias": "all", "target_modules": ["q_proj"], "modules_to_save": ["head"]}


def config(**fields: Any) -> lk.LoRAConfig:
    return lk.LoRAConfig(**{"r": 2, "target_modules": PLAIN, **fields})


@torch.no_grad()
def shaken(model: nn.Module, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.requires_grad:
            tensor += torch.rand(tensor.shape, generator=generator) * 0.2
    return model


def net(*adapters: dict[str, Any]) -> Any:
    """With these adapters, the first one "default", in evaluation."""
    torch.manual_seed(5)
    model: Any = Net().eval()
    for i, fields in enumerate(adapters):
        shaken(lk.inject(model, config(**fields), "default" if not i else f"a{i}"), i)
    return model


def peft_net() -> Any:
    model = net()
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["embed", "q_proj", "k_proj"]), model)


def packed(model: Any) -> Any:
    return lk.inject(lk.quantize(model, "nf4", block=32), config(target_modules=["q_proj", "k_proj"]))


def after(model: Any, *acts: Callable[..., Any]) -> Any:
    for act in acts:
        act(model)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    kinds = {"plain": {}, "dora": DORA, "head": HEAD, "biases": BIASES, "some": {"target_modules": ["q_proj"], "r": 1}}
    return {name: lk.save_adapter(shaken(net(fields), 9), root / name) for name, fields in kinds.items()}


Act = Callable[[Any, dict[str, Path]], object]
ACTS: dict[str, tuple[Callable[[], Any], Act]] = {
    "inject": (net, lambda m, f: lk.inject(m, config())),
    "inject, DoRA and a head": (net, lambda m, f: lk.inject(m, config(**DORA, **HEAD))),
    "inject, biases": (net, lambda m, f: lk.inject(m, config(**BIASES))),
    "inject, a second": (
        lambda: net({}, {}),
        lambda m, f: lk.inject(m, config(target_modules=["q_proj", "head.0"]), "b"),
    ),
    "inject, PiSSA": (net, lambda m, f: lk.inject(m, config(**PISSA))),
    "inject, OLoRA": (net, lambda m, f: lk.inject(m, config(**PISSA | {"init_lora_weights": "olora"}))),
    "load": (net, lambda m, f: lk.load_adapter(m, f["plain"])),
    "load, DoRA": (net, lambda m, f: lk.load_adapter(m, f["dora"], trainable=True)),
    "load, a head": (net, lambda m, f: lk.load_adapter(m, f["head"])),
    "load, biases": (net, lambda m, f: lk.load_adapter(m, f["biases"], trainable=True)),
    "load over one": (lambda: net({}), lambda m, f: lk.load_adapter(m, f["plain"])),
    "load over a head": (lambda: net(HEAD), lambda m, f: lk.load_adapter(m, f["head"])),
    "load over biases": (lambda: net(BIASES), lambda m, f: lk.load_adapter(m, f["biases"])),
    "load over another dtype": (lambda: net({}).double(), lambda m, f: lk.load_adapter(m, f["plain"])),
    "load a second": (lambda: net({}), lambda m, f: lk.load_adapter(m, f["head"], "b")),
    "hot swap": (
        lambda: after(net({}), lambda m: lk.prepare_for_hotswap(m, 4)),
        lambda m, f: lk.hotswap_adapter(m, f["some"]),
    ),
    "hot swap, DoRA": (lambda: net(DORA), lambda m, f: lk.hotswap_adapter(m, f["dora"])),
    "hot swap, a head": (lambda: net(HEAD), lambda m, f: lk.hotswap_adapter(m, f["head"])),
    "prepare for hot swaps": (lambda: net({}), lambda m, f: lk.prepare_for_hotswap(m, 4)),
    "choose": (lambda: net({}, {}), lambda m, f: lk.set_adapter(m, ["default", "a1"])),
    "scale": (lambda: net({}, {}), lambda m, f: lk.set_scale(m, "a1", 0.5)),
    "scale, of hot swaps": (
        lambda: after(net({}), lambda m: lk.prepare_for_hotswap(m, 4)),
        lambda m, f: lk.set_scale(m, "default", 0.5),
    ),
    "accelerate": (peft_net, lambda m, f: lk.accelerate(m)),
    "accelerate in groups": (peft_net, lambda m, f: lk.accelerate(m, groups=[["q_proj", "k_proj"]], invariant=True)),
    "restore": (lambda: after(peft_net(), lk.accelerate), lambda m, f: lk.restore(m)),
    "combine": (lambda: net({}, {}), lambda m, f: lk.add_weighted_adapter(m, ["default", "a1"], [0.5, 2], "b")),
    "merge": (lambda: net({}, {}), lambda m, f: lk.merge(m, ["a1"])),
    "merge two, kept": (lambda: net({}, {}), lambda m, f: lk.merge(m, ["a1", "default"], keep_base=True)),
    "merge, DoRA and a head": (lambda: net({**DORA, **HEAD}), lambda m, f: lk.merge(m)),
    "merge, lora_bias": (
        lambda: net({"lora_bias": True, "target_modules": ["q_proj", "conv"]}),
        lambda m, f: lk.merge(m),
    ),
    "merge, packed": (lambda: packed(net()), lambda m, f: lk.merge(m)),
    "unmerge": (lambda: after(net({}), lk.merge), lambda m, f: lk.unmerge(m)),
    "unmerge, kept": (lambda: after(net({}), lambda m: lk.merge(m, keep_base=True)), lambda m, f: lk.unmerge(m)),
    "unmerge, packed": (lambda: after(packed(net()), lk.merge), lambda m, f: lk.unmerge(m)),
    "delete": (lambda: net(HEAD, {}), lambda m, f: lk.delete_adapter(m, "default")),
    "delete, PiSSA": (lambda: net(PISSA), lambda m, f: lk.delete_adapter(m, "default")),
    "unload": (lambda: net(HEAD, {}), lambda m, f: lk.unload(m)),
    "unload, PiSSA": (lambda: net(PISSA), lambda m, f: lk.unload(m)),
    "unload, merged": (lambda: after(net(PISSA), lk.merge), lambda m, f: lk.unload(m)),
    "unload into it": (lambda: net(HEAD), lambda m, f: lk.unload(m, merge=True)),
    "unload into it, packed": (lambda: packed(net()), lambda m, f: lk.unload(m, merge=True)),
    "quantize": (net, lambda m, f: lk.quantize(m, "nf4", block=32)),
    "one layer, merge": (lambda: net(DORA), lambda m, f: m.q_proj.merge(keep_base=True)),
    "one layer, start anew": (lambda: net(DORA), lambda m, f: m.conv.reset_lora_parameters("default", "pissa")),
    "one layer, again": (lambda: net(PISSA), lambda m, f: m.q_proj.reset_lora_parameters("default", "gaussian")),
    "one layer, add": (lambda: net({}), lambda m, f: m.embed.add_adapter("b", r=3, init_lora_weights="olora")),
    "one layer, from its base": (net, lambda m, f: lk.LoRALinear.from_linear(m.q_proj, r=2, init_lora_weights="pissa")),
}  # fmt: skip


WITHOUT_OPERATORS = (
    "choose",
    "scale",
    "accelerate",
    "accelerate in groups",
    "restore",
    "delete",
    "unload",
    "unmerge, packed",
)


def value_of(one: Any) -> Any:
    """In a form that can be compared and kept."""
    if isinstance(one, torch.Tensor):
        return str(one.dtype), tuple(one.shape), one.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(one, nn.Module):
        return [type(one).__name__, *(value_of(own) for own in one.state_dict().items())]
    if isinstance(one, dict):
        if any(isinstance(key, int) for key in one):  # hooks, whose keys count up
            return [value_of(value) for value in one.values()]
        return [(key, value_of(value)) for key, value in one.items()]
    if isinstance(one, (list, tuple)):
        return [value_of(each) for each in one]
    if hasattr(one, "__dataclass_fields__"):
        return value_of(vars(one))
    if callable(one):
        return type(one).__name__
    return repr(one)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Every name, class, number and flag, the records of adapters, and what runs beside."""
    state: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = {name: value for name, value in module.__dict__.items() if name not in ("_modules", "_cache")}
        for kind in ("_parameters", "_buffers"):
            state |= {f"{path}.{name}": value_of(tensor) for name, tensor in own.pop(kind).items()}
        flags = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
        state[path] = [type(module).__qualname__, flags, list(module._modules), value_of(own)]
    state["configs"] = repr(held.configs(model))
    return state


class InterruptAt:
    """KeyboardInterrupt at a line of the package, but not where it takes care of one."""

    def __init__(self, number: int, error: BaseException) -> None:
        self.left, self.error = number, error

    def __enter__(self) -> InterruptAt:
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(None)

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE) or file == whole.__file__:
            return None
        self.left -= event == "line"
        if self.left == -1:
            raise self.error
        return self.trace


def points(act: str, folders: dict[str, Path], how: Any, error: type[BaseException], numbers: Iterator[int]) -> int:
    """Fail at each of these points until there is none left; how many there were."""
    make, run = ACTS[act]

    def state_after(number: int) -> tuple[dict[str, Any], bool]:
        model = make()
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            injected = how(number, error("injected"))
            try:
                with injected:
                    run(model, folders)
            except error as raised:
                assert raised is injected.error
        return state_of(model), injected.left < 0

    before, (done, _) = state_of(make()), state_after(1 << 40)
    assert before != done
    tried = 0
    for number in numbers:
        state, failed = state_after(number)
        if not failed:
            break
        tried += 1
        if state not in (before, done):
            near = min((before, done), key=lambda one: sum(one.get(key) != state[key] for key in state))
            wrong = [key for key in {**state, **near} if state.get(key) != near.get(key)]
            raise AssertionError(f"point {number}: neither before nor after in {wrong[:5]}")
    return tried


@pytest.mark.parametrize("act", ACTS)
def test_a_failure_at_an_operator(act: str, folders: dict[str, Path]) -> None:
    chosen = iter([len(act) % 3, 40 + len(act) % 7])
    assert points(act, folders, FailAt, ERRORS[len(act) % 3], chosen) or act in WITHOUT_OPERATORS


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
def test_a_failure_at_every_operator(act: str, folders: dict[str, Path]) -> None:
    tried = [points(act, folders, FailAt, error, iter(range(100_000))) for error in ERRORS]
    print(f"{act}: {sum(tried)} points, states wrong: 0")


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
def test_an_interrupt_at_many_lines(act: str, folders: dict[str, Path]) -> None:
    print(f"{act}: {points(act, folders, InterruptAt, KeyboardInterrupt, iter(range(0, 10**6, 37)))} lines, wrong: 0")


@pytest.mark.parametrize(
    ("act", "owner", "name"),
    [
        ("scale", Adapter, "rescale"),
        ("accelerate", peft_layers, "forget_packs"),
        ("restore", peft_layers, "forget_packs"),
    ],
)
def test_a_failure_half_way_through_what_runs_no_operator(
    act: str, owner: Any, name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, run = ACTS[act]
    model, real, calls = make(), getattr(owner, name), iter("ok")
    before = state_of(model)
    monkeypatch.setattr(owner, name, lambda *args: real(*args) if next(calls) == "o" else int("injected"))
    with pytest.raises(ValueError, match="injected"):
        run(model, folders)
    assert state_of(model) == before


def test_an_interrupt_of_the_terminal_waits_for_the_end() -> None:
    """A real one, at each millisecond of a merge: the model is merged, or it is not."""
    model = net({}, {})
    for delay in (0, 2, 5):
        fire = threading.Timer(delay / 1000, lambda: os.kill(os.getpid(), signal.SIGINT))
        before = state_of(model)
        try:
            fire.start()
            lk.merge(model, ["a1"], keep_base=True)
            fire.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            pass
        if state_of(model) != before:
            assert all(layer.merged for layer in held.layers(model).values())
            lk.unmerge(model)
            lk.set_adapter(model, "default")
        assert state_of(model) == before
    handler = signal.getsignal(signal.SIGINT)
    done = False
    with pytest.raises(KeyboardInterrupt), whole.uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        done = True
    assert done and signal.getsignal(signal.SIGINT) is handler


def test_where_memory_stays_out_what_was_merged_comes_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net({}, {})
    before, real = state_of(model), lk.LoRALinear.merge

    def merge(self: Any, *args: Any) -> None:
        if self is model.k_proj:
            raise torch.OutOfMemoryError("for good")
        real(self, *args)

    monkeypatch.setattr(lk.LoRALinear, "merge", merge)
    with pytest.raises(torch.OutOfMemoryError, match="for good"):
        lk.merge(model, ["a1"], keep_base=True)
    assert state_of(model) == before
