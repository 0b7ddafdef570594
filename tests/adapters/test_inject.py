"""Which layers get an adapter, of what rank and start, and what trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net, X, adapted_names, net, saved, trained
from torch import nn
from torch.nn.utils import parametrize, prune, spectral_norm, weight_norm

import lorakernels as lk


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


def test_a_broken_pattern_leaves_the_model_alone() -> None:
    model = net()
    with pytest.raises(ValueError, match="not a regular expression"):
        lk.inject(model, lk.LoRAConfig(target_modules=["q_proj"], rank_pattern={"layers.0.q_proj": 4, "(": 3}))
    assert not adapted_names(model)


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "quantized"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_a_transformer_does_not_leave_adapters_out(padded: bool, quantized: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    if quantized:  # linear2 stays packed, without an adapter
        lk.quantize(model, "int8")
    lk.inject(model, lk.LoRAConfig(r=4, target_modules=["linear1"] if quantized else ["linear1", "linear2"]))
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
