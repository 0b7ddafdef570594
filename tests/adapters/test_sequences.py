"""Any sequence of changes to a model: it answers as the formula of what is active, in float64.

`pytest tests/adapters/test_sequences.py --hypothesis-profile long` tries many more.
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import nn

import lorakernels as lk

NAMES = ("a", "b", "c")
names = st.sampled_from(NAMES)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 3, bias=False)).double()


class Model(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.base = make_net()
        self.net: nn.Module = copy.deepcopy(self.base)
        self.updates: dict[str, dict[str, torch.Tensor]] = {}  # of each adapter, s B A by layer
        self.scales: dict[str, float] = {}
        self.active: list[str] = []
        self.is_merged = False
        self.seed = 0

    def expects(self, error: type[Exception] | None, call: Any, *arguments: Any, **options: Any) -> bool:
        """Whether it was done; where it is wrong it raises that, and nothing has changed, as the invariant finds."""
        try:
            call(*arguments, **options)
        except (RuntimeError, KeyError, ValueError) as raised:
            assert error is not None and isinstance(raised, error), raised
            return False
        assert error is None, f"{call.__name__}{arguments} should have raised {error}"
        return True

    @rule(name=names, r=st.integers(1, 3), layers=st.sets(st.sampled_from("023"), min_size=1), rslora=st.booleans())
    def inject(self, name: str, r: int, layers: set[str], rslora: bool) -> None:
        self.seed += 1
        torch.manual_seed(self.seed)
        config = lk.LoRAConfig(
            r=r, lora_alpha=3, target_modules=sorted(layers), use_rslora=rslora, init_lora_weights=False
        )
        wrong = ValueError if name in self.updates else RuntimeError if self.is_merged else None
        if wrong is not None and name in self.updates and self.is_merged:
            wrong = Exception  # either will do
        if self.expects(wrong, lk.inject, self.net, config, name):
            if not self.updates:  # else it waits for `set_adapter`
                self.active = [name]
            self.remember(name)

    def remember(self, name: str) -> None:
        layers = {path: layer for path, layer in self.net.named_modules() if isinstance(layer, lk.LoRALinear)}
        self.updates[name] = {
            path: layer.adapters[name].own_scaling * layer.lora_B[name].weight @ layer.lora_A[name].weight
            for path, layer in layers.items()
            if name in layer.adapters
        }
        self.scales[name] = 1.0

    @rule(chosen=st.lists(names, min_size=1, max_size=3, unique=True))
    def set_adapter(self, chosen: list[str]) -> None:
        missing = any(name not in self.updates for name in chosen)
        wrong = Exception if missing and self.is_merged else KeyError if missing else None
        if wrong is None and self.is_merged:
            wrong = RuntimeError
        if self.expects(wrong, lk.set_adapter, self.net, chosen):
            self.active = chosen

    @rule(name=names, scale=st.sampled_from([0.0, 0.5, 1.0, -2.0]))
    def set_scale(self, name: str, scale: float) -> None:
        wrong = KeyError if name not in self.updates else RuntimeError if self.is_merged else None
        if self.expects(Exception if wrong and self.is_merged else wrong, lk.set_scale, self.net, name, scale):
            self.scales[name] = scale

    @rule(keep_base=st.booleans())
    def merge(self, keep_base: bool) -> None:
        before = self.is_merged
        try:
            lk.merge(self.net, keep_base=keep_base)
        except (RuntimeError, ValueError):
            assert before or not self.active
        else:
            self.is_merged = bool(self.active)

    @rule()
    def unmerge(self) -> None:
        lk.unmerge(self.net)
        self.is_merged = False

    @rule(name=names)
    def delete(self, name: str) -> None:
        wrong = KeyError if name not in self.updates else RuntimeError if self.is_merged else None
        if self.expects(Exception if wrong and self.is_merged else wrong, lk.delete_adapter, self.net, name):
            del self.updates[name], self.scales[name]
            self.active = [one for one in self.active if one != name]

    @rule(name=names)
    def save_and_load(self, name: str) -> None:
        """Into a new model of the same base."""
        if name not in self.updates or self.is_merged:
            return
        with tempfile.TemporaryDirectory() as folder:
            lk.save_adapter(self.net, folder, name)
            other = lk.load_adapter(copy.deepcopy(self.base), folder, "other")
        torch.testing.assert_close(other(self.x), self.formula([name], {name: 1.0}), rtol=0, atol=1e-12)

    @property
    def x(self) -> torch.Tensor:
        return torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)

    def formula(self, active: list[str], scales: dict[str, float]) -> torch.Tensor:
        net = copy.deepcopy(self.base)
        for name in active:
            for path, update in self.updates[name].items():
                layer: Any = net.get_submodule(path)
                layer.weight.data += scales[name] * update.detach()
        return net(self.x)

    @invariant()
    def it_answers_as_the_formula(self) -> None:
        expected = self.formula(self.active, self.scales)
        torch.testing.assert_close(self.net.eval()(self.x), expected, rtol=0, atol=1e-12)

    def teardown(self) -> None:
        if self.updates:
            lk.unload(self.net)
        torch.testing.assert_close(self.net(self.x), self.base(self.x), rtol=0, atol=1e-12)


TestModel = Model.TestCase
