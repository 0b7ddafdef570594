"""Triton kernels: the only package that imports triton. One file an operation: kernel, then its launcher."""

from lorakernels.backend import interpreter_on

if interpreter_on():
    from lorakernels.kernels.interpreter import mend_bf16

    mend_bf16()
