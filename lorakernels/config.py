"""LoRAConfig: what to adapt and how, with PEFT's names. Plain data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from lorakernels.patterns import check_pattern

INITS = (True, False, "kaiming", "gaussian", "orthogonal", "pissa", "olora")
_PISSA_STEPS = re.compile(r"pissa_niter_\d{1,4}")
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers of a model get an adapter, and of what rank, scale and start.

    Args:
        r: rank, at least 1.
        lora_alpha: numerator of the scaling lora_alpha / r (lora_alpha / √r with `use_rslora`).
        lora_dropout: probability in [0, 1) that an element of x does not reach lora_A.
        target_modules: names or suffixes of modules (["q_proj", "v_proj"]), a regular expression that
            matches whole names, or "all-linear".
        target_parameters: names or suffixes of a mixture's stacks of experts (["experts.gate_up_proj"]), each expert of
            which gets an A and B; beside `target_modules` or alone.
        exclude_modules: names, suffixes or a regular expression of modules to leave alone.
        bias: which biases train: "none", "all", or "lora_only" (those of adapted layers).
        use_rslora: rank-stabilised scaling (Kalajdzievski, arXiv 2312.03732).
        init_lora_weights: True or "kaiming" (A Kaiming-uniform with a = √5, B zero), "gaussian" (A normal with
            deviation 1 / r, B zero), "orthogonal" (neither zero, B A zero; r even), False (A and B both random: for
            tests), or out of the base weight, which changes it: "pissa", "pissa_niter_<n>" (Meng et al.,
            arXiv 2404.02948), "olora" (Büyükakyüz, arXiv 2406.01775).
        rank_pattern, alpha_pattern: rank and alpha by module name, suffix or regular expression.
        use_dora: a learned length for every row of the adapted weight (Liu et al., arXiv 2402.09353).
        lora_bias: a bias beside lora_B; not with `use_dora`, and only with init_lora_weights True, "kaiming" or False.
        use_qalora: A sees the mean of each `qalora_group_size` L of x's K features, times K / L, as PEFT has it (Xu et
            al., "QA-LoRA", arXiv 2309.14717), so that the adapter can go into the zeros of an int4 weight in groups of
            that size; of linear layers, not with `use_dora`.
        modules_to_save: modules, such as a new head, that train whole and are saved beside the adapter: each whose name
            ends in one of these.

    Raises:
        ValueError, TypeError: naming the field, what was given and what is expected.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | list[str] | tuple[str, ...] | set[str] | None = None
    exclude_modules: str | list[str] | tuple[str, ...] | set[str] | None = None
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    modules_to_save: list[str] | tuple[str, ...] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    target_parameters: list[str] | tuple[str, ...] | set[str] | None = None

    def __post_init__(self) -> None:
        for name in ("modules_to_save", "target_parameters"):
            names = getattr(self, name) or ()
            if not _are_texts(names) or not all(names):
                raise TypeError(f"{name} is {names!r}; expected a list of names")
        check_modules(self.target_modules, "target_modules")
        check_modules(self.exclude_modules, "exclude_modules")
        check_rank(self.r)
        check_alpha(self.lora_alpha)
        _check_number(self.lora_dropout, "lora_dropout", "a number in [0, 1)")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; expected a number in [0, 1)")
        if self.bias not in BIASES:
            raise ValueError(f"bias is {self.bias!r}; expected one of {', '.join(map(repr, BIASES))}")
        check_init(self.init_lora_weights)
        for name in ("use_rslora", "use_dora", "lora_bias", "use_qalora"):
            flag = getattr(self, name)
            if not isinstance(flag, bool):
                raise TypeError(f"{name} is {flag!r} ({type(flag).__name__}); expected True or False")
        # PEFT's rules: with DoRA its norm would take the bias for a part of the weight.
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias=True and use_dora=True exclude each other; expected one of them")
        if self.lora_bias and self.init_lora_weights not in (True, False, "kaiming"):
            init = self.init_lora_weights
            raise ValueError(f"lora_bias=True with init_lora_weights={init!r}; expected True, 'kaiming' or False")
        check_rank(self.qalora_group_size, "qalora_group_size")
        if self.use_qalora and (self.use_dora or self.init_lora_weights not in (True, False, "kaiming", "gaussian")):
            raise ValueError(
                f"use_qalora=True with use_dora={self.use_dora} and init_lora_weights={self.init_lora_weights!r}; "
                "expected no DoRA, and a start that does not read the base weight"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            if not isinstance(patterns, Mapping) or not all(isinstance(pattern, str) for pattern in patterns):
                raise TypeError(f"{name} is {patterns!r}; expected a mapping of names or patterns to numbers")
            for pattern in patterns:
                check_pattern(pattern, f"a key of {name}")
        for pattern, rank in self.rank_pattern.items():
            check_rank(rank, f"rank_pattern[{pattern!r}]")
        for pattern, alpha in self.alpha_pattern.items():
            check_alpha(alpha, f"alpha_pattern[{pattern!r}]")

    @property
    def pooled(self) -> int:
        """How many features A sees as one; 0 where it sees each."""
        return self.qalora_group_size if self.use_qalora else 0


class AdapterFields(TypedDict, total=False):
    """The fields that are about one layer."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    init_lora_weights: bool | str
    use_dora: bool
    lora_bias: bool
    use_qalora: bool
    qalora_group_size: int


