"""adapter_config.json, PEFT's file of a configuration: reading, checking, writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorakernels.config import LoRAConfig, check_modules

# Bigger than any real one by far; a file past it is not read.
MAX_BYTES = 16 << 20
HANDLED = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "bias",
    "use_rslora",
    "init_lora_weights",
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "lora_bias",
    "modules_to_save",
)
# Fields that say where an adapter comes from or how it was started or placed, not what it computes.
WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
# These start the adapter and leave the base weight as it was; the others take their start out of it.
KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")


class AdapterFileError(ValueError):
    """An adapter's files cannot be used: says which, what is in them and what is expected."""


def read_config(path: Path) -> LoRAConfig:
    """The configuration in an adapter_config.json. A field that changes the maths and is not known is refused."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise AdapterFileError(f"{path} has {path.stat().st_size:,} bytes; expected at most {MAX_BYTES:,}")
        fields = json.loads(path.read_text(encoding="utf-8"))
    except AdapterFileError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8, a number of 5000 digits
        raise AdapterFileError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise AdapterFileError(f"{path} holds a {type(fields).__name__}; expected an object of fields")
    return config_from_fields(fields, str(path))


def config_from_fields(fields: dict[str, Any], source: str) -> LoRAConfig:
    """PEFT's fields as a LoRAConfig."""
    if fields.get("peft_type", "LORA") != "LORA":
        raise AdapterFileError(f"{source}: peft_type is {fields['peft_type']!r}; expected 'LORA'")
    known = {"peft_type", *HANDLED, *WITHOUT_EFFECT}
    for name, value in fields.items():
        # Off is what a field that we do not know says when it is None, False or empty.
        if name not in known and value not in (None, False, "", [], {}):
            raise AdapterFileError(f"{source}: {name}={value!r} changes what the adapter computes and is not supported")
    init = fields.get("init_lora_weights")
    init = True if init is None else init
    if init not in KEEP_THE_BASE:
        raise AdapterFileError(
            f"{source}: init_lora_weights={init!r} changes the base weight, and the files do not hold that change; "
            "save the adapter from PEFT with path_initial_model_for_weight_conversion first"
        )
    # A file without them means PEFT's own defaults, and its alpha is not ours.
    arguments = {"r": 8, "lora_alpha": 8} | {name: fields[name] for name in HANDLED if fields.get(name) is not None}
    arguments["init_lora_weights"] = init if init in (True, False, "gaussian", "orthogonal") else True
    for name in ("r", "lora_alpha"):
        if name in fields and fields[name] is None:
            raise AdapterFileError(f"{source}: {name} is null; expected a number")
    for name in ("target_modules", "exclude_modules"):
        try:
            check_modules(arguments.get(name), name)
        except (TypeError, ValueError):  # the file's tensors say which layers are adapted
            del arguments[name]
    try:
        return LoRAConfig(**arguments)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise AdapterFileError(f"{source}: {error}") from error


def fields_of(config: LoRAConfig) -> dict[str, Any]:
    """`config` as PEFT's fields, the patterns in their own order: the first that matches counts."""
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "fan_in_fan_out": False,
    }
    for name in HANDLED:
        value = getattr(config, name)
        if isinstance(value, (set, frozenset, tuple)):
            value = sorted(value)
        fields[name] = dict(value) if name.endswith("_pattern") else value
    if fields["init_lora_weights"] == "kaiming":
        fields["init_lora_weights"] = True  # PEFT's name for it
    return fields


def write_config(path: Path, config: LoRAConfig) -> None:
    """Write `config` as PEFT would."""
    path.write_text(json.dumps(fields_of(config), indent=2) + "\n", encoding="utf-8")
