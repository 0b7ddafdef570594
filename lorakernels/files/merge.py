"""An adapter's files merged into a model's files, without a model in memory."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorakernels.files.checkpoint import DTYPES, Changes, Checkpoint, write_changed
from lorakernels.files.config_file import check_start
from lorakernels.files.formats import AdapterFile, read_adapter
from lorakernels.files.naming import HEADS, of_files, place
from lorakernels.files.one_file import fields_of_part
from lorakernels.files.reading import AdapterFileError, Tensors
from lorakernels.files.saving import appearing, new_folder
from lorakernels.files.stacks import OwnExperts, fitted_stack, of_own_experts, stored_stacks
from lorakernels.files.update import BIAS, Update, merged_bias, merged_weight
from lorakernels.quant.packed import Form

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
    prefix: str | None = None,
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
            A file of kohya's or diffusers' format too; a warning says what was taken as usual since it leaves it open.
        out: does not exist yet, or is an empty folder.
        prefix: which part of a file for several models ("lora_unet", "transformer", ...) `model` is.
        progress: a bar over the shards on stderr, where that is a terminal.

    Raises:
        AdapterFileError: the adapter is broken or does not fit, or weights are quantised otherwise. `out` is then not
            there.
    """
    read = read_adapter(adapter)
    checkpoint = Checkpoint(model)
    if dtype is not None and dtype not in DTYPES.values():
        raise AdapterFileError(f"dtype is {dtype}; expected float64, float32, bfloat16 or float16")
    changes = _changes(read, checkpoint, prefix)
    with appearing(new_folder(out, sources=[checkpoint.folder, read.source])) as folder:
        write_changed(checkpoint, folder, changes, dtype, progress)
    return Merged(Path(out), checkpoint.packed)


def _changes(adapter: AdapterFile, checkpoint: Checkpoint, prefix: str | None) -> dict[str, Change]:
    """What happens to which tensor; everything that can be wrong is found here, before anything is written."""
    for path in adapter.updates:
        _refuse_quantised(path, checkpoint)  # whose weight may have another name
    adapter = _of_experts(adapter, checkpoint)
    part, names = place(adapter, of_files(checkpoint), prefix)
    if part in adapter.assumed:
        warnings.warn(f"{adapter.source}: {adapter.assumed[part]}, as files without it mean", stacklevel=3)
    fields = adapter.fields if adapter.format in ("peft", "mlx") else fields_of_part(adapter.fields, part)
    check_start(fields, str(adapter.source))
    # Other formats than PEFT's do not say how a weight lies.
    transposed = bool(fields.get("fan_in_fan_out")) if adapter.format == "peft" else checkpoint.transposed
    changes: dict[str, Change] = {}
    updates = {names[name]: update for name, update in adapter.updates.items() if name in names}
    for module, found in updates.items():
        if found.experts:
            name = stored_stacks(checkpoint.tensors)[module]
            changes[name] = _of_stack(name, found, checkpoint, fields)
            continue
        update = _fitted(module, found, checkpoint, transposed)
        changes[f"{module}.weight"] = partial(merged_weight, update=update, fan_in_fan_out=transposed)
        if BIAS in update.tensors:
            checkpoint.check_holds(f"{module}.bias", update.tensors[BIAS].shape, "has lora_bias, which goes into")
            changes[f"{module}.bias"] = partial(merged_bias, update=update)
    others = {names[name]: value for name, value in adapter.others.items()}
    _check_tied(changes, updates, others, checkpoint)
    for name in checkpoint.tensors if checkpoint.packed else ():
        _refuse_quantised(name.rpartition(".")[0], checkpoint)  # config.json can no longer say how they are packed
    for target, value in others.items():
        _refuse_quantised(target.rpartition(".")[0], checkpoint)
        info = checkpoint.check_holds(target, value.shape, "replaces")
        if value.is_floating_point() != (info.dtype in DTYPES):
            raise AdapterFileError(f"the adapter's {target} is {value.dtype}, and {checkpoint.folder} has {info.dtype}")
        if target in changes and not target.endswith(".bias"):
            raise AdapterFileError(f"the adapter both replaces and updates {target}; expected one of them")
        changes[target] = partial(_replaced, value=value, then=changes.get(target))
    return changes


