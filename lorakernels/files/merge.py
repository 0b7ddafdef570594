"""An adapter's files merged into a model's files, without a model in memory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lorakernels.files.checkpoint import DTYPES, Changes, Checkpoint, write_changed
from lorakernels.files.config_file import check_start
from lorakernels.files.formats import AdapterFile, read_adapter
from lorakernels.files.reading import AdapterFileError
from lorakernels.files.saving import appearing, new_folder
from lorakernels.files.update import BIAS, MAGNITUDE, Update
from lorakernels.quant.packed import Form

# Their linear layers are transformers' Conv1D, whose weight is [in, out].
CONV1D_MODELS = ("decision_transformer", "gpt2", "imagegpt", "openai-gpt")
_HEADS = ("lm_head", "embed_out", "output_projection")
_WORD_EMBEDDINGS = (
    *("embed_tokens", "embed_in", "embedding", "embeddings", "shared", "tok_embeddings", "token_embedding"),
    *("tokens_embed", "w", "word_embedding", "word_embeddings", "wte"),
)
_POSITIONS = ("embed_positions", "position_embeddings", "positions_embed", "wpe")
_ENDS_IN_WORDS = ("ConditionalGeneration", "DoubleHeads", "LM", "PreTraining")

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Merged:
    """What `merge_files` has written: the folder, and the forms of the weights that were packed and are plain in it."""

    folder: Path
    dequantised: Mapping[str, Form]

    def __str__(self) -> str:
        kinds = Counter(form.kind for form in self.dequantised.values())
        return "\n".join(
            [str(self.folder), *(f"{number} {kind} weights are plain now" for kind, number in kinds.items())]
        )


def merge_files(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Merged:
    """Write the model in the folder `model` with `adapter` merged into the new folder `out`.

    Shards, index, config and tokenizer keep their names. A changed weight is summed in float32 (float64 for a float64
    weight) and rounded once, to its own dtype or to `dtype`. Memory: the adapter, and one tensor of the model.
    Weights that bitsandbytes has packed into 4 bits are dequantised, all of them, to the dtype that was packed, and
    config.json says no more of them: packed again, a merged weight would lose most of the update.

    Args:
        model: one .safetensors file or several with their index, and config.json.
        adapter: PEFT's folder (rsLoRA, DoRA, lora_bias, trained biases and modules_to_save included), or mlx-lm's.
        out: does not exist yet, or is an empty folder.
        progress: a bar over the shards on stderr, where that is a terminal.

    Raises:
        AdapterFileError: the adapter is broken or does not fit, or weights are quantised otherwise. `out` is then not
            there.
    """
    read = read_adapter(adapter)
    if read.format == "kohya":
        raise AdapterFileError(f"{adapter} is a kohya file; convert it first: lorakernels convert FILE --model DIR")
    checkpoint = Checkpoint(model)
    if dtype is not None and dtype not in DTYPES.values():
        raise AdapterFileError(f"dtype is {dtype}; expected float64, float32, bfloat16 or float16")
    check_start(read.fields, str(read.source))
    changes = _changes(read, checkpoint)
    with appearing(new_folder(out, sources=[checkpoint.folder, read.source])) as folder:
        write_changed(checkpoint, folder, changes, dtype, progress)
    return Merged(Path(out), checkpoint.packed)


def merged_weight(weight: torch.Tensor, update: Update, *, fan_in_fan_out: bool = False) -> torch.Tensor:
    """weight + scaling · B A, for DoRA with every row brought to its length (arXiv 2402.09353, eq. 5).

    Args:
        weight: [N, K], [N, K, *kernel], or [vocabulary, width] of an embedding; [K, N] with `fan_in_fan_out`.

    Returns:
        The weight's layout, in float32 (float64 for a float64 weight): the caller rounds, once.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A, B = (factor.to(dtype).flatten(1) for factor in update.factors)
    merged = weight.to(dtype, copy=True).contiguous()
    rows = merged.T if fan_in_fan_out or update.embedding else merged.flatten(1)
    rows.addmm_(B, A, alpha=update.scaling)  # into the copy: no second matrix of the weight's size
    if MAGNITUDE in update.tensors:
        norm = rows.norm(dim=1)
        # A row of zeros stays one, where the formula says 0 / 0.
        rows *= torch.where(norm == 0, 1, update.tensors[MAGNITUDE].to(dtype).flatten() / norm)[:, None]
    return merged


