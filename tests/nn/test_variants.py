"""Every layer and variant: parity with PEFT, merging, starts out of the base weight, what is kept and cached."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import layer as peft_layers
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import lorakernels as lk
from lorakernels.nn import dora
from lorakernels.nn.adapt import LAYERS
from lorakernels.nn.layer import LoRALayer
from lorakernels.testing.budget import assert_within_budget, error


def adapt(base_layer: nn.Module, *args: Any, **fields: Any) -> Any:
    return LAYERS[type(base_layer)].from_base(base_layer, *args, **fields)


def inject_into(layer: nn.Module) -> nn.Module:
    return lk.inject(nn.Sequential(layer), lk.LoRAConfig(target_modules=["0"]))


@dataclass(frozen=True)
class Kind:
    """A base layer, an input of it, and the layer that PEFT puts around it."""

    base: Callable[..., nn.Module]
    arguments: tuple[Any, ...]
    x: tuple[int, ...]
    theirs: type
    options: dict[str, Any] = field(default_factory=dict)
    r: int = 4

    def make(self, dtype: torch.dtype, bias: bool = True) -> nn.Module:
        with_bias = {} if self.base is nn.Embedding else {"bias": bias}
        return self.base(*self.arguments, **self.options, **with_bias).to(dtype)

    def input(self, dtype: torch.dtype) -> torch.Tensor:
        if self.base is nn.Embedding:
            return torch.randint(0, self.arguments[0], self.x)
        return torch.randn(self.x).to(dtype).requires_grad_()


KINDS = {
    "linear": Kind(nn.Linear, (24, 16), (2, 5, 24), peft_layers.Linear),
    "embedding": Kind(nn.Embedding, (30, 12), (3, 7), peft_layers.Embedding),
    "padded": Kind(
        nn.Embedding, (9, 12), (3, 7), peft_layers.Embedding, {"padding_idx": 2, "scale_grad_by_freq": True}
    ),
    "conv1d": Kind(nn.Conv1d, (6, 10, 3), (2, 6, 9), peft_layers.Conv1d, {"stride": 2, "padding": 1}),
    "same": Kind(nn.Conv1d, (6, 10, 3), (2, 6, 9), peft_layers.Conv1d, {"padding": "same"}),
    "conv2d": Kind(nn.Conv2d, (6, 10, (3, 2)), (2, 6, 7, 8), peft_layers.Conv2d, {"padding": (1, 0), "stride": (1, 2)}),
    "conv1x1": Kind(nn.Conv2d, (6, 10, 1), (2, 6, 4, 5), peft_layers.Conv2d),
    "grouped": Kind(nn.Conv2d, (6, 10, 3), (2, 6, 7, 8), peft_layers.Conv2d, {"groups": 2}),
    "conv3d": Kind(nn.Conv3d, (4, 6, 2), (2, 4, 4, 3, 5), peft_layers.Conv3d, {"stride": (1, 2, 1)}, r=2),
}
ONE_OF_EACH = ["linear", "embedding", "conv1d", "conv2d", "conv3d"]


@dataclass(frozen=True)
class Case:
    kind: str
    use_dora: bool = False
    use_rslora: bool = False
    bias: bool = True
    lora_bias: bool = False
    init_lora_weights: bool | str = False

    def __str__(self) -> str:
        flags = ("use_dora", "use_rslora", "lora_bias")
        parts = [self.kind, *(flag for flag in flags if getattr(self, flag)), *([] if self.bias else ["no bias"])]
        return ", ".join([*parts, str(self.init_lora_weights)])


CASES = [
    *(Case(kind) for kind in KINDS),
    *(Case(kind, use_dora=True) for kind in KINDS if kind != "grouped"),
    *(Case(kind, use_dora=True, use_rslora=True, bias=False) for kind in ("linear", "conv2d")),
    *(Case(kind, use_rslora=True, lora_bias=True) for kind in ("linear", "conv1d", "conv2d", "grouped")),
    *(Case(kind, init_lora_weights=init) for kind in ("linear", "embedding", "conv2d") for init in (True, "gaussian")),
    *(Case("linear", use_dora=dora, init_lora_weights="orthogonal") for dora in (False, True)),
    Case("linear", lora_bias=True, init_lora_weights=True),
    Case("linear", bias=False, lora_bias=True),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def ours(case: Case, dtype: torch.dtype) -> LoRALayer:
    """A layer with an adapter that is not as it started: B not zero, a magnitude that is not the norm."""
    kind = KINDS[case.kind]
    layer = adapt(
        kind.make(dtype, case.bias),
        r=kind.r,
        lora_alpha=6,
        use_rslora=case.use_rslora,
        init_lora_weights=case.init_lora_weights,
        use_dora=case.use_dora,
        lora_bias=case.lora_bias,
    )
    return trained(layer).to(dtype)


@torch.no_grad()
def trained(layer: LoRALayer, name: str = "default") -> LoRALayer:
    for suffix, tensor in layer.adapter_tensors(name).items():
        noise = torch.randn(tensor.shape).to(tensor)
        if suffix == "lora_magnitude_vector":
            tensor.mul_(1 + 0.3 * noise)
        else:
            tensor.add_(0.2 * noise)
    return layer


def theirs(case: Case, layer: LoRALayer, dtype: torch.dtype) -> nn.Module:
    """PEFT's layer with the same numbers."""
    kind = KINDS[case.kind]
    config = peft.LoraConfig(
        r=kind.r,
        lora_alpha=6,
        use_rslora=case.use_rslora,
        init_lora_weights=case.init_lora_weights,
        use_dora=case.use_dora,
        lora_bias=case.lora_bias,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # that groups and biasless bases cannot be merged
        other = kind.theirs(copy.deepcopy(layer.base_layer), "default", config=config, r=kind.r, lora_alpha=6)
    other.to(dtype)
    own = layer.adapter_tensors()
    with torch.no_grad():
        for suffix, tensor in their_tensors(other).items():
            assert tensor.shape == own[suffix].shape, suffix
            tensor.copy_(own[suffix])
        for tensor, value in zip(other.base_layer.parameters(), layer.base_layer.parameters(), strict=True):
            tensor.copy_(value)
    assert set(their_tensors(other)) == set(own)
    return other


def their_tensors(layer: nn.Module) -> dict[str, nn.Parameter]:
    """By the names in PEFT's files, where the adapter's is left out and the magnitude has no `.weight`."""
    return {
        name.replace(".default", "").replace("vector.weight", "vector"): tensor
        for name, tensor in layer.named_parameters()
        if name.startswith("lora_")
    }


def results(
    layer: nn.Module, tensors: dict[str, nn.Parameter], x: torch.Tensor, dy: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The output and every gradient."""
    bias = getattr(layer.base_layer, "bias", None)
    wanted = {**({"x": x} if x.requires_grad else {}), **tensors, **({} if bias is None else {"bias": bias})}
    for tensor in wanted.values():
        tensor.requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y, list(wanted.values()), dy.to(y.dtype))
    return {"y": y, **dict(zip(wanted, grads, strict=True))}


@every_case
def test_parity_with_peft(case: Case) -> None:
    layer = ours(case, torch.float64)
    other = theirs(case, layer, torch.float64)
    x = KINDS[case.kind].input(torch.float64)
    dy = torch.randn(layer(x).shape, dtype=torch.float64)
    expected = results(other, their_tensors(other), x, dy)
    for name, result in results(layer, layer.adapter_tensors(), x, dy).items():
        assert result.shape == expected[name].shape and error(result, expected[name]) < 1e-10, name


@every_case
def test_bf16_is_as_near_as_pefts(case: Case) -> None:
    layer = ours(case, torch.bfloat16)
    eager = theirs(case, layer, torch.bfloat16)
    exact = copy.deepcopy(layer).double()
    x = KINDS[case.kind].input(torch.bfloat16)
    dy = torch.randn(layer(x).shape).bfloat16()
    x64 = x.detach().double().requires_grad_() if x.is_floating_point() else x
    truth = results(exact, exact.adapter_tensors(), x64, dy)
    of_eager = results(eager, their_tensors(eager), x, dy)
    for name, result in results(layer, layer.adapter_tensors(), x, dy).items():
        assert_within_budget(result, of_eager[name], truth[name], torch.bfloat16, name)


@every_case
def test_merged_it_does_the_same(case: Case) -> None:
    layer = ours(case, torch.float64).eval()
    x, base = KINDS[case.kind].input(torch.float64), layer.weight.clone()
    bias = None if layer.bias is None else layer.bias.clone()
    expected = layer(x)
    if case.kind == "grouped" or (case.lora_bias and not case.bias):
        with pytest.raises(ValueError, match=r"groups=2|without a bias"):
            layer.merge()
        assert torch.equal(layer.weight, base) and not layer.merged
        return
    delta = layer.delta_weight()
    for keep_base in (False, True):
        layer.merge(keep_base=keep_base)
        assert error(layer.weight, base + delta) < 1e-14
        assert error(layer(x), expected) < 1e-10
        assert error(layer.delta_weight(), delta) < 1e-10
        layer.train()
        with pytest.raises(RuntimeError, match="training would not reach"):
            layer(x)
        copied = copy.deepcopy(layer.eval())
        for one in (layer, copied):
            one.unmerge()
            assert error(one.weight, base) < 1e-13 and error(one(x), expected) < 1e-10
            assert bias is None or torch.allclose(one.bias, bias, rtol=0, atol=1e-14)
        layer.weight.copy_(base)
    layer.merge(keep_base=True)
    layer.unmerge()
    assert torch.equal(layer.weight, base)


@every_case
def test_starts_as_its_base_copies_saves_and_switches_off(case: Case) -> None:
    kind = KINDS[case.kind]
    base = kind.make(torch.float32, case.bias)
    x = kind.input(torch.float32)
    expected = base(x)
    fields = {"use_dora": case.use_dora, "use_rslora": case.use_rslora, "lora_bias": case.lora_bias, "r": kind.r}
    started = adapt(copy.deepcopy(base), init_lora_weights=case.init_lora_weights or True, **fields)
    assert error(started(x), expected) < 1e-6  # with DoRA magnitude over norm is one to within rounding
    shapes = LAYERS[type(base)].adapter_shapes(base, kind.r, case.use_dora, case.lora_bias)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in started.adapter_tensors().items()}
    assert {id(p) for p in started.parameters() if p.requires_grad} == set(map(id, started.adapter_tensors().values()))

    layer = trained(started).eval()
    y = layer(x)
    assert error(y, expected) > 1e-3
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = adapt(kind.make(torch.float32, case.bias), **fields).eval()
    other(x)  # so that whatever is cached is of the old numbers
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), y)

    layer.scaling = 0
    assert torch.equal(layer(x), expected)
    layer.delete_adapter("default")
    assert torch.equal(layer(x), expected) and not layer.adapter_names and not layer.active_adapters
    assert layer.state_dict().keys() == {f"base_layer.{name}" for name in base.state_dict()}


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_several_adapters_add_up(kind: str, dropout: float, use_dora: bool) -> None:
    layer = ours(Case(kind, use_dora=use_dora), torch.float64)
    for name in ("plain", "second", "off"):
        fields = {"lora_bias": kind != "embedding"} if name == "plain" else {"use_dora": use_dora}
        layer.add_adapter(name, r=2, lora_alpha=3, lora_dropout=dropout, **fields)
        trained(layer, name)
    x = KINDS[kind].input(torch.float64)
    base = layer.base_layer(x)
    names = ["default", "plain", "second"]
    layer.eval()
    expected = base
    for name in names:
        layer.set_adapter(name)
        expected = expected + layer(x) - base
    layer.set_adapter([*names, "off"])
    layer.adapters["off"].scaling = 0.0
    assert error(layer(x), expected) < 1e-10
    assert (error(layer.train()(x), expected) < 1e-10) == (not dropout or kind == "embedding")
    parameters = {f"{n}.{s}": p for n in names for s, p in layer.adapter_tensors(n).items()}
    plain = torch.autograd.grad(layer.eval()(x).square().sum(), list(parameters.values()))
    handle = layer.base_layer.register_forward_hook(lambda *_: None)  # the path that runs the base as a module
    watched = torch.autograd.grad(layer(x).square().sum(), list(parameters.values()))
    handle.remove()
    for name, a, b in zip(parameters, plain, watched, strict=True):
        assert error(a, b) < 1e-10, name
    before = layer.weight.clone()
    layer.merge()
    assert error(layer(x), expected) < 1e-10
    layer.unmerge()
    assert error(layer.weight, before) < 1e-12


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_dropout_reaches_lora_A_alone_and_is_unbiased(kind: str) -> None:
    layer = ours(Case(kind, use_dora=True), torch.float32)
    layer.adapters["default"].lora_dropout = 0.5
    x = KINDS[kind].input(torch.float32).detach()
    with torch.no_grad():
        runs = torch.stack([layer(x) for _ in range(900)]).double()
        mean = layer.eval()(x).double()
    # 900 draws: each element within six of its standard errors, for some two thousand elements.
    assert ((runs.mean(0) - mean).abs() <= 6 * runs.std(0) / 30 + 1e-5).all() and runs.std(0).min() > 0
    nn.init.zeros_(layer.lora_A["default"].weight)
    layer.train()
    assert torch.equal(layer(x), layer(x))  # the base product has no dropout


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize("several", [False, True])
def test_nothing_of_an_outputs_size_is_kept(kind: str, several: bool) -> None:
    bases = {
        "linear": (nn.Linear(8, 96), torch.randn(40, 8)),
        "embedding": (nn.Embedding(8, 96), torch.randint(0, 8, (40,))),
        "conv1d": (nn.Conv1d(2, 96, 3), torch.randn(2, 2, 40)),
        "conv2d": (nn.Conv2d(2, 96, 3), torch.randn(2, 2, 9, 9)),
        "conv3d": (nn.Conv3d(2, 96, 2), torch.randn(2, 2, 4, 4, 4)),
    }
    base, x = bases[kind]
    layer = trained(adapt(base, r=2, use_dora=True))
    if several:
        layer.add_adapter("second", r=2, use_dora=True)
        layer.set_adapter(["default", "second"])
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.untyped_storage().nbytes()), t)[1], id):
        y = layer(x)
    assert sizes and max(sizes) < y.numel() * 4


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize("several", [False, True])
def test_compiles_to_one_graph_with_right_gradients(kind: str, several: bool) -> None:
    layer = ours(Case(kind, use_dora=True), torch.float64)
    if several:
        layer.add_adapter("second", r=2, use_dora=True)
        layer.set_adapter(["default", "second"])
    x = KINDS[kind].input(torch.float64)
    layer(x)  # what is cached before does not matter
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        dy = torch.randn(layer(x).shape, dtype=torch.float64)
        expected = results(layer, layer.adapter_tensors(), x, dy)
        y = compiled(x)
        wanted = list(layer.adapter_tensors().values())
        assert error(y, expected["y"]) < 1e-12
        for name, grad in zip(layer.adapter_tensors(), torch.autograd.grad(y, wanted, dy), strict=True):
            assert error(grad, expected[name]) < 1e-12, name
        with torch.no_grad():
            layer.weight.mul_(1.5)


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize("several", [False, True])
def test_autocast_export_and_inference_mode(kind: str, several: bool) -> None:
    layer = ours(Case(kind, use_dora=True), torch.float32).eval()
    if several:
        layer.add_adapter("second", r=2, use_dora=True)
        layer.set_adapter(["default", "second"])
    x = KINDS[kind].input(torch.float32)
    with torch.inference_mode():
        expected = layer(x.detach())
    y = layer(x)
    assert torch.equal(y, expected)
    y.sum().backward()  # what inference mode has cached does not disturb it
    for strict in (False, True):
        assert torch.equal(torch.export.export(layer, (x.detach(),), strict=strict).module()(x.detach()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        lower, base = layer(x), layer.base_layer(x)
        scale = layer._row_scale("default")
        delta = layer.delta_weight("default")
    assert lower.dtype == base.dtype and error(lower, expected) < 4 * torch.finfo(torch.bfloat16).eps
    assert error(scale, layer._row_scale("default")) < 1e-6  # the norm is float32's all the same
    assert error(delta, layer.delta_weight("default")) < 1e-6


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_torch_func_takes_gradients_of_the_adapter(kind: str) -> None:
    layer = ours(Case(kind, use_dora=True), torch.float64)
    x, parameters = KINDS[kind].input(torch.float64), dict(layer.named_parameters())
    trained_ones = {name: p.detach() for name, p in parameters.items() if name.startswith("lora_")}

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(layer, values, (x.detach(),)).square().sum()

    layer(x)  # so that a norm of the layer's own numbers is cached
    doubled = {name: 2 * p for name, p in trained_ones.items()}
    grads = torch.func.grad(loss)(doubled)
    with torch.no_grad():
        for name, value in doubled.items():
            parameters[name].copy_(value)
    layer(x).square().sum().backward()
    for name, grad in grads.items():
        assert error(grad, parameters[name].grad) < 1e-12, name


def _new_parameter(layer: LoRALayer) -> None:
    layer.base_layer.weight = nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)


def _new_parameter_on_the_same_memory(layer: LoRALayer) -> None:
    old = layer.weight
    new = nn.Parameter(old.data, requires_grad=False)
    for _ in range(old._version - new._version):
        new.add_(0.5)
    assert (new._version, new.data_ptr()) == (old._version, old.data_ptr())
    layer.base_layer.weight = new


def _new_data(layer: LoRALayer) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


def _new_data_twice(layer: LoRALayer) -> None:
    for _ in range(2):  # the second one where the first one was
        layer.weight.data = layer.weight.data * 1.5


def _stepped_by_a_fused_optimizer(layer: LoRALayer) -> None:
    tensors = [layer.weight.requires_grad_(), *layer.adapter_tensors().values()]
    for tensor in tensors:
        tensor.requires_grad_().grad = torch.randn_like(tensor)
    torch.optim.SGD(tensors, lr=0.5, fused=True).step()


def _loaded(layer: LoRALayer) -> None:
    layer.load_state_dict({name: tensor + 0.5 for name, tensor in layer.state_dict().items()})


def _trained_through_data(layer: LoRALayer) -> None:
    layer.train()
    for tensor in (layer.weight, *layer.adapter_tensors().values()):
        tensor.data.add_(0.5)
    layer.eval()


CHANGES: dict[str, Callable[[LoRALayer], Any]] = {
    "weight edited": lambda layer: layer.weight.add_(0.5),
    "new weight": _new_parameter,
    "new weight in its place": _new_parameter_on_the_same_memory,
    "new data": _new_data,
    "new data twice": _new_data_twice,
    "fused step": _stepped_by_a_fused_optimizer,
    "loaded": _loaded,
    "moved": lambda layer: layer.float(),
    "merged and back": lambda layer: (layer.merge(), layer.unmerge()),
    "factor edited": lambda layer: next(iter(layer.adapter_tensors().values())).add_(0.5),
    "magnitude edited": lambda layer: layer.adapter_tensors()["lora_magnitude_vector"].add_(0.5),
    "scaling": lambda layer: setattr(layer, "scaling", 0.3),
    "trained through .data": _trained_through_data,
    "weight edited through .data": lambda layer: layer.weight.data.mul_(1.5),
    "a row edited through .data": lambda layer: layer.weight.data[-1].mul_(1.5),
    "a column edited through .data": lambda layer: layer.weight.data[:, -1].mul_(1.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
@torch.no_grad()
def test_a_cached_norm_is_never_stale(kind: str, change: str) -> None:
    layer = ours(Case(kind, use_dora=True), torch.float64).eval().requires_grad_(False)
    x = KINDS[kind].input(torch.float64)
    before = layer(x)
    assert torch.equal(layer(x), before)
    CHANGES[change](layer)
    x = x.to(layer.weight.dtype) if x.is_floating_point() else x
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))  # a copy has nothing cached
    assert change == "merged and back" or not torch.equal(layer(x).double(), before)


@torch.no_grad()
def test_a_cached_norm_keeps_no_weight_alive() -> None:
    layer = ours(Case("linear", use_dora=True), torch.float32).eval().requires_grad_(False)
    layer(KINDS["linear"].input(torch.float32))
    old = StorageWeakRef(layer.weight.untyped_storage())
    _new_parameter(layer)
    assert old.expired()


@torch.no_grad()
def test_a_cached_norm_is_of_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = ours(Case("linear", use_dora=True), torch.float32).eval().requires_grad_(False)
    x, made, counts = KINDS["linear"].input(torch.float32), [], []
    norm = dora.lora_weight_norm
    monkeypatch.setattr(dora, "lora_weight_norm", lambda *args, **named: made.append(1) or norm(*args, **named))
    for stream in "aab":
        monkeypatch.setattr(dora, "_stream", lambda device, stream=stream: stream)
        layer(x)
        counts.append(len(made))
    assert counts == [1, 1, 2]


@pytest.mark.parametrize(
    ("training", "trains", "norms"), [(True, True, 3), (True, False, 3), (False, True, 3), (False, False, 1)]
)
def test_what_is_computed_again(training: bool, trains: bool, norms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"row_norm": 0, "lora_weight_norm": 0}

    def counted(name: str) -> Callable[..., torch.Tensor]:
        function = getattr(dora, name)

        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    layer = ours(Case("linear", use_dora=True), torch.float32).train(training)
    for tensor in layer.adapter_tensors().values():
        tensor.requires_grad_(trains)
    for name in counts:
        monkeypatch.setattr(dora, name, counted(name))
    x = KINDS["linear"].input(torch.float32)
    with torch.set_grad_enabled(training):
        for _ in range(3):
            layer(x)
    assert counts == {"row_norm": 1, "lora_weight_norm": norms}


def test_a_row_of_zeros_stays_finite() -> None:
    linear = nn.Linear(6, 4)
    nn.init.zeros_(linear.weight)
    layer = adapt(linear, r=2, use_dora=True)
    x = torch.randn(3, 6)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, linear(x))
    assert all(tensor.grad.isfinite().all() for tensor in layer.adapter_tensors().values())


def test_a_magnitude_of_zero_is_merged_only_beside_a_copy() -> None:
    layer = ours(Case("linear", use_dora=True), torch.float32)
    layer.adapter_tensors()["lora_magnitude_vector"].data[3] = 0
    base = layer.weight.clone()
    with pytest.raises(ValueError, match="keep_base=True"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.weight, base)
    layer.merge(keep_base=True)
    layer.unmerge()
    assert torch.equal(layer.weight, base)


STARTS = ["pissa", "pissa_niter_20", "olora"]


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_out_of_the_base_are_pefts(init: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(24, 16, dtype=dtype)
    with torch.no_grad():  # with a gap behind the fourth singular value, so that the randomised SVD converges
        linear.weight.mul_(0.1).add_(torch.randn(16, 4) @ torch.randn(4, 24))
    layer = adapt(copy.deepcopy(linear), r=4, lora_alpha=6, init_lora_weights=init)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=init)
    other = peft_layers.Linear(copy.deepcopy(linear), "default", config=config, r=4, lora_alpha=6)
    # A singular vector's sign is free, B A is not. Beside a bf16 base PEFT's layer rounds its factors, both by eps / 2.
    A, B = (their_tensors(other)[f"lora_{factor}.weight"] for factor in "AB")
    eps = torch.finfo(dtype).eps
    assert error(layer.delta_weight(), 1.5 * (B.float() @ A.float())) < 2e-5 + eps
    difference = torch.linalg.vector_norm(layer.weight.double() - other.base_layer.weight.double())
    assert difference < (2e-5 + eps / 2) * torch.linalg.vector_norm(linear.weight.double())


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_starts_out_of_the_base_keep_its_function_and_can_be_undone(kind: str, use_dora: bool, init: str) -> None:
    base = KINDS[kind].make(torch.float64)
    original, x = base.weight.clone(), KINDS[kind].input(torch.float64)
    expected = base(x)
    layer = adapt(base, r=4, lora_alpha=6, init_lora_weights=init, use_dora=use_dora)
    assert layer.base_changed_by == ["default"] and "base_changed_by=['default']" in repr(layer)
    assert error(layer(x), expected) < 1e-10 and error(layer.weight, original) > 0.1
    if init == "pissa":
        matrix = layer._matrix(original)
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        assert error(layer._matrix(layer.delta_weight()), (U[:, :4] * S[:4]) @ Vh[:4]) < 1e-10 or use_dora

    trained(layer).eval()
    adapted, changed = layer(x), layer.weight.clone()
    layer.merge()
    assert error(layer(x), adapted) < 1e-10 and error(layer.original_weight(), original) < 1e-12
    layer.unmerge()
    assert error(layer(x), adapted) < 1e-10 and error(layer.weight, changed) < 1e-12

    A, B = layer.as_plain_lora()
    plain = adapt(copy.deepcopy(base), r=8, lora_alpha=12, use_dora=use_dora)
    with torch.no_grad():
        plain.weight.copy_(original)
        own = layer.adapter_tensors()
        for name, tensor in plain.adapter_tensors().items():
            tensor.copy_({0: A, 1: B}.get(list(own).index(name), own[name]))
    assert error(plain(x), adapted) < 1e-10

    again = adapt(KINDS[kind].make(torch.float64), r=4, lora_alpha=6, init_lora_weights=init, use_dora=use_dora)
    again.load_state_dict(layer.state_dict())
    for one in (layer, again, copy.deepcopy(layer)):
        assert error(one(x), adapted) < 1e-10
        with pytest.raises(ValueError, match="'default' has changed this layer's base weight"):
            one.add_adapter("second", r=4, init_lora_weights=init)
        assert one.adapter_names == ["default"]
        one.scaling = 0.1  # what comes back is what was taken, whatever was set since
        one.delete_adapter("default")
        assert error(one.weight, original) < 1e-12 and not one.base_changed_by


def test_starting_anew_gives_the_base_back_first() -> None:
    layer = lk.LoRALinear(24, 16, r=4, dtype=torch.float64)
    original = layer.weight.clone()
    for init in ("pissa", "olora", "pissa"):
        layer.reset_lora_parameters(init_lora_weights=init)
        assert error(layer.weight + layer.delta_weight(), original) < 1e-12
    layer.reset_lora_parameters()
    assert error(layer.weight, original) < 1e-12 and not layer.base_changed_by
    assert [tensor.data_ptr() for tensor in layer.as_plain_lora()] == [
        tensor.data_ptr() for tensor in layer.adapter_tensors().values()
    ]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "olora"])
def test_starting_anew_reaches_kernels_in_channels_last(init: bool | str, use_dora: bool) -> None:
    layer = ours(Case("conv2d", use_dora=use_dora), torch.float64).to(memory_format=torch.channels_last)
    x = KINDS["conv2d"].input(torch.float64)
    before = {name: tensor.clone() for name, tensor in layer.adapter_tensors().items()}
    expected = layer.base_layer(x)
    layer.reset_lora_parameters("default", init)
    assert error(layer(x), expected) < 1e-10
    assert not any(torch.equal(before[name], tensor) for name, tensor in layer.adapter_tensors().items())


def test_the_orthogonal_start() -> None:
    layer = lk.LoRALinear(1000, 1200, r=8, init_lora_weights="orthogonal")
    A, B = (tensor.detach().double() for tensor in layer.adapter_tensors().values())
    assert (B @ A).abs().max() < 1e-6
    # Half of an orthogonal basis times normal numbers over ten: the rows' mean square is (1 / 2) / 100 in all.
    for factor, width in ((A, 1000), (B, 1200)):
        draws = 4 * width
        assert abs(factor.square().mean() / 0.005 - 1) < 5 * (2 / draws) ** 0.5


REFUSED = [
    (lambda: lk.LoRAConfig(use_dora=True, lora_bias=True), ValueError, "exclude each other"),
    (lambda: lk.LoRAConfig(use_dora=1), TypeError, "use_dora is 1"),
    (lambda: lk.LoRAConfig(lora_bias=True, init_lora_weights="pissa"), ValueError, "lora_bias=True with"),
    (lambda: lk.LoRAConfig(init_lora_weights="pissa_niter_x"), ValueError, "expected one of .*pissa_niter_<n>"),
    (lambda: lk.LoRALinear(8, 8, r=3, init_lora_weights="orthogonal"), ValueError, "even rank; got r=3"),
    (lambda: lk.LoRALinear(8, 6, r=7, init_lora_weights="pissa"), ValueError, "at most 6 here; got r=7"),
    (lambda: lk.LoRALinear(8, 6, r=2, lora_alpha=0, init_lora_weights="olora"), ValueError, "divides by the scaling"),
    (lambda: adapt(nn.Embedding(8, 6), r=2, lora_bias=True), ValueError, "has no bias"),
    (lambda: adapt(nn.Embedding(8, 6, max_norm=1.0), r=2), ValueError, "max_norm=None first"),
    (lambda: adapt(nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"), r=2), ValueError, "padding_mode='reflect'"),
    (lambda: adapt(nn.Conv2d(4, 4, 3, groups=4), r=2), ValueError, "a multiple; got r=2"),
    (lambda: adapt(nn.Conv2d(4, 4, 3, groups=2), r=2, use_dora=True), ValueError, "groups=1; got groups=2"),
    (lambda: adapt(nn.Conv2d(4, 4, 3, groups=2), r=2, init_lora_weights="olora"), ValueError, "groups=1; got"),
    (lambda: inject_into(nn.ConvTranspose1d(4, 4, 3)), TypeError, "ConvTranspose1d; expected exactly one of"),
    (lambda: inject_into(nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)), TypeError, "Linear; expected"),
    (lambda: adapt(nn.Linear(4, 4), "get"), ValueError, "is an attribute of torch.nn.ParameterDict"),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_a_start_that_fails_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    linear = nn.Linear(8, 8)
    weight = linear.weight.clone()
    with pytest.raises(torch.linalg.LinAlgError):
        adapt(linear, r=2, init_lora_weights="pissa", use_dora=True)
    assert linear.weight.requires_grad and torch.equal(linear.weight, weight)
    layer = adapt(linear, r=2)
    with pytest.raises(torch.linalg.LinAlgError):
        layer.add_adapter("second", r=2, init_lora_weights="pissa", use_dora=True)
    assert layer.adapter_names == ["default"] and torch.equal(linear.weight, weight)
    assert not any("second" in name for name in layer.state_dict())


def test_a_dilated_convolution_which_peft_cannot_run() -> None:
    layer = trained(lk.LoRAConv2d(4, 6, 3, r=2, use_dora=True, dilation=2, padding=1, dtype=torch.float64)).eval()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    expected = layer(x)
    layer.merge()
    assert error(layer(x), expected) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_code_that_knows_the_plain_layer_goes_on_working(kind: str) -> None:
    base = KINDS[kind].make(torch.float32)
    layer, x = adapt(base, r=KINDS[kind].r, init_lora_weights=False), KINDS[kind].input(torch.float32)
    for name in base.__constants__:
        if hasattr(base, name):  # an embedding of torch's has a constant that it lacks
            assert getattr(layer, name) == getattr(base, name), name
    assert torch.equal(layer(input=x), layer(x))
    tied = nn.Parameter(base.weight.clone(), requires_grad=False)
    layer.weight = tied
    assert base.weight is tied and layer.weight is tied and "weight" not in layer._parameters
    if kind != "grouped":
        layer.merge()
        with pytest.raises(RuntimeError, match=r"call unmerge\(\) first"):
            layer.weight = tied


def test_the_constructors_take_torchs_arguments() -> None:
    conv = lk.LoRAConv2d(4, 6, 3, r=2, use_dora=True, stride=2, dilation=2, bias=False)
    assert conv(torch.randn(4, 9, 9)).shape == (6, 3, 3) and conv.bias is None
    embedding = lk.LoRAEmbedding(10, 6, r=2, padding_idx=1, sparse=True)
    trained(embedding)(torch.tensor([1, 3])).sum().backward()
    assert embedding.lora_embedding_A["default"].grad[:, [1, 0]].abs().sum() == 0
    assert embedding.lora_embedding_A["default"].grad[:, 3].abs().min() > 0
    assert lk.LoRAConv1d(4, 6, 3, r=2)(torch.randn(2, 4, 9)).shape == (2, 6, 7)
    assert lk.LoRAConv3d(4, 6, 2, r=2)(torch.randn(2, 4, 3, 3, 3)).shape == (2, 6, 2, 2, 2)