def layer_config(config: LoRAConfig | None, fields: Any) -> LoRAConfig:
    """`config`, or one of these fields of one layer; raises TypeError for both, and for a field of another name."""
    if config is not None and (fields or not isinstance(config, LoRAConfig)):
        raise TypeError(f"config is {config!r}, beside {sorted(fields)}; expected a LoRAConfig alone, or fields of one")
    unknown = sorted(set(fields) - set(AdapterFields.__annotations__))
    if unknown:
        raise TypeError(f"{unknown} mean nothing for one layer; expected some of {list(AdapterFields.__annotations__)}")
    return LoRAConfig(**fields) if config is None else config


def split_fields(arguments: dict[str, Any]) -> tuple[AdapterFields, dict[str, Any]]:
    """The fields of one layer, and what else was given by name: arguments of the base layer."""
    own: Any = {name: value for name, value in arguments.items() if name in AdapterFields.__annotations__}
    return own, {name: value for name, value in arguments.items() if name not in own}


def of_one_layer(config: LoRAConfig, r: int, lora_alpha: float, **changes: Any) -> LoRAConfig:
    """What a layer gets by a model's configuration: the rank and alpha that its patterns give it, and no patterns."""
    changes |= {"target_modules": None, "exclude_modules": None, "rank_pattern": {}, "alpha_pattern": {}}
    changes["target_parameters"] = None
    return replace(config, r=r, lora_alpha=lora_alpha, **changes)


def _are_texts(values: Any) -> bool:
    return isinstance(values, (list, tuple, set, frozenset)) and all(isinstance(value, str) for value in values)


def check_modules(modules: Any, name: str) -> None:
    """None, one regular expression, or a list, tuple or set of names."""
    if isinstance(modules, str):
        check_pattern(modules, name)
    elif modules is not None and not _are_texts(modules):
        raise TypeError(f"{name} is {modules!r}; expected a regular expression, or a list, tuple or set of names")


def check_rank(r: Any, name: str = "r") -> None:
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"{name} is {r!r} ({type(r).__name__}); expected an int of at least 1")
    if r < 1:
        raise ValueError(f"{name} is {r}; expected an int of at least 1")


def _check_number(value: Any, name: str, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected {expected}")


def check_alpha(alpha: Any, name: str = "lora_alpha") -> None:
    _check_number(alpha, name, "a finite number")
    if not abs(alpha) <= FLOAT32_MAX:  # kernels and plans hold a scaling in float32
        shown = "an int too large for a float" if isinstance(alpha, int) else alpha
        raise ValueError(f"{name} is {shown}; expected a finite number that float32 can hold")


def check_init(init: Any) -> None:
    steps = isinstance(init, str) and _PISSA_STEPS.fullmatch(init)
    if not steps and not (isinstance(init, (bool, str)) and init in INITS):
        names = ", ".join(map(repr, INITS))
        raise ValueError(f"init_lora_weights is {init!r}; expected one of {names}, 'pissa_niter_<n>'")


def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """lora_alpha / r (arXiv 2106.09685, section 4.1), or lora_alpha / √r (arXiv 2312.03732)."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