def _merged_bias(bias: torch.Tensor, update: Update) -> torch.Tensor:
    """bias + scaling · (the bias of lora_B), as `merged_weight` rounds."""
    dtype = torch.promote_types(bias.dtype, torch.float32)
    return bias.to(dtype) + update.scaling * update.tensors[BIAS].to(dtype)


def _changes(adapter: AdapterFile, checkpoint: Checkpoint) -> dict[str, Change]:
    """What happens to which tensor; everything that can be wrong is found here, before anything is written."""
    rename = _renaming(adapter, checkpoint)
    transposed = bool(adapter.fields.get("fan_in_fan_out"))
    changes: dict[str, Change] = {}
    for path, update in adapter.updates.items():
        module = rename(path)
        _check_weight(module, update, checkpoint, transposed)
        changes[f"{module}.weight"] = partial(merged_weight, update=update, fan_in_fan_out=transposed)
        if BIAS in update.tensors:
            checkpoint.check_holds(f"{module}.bias", update.tensors[BIAS].shape, "has lora_bias, which goes into")
            changes[f"{module}.bias"] = partial(_merged_bias, update=update)
    _check_tied(changes, adapter, checkpoint, rename)
    for name in checkpoint.tensors if checkpoint.packed else ():
        _refuse_quantised(name.rpartition(".")[0], checkpoint)  # config.json can no longer say how they are packed
    for name, value in adapter.others.items():
        target = rename(name)
        _refuse_quantised(target.rpartition(".")[0], checkpoint)
        info = checkpoint.check_holds(target, value.shape, "replaces")
        if value.is_floating_point() != (info.dtype in DTYPES):
            raise AdapterFileError(f"the adapter's {name} is {value.dtype}, and {checkpoint.folder} has {info.dtype}")
        if target in changes and not target.endswith(".bias"):
            raise AdapterFileError(f"the adapter both replaces and updates {name}; expected one of them")
        changes[target] = partial(_replaced, value=value, then=changes.get(target))
    return changes


def _refuse_quantised(module: str, checkpoint: Checkpoint) -> None:
    reason = checkpoint.quantised(module)
    if reason:
        raise AdapterFileError(f"{module} is quantised ({reason}); merge into the unquantised model instead")


def _replaced(old: torch.Tensor, value: torch.Tensor, then: Change | None) -> torch.Tensor:
    value = value if value.is_floating_point() else value.to(old.dtype)  # the writer rounds floats only
    return value if then is None else then(value)


def _renaming(adapter: AdapterFile, checkpoint: Checkpoint) -> Callable[[str], str]:
    """The one way in which the adapter's paths mean the checkpoint's names.

    A checkpoint of the inner model lacks the first part of a path ("model."), one of an outer model has one more. The
    names as they are win; otherwise exactly one other way must place every module.
    """
    paths = list(adapter.updates)
    names = checkpoint.tensors
    ways: list[tuple[str, str]] = [("", "")]  # the prefix that goes, the prefix that comes
    parts = paths[0].split(".")
    for count in range(1, len(parts)):
        gone = ".".join(parts[:count]) + "."
        if all(path.startswith(gone) for path in paths):
            ways.append((gone, ""))
    suffix = f".{paths[0]}.weight"
    ways += [("", name[: len(name) - len(suffix) + 1]) for name in names if name.endswith(suffix)]

    def apply(way: tuple[str, str], path: str) -> str:
        return way[1] + path.removeprefix(way[0])

    placed = [way for way in ways if all(f"{apply(way, path)}.weight" in names for path in paths)]
    if ("", "") in placed:
        placed = [("", "")]
    if len(placed) > 1:
        meanings = " or ".join(apply(way, paths[0]) for way in placed[:4])
        raise AdapterFileError(f"{paths[0]} can mean {meanings} of {checkpoint.folder}; expected one meaning")
    if not placed:
        for path in paths:
            _refuse_quantised(path, checkpoint)
        missing = [path for path in paths if f"{path}.weight" not in names]
        tied = " (a head tied to the embedding has no tensor of its own)" if _leaf(missing[0]) in _HEADS else ""
        raise AdapterFileError(
            f"{checkpoint.folder} has no weight for {len(missing)} of the adapter's {len(paths)} modules, such as "
            f"{missing[0]}.weight{tied}; expected the model that it was trained on"
        )
    return partial(apply, placed[0])


