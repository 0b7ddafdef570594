"""Files of other trainers into a model: what is inferred is said, and what could mean two things is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakernels as lk
from lorakernels.files.unet_names import original_names

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_out[0](torch.tanh(self.to_q(x)))


def net(depth: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(depth))).double()


def pair(seed: int, r: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((r, 4), (4, r)))
    return A, B


def module(name: str, seed: int = 1, r: int = 2, halves: tuple[str, str] = ("lora_down", "lora_up")) -> Any:
    return {f"{name}.{half}.weight": factor for half, factor in zip(halves, pair(seed, r), strict=True)}


A_B = ("lora_A", "lora_B")
SOME = {**module("lora_unet_0_to_q"), "lora_unet_0_to_q.alpha": torch.tensor(1.0)}


def written(path: Path, tensors: Any, metadata: Any = None) -> Path:
    save_file(tensors, path, metadata=metadata)
    return path


def expected(scaling: float, depth: int = 2, seed: int = 1) -> torch.Tensor:
    model, (A, B) = net(depth), pair(seed)
    with torch.no_grad():
        model[0].to_q.weight += scaling * B @ A
        return model(X)


def test_what_is_inferred_is_said(tmp_path: Path) -> None:
    tensors = SOME | module("lora_unet_1_to_out_0", 2, r=3) | module("lora_te_text_model_q", 3)
    file = written(tmp_path / "k.safetensors", tensors)
    said = (
        r"kohya format, of which the part is lora_unet; r=2, lora_alpha=1, 1 in rank_pattern, 1 in alpha_pattern, "
        r"use_rslora=False, use_dora=False, 2 target modules such as 0.to_q; alpha is the rank for 1 of 2 modules; "
        r"1 modules of other models are left out"
    )
    with pytest.warns(UserWarning, match=said) as caught:
        model = lk.load_adapter(net(), file)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert {path: layer.scaling for path, layer in model.named_modules() if isinstance(layer, lk.LoRALinear)} == {
        "0.to_q": 0.5,
        "1.to_out.0": 1.0,
    }


HEADER = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 1, "unet.init_lora_weights": "pissa"})}
FAULTS: dict[str, tuple[Any, Any, str]] = {
    "two parts fit": (SOME | module("lora_te_0_to_q"), None, "lora_te and lora_unet fit"),
    "no part fits": (module("lora_te_q") | module("lora_unet_q"), None, "none fits: the Sequential has no module"),
    "two formats": (SOME | module("unet.0.to_q", halves=A_B), None, "names of kohya's format and of diffusers'"),
    "a tensor twice": (SOME | module("lora_unet_0.to_q"), None, "two keys for one tensor"),
    "of several adapters": (
        module("unet.0.to_q", halves=("lora_A.one", "lora_B.two")),
        None,
        "holds the adapters one, two; expected one",
    ),
    "two alphas": (
        {**module("unet.0.to_q", halves=A_B), "unet.0.to_q.alpha": torch.ones(())},
        HEADER,
        "alpha, and lora_alpha in its header",
    ),
    "PiSSA": (module("unet.0.to_q", halves=A_B), HEADER, "init_lora_weights='pissa' changes the base weight"),
    "a header that is none": (
        module("unet.0.to_q", halves=A_B),
        {"lora_adapter_metadata": "["},
        "lora_adapter_metadata in its header",
    ),
    "a header of a list": (module("unet.0.to_q", halves=A_B), {"lora_adapter_metadata": "[]"}, "is a list; expected"),
    "a field of another method": (
        module("unet.0.to_q", halves=A_B),
        {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.target_parameters": ["x"]})},
        "target_parameters",
    ),
    "another shape": (
        module("lora_unet_0_to_q", halves=A_B) | {"lora_unet_0_to_q.lora_B.weight": torch.ones(5, 2)},
        None,
        r"expected \[4, 2\]",
    ),
}


@pytest.mark.filterwarnings("ignore:.*this is inferred:UserWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_and_change_nothing(fault: str, tmp_path: Path) -> None:
    tensors, metadata, message = FAULTS[fault]
    file, model = written(tmp_path / "k.safetensors", tensors, metadata), net()
    with pytest.raises(lk.AdapterFileError, match=message):
        lk.load_adapter(model, file)
    assert torch.equal(model(X), net()(X)) and not any(isinstance(m, lk.LoRALinear) for m in model.modules())


def test_a_name_that_means_two_modules(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"to_q": nn.Linear(4, 4)}), "a_to": nn.ModuleDict({"q": nn.Linear(4, 4)})}
    )
    file = written(tmp_path / "k.safetensors", module("lora_unet_a_to_q"))
    with pytest.raises(lk.AdapterFileError, match=r"can mean a\.to_q or a_to\.q of the ModuleDict; expected one"):
        lk.load_adapter(model, file)


def test_two_names_that_mean_one_module(tmp_path: Path) -> None:
    model = nn.ModuleDict({"conv_in": nn.Linear(4, 4), "down_blocks": nn.ModuleList([nn.Linear(4, 4)])})
    tensors = module("lora_unet_conv_in") | module("lora_unet_input_blocks_0_0")
    with pytest.raises(lk.AdapterFileError, match="lora_unet_input_blocks_0_0 are both conv_in of the ModuleDict"):
        lk.load_adapter(model, written(tmp_path / "k.safetensors", tensors))


@pytest.mark.filterwarnings("ignore:.*this is inferred:UserWarning")
def test_a_part_is_chosen(tmp_path: Path) -> None:
    file = written(tmp_path / "k.safetensors", SOME | module("lora_te_0_to_q", 2))
    assert (lk.load_adapter(net(), file, prefix="lora_unet")(X) - expected(0.5)).abs().max() < 1e-12
    assert (lk.load_adapter(net(), file, prefix="lora_te")(X) - expected(1, seed=2)).abs().max() < 1e-12
    with pytest.raises(lk.AdapterFileError, match=r"no modules of the prefix 'unet'; it has: lora_te \(1 modules\)"):
        lk.load_adapter(net(), file, prefix="unet")
    with pytest.raises(lk.AdapterFileError, match="which is for one model; leave prefix='unet' out"):
        lk.load_adapter(net(), lk.save_adapter(lk.load_adapter(net(), file, prefix="lora_te"), tmp_path), prefix="unet")


@pytest.mark.filterwarnings("ignore:.*this is inferred:UserWarning")
def test_a_slot_takes_such_a_file_too(tmp_path: Path) -> None:
    file = written(tmp_path / "k.safetensors", SOME)
    model = lk.load_adapter(net(), file)
    more = {name: tensor.float() if "alpha" in name else tensor * 2 for name, tensor in SOME.items()}
    lk.hotswap_adapter(model, written(tmp_path / "other.safetensors", more))
    assert (model(X) - expected(2.0)).abs().max() < 1e-12


def test_two_formats_in_a_folder(tmp_path: Path) -> None:
    lk.save_adapter(lk.inject(net(), lk.LoRAConfig(target_modules=["to_q"])), tmp_path)
    written(tmp_path / "pytorch_lora_weights.safetensors", module("unet.0.to_q", halves=A_B))
    with pytest.raises(lk.AdapterFileError, match=r"adapter_model\.safetensors and pytorch.* which are two formats"):
        lk.load_adapter(net(), tmp_path)


@pytest.mark.filterwarnings("ignore:.*this is inferred:UserWarning")
@pytest.mark.parametrize(
    "name",
    [
        "transformer.0.to_q",  # a pipeline's model; here the first part of the names is the model's own
        "0.to_q",
        "unet.0.to_q",
    ],
)
def test_what_is_in_front_of_a_name(name: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"transformer": net()})
    model.forward = lambda x: model.transformer(x)  # type: ignore[method-assign]
    file = written(tmp_path / "d.safetensors", module(name, halves=A_B))
    assert (lk.load_adapter(model, file)(X) - expected(1.0)).abs().max() < 1e-12
    assert (lk.load_adapter(net(), file)(X) - expected(1.0)).abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore:.*this is inferred:UserWarning")
def test_half_converted_names(tmp_path: Path) -> None:
    """Comfy-Org/ComfyUI #3494: diffusers' own script left dots in kohya's names of magnitudes."""
    tensors = SOME | {"lora_unet_0.to_q.lora_magnitude_vector": torch.ones(4, dtype=torch.float64)}
    layer = lk.load_adapter(net(), written(tmp_path / "k.safetensors", tensors))[0].to_q
    assert layer.adapters["default"].use_dora


