"""Every format of file, and what can be done with it: the table of docs/coming-from.md, a test a cell."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import Tensors, randn
from safetensors.torch import load_file, save_file
from torch import nn

import lorakernels as lk
from lorakernels.files.convert import convert
from lorakernels.files.inspect import inspect_adapter
from lorakernels.files.merge import merge_files

DOCS = Path(__file__).parents[2] / "docs" / "coming-from.md"
ATTENTION = "down_blocks.1.attentions.0"
# A UNet's modules by diffusers' names, and by those that SDXL's files have.
ORIGINAL = {
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_2_0_op",
    "down_blocks.1.resnets.0.conv1": "input_blocks_3_0_in_layers_2",
    f"{ATTENTION}.proj_in": "input_blocks_3_1_proj_in",
    f"{ATTENTION}.transformer_blocks.0.attn1.to_q": "input_blocks_3_1_transformer_blocks_0_attn1_to_q",
    f"{ATTENTION}.transformer_blocks.0.attn1.to_out.0": "input_blocks_3_1_transformer_blocks_0_attn1_to_out_0",
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "up_blocks.0.resnets.0.conv1": "output_blocks_0_0_in_layers_2",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_0_1_conv",
}
PATHS = tuple(ORIGINAL)
LINEARS = [path for path in PATHS if ".attn1." in path or path.startswith("mid_block")]
ALPHA, R = 3.0, 2
X = torch.linspace(-1, 1, 36, dtype=torch.float64).view(1, 4, 3, 3)


def holding(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def conv(size: int = 3) -> nn.Module:
    return nn.Conv2d(4, 4, size, padding=size // 2)


def net() -> Any:
    """Always the same weights."""
    torch.manual_seed(0)
    attn = holding(to_q=nn.Linear(4, 6, bias=False), to_out=nn.ModuleList([nn.Linear(6, 4)]))
    attention = holding(proj_in=conv(1), transformer_blocks=nn.ModuleList([holding(attn1=attn)]))
    resnet = {"resnets": nn.ModuleList([holding(conv1=conv())])}
    first = holding(**resnet, downsamplers=nn.ModuleList([holding(conv=conv())]))
    second = holding(resnets=nn.ModuleList([holding(conv1=conv())]), attentions=nn.ModuleList([attention]))
    last = holding(resnets=nn.ModuleList([holding(conv1=conv())]), upsamplers=nn.ModuleList([holding(conv=conv())]))
    model = holding(
        down_blocks=nn.ModuleList([first, second]),
        mid_block=holding(attentions=nn.ModuleList([holding(proj_in=nn.Linear(4, 4))])),
        up_blocks=nn.ModuleList([last]),
        head=holding(dense=nn.Linear(4, 4), out=nn.Linear(4, 2)),
    )

    def forward(x: torch.Tensor) -> torch.Tensor:
        for path in PATHS[:3] + PATHS[-2:]:
            x = torch.tanh(model.get_submodule(path)(x))
        tokens = attention.proj_in(x).flatten(2).transpose(1, 2)
        tokens = model.mid_block.attentions[0].proj_in(tokens + attn.to_out[0](attn.to_q(tokens)))
        return model.head.out(torch.tanh(model.head.dense(tokens)))

    model.head.forward = lambda tokens: model.head.out(torch.tanh(model.head.dense(tokens)))
    model.forward = forward  # type: ignore[method-assign]
    return model.double().eval()


STATE = net().state_dict()


def factors(paths: Sequence[str] = PATHS) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {path: FACTORS[path] for path in paths}


def factors_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    N, K, *kernel = weight.shape
    return randn(R, K, *kernel), randn(N, R, *(1 for _ in kernel))


torch.manual_seed(1)
FACTORS = {path: factors_of(STATE[f"{path}.weight"]) for path in (*PATHS, "head.dense")}


def lengths(path: str) -> torch.Tensor:
    return torch.linspace(0.5, 2, STATE[f"{path}.weight"].shape[0], dtype=torch.float64)


def weights(scaling: float, *, dora: bool = False, paths: Sequence[str] = PATHS) -> Tensors:
    """What the adapted weights come to."""
    expected = {}
    for path, (A, B) in factors(paths).items():
        W = STATE[f"{path}.weight"]
        sum_ = W + scaling * torch.einsum("nr,rk...->nk...", B.flatten(1), A)
        norm = sum_.flatten(1).norm(dim=1)
        ratio = (lengths(path) / norm).view(-1, *(1 for _ in W.shape[1:])) if dora else 1
        expected[f"{path}.weight"] = sum_ * ratio
    return expected


Make = Callable[[Path], Path]
PEFT = "base_model.model."


def peft_tensors(infix: str = "", paths: Sequence[str] = PATHS) -> Tensors:
    pairs = factors(paths).items()
    return {f"{PEFT}{path}.lora_{half}{infix}.weight": pair[at] for path, pair in pairs for at, half in enumerate("AB")}


def peft_folder(tensors: Tensors, shards: bool = False, **fields: Any) -> Make:
    def make(folder: Path) -> Path:
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": R, "lora_alpha": ALPHA, **fields}))
        if not shards:
            save_file(tensors, folder / "adapter_model.safetensors")
            return folder
        files = ("adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors")
        where = {key: files[at % 2] for at, key in enumerate(tensors)}
        for file in files:
            save_file({key: tensors[key] for key in tensors if where[key] == file}, folder / file)
        (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        return folder

    return make


def head_tensors() -> Tensors:
    """A head that PEFT trains whole, with an adapter inside: a token classifier whose targets are named `dense`."""
    A, B = factors(["head.dense"])["head.dense"]
    return peft_tensors() | {
        f"{PEFT}head.dense.base_layer.weight": STATE["head.dense.weight"],
        f"{PEFT}head.dense.base_layer.bias": STATE["head.dense.bias"],
        f"{PEFT}head.dense.lora_A.weight": A,
        f"{PEFT}head.dense.lora_B.weight": B,
        f"{PEFT}head.out.weight": STATE["head.out.weight"] + 1,
        f"{PEFT}head.out.bias": STATE["head.out.bias"],
    }


def mlx_folder(folder: Path) -> Path:
    folder.mkdir()
    parameters = {"rank": R, "scale": ALPHA / R, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    pairs = factors(LINEARS).items()
    tensors = {f"{path}.lora_{half}": pair[at].T.contiguous() for path, pair in pairs for at, half in enumerate("ab")}
    save_file(tensors, folder / "adapters.safetensors")
    return folder


def one_file(
    name_of: Callable[[str], str],
    halves: tuple[str, str],
    *,
    alpha: float | None = ALPHA,
    dora: str = "",
    flat: bool = False,
    metadata: Mapping[str, str] | None = None,
    name: str = "style.safetensors",
    more: Mapping[str, torch.Tensor] | None = None,
) -> Make:
    """A file for itself. `flat`: convolutions with a kernel of 1 as linear layers, and these as such."""

    def make(folder: Path) -> Path:
        tensors = dict(more or {})
        for path, (A, B) in factors().items():
            if flat and A.dim() == 4 and A.shape[2:].numel() == 1:
                A, B = A.flatten(1), B.flatten(1)
            elif flat and A.dim() == 2:
                A, B = A[..., None, None], B[..., None, None]
            own = name_of(path)
            tensors |= {f"{own}{halves[0]}": A.contiguous(), f"{own}{halves[1]}": B.contiguous()}
            if alpha is not None:
                tensors[f"{own}.alpha"] = torch.tensor(alpha)
            if dora:
                tensors[f"{own}.{dora}"] = lengths(path).view(-1, *(1 for _ in A.shape[1:]))
        folder.mkdir()
        save_file(tensors, folder / name, metadata=None if metadata is None else dict(metadata))
        return folder / name

    return make


def kohya(path: str) -> str:
    return f"lora_unet_{path.replace('.', '_')}"


def before_peft(path: str) -> str:
    """As diffusers wrote them once, attention above all."""
    return "unet." + re.sub(r"attn1\.(to_q|to_out)(\.0)?\.lora$", r"attn1.processor.\1_lora", f"{path}.lora")


def without_configuration(folder: Path) -> Path:
    peft_folder(peft_tensors())(folder)
    (folder / "adapter_config.json").unlink()
    return folder / "adapter_model.safetensors"


DOWN_UP = (".lora_down.weight", ".lora_up.weight")
A_B = (".lora_A.weight", ".lora_B.weight")
OF_DIFFUSERS = {
    "lora_adapter_metadata": json.dumps(
        {"transformer.r": R, "transformer.lora_alpha": ALPHA, "transformer.use_rslora": True}
    )
}
PIPELINE = "pytorch_lora_weights.safetensors"
YES, MODEL = "yes", "with the model"


@dataclass(frozen=True)
class Format:
    """A row. `cells`: what load, inspect, convert and merge do; another text than YES and MODEL is a refusal's."""

    files: str
    make: Make
    cells: tuple[str, str, str, str] = (YES, YES, YES, YES)
    expected: Tensors | None = None
    reason: str = ""  # why it is refused, as its error says


