"""Whole models: targets, injection, switching, merging, files."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize, prune, spectral_norm, weight_norm

import lorakernels as lk
from lorakernels.files import patterns
from lorakernels.files.patterns import by_pattern


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(12, 12), nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.v_proj(torch.tanh(self.q_proj(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def net() -> Net:
    """Always the same weights."""
    torch.manual_seed(5)
    return Net()


def trained(model: nn.Module) -> nn.Module:
    for parameter in lk.trainable_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


X = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))


def adapted_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, lk.LoRALinear)]


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["q_proj"], None, ["layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj"]),
        (["layers.1.v_proj", "head"], None, ["layers.1.v_proj", "head"]),
        (["1.v_proj"], None, ["layers.1.v_proj"]),
        (r"layers\.[02]\.v.*", None, ["layers.0.v_proj", "layers.2.v_proj"]),
        ("all-linear", ["v_proj", "head"], ["layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj"]),
        ("all-linear", r"layers.*", ["head"]),
        (("q_proj", "head"), ["layers.0.q_proj"], ["layers.1.q_proj", "layers.2.q_proj", "head"]),
    ],
)
def test_targets(targets: Any, exclude: Any, expected: list[str]) -> None:
    model = lk.inject(net(), lk.LoRAConfig(target_modules=targets, exclude_modules=exclude))
    assert adapted_names(model) == expected
    adapted = {f"{name}.lora_{factor}.default.weight" for name in expected for factor in "AB"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapted


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        (dict(target_modules=["head", "hed"]), r"target_modules=\['hed'\]"),
        (dict(exclude_modules=["nothing"]), r"exclude_modules=\['nothing'\]"),
        (dict(exclude_modules="nothing"), "exclude_modules='nothing'"),
        (dict(rank_pattern={"q_proj": 4}), r"rank_pattern\['q_proj'\]"),  # is there, and is no target
        (dict(rank_pattern={"head": 4}, alpha_pattern={"hed": 4}), r"alpha_pattern\['hed'\]"),
        (dict(exclude_modules=["q_proj"], rank_pattern={"(.*)": 4, "head": 2}), None),
        (dict(target_modules="all-linear", exclude_modules="layers.*"), None),
    ],
)
def test_an_entry_that_means_nothing_gets_a_warning(fields: dict[str, Any], meant: str | None) -> None:
    config = lk.LoRAConfig(**{"target_modules": ["head"], **fields})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert adapted_names(lk.inject(net(), config)) == ["head"]
    if meant is None:
        assert not caught
    else:
        with pytest.warns(UserWarning, match=f"^{meant} matches nothing in Net, and is ignored$"):
            lk.inject(net(), config)
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("value", [5, [1, 2], b"x", {"head": 1}, ["head", None]], ids=repr)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_names_of_another_type(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{field} is .*; expected a regular expression, or a list, tuple or set"):
        lk.LoRAConfig(**{field: value})


@pytest.mark.parametrize("fields", [dict(target_modules="["), dict(exclude_modules="("), dict(rank_pattern={"(": 1})])
def test_a_pattern_is_seen_when_the_configuration_is_made(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(fields))} is '.', which is not a regular expression"):
        lk.LoRAConfig(**fields)
    lk.LoRAConfig(target_modules=r"layers\.\d+\.(q|v)_proj", rank_pattern={r"^layers\.0\.q-proj$": 2, "a.*": 3})


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (dict(target_modules=["q_prj"]), ValueError, "near names: q_proj"),
        (dict(target_modules=["proj"]), ValueError, "matches 0 modules of Net; near names: .*_proj"),
        (dict(target_modules="head", exclude_modules=["head"]), ValueError, "exclude_modules=.* leaves none"),
        (dict(target_modules=["norm"]), TypeError, "'layers.0.norm' is a torch.nn.modules.normalization.LayerNorm"),
        (dict(target_modules="(a|aa)+!", exclude_modules=["x"]), ValueError, "matches 0 modules"),
        (dict(), ValueError, "target_modules is None"),
    ],
)
def test_targets_that_cannot_be_leave_the_model_alone(config: dict, error: type[Exception], message: str) -> None:
    model = net()
    with pytest.raises(error, match=message):
        lk.inject(model, lk.LoRAConfig(**config))
    assert not adapted_names(model) and all(p.requires_grad for p in model.parameters())


def test_patterns_of_rank_and_alpha() -> None:
    config = lk.LoRAConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        rank_pattern={"head": 1, r"layers\.0\..*": 2},
        alpha_pattern={"v_proj": 32, "^layers.1.q_proj": 16},
    )
    model = lk.inject(net(), config)
    found = {
        name: (model.get_submodule(name).adapters["default"].r, model.get_submodule(name).scaling)
        for name in adapted_names(model)
    }
    assert found["head"] == (1, 8.0)
    assert found["layers.0.q_proj"] == (2, 4.0)
    assert found["layers.0.v_proj"] == (2, 16.0)
    assert found["layers.1.q_proj"] == (4, 4.0)
    assert found["layers.2.v_proj"] == (4, 8.0)


@pytest.mark.parametrize(
    ("bias", "trained_biases"),
    [
        ("none", set()),
        (
            "lora_only",
            {"layers.0.q_proj.base_layer.bias", "layers.1.q_proj.base_layer.bias", "layers.2.q_proj.base_layer.bias"},
        ),
        ("all", None),
    ],
)
def test_biases_that_train(bias: str, trained_biases: set[str] | None) -> None:
    model = lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj"], bias=bias))
    names = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert names == (
        trained_biases if trained_biases is not None else {n for n, _ in model.named_parameters() if n.endswith("bias")}
    )


def test_a_shared_layer_stays_shared() -> None:
    model = net()
    model.layers[2].q_proj = model.layers[0].q_proj
    lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"]))
    assert model.layers[2].q_proj is model.layers[0].q_proj
    assert isinstance(model.layers[2].q_proj, lk.LoRALinear)


def test_injecting_into_a_training_model_keeps_its_mode() -> None:
    assert not lk.inject(net().eval(), lk.LoRAConfig(target_modules=["head"])).head.training
    assert lk.inject(net().train(), lk.LoRAConfig(target_modules=["head"])).head.training


def test_parameters_are_counted() -> None:
    model = lk.inject(net(), lk.LoRAConfig(r=2, target_modules=["head"]))
    parameters = lk.trainable_parameters(model)
    assert parameters.num_trainable == 2 * (12 + 4) == sum(p.numel() for p in parameters)
    assert str(parameters) == f"trainable: 32 of {parameters.num_total:,} parameters ({parameters.share:.2%})"
    assert parameters.num_total == sum(p.numel() for p in model.parameters())
    torch.optim.SGD(parameters, lr=0.1)


def test_switching_scaling_and_merging() -> None:
    model = trained(lk.inject(net(), lk.LoRAConfig(r=2, target_modules=["q_proj"]))).eval()
    base = net()(X)
    one = model(X)
    lk.inject(model, lk.LoRAConfig(r=3, target_modules=["v_proj", "head"]), "other")
    lk.set_adapter(model, "default")
    assert torch.equal(model(X), one)
    lk.set_adapter(model, "other")
    trained(model)
    other = model(X)
    lk.set_adapter(model, ["default", "other"])
    both = model(X)
    assert not torch.allclose(both, one) and not torch.allclose(both, other)
    lk.set_scale(model, "other", 0)
    assert torch.equal(model(X), one)
    lk.set_scale(model, "default", 0)
    assert torch.equal(model(X), base)
    for name in ("default", "other"):
        lk.set_scale(model, name, 1)
    assert torch.equal(model(X), both)
    before = {name: p.clone() for name, p in model.named_parameters()}
    lk.merge(model, keep_base=True)
    assert torch.allclose(model(X), both, atol=1e-5) and not torch.equal(model(X), both)
    lk.unmerge(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    lk.merge(model, "other")
    assert torch.allclose(model(X), other, atol=1e-5)
    lk.unmerge(model)
    for call in (lambda: lk.set_adapter(net(), "x"), lambda: lk.set_scale(model, "x", 1)):
        with pytest.raises(KeyError, match="no adapter 'x'; its adapters"):
            call()


def saved(folder: Path, **fields: Any) -> tuple[nn.Module, Path]:
    config = lk.LoRAConfig(**{"r": 3, "target_modules": ["q_proj", "head"], "use_rslora": True, **fields})
    model = trained(lk.inject(net(), config)).eval()
    return model, lk.save_adapter(model, folder)


def test_files_go_round(tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "a", rank_pattern={"head": 2}, alpha_pattern={"layers.1.q_proj": 5})
    again = lk.load_adapter(net().eval(), folder)
    assert torch.equal(again(X), model(X))
    assert not lk.trainable_parameters(again)
    lk.save_adapter(again, tmp_path / "b")
    name = "adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert lk.trainable_parameters(lk.load_adapter(net(), folder, trainable=True)).num_trainable > 0


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_in_the_files(bias: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, folder = saved(tmp_path / "ours", bias=bias)
    again = lk.load_adapter(net().eval(), folder)
    assert torch.equal(again(X), model(X)) and not lk.trainable_parameters(again)
    trainable = lk.trainable_parameters(lk.load_adapter(net(), folder, trainable=True))
    assert trainable.num_trainable == lk.trainable_parameters(model).num_trainable
    theirs = peft.PeftModel.from_pretrained(net().eval(), folder)
    assert torch.allclose(theirs(X), model(X), atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(lk.load_adapter(net().eval(), tmp_path / "theirs")(X), model(X))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith(".bias"))
    save_file({**tensors, key: torch.ones(99)}, path)
    with pytest.raises(lk.AdapterFileError, match=r"bias is \[99\]"):
        lk.load_adapter(net(), folder)


def test_a_shared_layer_goes_through_files(tmp_path: Path) -> None:
    def shared() -> Net:
        model = net()
        model.layers[2].q_proj = model.layers[0].q_proj
        return model

    model = trained(lk.inject(shared(), lk.LoRAConfig(r=2, target_modules=["q_proj"]))).eval()
    again = lk.load_adapter(shared().eval(), lk.save_adapter(model, tmp_path))
    assert again.layers[2].q_proj is again.layers[0].q_proj
    assert torch.equal(again(X), model(X))


def test_loading_over_an_adapter_takes_its_alpha_too(tmp_path: Path) -> None:
    model, folder = saved(tmp_path, lora_alpha=32, use_rslora=False)
    other = lk.inject(
        net().eval(), lk.LoRAConfig(r=3, lora_alpha=2, lora_dropout=0.5, target_modules=["q_proj", "head"])
    )
    lk.load_adapter(other, folder)
    assert torch.equal(other(X), model(X))
    assert other.head.scaling == 32 / 3 and other.head.adapters["default"].lora_dropout == 0


def test_merging_a_tied_weight_is_refused() -> None:
    model = net()
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"]))
    before = model.layers[0].q_proj.weight.clone()
    with pytest.raises(ValueError, match="share one weight"):
        lk.merge(model)
    assert torch.equal(before, model.layers[0].q_proj.weight) and not model.layers[0].q_proj.merged


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
@pytest.mark.parametrize("targets", [["head"], ["embed"], ["embed", "head"]], ids=str)
def test_a_start_that_changes_a_tied_weight_is_refused(init: str, targets: list[str]) -> None:
    model = Tied()
    before = model.head.weight.clone()
    with pytest.raises(ValueError, match=f"'embed' and 'head' share one weight, so init_lora_weights='{init}' would"):
        lk.inject(model, lk.LoRAConfig(r=2, target_modules=targets, init_lora_weights=init))
    assert type(model.head) is nn.Linear and torch.equal(model.embed.weight, before)
    lk.inject(model, lk.LoRAConfig(r=2, target_modules=targets, init_lora_weights="orthogonal"))


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


COMPUTED: dict[str, Callable[[nn.Module], Any]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "weight_norm": lambda layer: weight_norm(layer),
    "spectral_norm": lambda layer: spectral_norm(layer),
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("how", COMPUTED)
def test_a_weight_that_each_call_computes_is_not_changed(how: str, kind: str) -> None:
    base, x = (nn.Linear(12, 8), X) if kind == "linear" else (nn.Conv1d(12, 8, 1), X[:, :, None])
    layer: Any = (lk.LoRALinear if kind == "linear" else lk.LoRAConv1d).from_base(base, r=2, init_lora_weights=False)
    COMPUTED[how](layer.base_layer)
    model = nn.Sequential(layer).eval()
    answer = model(x)
    for call in (
        lambda: lk.merge(model),
        lambda: lk.merge(model, keep_base=True),
        lambda: layer.reset_lora_parameters("default", "pissa"),
        lambda: layer.add_adapter("second", r=2, init_lora_weights="olora"),
    ):
        with pytest.raises(ValueError, match=r"weight is computed at each call .*; make it permanent first"):
            call()
    assert not layer.merged and layer.adapter_names == ["default"] and torch.equal(model(x), answer)
    assert layer.delta_weight().shape == layer.weight.shape
    if how == "pruned":
        prune.remove(layer.base_layer, "weight")
        lk.merge(model)
        torch.testing.assert_close(model(x), answer)


def test_a_bias_that_each_call_computes_is_not_changed() -> None:
    layer = lk.LoRALinear.from_linear(prune.l1_unstructured(nn.Linear(12, 8), "bias", 0.3), r=2, lora_bias=True)
    with pytest.raises(ValueError, match="bias is computed at each call"):
        layer.merge()
    lk.LoRALinear.from_linear(prune.l1_unstructured(nn.Linear(12, 8), "bias", 0.3), r=2).merge()


def test_a_plain_tensor_in_the_place_of_the_parameter_is_merged_into() -> None:
    """As FSDP has it while the parameters are whole."""
    layer = lk.LoRALinear(12, 8, r=2, init_lora_weights=False).eval()
    weight = layer.base_layer.weight.detach()
    del layer.base_layer._parameters["weight"]
    layer.base_layer.__dict__["weight"] = weight
    answer = layer(X)
    layer.merge()
    torch.testing.assert_close(layer(X), answer)


class Quantised(torch.Tensor):
    """Stands for torchao's weights: in a plain torch.nn.Linear, and not the numbers themselves."""