def test_the_unet_of_sdxl() -> None:
    """As kohya-ss/sd-scripts has its names: three levels, two residuals each down and three up, no attention in one."""
    paths = ["conv_in", "time_embedding.linear_1", "add_embedding.linear_2", "mid_block.resnets.1.conv2", "conv_out"]
    paths += [f"down_blocks.{i}.resnets.{j}.conv1" for i in range(3) for j in range(2)]
    paths += [f"up_blocks.{i}.resnets.{j}.conv_shortcut" for i in range(3) for j in range(3)]
    paths += [f"down_blocks.{i}.attentions.{j}.proj_in" for i in (1, 2) for j in range(2)]
    paths += [f"up_blocks.{i}.attentions.{j}.transformer_blocks.0.attn2.to_k" for i in (0, 1) for j in range(3)]
    paths += [f"down_blocks.{i}.downsamplers.0.conv" for i in (0, 1)]
    paths += [f"up_blocks.{i}.upsamplers.0.conv" for i in (0, 1)]
    names = original_names(paths)
    assert names.keys() == set(paths) and len(set(names.values())) == len(paths)
    some = {
        "time_embedding.linear_1": "time_embed.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
        "down_blocks.2.resnets.1.conv1": "input_blocks.8.0.in_layers.2",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_k": "output_blocks.2.1.transformer_blocks.0.attn2.to_k",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
    }
    assert some.items() <= names.items()


