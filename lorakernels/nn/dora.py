"""DoRA's magnitude and the norm that it is measured against (Liu et al., arXiv 2402.09353)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lorakernels.functional import lora_weight_norm, row_norm
from lorakernels.quant.packed import PackedWeight


@dataclass(frozen=True)
class _Kept:
    """A norm, and what its sources were when it was computed."""

    stamps: list[Any]
    # While there is a weak reference to a storage no other is made at its address. None to a tensor: torch cannot swap
    # a parameter that has one.
    storages: list[StorageWeakRef]
    norm: torch.Tensor


class NormCache:
    """‖W + scaling · B A‖ by rows, with what of it need not be computed again.

    ‖W‖ is kept from one call to the next, and the whole norm where `keep` says so: until a tensor that they come
    from is another, lies elsewhere or was edited in place, or the CUDA stream is another. What comes from one that
    trains is not kept: a fused optimizer's step is not seen. An edit through `.data` shows in neither version nor
    address: on a CPU sums over some of the base weight tell; elsewhere, where reading one would wait for the device,
    nothing is kept while there are gradients. No tensor but the norms is kept alive.
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}

    def clear(self) -> None:
        self._kept.clear()

    def norm(
        self,
        base: Any,
        matrix: Any,
        A: torch.Tensor,
        B: torch.Tensor,
        scaling: float | torch.Tensor,
        keep: bool,
    ) -> torch.Tensor:
        """`base` is the weight itself and `matrix` the same as [N, K]; A [r, K], B [N, r] are parameters or views."""
        if isinstance(base, PackedWeight):
            base = base.data

        def compute() -> torch.Tensor:
            base_norm = self._get("base_norm", (base,), None, lambda: row_norm(matrix.detach()))
            return lora_weight_norm(matrix, A, B, scaling=scaling, base_norm=base_norm)

        if not keep:
            # Some optimizers step past the version counter: no norm outlives a step.
            self._kept.pop("norm", None)
            return compute()
        # A scaling that is a tensor is watched like the others and not read: that would wait for the device.
        if isinstance(scaling, torch.Tensor):
            return self._get("norm", (base, _owner(A), _owner(B), scaling), None, compute)
        return self._get("norm", (base, _owner(A), _owner(B)), scaling, compute)

    def _get(
        self, what: str, sources: tuple[torch.Tensor, ...], value: float | None, compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        if any(tensor.requires_grad for tensor in sources):
            self._kept.pop(what, None)
            return compute()
        on_cpu = all(tensor.is_cpu for tensor in sources)
        if not all(map(_can_be_watched, sources)) or (torch.is_grad_enabled() and not on_cpu):
            return compute()
        stamps: list[Any] = [value, _stream(sources[0].device)]
        for t in sources:
            stamps += t._cdata, t._version, t.untyped_storage()._cdata, t.data_ptr(), t.dtype
        if on_cpu:  # of the base weight alone: adapters are edited between steps, when nothing is kept
            stamps += _some_of(sources[0])
        kept = self._kept.get(what)
        if kept is not None and kept.stamps == stamps:
            return kept.norm
        norm = compute()
        self._kept[what] = _Kept(stamps, [StorageWeakRef(t.untyped_storage()) for t in sources], norm)
        return norm


class Magnitude(nn.Module):
    """The learned length of every row of W + scaling · B A; `weight` has PEFT's shape.

    The norm is kept for inference with a frozen adapter; what is kept goes when the model moves, loads a state dict,
    or goes from training to evaluation and back.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self._cache = NormCache()

    def row_scale(self, base: Any, matrix: Any, A: torch.Tensor, B: torch.Tensor, scaling: Any) -> torch.Tensor:
        """magnitude / ‖W + scaling · B A‖ [N], the norm without a gradient (section 4.3); a row of zeros stays one.

        The arguments are those of `NormCache.norm`.
        """
        norm = self.norm(base, matrix, A, B, scaling)
        scale = self.weight.flatten() / torch.where(norm > 0, norm, 1)
        # Off is the base layer. Of a number the caller sees it; a tensor is not looked into.
        return torch.where(scaling == 0, 1.0, scale) if isinstance(scaling, torch.Tensor) else scale

    def norm(self, base: Any, matrix: Any, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
        keep = not self.training and not torch.is_grad_enabled()
        return self._cache.norm(base, matrix, A, B, scaling, keep)

    def train(self, mode: bool = True) -> Magnitude:
        if mode != self.training:
            self._cache.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Magnitude:
        self._cache.clear()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": NormCache()}


def change_of_base(scales: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    """1 + Σ (factor - 1) over the adapters with DoRA: what several multiply the base product by; None without."""
    with_dora = [scale for scale in scales if scale is not None]
    return sum(with_dora[1:], with_dora[0]) - (len(with_dora) - 1) if with_dora else None


def scale_product(
    scale: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """scale * product(x), which for scale's gradient computes the product again instead of keeping it."""

    def scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y = product(x)
        return y * scale.to(y.dtype)

    # torch.func cannot have the hooks that recomputing hangs on, nor can an exported graph.
    needs_grad = torch.is_grad_enabled() and scale.requires_grad
    if needs_grad and not _transformed() and not torch.compiler.is_exporting():
        return checkpoint(scaled, x, scale, use_reentrant=False, preserve_rng_state=False)
    return scaled(x, scale)


@torch.no_grad()
def _some_of(tensor: torch.Tensor) -> list[float]:
    """Sums over some whole rows and over two numbers of each: an edit of one row or of one column shows. 20 to 150 µs.

    In float64, where the change of one number among thousands is not rounded away.
    """
    steps = [max(1, -(-size // parts)) for size, parts in zip(tensor.shape, (8, 2), strict=False)]
    return [
        tensor[(slice(None),) * dim + (slice(None, None, step),)].sum(dtype=torch.float64).item()
        for dim, step in enumerate(steps)
    ]


def _owner(tensor: torch.Tensor) -> torch.Tensor:
    """The parameter that a view is of: views are made anew at every call, and share its version."""
    return tensor if tensor._base is None else tensor._base


def _stream(device: torch.device) -> int | None:
    """Where a norm is made: another stream would not wait until it is."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def _can_be_watched(tensor: torch.Tensor) -> bool:
    """Not while it is traced or transformed; sharded and fake tensors and those of inference mode
    tell no version; what a CUDA graph has computed is there only when it is replayed."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (torch.Tensor, nn.Parameter)
        and not tensor.is_inference()
        and not _transformed()
        and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _transformed() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
