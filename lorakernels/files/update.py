"""One module's update, as adapter files hold it, and the checks of it that need no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lorakernels.files.reading import AdapterFileError, Tensors, check_finite

CONFIG_FILE = "adapter_config.json"
# What PEFT's files call the parts of an update, behind the module's name.
LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
BIAS, MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"
SUFFIXES = (*LINEAR, BIAS, *EMBEDDING, MAGNITUDE)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Update:
    """The update of one module's weight: scaling · B A.

    `tensors` is by PEFT's names, A and B first. They are [r, K] and [N, r] (linear), [r, K, *kernel] and
    [N, r / groups, 1, ...] (convolution), or [r, vocabulary] and [width, r] (`embedding`, whose weight
    [vocabulary, width] gets the transpose). Beside them DoRA's magnitude, a length for every row, or a bias of lora_B.
    Of a stack of `experts` they are [r · E, in], the expert slowest, and [out, r · E], the expert fastest.
    """

    tensors: Tensors
    alpha: float
    scaling: float
    experts: int = 0

    @property
    def embedding(self) -> bool:
        return EMBEDDING[0] in self.tensors

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, of experts [E, r, in] and [E, out, r]."""
        A, B, *_ = self.tensors.values()
        if self.experts:
            return A.unflatten(0, (self.experts, -1)), B.unflatten(1, (-1, self.experts)).permute(2, 0, 1)
        return A, B

    @property
    def r(self) -> int:
        return self.factors[0].shape[1 if self.experts else 0]

    @property
    def groups(self) -> int:
        """Of a convolution: A reads all channels, and each group of B's rows a part of A's outputs."""
        return 1 if self.experts else self.r // self.factors[1].shape[1]

    @property
    def shape(self) -> torch.Size:
        """The weight's, [N, K, *kernel]; an embedding's [vocabulary, width]; of experts [E, out, in]."""
        A, B = self.factors
        if self.experts:
            return torch.Size((self.experts, B.shape[1], A.shape[2]))
        shape = torch.Size((B.shape[0], *A.shape[1:]))
        return shape[::-1] if self.embedding else shape


def of_kernel(tensors: Tensors, kernel: Sequence[int]) -> Tensors:
    """The same for a weight [N, K, *kernel], where a linear layer's is that of a convolution with a kernel of 1."""
    A = tensors.get(LINEAR[0])
    if A is None or A.dim() < 2 or {*A.shape[2:], *kernel} - {1} or A.dim() == 2 + len(kernel):
        return tensors
    shaped = {name: tensors[name].reshape(*tensors[name].shape[:2], *kernel) for name in LINEAR if name in tensors}
    if MAGNITUDE in tensors:
        shaped[MAGNITUDE] = tensors[MAGNITUDE].reshape((1, -1, *kernel) if kernel else (-1,))
    return tensors | shaped