def _of_experts(adapter: AdapterFile, checkpoint: Checkpoint) -> AdapterFile:
    """The same with an update for each expert's own layers, where the model's files have these and no stacks."""
    if not any(update.experts for update in adapter.updates.values()):
        return adapter
    files = OwnExperts({name: info.shape for name, info in checkpoint.tensors.items()})
    updates: dict[str, Update] = {}
    for path, update in adapter.updates.items():
        own = of_own_experts(path, update, files, adapter.fields) if update.experts else {}
        updates |= own or {path: update}
    return replace(adapter, updates=updates)


def _of_stack(name: str, update: Update, checkpoint: Checkpoint, fields: Mapping[str, Any]) -> Change:
    """What happens to a stack of experts that the model's files hold as one tensor."""
    info = checkpoint.tensors[name]
    if info.dtype not in DTYPES:
        raise AdapterFileError(f"{name} is {info.dtype}; merge into the unquantised model instead")
    by_rows = False
    if len(info.shape) == 3 and info.shape[0] == update.experts:
        update, by_rows = fitted_stack(name, update, info.shape, checkpoint.config.get("model_type"), fields)
    expected = (update.shape[0], *update.shape[:0:-1]) if by_rows else update.shape
    checkpoint.check_holds(name, torch.Size(expected), "updates")
    return partial(merged_weight, update=update, fan_in_fan_out=by_rows)


def _refuse_quantised(module: str, checkpoint: Checkpoint) -> None:
    reason = checkpoint.quantised(module)
    if reason:
        raise AdapterFileError(f"{module} is quantised ({reason}); merge into the unquantised model instead")


def _replaced(old: torch.Tensor, value: torch.Tensor, then: Change | None) -> torch.Tensor:
    value = value if value.is_floating_point() else value.to(old.dtype)  # the writer rounds floats only
    return value if then is None else then(value)


def _fitted(module: str, update: Update, checkpoint: Checkpoint, fan_in_fan_out: bool) -> Update:
    """An update with as many dimensions as the weight that it is checked to fit."""
    _refuse_quantised(module, checkpoint)
    model_type = checkpoint.config.get("model_type")
    conv1d, head = checkpoint.transposed, _leaf(module) in HEADS
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
    return checkpoint.fitted(module, update, fan_in_fan_out)


def _check_tied(changes: Changes, updates: Mapping[str, Update], others: Tensors, checkpoint: Checkpoint) -> None:
    """Refuse to change one end of an embedding and head that are one tensor: the other end would change too."""
    config = checkpoint.config
    inner = config.get("text_config")
    both = {**(inner if isinstance(inner, dict) else {}), **config}
    flag, vocabulary = both.get("tie_word_embeddings"), both.get("vocab_size")
    # Only where the model ends in words can an embedding be tied.
    has_head = any(part in str(name) for name in config.get("architectures") or ["LM"] for part in _ENDS_IN_WORDS)
    embeddings = {f"{path}.weight" for path, update in updates.items() if update.embedding}
    for name in sorted({*changes, *others}):
        info = checkpoint.tensors.get(name)
        leaf = _leaf(name)
        if info is None or len(info.shape) != 2 or leaf in _POSITIONS:
            continue
        whole = name in others and (leaf in _WORD_EMBEDDINGS or info.shape[0] == vocabulary)
        if not (leaf in HEADS or name in embeddings or whole):
            continue
        # Configurations leave the flag out where it is their class's default; then a head of its own tells.
        alike = [other for other, has in checkpoint.tensors.items() if other != name and has.shape == info.shape]
        twins = [other for other in alike if leaf in HEADS or _leaf(other) not in (*_WORD_EMBEDDINGS, *_POSITIONS)]
        if flag or (flag is None and not twins and has_head):
            raise AdapterFileError(
                f"the adapter changes {name}, which is tied (tie_word_embeddings): embedding and head are one tensor, "
                "and merged both would change; untie them in the model first, or keep the adapter unmerged"
            )


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