def quantised(model: Net) -> Net:
    model.head.weight = nn.Parameter(model.head.weight.detach().as_subclass(Quantised), requires_grad=False)
    return model


def test_a_weight_in_another_form_is_refused_by_its_type(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    model, message = quantised(net()), r"'head': the base weight is a .*Quantised, .*; expected a torch\.Tensor"
    with pytest.raises(TypeError, match=f"target {message}"):
        lk.inject(model, lk.LoRAConfig(target_modules="all-linear"))
    with pytest.raises(lk.AdapterFileError, match=f"module {message}"):
        lk.load_adapter(model, folder)
    with pytest.raises(TypeError, match="the base weight is a"):
        lk.LoRALinear.from_linear(model.head)
    assert not adapted_names(model) and model.layers[0].q_proj.weight.requires_grad
    lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"]))


def test_a_model_without_values(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "layers")
    _, with_head = saved(tmp_path / "head", target_modules=["q_proj"], modules_to_save=["head"])
    model = net().to("meta")
    with pytest.raises(lk.AdapterFileError, match=r"\.weight is on the meta device and has no values"):
        lk.load_adapter(model, folder)
    with pytest.raises(ValueError, match=r"'head': init_lora_weights='pissa' starts from the base weight, .* meta"):
        lk.inject(model, lk.LoRAConfig(r=2, target_modules=["head"], init_lora_weights="pissa"))
    assert not adapted_names(model)
    model.layers.to_empty(device="cpu")
    with pytest.raises(lk.AdapterFileError, match=r"head\.weight is on the meta device"):
        lk.load_adapter(model, with_head)
    lk.inject(model, lk.LoRAConfig(target_modules=["head"]))  # its start can be made later
    _, of_the_head = saved(tmp_path / "slot", target_modules=["head"])
    with pytest.raises(lk.AdapterFileError, match=r"head\.base_layer\.weight is on the meta device"):
        lk.hotswap_adapter(model, of_the_head)


def test_8_bit_adapters_are_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    edit_tensors(lambda tensors: tensors.update({A: tensors[A].to(torch.float8_e4m3fn)}))(folder)
    with pytest.raises(lk.AdapterFileError, match=r"head\.lora_A\.weight is torch\.float8_e4m3fn; expected float64"):
        lk.load_adapter(net(), folder)


def test_a_compiled_model_is_given_adapters(tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "a")
    compiled: Any = torch.compile(net().eval(), backend="eager")
    compiled(X)
    assert lk.load_adapter(compiled, folder) is compiled
    torch.testing.assert_close(compiled(X), model(X))
    config = lk.LoRAConfig(target_modules=r"layers\.0\.v_proj", init_lora_weights=False)
    assert lk.inject(compiled, config, "second") is compiled
    assert lk.add_weighted_adapter(compiled, ["default", "second"], [1.0, 1.0], "sum", "cat") is compiled
    again = lk.load_adapter(net().eval(), lk.save_adapter(compiled, tmp_path / "b", "sum"))
    lk.set_adapter(compiled, "sum")
    torch.testing.assert_close(compiled(X), again(X))


def test_what_a_layer_has_lost_the_model_has_lost(tmp_path: Path) -> None:
    config = lk.LoRAConfig(target_modules=["v_proj"], modules_to_save=["head"])
    model = lk.inject(net(), config)
    for layer in model.layers:
        layer.v_proj.delete_adapter("default")
    with pytest.raises(KeyError, match="no adapter 'default'"):
        lk.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="'default' is taken"):  # by the copy of the head
        lk.inject(model, config)
    lk.delete_adapter(model, "default")
    assert type(model.head) is nn.Linear
    trained(lk.inject(model, config))
    again = lk.load_adapter(net(), lk.save_adapter(model, tmp_path))
    assert torch.equal(again(X), model(X))


