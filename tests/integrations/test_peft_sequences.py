"""Any sequence of PEFT's own changes, accelerated and restored in between: PEFT's answers and errors.

`pytest tests/integrations/test_peft_sequences.py --hypothesis-profile long` tries many more.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

pytest.importorskip("peft")

from accelerated import IN, NAMES, assert_equal, config, peft_model, values_and_gradients

from lorakernels.integrations.peft import accelerate, restore

names = st.sampled_from(NAMES)
layers = st.sampled_from([["up"], ["down"], ["up", "down"]])
combinations = st.sampled_from(["linear", "cat", "svd"])


class Sequence(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.theirs = peft_model(config())
        self.ours = copy.deepcopy(self.theirs)
        self.seed = 0

    def both(self, change: Callable[[Any], object]) -> None:
        """The same error, or none, of both."""
        self.seed += 1
        errors = []
        for model in (self.theirs, self.ours):
            torch.manual_seed(self.seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    change(model)
                except Exception as error:
                    errors.append((type(error), str(error)))
        assert not errors or (len(errors) == 2 and errors[0] == errors[1]), errors

    @rule(group=st.sampled_from([None, True, False]), invariant=st.booleans())
    def accelerate(self, group: bool | None, invariant: bool) -> None:
        accelerate(self.ours, group=group, invariant=invariant)

    @rule()
    def restore(self) -> None:
        restore(self.ours)

    @rule(name=names, r=st.integers(1, 5), layers=layers, dora=st.booleans(), rslora=st.booleans())
    def add(self, name: str, r: int, layers: list[str], dora: bool, rslora: bool) -> None:
        fields = config(r=r, target_modules=layers, use_dora=dora, use_rslora=rslora, init_lora_weights=False)
        if name not in self.theirs.peft_config:
            self.both(lambda model: model.add_adapter(name, copy.deepcopy(fields)))

    @rule(chosen=st.lists(names, min_size=1, max_size=3, unique=True))
    def choose(self, chosen: list[str]) -> None:
        if set(chosen) <= set(self.theirs.peft_config):
            self.both(lambda model: model.base_model.set_adapter(chosen))

    @rule(name=names)
    def delete(self, name: str) -> None:
        if name in self.theirs.peft_config and len(self.theirs.peft_config) > 1 and not self.merged:
            self.both(lambda model: model.delete_adapter(name))

    @rule(kind=combinations, weights=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=2, max_size=2))
    def combine(self, kind: str, weights: list[float]) -> None:
        free = [name for name in NAMES if name not in self.theirs.peft_config]
        if len(free) == 1:
            both = [name for name in NAMES if name not in free]
            self.both(lambda model: model.add_weighted_adapter(both, weights, free[0], combination_type=kind))

    @rule(on=st.booleans())
    def switch(self, on: bool) -> None:
        change = "enable_adapter_layers" if on else "disable_adapter_layers"
        self.both(lambda model: getattr(model.base_model, change)())

    @rule()
    def merge(self) -> None:
        if not self.merged:
            self.both(lambda model: model.merge_adapter())

    @rule()
    def unmerge(self) -> None:
        self.both(lambda model: model.unmerge_adapter())

    @rule(scale=st.sampled_from([0.0, 0.5, 2.0]))
    def scale(self, scale: float) -> None:
        for path in ("up", "down"):
            self.both(lambda model, path=path: model.base_model.model.get_submodule(path).scale_layer(scale))

    @rule(training=st.booleans())
    def train(self, training: bool) -> None:
        self.both(lambda model: model.train(training))

    @rule(rows=st.lists(st.sampled_from([*NAMES, "__base__"]), min_size=4, max_size=4))
    def mixed(self, rows: list[str]) -> None:
        found: list[torch.Tensor] = []
        self.both(lambda model: found.append(model(self.x, adapter_names=rows)))
        if found:
            torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-9)

    @property
    def x(self) -> torch.Tensor:
        return torch.linspace(-1, 1, 4 * IN, dtype=torch.float64).view(4, IN)

    @property
    def merged(self) -> bool:
        return any(getattr(module, "merged", False) for module in self.theirs.modules())

    @invariant()
    def it_answers_as_peft(self) -> None:
        assert_equal(values_and_gradients(self.ours, self.x), values_and_gradients(self.theirs, self.x), 1e-9)
        assert list(self.ours.state_dict()) == list(self.theirs.state_dict())


TestSequence = Sequence.TestCase