def classifier() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(vocab_size=12, max_position_embeddings=12, **sizes)
    return transformers.RobertaForSequenceClassification(config).double().eval()


IDS = torch.arange(2, 8)[None]


def test_an_adapter_inside_a_head(tmp_path: Path) -> None:
    """PEFT's own copy of the head, with the adapter that it has in it; PEFT fails to read this."""
    config = peft.LoraConfig(
        task_type="TOKEN_CLS", target_modules=["query", "dense"], init_lora_weights=False, r=2, lora_alpha=3
    )
    trained = peft.get_peft_model(classifier(), config).eval()
    trained.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.classifier.dense.base_layer.weight" in keys
    with pytest.warns(UserWarning, match="inside modules_to_save are merged into these: classifier.dense"):
        model = lk.load_adapter(classifier(), tmp_path)
    torch.testing.assert_close(model(IDS).logits, trained(IDS).logits, rtol=0, atol=1e-12)


def test_a_head_that_the_configuration_leaves_out(tmp_path: Path) -> None:
    """PEFT's first versions wrote no modules_to_save for a task's own head."""
    trained = peft.get_peft_model(classifier(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).eval()
    trained.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "modules_to_save": None}))
    with pytest.warns(UserWarning, match=r"modules_to_save=\['classifier'\] of task_type='SEQ_CLS'"):
        model = lk.load_adapter(classifier(), tmp_path)
    torch.testing.assert_close(model(IDS).logits, trained(IDS).logits, rtol=0, atol=1e-12)


def test_shards(tmp_path: Path) -> None:
    """In a store too, which looks where each of them lies."""
    trained = lk.inject(net(), lk.LoRAConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    folder = lk.save_adapter(trained, tmp_path / "root" / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    names = ("adapter_model-1.safetensors", "adapter_model-2.safetensors")
    where = {key: names[at % 2] for at, key in enumerate(tensors)}
    for name in names:
        written(folder / name, {key: tensor for key, tensor in tensors.items() if where[key] == name})
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert torch.equal(lk.load_adapter(net(), folder)(X), trained(X))
    store = lk.AdapterStore(net(), max_adapters=2, max_rank=2, root=tmp_path / "root")
    store.load("a")
    with store.batch(["a"] * 3):
        assert (store.model(X) - trained(X)).abs().max() < 1e-12
    (folder / names[1]).rename(tmp_path / "outside.safetensors")
    (folder / names[1]).symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(lk.AdapterFileError, match="leads out of the root"):
        store.load("b", "a")
    index.write_text(json.dumps({"weight_map": {**where, "more": names[0]}}))
    with pytest.raises(lk.AdapterFileError, match="disagree on where tensors are"):
        lk.load_adapter(net(), folder)