def refused(files: str, make: Make, reason: str) -> Format:
    return Format(files, make, ("refused",) * 4, reason=reason)


def with_key(key: str, *shape: int) -> Make:
    return one_file(kohya, DOWN_UP, more={f"lora_unet_x.{key}": torch.ones(shape or (2, 2))})


OWN = (YES, YES, "is PEFT's", YES)
HEAD = weights(1.5) | weights(1.5, paths=["head.dense"]) | {"head.out.weight": STATE["head.out.weight"] + 1}
FORMATS: dict[str, Format] = {
    "PEFT": Format("`adapter_config.json`, `adapter_model.safetensors`", peft_folder(peft_tensors()), OWN),
    "PEFT, in shards": Format(
        "the same with `adapter_model.safetensors.index.json`", peft_folder(peft_tensors(), shards=True), OWN
    ),
    "PEFT, keys of a state dict": Format(
        "the same with `lora_A.default.weight`", peft_folder(peft_tensors(".default")), OWN
    ),
    "PEFT, an adapter inside `modules_to_save`": Format(
        "the same with `classifier.dense.base_layer.weight`",
        peft_folder(head_tensors(), modules_to_save=["head"]),
        OWN,
        HEAD,
    ),
    "mlx-lm": Format("`adapter_config.json`, `adapters.safetensors`", mlx_folder, expected=weights(1.5, paths=LINEARS)),
    "kohya": Format(
        "one file, `lora_unet_down_blocks_….lora_down.weight`", one_file(kohya, DOWN_UP), (YES, YES, MODEL, YES)
    ),
    "kohya, SDXL": Format(
        "one file, `lora_unet_input_blocks_….lora_down.weight`",
        one_file(lambda path: f"lora_unet_{ORIGINAL[path]}", DOWN_UP, flat=True),
        (YES, YES, MODEL, YES),
    ),
    "LyCORIS with `dora_scale`": Format(
        "one file, kohya's keys and `….dora_scale` [N, 1]",
        one_file(kohya, DOWN_UP, dora="dora_scale"),
        (YES, YES, MODEL, YES),
        weights(1.5, dora=True),
    ),
    "diffusers": Format(
        f"`{PIPELINE}`, `transformer.….lora_A.weight`, configuration in its header",
        one_file(lambda path: f"transformer.{path}", A_B, alpha=None, metadata=OF_DIFFUSERS, name=PIPELINE),
        expected=weights(ALPHA / R**0.5),
    ),
    "ai-toolkit": Format(
        "one file, `transformer.….lora_A.weight` or `diffusion_model.…`, nothing else",
        one_file(lambda path: f"diffusion_model.{path}", A_B, alpha=None),
        expected=weights(1.0),
    ),
    "diffusers before PEFT": Format(
        f"`{PIPELINE}`, `unet.….lora.down.weight` or `….processor.to_q_lora.down.weight`",
        one_file(before_peft, (".down.weight", ".up.weight"), alpha=None, name=PIPELINE),
        expected=weights(1.0),
    ),
    "PEFT's keys in a file alone": refused(
        "`base_model.model.….lora_A.weight`, no `adapter_config.json`",
        without_configuration,
        "which says the scaling",
    ),
    "LyCORIS, lengths of columns": refused(
        "`….dora_scale` [1, K]",
        one_file(kohya, DOWN_UP, more={f"{kohya(LINEARS[0])}.dora_scale": torch.ones(1, 4)}),
        "a length for each column of the weight",
    ),
    "LoHa": refused("`….hada_w1_a`", with_key("hada_w1_a"), r"LoHa \(LyCORIS\), which is not supported"),
    "LoKr": refused("`….lokr_w1`", with_key("lokr_w1"), r"LoKr \(LyCORIS\), which is not supported"),
    "LoCon with a Tucker core": refused("`….lora_mid.weight`", with_key("lora_mid.weight"), "a Tucker core"),
    "full differences": refused("`….diff`", with_key("diff"), r"a full difference \(LyCORIS\)"),
}
VERBS = ("load", "inspect", "convert", "merge")