def _check_weight(module: str, update: Update, checkpoint: Checkpoint, fan_in_fan_out: bool) -> None:
    _refuse_quantised(module, checkpoint)
    model_type = checkpoint.config.get("model_type")
    conv1d, head = model_type in CONV1D_MODELS, _leaf(module) in _HEADS
    if not update.embedding and not head and fan_in_fan_out != conv1d:
        raise AdapterFileError(
            f"the adapter says fan_in_fan_out={fan_in_fan_out}, and config.json model_type={model_type!r}, whose "
            f"weights are {'[in, out]' if conv1d else 'taken for [out, in]'}; expected both to agree"
        )
    if fan_in_fan_out and (update.embedding or head):
        raise AdapterFileError(f"{module} is not [in, out] as fan_in_fan_out=True says; merge this one with PEFT")
    if update.groups > 1:
        raise AdapterFileError(
            f"{module} is a convolution with {update.groups} groups, whose adapter reads the channels of all of them: "
            "no weight of the layer does that; keep the adapter unmerged"
        )
    shape = update.shape[::-1] if fan_in_fan_out else update.shape
    checkpoint.check_holds(f"{module}.weight", shape, "updates")


def _check_tied(changes: Changes, adapter: AdapterFile, checkpoint: Checkpoint, rename: Callable[[str], str]) -> None:
    """Refuse to change one end of an embedding and head that are one tensor: the other end would change too."""
    config = checkpoint.config
    inner = config.get("text_config")
    both = {**(inner if isinstance(inner, dict) else {}), **config}
    flag, vocabulary = both.get("tie_word_embeddings"), both.get("vocab_size")
    # Only where the model ends in words can an embedding be tied.
    has_head = any(part in str(name) for name in config.get("architectures") or ["LM"] for part in _ENDS_IN_WORDS)
    embeddings = {f"{rename(path)}.weight" for path, update in adapter.updates.items() if update.embedding}
    replaced = {rename(name) for name in adapter.others}
    for name in sorted({*changes, *replaced}):
        info = checkpoint.tensors.get(name)
        leaf = _leaf(name)
        if info is None or len(info.shape) != 2 or leaf in _POSITIONS:
            continue
        whole = name in replaced and (leaf in _WORD_EMBEDDINGS or info.shape[0] == vocabulary)
        if not (leaf in _HEADS or name in embeddings or whole):
            continue
        # Configurations leave the flag out where it is their class's default; then a head of its own tells.
        alike = [other for other, has in checkpoint.tensors.items() if other != name and has.shape == info.shape]
        twins = [other for other in alike if leaf in _HEADS or _leaf(other) not in (*_WORD_EMBEDDINGS, *_POSITIONS)]
        if flag or (flag is None and not twins and has_head):
            raise AdapterFileError(
                f"the adapter changes {name}, which is tied (tie_word_embeddings): embedding and head are one tensor, "
                "and merged both would change; untie them in the model first, or keep the adapter unmerged"
            )


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