def test_an_adapter_of_a_part(tmp_path: Path) -> None:
    model = net()
    part = lk.inject(model.layers[0], lk.LoRAConfig(target_modules=["v_proj"], use_rslora=True))
    folder = lk.save_adapter(part, tmp_path / "part")
    for call in (
        lambda: lk.save_adapter(model, tmp_path / "whole"),
        lambda: lk.add_weighted_adapter(model, ["default"], [1.0], "sum"),
        lambda: lk.hotswap_adapter(model, folder),
    ):
        with pytest.raises(
            KeyError, match=r"adapter 'default' is in 'layers\.0\.v_proj', but .* on this module: call it"
        ):
            call()
    with pytest.raises(ValueError, match="'default' is taken"):
        lk.inject(model, lk.LoRAConfig(target_modules=["head"]))
    lk.delete_adapter(model, "default")
    with pytest.raises(KeyError, match="no adapter 'default'"):
        lk.save_adapter(part, tmp_path / "again")
    lk.inject(model, lk.LoRAConfig(target_modules=["v_proj"]))
    with pytest.raises(KeyError, match="on this module"):
        lk.save_adapter(part, tmp_path / "again")


@pytest.mark.parametrize("how", ["inject", "load"])
def test_beside_a_layer_made_by_hand_nothing_changes(how: str, tmp_path: Path) -> None:
    _, folder = saved(tmp_path, target_modules=["v_proj"])
    model = net()
    model.layers[0].q_proj = lk.LoRALinear(12, 12, init_lora_weights=False)
    if how == "inject":
        lk.inject(model, lk.LoRAConfig(target_modules=["v_proj"], init_lora_weights=False), "second")
        assert model.layers[0].q_proj.active_adapters == ["default"] and not model.layers[1].v_proj.active_adapters
        with pytest.raises(ValueError, match=r"trains biases, .* the model has \['default', 'second'\]"):
            lk.inject(model, lk.LoRAConfig(target_modules=["head"], bias="all"), "third")
    else:
        lk.load_adapter(model, folder, "second")
        assert model.layers[1].v_proj.active_adapters == ["second"]
    assert model.head.weight.requires_grad


