"""Triton kernels: the only package that imports triton. One file an operation: kernel, then its launcher."""
