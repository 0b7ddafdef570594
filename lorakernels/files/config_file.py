"""adapter_config.json, PEFT's file of a configuration: its fields as a LoRAConfig and back."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any

from lorakernels.config import LoRAConfig, check_modules
from lorakernels.files.reading import AdapterFileError, as_file_error

HANDLED = tuple(field.name for field in dataclasses.fields(LoRAConfig))
# Fields that say where an adapter comes from or how it was started or placed, not what it computes; and the layout of
# the base weight, of which whoever uses the adapter asks.
WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "megatron_config", "megatron_core", "peft_version"),
    *("revision", "runtime_config", "task_type"),
    # Left over from a start, which `init_lora_weights` names, or of training alone.
    *("lora_ga_config", "velora_config", "ensure_weight_tying"),
    # Of ms-swift and of PEFT's beginnings.
    *("swift_type", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "merge_weights"),
)
_PEFT_VERSION = (0, 21)  # whose fields are known
# PEFT's other fields, each of which changes the maths.
_OF_PEFT = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config"),
    *("trainable_token_indices", "use_bdlora"),
)


def config_from_fields(fields: Mapping[str, Any], source: str) -> LoRAConfig:
    """PEFT's fields as a LoRAConfig. A field that changes the maths and is not known is refused.

    A text under a name that PEFT does not have is a note, and gets a warning. Of the start no more is read than what a
    new adapter could have: `check_start` refuses those that have changed the base.
    """
    if fields.get("peft_type", "LORA") != "LORA":
        raise AdapterFileError(f"{source}: peft_type is {fields['peft_type']!r}; expected 'LORA'")
    known = {"peft_type", *HANDLED, *WITHOUT_EFFECT}
    notes = []
    for name, value in fields.items():
        # Off is what a field that we do not know says when it is None, False or empty.
        if name in known or value in (None, False, "", [], {}):
            continue
        if name in _OF_PEFT:
            raise not_supported(name, value, source)
        if not isinstance(value, str) or (peft_version(fields) or (0, 0)) > _PEFT_VERSION:
            raise AdapterFileError(
                f"{source}: {name}={value!r} is a field that is not known, and may change what the adapter computes; "
                "take it out of the file if it does not"
            )
        notes.append(name)
    if notes:
        shown = ", ".join(f"{name[:40]!r}" for name in notes[:5]) + (", …" if len(notes) > 5 else "")
        warnings.warn(f"{source}: PEFT has no field {shown}; taken for a note", stacklevel=2)
    # A file without them means PEFT's own defaults, and its alpha is not ours.
    arguments = {"r": 8, "lora_alpha": 8} | {name: fields[name] for name in HANDLED if fields.get(name) is not None}
    if arguments.get("init_lora_weights") not in (False, "gaussian", "orthogonal"):
        arguments["init_lora_weights"] = True
    for name in ("r", "lora_alpha"):
        if name in fields and fields[name] is None:
            raise AdapterFileError(f"{source}: {name} is null; expected a number")
    for name in ("target_modules", "exclude_modules"):
        try:
            check_modules(arguments.get(name), name)
        except (TypeError, ValueError):  # the file's tensors say which layers are adapted
            del arguments[name]
    with as_file_error(source):
        return LoRAConfig(**arguments)


def peft_version(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    """Which PEFT has written a file, where it says so."""
    version = fields.get("peft_version")
    numbers = re.match(r"(\d{1,4})\.(\d{1,4})", version) if isinstance(version, str) else None
    return None if numbers is None else (int(numbers[1]), int(numbers[2]))


def not_supported(name: str, value: Any, source: str) -> AdapterFileError:
    return AdapterFileError(f"{source}: {name}={value!r} changes what the adapter computes and is not supported")


def check_start(fields: Mapping[str, Any], source: str) -> None:
    """Raise AdapterFileError where an adapter's start, such as PiSSA's, has taken a part out of the base weight."""
    init = fields.get("init_lora_weights")
    # These leave the base weight as it was.
    if init not in (None, True, False, "gaussian", "orthogonal", "eva"):
        raise AdapterFileError(
            f"{source}: init_lora_weights={init!r} changes the base weight, and the files do not hold that change; "
            "save the adapter from PEFT with path_initial_model_for_weight_conversion first"
        )


def fields_of(config: LoRAConfig) -> dict[str, Any]:
    """`config` as PEFT's fields, the patterns in their own order: the first that matches counts."""
    fields: dict[str, Any] = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None}
    fields |= {"inference_mode": True, "fan_in_fan_out": False}
    for name in HANDLED:
        value = getattr(config, name)
        if isinstance(value, (set, frozenset, tuple)):
            value = sorted(value)
        fields[name] = dict(value) if name.endswith("_pattern") else value
    if fields["init_lora_weights"] == "kaiming":
        fields["init_lora_weights"] = True  # PEFT's name for it
    return fields