def merged_weight(weight: torch.Tensor, update: Update, *, fan_in_fan_out: bool = False) -> torch.Tensor:
    """weight + scaling · B A, for DoRA with every row brought to its length (arXiv 2402.09353, eq. 5).

    Args:
        weight: [N, K], [N, K, *kernel], or [vocabulary, width] of an embedding; [K, N] with `fan_in_fan_out`. Of
            experts a stack of these.

    Returns:
        The weight's layout, in float32 (float64 for a float64 weight): the caller rounds, once.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(dtype, copy=True).contiguous()
    if update.experts:
        A, B = (factor.to(dtype) for factor in update.factors)
        (merged.mT if fan_in_fan_out else merged).baddbmm_(B, A, alpha=update.scaling)
        return merged
    A, B = (factor.to(dtype).flatten(1) for factor in update.factors)
    rows = merged.T if fan_in_fan_out or update.embedding else merged.flatten(1)
    rows.addmm_(B, A, alpha=update.scaling)  # into the copy: no second matrix of the weight's size
    if MAGNITUDE in update.tensors:
        norm = rows.norm(dim=1)
        # A row of zeros stays one, where the formula says 0 / 0.
        rows *= torch.where(norm == 0, 1, update.tensors[MAGNITUDE].to(dtype).flatten() / norm)[:, None]
    return merged


def merged_bias(bias: torch.Tensor, update: Update) -> torch.Tensor:
    """bias + scaling · (the bias of lora_B), as `merged_weight` rounds."""
    dtype = torch.promote_types(bias.dtype, torch.float32)
    return bias.to(dtype) + update.scaling * update.tensors[BIAS].to(dtype)


def check_pair(
    path: str, found: Tensors, names: tuple[str, str], *, transposed: bool = False, grouped: bool = False
) -> None:
    """Both factors are there and have one rank. `transposed`: [K, r] and [r, N]. `grouped`: a convolution may have
    groups."""
    missing = [name for name in names if name not in found]
    if missing:
        raise AdapterFileError(f"module {path!r} has no {missing[0]}; expected both {names[0]} and {names[1]}")
    A, B = (found[name] for name in names)
    was = f"{path}: {names[0]} is {list(A.shape)} and {names[1]} {list(B.shape)}; expected"
    conv = A.dim() == B.dim() > 2 and not transposed and set(B.shape[2:]) == {1}
    if not A.dim() == B.dim() == 2 and not conv:
        raise AdapterFileError(f"{was} two dimensions{'' if transposed else ', or [r, K, *kernel] and [N, r, 1, ...]'}")
    ranks = (A.shape[1], B.shape[0]) if transposed else (A.shape[0], B.shape[1])
    empty = 0 in (*A.shape, *B.shape)
    groups = ranks[0] // ranks[1] if conv and grouped and not empty and ranks[0] % ranks[1] == 0 else 1
    if empty or ranks[0] != groups * ranks[1] or B.shape[0] % groups:
        forms = "[K, r] and [r, N]" if transposed else "[r, K] and [N, r]"
        raise AdapterFileError(f"{was} {forms} with one r of at least 1 (transposed?)")


def own_shapes(path: str, tensors: Tensors, r: int, use_dora: bool = False, lora_bias: bool = False) -> Shapes:
    """What an update of rank r should hold, by the outer sizes of its own factors: where no model tells."""
    names = EMBEDDING if any(name in tensors for name in EMBEDDING) else LINEAR
    check_pair(path, tensors, names, grouped=True)
    A, B = (tensors[name] for name in names)
    N, ones = B.shape[0], B.shape[2:]
    shapes = {names[0]: (r, *A.shape[1:]), names[1]: (N, r // (A.shape[0] // B.shape[1]), *ones)}
    shapes |= {BIAS: (N,)} if lora_bias else {}
    return shapes | ({MAGNITUDE: (1, N, *ones) if ones else (N,)} if use_dora else {})


def check_tensors(path: str, tensors: Tensors, shapes: Shapes, kind: str, r: int) -> None:
    """Each tensor of a module is there, of floats, of its shape and finite. `kind`: what the shapes are those of."""
    if tensors.keys() != shapes.keys():
        missing = [name for name in shapes if name not in tensors]
        extra = [name for name in tensors if name not in shapes]
        what = f"has no {' and no '.join(missing)}" if missing else f"has {' and '.join(extra)} too"
        raise AdapterFileError(f"module {path!r} {what}; expected {', '.join(shapes)} ({kind})")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if not tensor.is_floating_point():
            raise AdapterFileError(f"{path}.{name} is {tensor.dtype}; expected a float dtype")
        if tuple(tensor.shape) != shape:
            wrong = [size for own, size in zip(tensor.shape, shape, strict=False) if own != size]
            hint = (
                ""
                if r in wrong or len(shape) != tensor.dim()
                else " (a model of other sizes, or before it was resized?)"
            )
            hint = " (transposed?)" if tuple(tensor.shape) == shape[::-1] else hint
            expected = f"expected {list(shape)}, as {CONFIG_FILE} says r={r}{hint}"
            raise AdapterFileError(f"{path}.{name} is {list(tensor.shape)}; {expected}")
        check_finite(f"{path}.{name}", tensor)
