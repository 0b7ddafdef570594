"""LoRAEmbedding: a drop-in `torch.nn.Embedding` with low-rank adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lorakernels.config import split_fields
from lorakernels.nn.base import DEFAULT, MAGNITUDE
from lorakernels.nn.dora import scale_product
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.modules import of_base_layer


class LoRAEmbedding(LoRALayer):
    """y = W[ids] + scaling · Aᵀ[ids] Bᵀ with W frozen (arXiv 2106.09685).

    `base_layer` is a `torch.nn.Embedding`; `lora_embedding_A[name]` is [r, num_embeddings] and starts at zero,
    `lora_embedding_B[name]` is [embedding_dim, r] and starts normal, as in PEFT. `padding_idx` and
    `scale_grad_by_freq` of the base act on A's look-up too; its gradient is dense, whatever `sparse` says.
    There is no dropout: `lora_dropout` is accepted and does nothing, as in PEFT.

    With DoRA, y = c ∘ (W[ids] + scaling · Aᵀ[ids] Bᵀ), c [embedding_dim] (see `LoRALinear`). Its norm is one over
    the whole table, at every training step.

    Args:
        num_embeddings, embedding_dim, and more by name: as for `torch.nn.Embedding`; `max_norm` is refused.
        r, lora_alpha, use_rslora, init_lora_weights, use_dora: as for `LoRAConfig`.
        adapter_name: the name of the first adapter.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is expected.
    """

    BASE = nn.Embedding
    num_embeddings, embedding_dim = of_base_layer("num_embeddings"), of_base_layer("embedding_dim")
    padding_idx, max_norm, norm_type = (
        of_base_layer("padding_idx"),
        of_base_layer("max_norm"),
        of_base_layer("norm_type"),
    )
    scale_grad_by_freq, sparse = of_base_layer("scale_grad_by_freq"), of_base_layer("sparse")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        adapter_name: str = DEFAULT,
        **fields_and_embedding: Any,
    ) -> None:
        fields, embedding = split_fields(fields_and_embedding)
        super().__init__(nn.Embedding(num_embeddings, embedding_dim, **embedding))
        self.add_adapter(adapter_name, **fields)

    def _make_containers(self) -> None:
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    @classmethod
    def adapter_shapes(
        cls, base_layer: nn.Module, r: int, use_dora: bool = False, lora_bias: bool = False, pooled: int = 0
    ) -> dict[str, tuple[int, ...]]:
        """lora_embedding_A [r, num_embeddings], lora_embedding_B [embedding_dim, r], DoRA's magnitude [embedding_dim].

        Raises ValueError for `lora_bias`, and for a base with `max_norm`.
        """
        if pooled:
            raise ValueError("use_qalora=True is for linear layers; got an embedding")
        if lora_bias:
            raise ValueError("lora_bias=True is not for an embedding, which has no bias")
        if base_layer.max_norm is not None:
            raise ValueError(
                "the embedding has max_norm, which rewrites its frozen table while it runs: set max_norm=None first"
            )
        V, N = base_layer.weight.shape  # type: ignore[union-attr,misc]
        shapes: dict[str, tuple[int, ...]] = {"lora_embedding_A": (r, V), "lora_embedding_B": (N, r)}
        return shapes | ({MAGNITUDE: (N,)} if use_dora else {})

    def adapter_tensors(self, adapter_name: str = DEFAULT) -> dict[str, nn.Parameter]:
        self._adapter(adapter_name)
        A, B = self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name]
        return {"lora_embedding_A": A, "lora_embedding_B": B} | self._magnitude(adapter_name)

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        # Without a look at the adapter: torch.compile would make a graph for each rank of it.
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    @property
    def bias(self) -> None:
        """An embedding has none."""

    def _add_parameters(self, name: str, r: int, lora_bias: bool, pooled: int, **factory: Any) -> None:
        self.lora_embedding_A[name] = nn.Parameter(torch.empty(r, self.num_embeddings, **factory))
        self.lora_embedding_B[name] = nn.Parameter(torch.empty(self.embedding_dim, r, **factory))

    def _start(self, A: torch.Tensor, B: torch.Tensor, init_lora_weights: bool | str) -> None:
        if init_lora_weights == "orthogonal":
            return super()._start(A, B, init_lora_weights)
        nn.init.normal_(B)
        nn.init.normal_(A) if init_lora_weights is False else nn.init.zeros_(A)

    def _matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t()

    def _from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.t()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Indices [...] to [..., embedding_dim]."""
        ids = input  # torch's name
        if (ran := self.ran) is not None:  # read once: another thread may end it
            ran.add(self)
        if self.merged:
            self._refuse_training_while_merged()
            return self.base_layer(ids)
        scales, base_scale = self._row_scales()
        if not scales:
            return self.base_layer(ids)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)  # summed in float32, rounded once, as in PEFT

        def base_product(ids: torch.Tensor) -> torch.Tensor:
            return self.base_layer(ids).to(dtype)

        y = base_product(ids) if base_scale is None else scale_product(base_scale, base_product, ids)
        for name, row_scale in scales.items():
            (A, B), scaling = self._factors(name), self.adapters[name].scaling
            B = B * scaling if row_scale is None else B * (scaling * row_scale)[:, None]
            y = y + F.linear(self._look_up(ids, A), B.to(A.dtype))
        return y.to(self.weight.dtype)

    def _look_up(self, ids: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        # Never sparse: autograd cannot transpose such a gradient, and A is no bigger than r rows.
        base: Any = self.base_layer
        return F.embedding(ids, A.t(), base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, {super().extra_repr()}"