def load(source: Path, folder: Path, row: Format, cell: str) -> None:
    own = row.cells == OWN
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = lk.load_adapter(net(), source)
    said = [str(one.message) for one in caught if "this is inferred" in str(one.message)]
    assert len(said) == (not own), caught
    assert own or f"r={R}, lora_alpha=" in said[0]
    expected = net()
    expected.load_state_dict(row.expected or weights(ALPHA / R), strict=False)
    assert (model(X) - expected(X)).abs().max() < 1e-10


def check_weights(found: Mapping[str, torch.Tensor], row: Format) -> None:
    expected = STATE | (row.expected or weights(ALPHA / R))
    assert found.keys() == expected.keys()
    assert all((found[name] - tensor).abs().max() < 1e-10 for name, tensor in expected.items())


def inspect(source: Path, folder: Path, row: Format, cell: str) -> None:
    report = inspect_adapter(source)
    adapted = LINEARS if row.make is mlx_folder else PATHS
    assert report.format in ("peft", "mlx", "kohya", "diffusers")
    A, B = factors()[LINEARS[0]]
    sizes = [update.frobenius for update in report.updates if update.name.endswith(("attn1.to_q", "attn1_to_q"))]
    assert len(report.updates) == len(adapted) and report.updates[0].r == R
    assert sizes == [pytest.approx(float((B @ A).norm()) * report.updates[0].scaling)]