def test_arguments_in_another_order() -> None:
    config = lk.LoRAConfig(target_modules=["head"])
    with pytest.raises(
        TypeError, match=r"inject takes a torch\.nn\.Module and a .*; got lorakernels\.config\.LoRAConfig and"
    ):
        lk.inject(config, net())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="names is None; expected a name or a list of names"):
        lk.set_adapter(lk.inject(net(), config), None)  # type: ignore[arg-type]


def test_nothing_switches_or_is_added_while_a_layer_is_merged() -> None:
    model = lk.inject(net().eval(), lk.LoRAConfig(target_modules=["q_proj"]))
    lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"]), "other")
    model.layers[2].q_proj.merge()
    for call in (
        lambda: lk.set_adapter(model, "other"),
        lambda: lk.set_scale(model, "default", 0),
        lambda: lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"]), "third"),
    ):
        with pytest.raises(RuntimeError, match="unmerge first"):
            call()
    assert model.layers[0].q_proj.active_adapters == ["default"]
    assert model.layers[0].q_proj.adapter_names == ["default", "other"]


def test_a_broken_pattern_leaves_the_model_alone() -> None:
    model = net()
    with pytest.raises(ValueError, match="not a regular expression"):
        lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"], rank_pattern={"layers.0.q_proj": 4, "(": 3}))
    assert not adapted_names(model)


@pytest.mark.parametrize(("first", "second"), [("all", "none"), ("none", "lora_only"), ("all", "all")])
def test_an_adapter_that_trains_biases_is_alone(first: str, second: str, tmp_path: Path) -> None:
    _, folder = saved(tmp_path, bias=second)
    model = lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj"], bias=first))
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(lk.AdapterFileError, match="trains biases"):
        lk.load_adapter(model, folder, "other")
    with pytest.raises(ValueError, match=r"trains biases, .* the model has"):
        lk.inject(model, lk.LoRAConfig(target_modules=["head"], bias=second), "other")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(
        torch.equal(after[name], p) and after[name].requires_grad == needed for name, (p, needed) in before.items()
    )
    again = lk.load_adapter(net(), folder)
    lk.load_adapter(again, folder)  # the same one once more


@pytest.mark.parametrize("active", [["default"], []])
def test_a_second_adapter_changes_neither_the_output_nor_what_trains(active: list[str]) -> None:
    model = lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj"], init_lora_weights=False))
    lk.set_adapter(model, active)
    output, trains = model(X), set(map(id, lk.trainable_parameters(model)))
    config = lk.LoRAConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["head"], init_lora_weights=False)
    lk.inject(model, config, "other")
    assert torch.equal(model(X), output) and set(map(id, lk.trainable_parameters(model))) == trains
    assert model.layers[0].q_proj.active_adapters == active and model.layers[0].v_proj.active_adapters == []
    assert model.head.active_adapter is None
    lk.set_adapter(model, "other")
    assert not torch.equal(model(X), output) and model.head.active_adapter == "other"


