"""What a transformers model's own methods do while it has adapters: save_pretrained, tie_weights, resizing."""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakernels.adapters import held
from lorakernels.adapters.save import save_adapter
from lorakernels.adapters.saved_modules import SavedModule, saved_modules
from lorakernels.nn.base import DEFAULT
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.modules import names_of


def _save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> Any:
    """As PEFT's: the adapters' files and not the model's.

    transformers' own would write the weights of adapted layers under names that its `from_pretrained` does not know,
    and which it then leaves random. While adapters are merged the state dict is the plain model's, and its own runs.
    """
    there, layers = held.names(model), held.layers(model).values()
    if not there or all(layer.is_plain for layer in layers):
        options = {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub}
        return type(model).save_pretrained(model, save_directory, **options, **kwargs)
    if push_to_hub:
        raise ValueError("push_to_hub=True: adapters are written to a folder alone; upload that")
    held.refuse_merged(model)  # some are, and others not
    sharded = any(hasattr(parameter, "full_tensor") for parameter in held.parameters(model))
    if is_main_process or (sharded and state_dict is None):  # whose shards all processes gather
        for name in there:
            folder = Path(save_directory, "" if name == DEFAULT or len(there) == 1 else name)
            save_adapter(model, folder, name, state_dict=state_dict)


def _tie_weights(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The base weights are tied: not an adapter's copy of a head to a base embedding, nor the other way round."""
    held.refuse_merged(model)
    plain: dict[nn.Module, nn.Module] = {layer: layer.plain_layer for layer in held.layers(model).values()}
    plain |= {wrapper: wrapper.original_module for wrapper in saved_modules(model).values()}
    children = [(parent, name, one) for parent in model.modules() for name, one in parent._modules.items()]
    places = [(parent, name, one) for parent, name, one in children if one in plain]
    try:
        for parent, name, wrapper in places:
            parent._modules[name] = plain[wrapper]
        return type(model).tie_weights(model, *args, **kwargs)
    finally:
        for parent, name, wrapper in places:
            parent._modules[name] = wrapper


def _resize_token_embeddings(model: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """Refused where an embedding or a head has an adapter, whose factors or copies have a row for each token."""
    names = names_of(model)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    held_by = [names[end] for end in ends if isinstance(end, (LoRALayer, SavedModule))]
    if new_num_tokens is not None and held_by:
        raise ValueError(
            f"resize_token_embeddings({new_num_tokens}) with adapters on {' and '.join(held_by)}, whose sizes would no "
            "longer fit; resize before inject or load_adapter, or call lorakernels.unload first"
        )
    return type(model).resize_token_embeddings(model, new_num_tokens, *args, **kwargs)


_METHODS: dict[str, Callable[..., Any]] = {
    "save_pretrained": _save_pretrained,
    "tie_weights": _tie_weights,
    "resize_token_embeddings": _resize_token_embeddings,
}


class _Method:
    """One of `_METHODS` as an attribute of a model, before its type's own."""

    def __init__(self, model: Any, name: str) -> None:
        self._model, self._name = weakref.ref(model), name  # the model has this

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _METHODS[self._name](self._model(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        model = self._model()
        return _Method(memo.get(id(model), model), self._name)

    def __reduce__(self) -> Any:
        return _Method, (self._model(), self._name)


def _refuse_outside() -> None:
    """From now on transformers' save_pretrained raises where a part of the model was given adapters, and not the whole.

    Only the part has `_save_pretrained`, and which models it is in, or will be, a part does not know.
    """
    loaded = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if loaded is None or hasattr(save_pretrained := loaded.save_pretrained, "_of_lorakernels"):
        return

    @functools.wraps(save_pretrained)
    def save_whole(model: Any, *args: Any, **kwargs: Any) -> Any:
        holders = held.holders(model)
        names = [path for path, one in holders.items() if not getattr(one, "is_plain", one.in_merged_model)]
        if names:
            parts = [path for one, path in names_of(model).items() if path and held.configs(one)]
            part = f"model.{parts[0]}" if parts else "part"
            raise RuntimeError(
                f"{len(names)} modules of this {type(model).__name__} are adapted ({names[0]}, …), by adapters that "
                "were put into a part of it, and save_pretrained would write them under names that from_pretrained "
                f"leaves out. Call lorakernels.save_adapter({part}, folder) for the adapters, or "
                f"lorakernels.merge({part}) before it; or give lorakernels.inject the whole model"
            )
        return save_pretrained(model, *args, **kwargs)

    save_whole._of_lorakernels = True  # type: ignore[attr-defined]
    loaded.save_pretrained = save_whole


def give_methods(model: Any) -> None:
    """Let a transformers model, and so a Trainer, call these while it has adapters."""
    _refuse_outside()
    for name in _METHODS:
        if hasattr(type(model), name) and name not in model.__dict__:
            setattr(model, name, _Method(model, name))


def take_methods(model: nn.Module) -> None:
    """Let the model's own methods run again."""
    for name in _METHODS:
        if isinstance(model.__dict__.get(name), _Method):
            del model.__dict__[name]