def convert_(source: Path, folder: Path, row: Format, cell: str) -> None:
    if cell == MODEL:
        with pytest.raises(lk.AdapterFileError, match="give the model's folder as --model"):
            convert(source, folder / "out")
    to = convert(source, folder / "out", model=saved_model(folder) if cell == MODEL else None)
    check_weights(lk.unload(lk.load_adapter(net(), to), merge=True).state_dict(), row)


def saved_model(folder: Path) -> Path:
    (folder / "model").mkdir()
    save_file(STATE, folder / "model" / "model.safetensors")
    return folder / "model"


def merge(source: Path, folder: Path, row: Format, cell: str) -> None:
    out = merge_files(saved_model(folder), source, folder / "out").folder
    check_weights(load_file(out / "model.safetensors"), row)


@pytest.mark.filterwarnings("ignore:.*(this is inferred|alpha is the rank|adapters inside modules_to_save):UserWarning")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", FORMATS)
def test_cell(name: str, verb: str, tmp_path: Path) -> None:
    row = FORMATS[name]
    cell = row.cells[VERBS.index(verb)]
    source = row.make(tmp_path / "adapter")
    do = {"load": load, "inspect": inspect, "convert": convert_, "merge": merge}[verb]
    if cell in (YES, MODEL):
        do(source, tmp_path, row, cell)
    else:
        with pytest.raises(lk.AdapterFileError, match=row.reason or "in PEFT's format already"):
            do(source, tmp_path, row, cell)


def test_the_page_has_this_table() -> None:
    rows = [f"| {name} | {row.files} | {' | '.join(row.cells)} |" for name, row in FORMATS.items()]
    assert [
        line for line in DOCS.read_text().splitlines() if line.startswith(tuple(f"| {name} |" for name in FORMATS))
    ] == rows