def test_merging_is_all_or_nothing() -> None:
    model = trained(lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj", "head"])))
    nn.init.constant_(model.head.lora_A["default"].weight, float("inf"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"^'head': .* not finite; nothing changed"):
        lk.merge(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not any(model.get_submodule(name).merged for name in adapted_names(model))


def test_a_merge_that_fails_leaves_the_earlier_adapter_active() -> None:
    model = lk.inject(net(), lk.LoRAConfig(target_modules=["q_proj"]))
    lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"], use_dora=True), "two")
    trains = set(map(id, lk.trainable_parameters(model)))
    nn.init.zeros_(model.layers[2].q_proj.adapter_tensors("two")["lora_magnitude_vector"])
    with pytest.raises(ValueError, match="a magnitude is zero"):
        lk.merge(model, "two")
    layers = [model.get_submodule(name) for name in adapted_names(model)]
    assert not any(layer.merged for layer in layers) and all(layer.active_adapters == ["default"] for layer in layers)
    assert set(map(id, lk.trainable_parameters(model))) == trains


def test_files_are_pefts_both_ways(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, folder = saved(tmp_path / "ours", rank_pattern={"head": 2})
    theirs = peft.PeftModel.from_pretrained(net().eval(), folder)
    assert torch.allclose(theirs(X), model(X), atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, back = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == back.keys() and all(torch.equal(ours[key], back[key]) for key in ours)
    again = lk.load_adapter(net().eval(), tmp_path / "theirs")
    assert torch.equal(again(X), model(X))


def test_loading_under_a_taken_name_replaces_the_weights(tmp_path: Path) -> None:
    model, folder = saved(tmp_path)
    answer = model(X)
    weight = model.head.lora_A["default"].weight
    trained(model)
    lk.load_adapter(model, folder)
    assert torch.equal(model(X), answer) and model.head.lora_A["default"].weight is weight
    lk.load_adapter(model, folder, "second")
    assert torch.equal(model(X), answer) and model.head.active_adapters == ["second"]
    other = lk.inject(net(), lk.LoRAConfig(r=5, target_modules=["head"]))
    with pytest.raises(lk.AdapterFileError, match="other layers or ranks"):
        lk.load_adapter(other, folder)
    lk.merge(model)
    with pytest.raises(lk.AdapterFileError, match="call unmerge first"):
        lk.load_adapter(model, folder)


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")

    return edit


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


HEAD = "base_model.model.head.lora_{}.weight"
A, B = HEAD.format("A"), HEAD.format("B")


def only_a_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"never": "read"}))


def pipe(name: str) -> Callable[[Path], None]:
    """Whoever opens it to read waits for ever."""

    def replace(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return replace


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe for the config": (pipe("adapter_config.json"), "adapter_config.json is not a regular file"),
    "a pipe for the weights": (pipe("adapter_model.safetensors"), "adapter_model.safetensors is not a regular file"),
    "no B": (edit_tensors(lambda t: t.pop(B)), "module 'head' has no lora_B.weight"),
    "no A": (edit_tensors(lambda t: t.pop(A)), "module 'head' has no lora_A.weight"),
    "unknown key": (edit_tensors(lambda t: t.update(extra=torch.ones(2))), "unknown key 'extra'"),
    "unknown module": (
        edit_tensors(lambda t: t.update({A.replace("head", "hed"): t.pop(A), B.replace("head", "hed"): t.pop(B)})),
        "no module 'hed'; near names: head",
    ),
    "other prefix": (edit_tensors(lambda t: t.update({A[5:]: t.pop(A)})), "unknown key"),
    "ranks differ": (
        edit_tensors(lambda t: t.update({B: torch.ones(4, 5)})),
        r"head.lora_B.weight is \[4, 5\]; expected \[4, 3\]",
    ),
    "A transposed": (edit_tensors(lambda t: t.update({A: t[A].T})), "transposed"),
    "NaN": (edit_tensors(lambda t: t[A].fill_(float("nan"))), "head.lora_A.weight holds NaN or Inf"),
    "Inf": (edit_tensors(lambda t: t[B].fill_(float("inf"))), "head.lora_B.weight holds NaN or Inf"),
    "integers": (edit_tensors(lambda t: t.update({A: t[A].int()})), "head.lora_A.weight is torch.int32"),
    "three dimensions": (edit_tensors(lambda t: t.update({A: t[A][None]})), r"is \[1, 3, 12\]; expected \[3, 12\]"),
    "a layer that is no linear": (
        edit_tensors(lambda t: t.update({k.replace("head", "layers.0.norm"): t[k].clone() for k in (A, B)})),
        "'layers.0.norm' is a LayerNorm",
    ),
    "inside an adapted layer": (
        edit_tensors(lambda t: t.update({k.replace("head", "head.base_layer"): t.pop(k) for k in (A, B)})),
        "no module 'head.base_layer'",
    ),
    "lora_ga": (edit_config(init_lora_weights="lora_ga"), "changes the base weight"),
    "alpha of 401 digits": (edit_config(lora_alpha=10**400), "lora_alpha is an int too large for a float"),
    "alpha of 5000 digits": (
        lambda f: write("adapter_config.json", b'{"r": 3, "lora_alpha": 1' + b"0" * 5000 + b"}")(f),
        "cannot be read as JSON",
    ),
    "no tensors": (edit_tensors(lambda t: t.clear()), "holds no tensors"),
    "truncated": (
        lambda f: write("adapter_model.safetensors", (f / "adapter_model.safetensors").read_bytes()[:-9])(f),
        "not a whole safetensors file",
    ),
    "empty": (write("adapter_model.safetensors", b""), "not a whole safetensors file"),
    "header of 2**62 bytes": (write("adapter_model.safetensors", (2**62).to_bytes(8, "little")), "not a whole"),
    "a pickle by another name": (write("adapter_model.safetensors", pickle.dumps({"a": 1})), "not a whole"),
    "only a pickle": (only_a_pickle, "a pickle can run any code and is not read"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "broken config": (write("adapter_config.json", b"{"), "cannot be read as JSON"),
    "config that is a list": (write("adapter_config.json", b"[]"), "holds a list"),
    "config of bytes": (write("adapter_config.json", b"\xff\xfe\x00"), "cannot be read as JSON"),
    "another method": (edit_config(peft_type="LOHA"), "peft_type is 'LOHA'"),
    "r = 0": (edit_config(r=0), "r is 0"),
    "r negative": (edit_config(r=-1), "r is -1"),
    "r a text": (edit_config(r="8"), "r is '8'"),
    "r huge": (edit_config(r=10**9), "says r=1000000000"),
    "r null": (edit_config(r=None), "r is null"),
    "alpha NaN": (edit_config(lora_alpha=float("nan")), "lora_alpha is nan"),
    "alpha Inf": (edit_config(lora_alpha=float("inf")), "lora_alpha is inf"),
    "alpha null": (edit_config(lora_alpha=None), "lora_alpha is null"),
    "unknown field": (edit_config(use_magic=True), "use_magic=True changes what the adapter computes"),
    "fan_in_fan_out": (edit_config(fan_in_fan_out=True), "fan_in_fan_out=True"),
    "replication": (edit_config(layer_replication=[[0, 2]]), "layer_replication"),
    "PiSSA": (edit_config(init_lora_weights="pissa"), "'pissa' changes the base weight"),
    "rank_pattern disagrees": (edit_config(rank_pattern={"head": 9}), "says r=9"),
    "broken rank_pattern": (edit_config(rank_pattern={"(": 9}), "not a regular expression"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_faults_in_files_are_refused_and_change_nothing(fault: str, tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    spoil, message = FAULTS[fault]
    spoil(folder)
    model = net()
    answer = model(X)
    with pytest.raises(lk.AdapterFileError, match=message):
        lk.load_adapter(model, folder)
    assert not adapted_names(model) and torch.equal(model(X), answer)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("value", ["[", 5, [1], ["nothing"], {"head": 1}], ids=repr)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_the_names_of_a_file_are_not_looked_at(field: str, value: Any, tmp_path: Path) -> None:
    """Its tensors say which layers are adapted."""
    model, folder = saved(tmp_path / "a")
    edit_config(**{field: value, "rank_pattern": {"nothing": 2}})(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = lk.load_adapter(net().eval(), folder)
        lk.save_adapter(again, tmp_path / "b")
    assert torch.equal(again(X), model(X))


@pytest.mark.filterwarnings("ignore:rank_pattern.'nothing':UserWarning")
def test_patterns_of_a_file_have_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved(tmp_path, rank_pattern={"head": 3, "nothing": 2})
    lk.load_adapter(net(), folder)
    monkeypatch.setattr(patterns, "MAX_MATCHES", 7)
    with pytest.raises(lk.AdapterFileError, match="2 patterns for 4 modules; expected at most 7 pairs"):
        lk.load_adapter(net(), folder)
    with pytest.raises(lk.AdapterFileError, match="no module"):  # which comes first
        lk.load_adapter(nn.Sequential(nn.Linear(2, 2)), folder)


def test_a_pattern_that_never_ends_is_given_up() -> None:
    with pytest.raises(ValueError, match=r"took over 1\.0 s"):
        by_pattern(["a" * 60 + "b"], {"(a|aa)+!": 3}, 8)


def test_a_hundred_thousand_entries_are_refused_soon(tmp_path: Path) -> None:
    _, folder = saved(tmp_path)
    entries = {f"entry.{i}": torch.ones(1) for i in range(100_000)}
    save_file(entries, folder / "adapter_model.safetensors")
    with pytest.raises(lk.AdapterFileError, match="unknown key"):
        lk.load_adapter(net(), folder)


def test_saving_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="no adapter 'default'; its adapters"):
        lk.save_adapter(net(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_a_transformer_does_not_leave_adapters_out(padded: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    lk.inject(model, lk.LoRAConfig(r=4, target_modules=["linear1", "linear2"]))
    for parameter in lk.trainable_parameters(model):
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = model(x, src_key_padding_mask=padding)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    real = slice(None) if padding is None else ~padding
    torch.testing.assert_close(fast[real], slow[real])
