"""PEFT's mixed batches by the kernels: q, k and v, gate and up are slices of one launch, and the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("triton")

from accelerated import randomised
from peft import LoraConfig, get_peft_model

import lorakernels as lk
from lorakernels.integrations import peft_mixed
from lorakernels.kernels.launch import record_launches
from lorakernels.nn import mixed, siblings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

WIDTH = 16
NAMES = ["a", "__base__", "b", "a"]
QKV = ["q_proj", "k_proj", "v_proj"]


class Attention(nn.Module):
    """`between` runs after q and gives k, or None for k of h."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8, bias=False)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)
        self.between: Callable[[Any, torch.Tensor], Any] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        q = self.q_proj(h)
        k = self.between(self, h) if self.between else None
        k = self.k_proj(h) if k is None else k
        return x + self.o_proj(torch.tanh(q * k).mean(-1, keepdim=True) + self.v_proj(h))


def make_model(*targets: list[str], dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[Any, Any]:
    """PEFT's model with adapters a and b, of these targets, and the attention in it."""
    torch.manual_seed(0)
    attention = Attention().to(dtype)
    configs = [LoraConfig(r=4 + 3 * i, target_modules=names, **fields) for i, names in enumerate(targets)]
    model = get_peft_model(attention, configs[0], adapter_name="a")
    model.add_adapter("b", configs[1])
    return randomised(model.to(dtype)).eval().requires_grad_(False), attention


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many slices each product of many adapters had, by the kernels."""
    monkeypatch.setenv("LORAKERNELS_IMPL", "triton")
    sizes: list[int] = []
    many, one = mixed.multi_lora_linear, peft_mixed._product

    def group(x: torch.Tensor, weights: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(weights))
        return many(x, weights, *args, **kwargs)

    def single(*args: Any) -> torch.Tensor:
        sizes.append(1)
        return one(*args)

    monkeypatch.setattr(mixed, "multi_lora_linear", group)
    monkeypatch.setattr(peft_mixed, "_product", single)
    return sizes


def answers(change: Callable[[Any], None], *targets: list[str], dtype: torch.dtype = torch.float32) -> list[Any]:
    """What the model gives in groups and without, once more each, and PEFT's own."""
    found: list[Any] = []
    x = torch.randn(4, 1, WIDTH).to(dtype)
    for group in (None, False):
        model, attention = make_model(*(targets or (QKV, QKV)), dtype=dtype)
        if group is None:
            plain = copy.deepcopy(model)
        lk.accelerate(model, group=group)
        change(attention)
        with torch.no_grad():
            found += [model(x, adapter_names=NAMES) for _ in range(2)]
    change(plain.base_model.model)
    with torch.no_grad():
        return [*found, plain(x, adapter_names=NAMES)]


def nothing(attention: Any) -> None:
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_is_one_launch_and_the_same_to_the_bit(dtype: torch.dtype, launches: list[int]) -> None:
    *ours, plain = answers(nothing, QKV, [*QKV, "o_proj"], dtype=dtype)
    assert all(torch.equal(each, ours[0]) for each in ours) and launches == [3, 1] * 2 + [1] * 4 * 2
    assert (ours[0] - plain).abs().max() <= 4 * torch.finfo(dtype).eps * plain.abs().max()
    assert not peft_mixed._packs and siblings._thread.scope is None
    model, _ = make_model(QKV, QKV)
    lk.accelerate(model)
    with record_launches() as recorded, torch.no_grad():
        model(torch.randn(4, 1, WIDTH), adapter_names=NAMES)
    assert len(recorded) == 2


@pytest.mark.parametrize(
    ("targets", "expected"),
    [((QKV, ["q_proj", "v_proj"]), [2, 1]), ((["q_proj"], QKV), [1, 2]), ((["o_proj"], QKV), [3, 1])],
)
def test_who_reaches_what(targets: tuple[list[str], ...], expected: list[int], launches: list[int]) -> None:
    """Slices are what the same adapters reach; a member that one of them does not reach runs by itself."""
    *ours, plain = answers(nothing, *targets)
    assert all(torch.equal(each, ours[0]) for each in ours) and launches[: len(expected)] == expected
    torch.testing.assert_close(ours[0], plain)


def of_another(attention: Any, h: torch.Tensor) -> torch.Tensor:
    return attention.k_proj(h + 1, adapter_names=NAMES)


def other_names(attention: Any, h: torch.Tensor) -> torch.Tensor:
    return attention.k_proj.forward(h, adapter_names=NAMES[::-1])


def edit_x(attention: Any, h: torch.Tensor) -> None:
    h.mul_(2)


def edit_adapter(attention: Any, h: torch.Tensor) -> None:
    attention.k_proj.lora_B["a"].weight.mul_(3)


def rescale(attention: Any, h: torch.Tensor) -> None:
    attention.k_proj.scaling["b"] = 7.0


def under_autocast(attention: Any, h: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return attention.k_proj(h).float()


@pytest.mark.parametrize("event", [of_another, other_names, edit_x, edit_adapter, rescale, under_autocast])
def test_what_happens_between(event: Callable[..., Any], launches: list[int]) -> None:
    once = iter((event, None, event, None, event))

    def change(attention: Any) -> None:
        def between(attention: Any, h: torch.Tensor) -> Any:
            now = next(once)
            return None if now is None else now(attention, h)

        attention.between = between

    first, second, alone_first, alone_second, plain = answers(change)
    assert launches[0] == 3 and torch.equal(first, alone_first) and torch.equal(second, alone_second)
    torch.testing.assert_close(first, plain, **({"atol": 0.1, "rtol": 0} if event is under_autocast else {}))


def hook(attention: Any) -> None:
    attention.k_proj.register_forward_hook(lambda module, args, y: 2 * y)


def own_forward(attention: Any) -> None:
    kept = attention.k_proj.forward
    attention.k_proj.forward = lambda h, **names: kept(h, **names) + 1


def own_names(attention: Any) -> None:
    attention.k_proj.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {"adapter_names": NAMES[::-1]}), with_kwargs=True
    )


@pytest.mark.parametrize("change", [hook, own_forward, own_names])
def test_members_that_do_more_run_by_themselves(change: Callable[..., Any], launches: list[int]) -> None:
    *ours, plain = answers(change)
    assert launches[0] == 2 and all(torch.equal(each, ours[0]) for each in ours)
    torch.testing.assert_close(ours[0], plain)


def test_where_there_are_no_groups(launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make_model(QKV, QKV)
    x = torch.randn(4, 1, WIDTH)
    lk.accelerate(model)
    model(x, adapter_names=NAMES)  # with gradients
    with torch.inference_mode():
        model(x, adapter_names=NAMES)
    monkeypatch.setenv("LORAKERNELS_IMPL", "torch")
    with torch.no_grad():
        model(x, adapter_names=NAMES)
    lk.accelerate(model, invariant=True)
    monkeypatch.setenv("LORAKERNELS_IMPL", "triton")
    with torch.no_grad():
        model(x, adapter_names=NAMES)
    assert launches == [1] * 12


def test_autocast(launches: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 1, WIDTH)
    model, _ = make_model(QKV, QKV)
    found = []
    for group in (None, False):
        lk.accelerate(model, group=group)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(model(x, adapter_names=NAMES))
    assert torch.equal(*found) and launches == [3, 1, 1, 1]
