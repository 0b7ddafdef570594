"""Triton's interpreter, made to show what it hides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter


def quicken() -> None:
    """Spare the interpreter the work that changes no result: 52 cases of a layer took 53 s before, 25 s after.

    - The language is patched once a launch. Each call of a `@triton.jit` function inside a kernel looks at every name
      of the language anew, and nothing is left to patch by then.
    - Sums of integers are not made a second time for an overflow check that only `debug=True` reads.
    - A block's type, and what a tensor keeps of its type, is worked out once.
    """
    patch_lang = interpreter._patch_lang

    @cache
    def langs_of(fn: Any) -> list[Any]:
        return [lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())]

    def patch_lang_once(fn: Any) -> Any:
        if any(tl.core.is_builtin(lang.load) for lang in langs_of(fn)):
            return patch_lang(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang_once
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    _know_types()


def _know_types() -> None:
    block_type, tensor, np_dtype = tl.block_type, tl.tensor, interpreter._get_np_dtype
    init_type, init_tensor = block_type.__init__, tensor.__init__
    types: dict[tuple[Any, ...], dict[str, Any]] = {}
    np_dtypes: dict[str, Any] = {}

    def init_type_once(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape))
        if key not in types:
            init_type(self, element_ty, shape)
            sample = tensor.__new__(tensor)
            init_tensor(sample, None, self)
            self.of_tensors = (sample.shape, sample.numel, sample.dtype)
            types[key] = vars(self)
        vars(self).update(types[key])

    def init_tensor_once(self: Any, handle: Any, type: Any) -> None:
        if "of_tensors" not in vars(type):
            return init_tensor(self, handle, type)
        self.handle, self.type = handle, type
        self.shape, self.numel, self.dtype = type.of_tensors

    def np_dtype_once(type: Any) -> Any:
        scalar = type.scalar
        if scalar.name not in np_dtypes:
            np_dtypes[scalar.name] = np_dtype(scalar)
        return np_dtypes[scalar.name]

    block_type.__init__, tensor.__init__, interpreter._get_np_dtype = init_type_once, init_tensor_once, np_dtype_once


@contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Run the programs of every grid in a random order: no program may lean on another."""
    builder = interpreter.InterpreterBuilder
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    rng = np.random.default_rng(seed)
    order: list[Any] = [None]

    def set_grid_dim(self: Any, *dim: int) -> None:
        set_dim(self, *dim)
        order[0] = rng.permutation(int(np.prod(dim)))

    def set_grid_idx(self: Any, *idx: int) -> None:
        place = int(np.ravel_multi_index(idx, self.grid_dim))
        set_idx(self, *(int(i) for i in np.unravel_index(order[0][place], self.grid_dim)))

    with patch.multiple(builder, set_grid_dim=set_grid_dim, set_grid_idx=set_grid_idx):
        yield


@contextmanager
def tf32_products() -> Iterator[None]:
    """Inside the block float32 is multiplied in tf32 where a kernel asks for it: without the bits past the eleventh.

    The interpreter multiplies all of them.
    """
    create_dot = interpreter.InterpreterBuilder.create_dot

    def cut(operand: Any) -> Any:
        if operand.dtype.scalar != tl.float32:
            return operand
        return interpreter.TensorHandle((operand.data.view(np.uint32) & 0xFFFFE000).view(np.float32), tl.float32)

    def create_dot_tf32(self: Any, a: Any, b: Any, d: Any, input_precision: Any, *rest: Any) -> Any:
        if input_precision == ir.INPUT_PRECISION.TF32:
            a, b = cut(a), cut(b)
        return create_dot(self, a, b, d, input_precision, *rest)

    with patch.object(interpreter.InterpreterBuilder, "create_dot", create_dot_tf32):
        yield


@contextmanager
def only_own_memory() -> Iterator[None]:
    """Inside the block a kernel may load from and store to its launch's tensors alone, by address.

    Raises Triton's InterpreterError where an unmasked element lies in none of them, also when its value is not used:
    on a GPU the address may belong to nobody. A tensor's memory is from its first element to its last.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, init_args = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    kernel, begins, ends = "", np.zeros(0, np.uint64), np.zeros(0, np.uint64)

    def init_args_hst(self: Any, args: Any, kwargs: Any) -> Any:
        nonlocal kernel, begins, ends
        on_host = init_args(self, args, kwargs)
        spans = np.array(sorted(_spans([*on_host[0], *on_host[1].values()])), np.uint64).reshape(-1, 2)
        # Of all that begins at or before an address, the furthest end.
        kernel, begins, ends = self.fn.__name__, spans[:, 0], np.maximum.accumulate(spans[:, 1])
        return on_host

    def check(what: str, pointers: Any, mask: Any) -> None:
        # Triton 3.6 gives descriptors' masks as arrays, whose data is a buffer.
        taken = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
        addresses = pointers.data[taken].astype(np.uint64)
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        place = np.searchsorted(begins, addresses, side="right")
        outside = (place == 0) | (addresses + size > np.append(ends, np.uint64(0))[place - 1])
        program = tuple(interpreter.interpreter_builder.grid_idx)
        assert not outside.any(), f"{kernel}, program {program}: a {what} of {outside.sum()} elements of no tensor"

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check("load", ptrs, mask)
        return load(self, ptrs, mask, *rest, **named)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check("store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **named)

    memory = patch.multiple(builder, create_masked_load=create_masked_load, create_masked_store=create_masked_store)
    with memory, patch.object(executor, "_init_args_hst", init_args_hst):
        yield


def _spans(arguments: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """Where the memory of each tensor begins and ends, in bytes; tuples hold some, and descriptors one."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _spans(argument)
        elif not isinstance(argument, torch.Tensor):
            yield from _spans([argument.base] if hasattr(argument, "base") else [])
        elif argument.numel():
            last = sum((size - 1) * stride for size, stride in zip(argument.shape, argument.stride(), strict=True))
            yield argument.data_ptr(), argument.data_ptr() + (last + 1) * argument.element_size()
