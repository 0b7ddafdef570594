"""LoRAConv1d, LoRAConv2d, LoRAConv3d: drop-in convolutions with low-rank adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lorakernels.config import LoRAConfig, split_fields
from lorakernels.low_rank import low_rank_dtype
from lorakernels.nn.base import DEFAULT, MAGNITUDE
from lorakernels.nn.dora import scale_product
from lorakernels.nn.layer import LoRALayer
from lorakernels.nn.modules import of_base_layer, runs_more_than_forward


class _LoRAConv(LoRALayer):
    """y = W * x + bias + scaling · B * (A * dropout(x)) with W and bias frozen, * being the convolution.

    A is a convolution with the base's kernel, stride, padding and dilation to r channels, B one of kernel 1 to
    out_channels: `lora_A[name].weight` is [r, in_channels, ...kernel], `lora_B[name].weight` [out_channels, r, 1...],
    as in PEFT. With DoRA all but the bias is multiplied by c [out_channels], magnitude over the norm of each output
    channel's kernel; `lora_magnitude_vector` is [1, out_channels, 1...] (see `LoRALinear`).

    In a grouped base A sees all channels and B is grouped, [out_channels, r / groups, 1...], as in PEFT. That is no
    grouped weight, so such a layer cannot be merged and has no DoRA.

    Args:
        in_channels, out_channels, kernel_size, and more by name: as for torch's convolution; `padding_mode` must be
            "zeros".
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, use_dora, lora_bias: as for `LoRAConfig`.
        adapter_name: the name of the first adapter.

    Raises:
        ValueError, TypeError: naming the argument, what was given and what is expected.
    """

    in_channels, out_channels = of_base_layer("in_channels"), of_base_layer("out_channels")
    kernel_size, stride, padding = of_base_layer("kernel_size"), of_base_layer("stride"), of_base_layer("padding")
    dilation, groups, padding_mode = of_base_layer("dilation"), of_base_layer("groups"), of_base_layer("padding_mode")
    transposed, output_padding = of_base_layer("transposed"), of_base_layer("output_padding")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        *,
        adapter_name: str = DEFAULT,
        **fields_and_conv: Any,
    ) -> None:
        fields, conv = split_fields(fields_and_conv)
        super().__init__(self.BASE(in_channels, out_channels, kernel_size, **conv))
        self.add_adapter(adapter_name, **fields)

    @classmethod
    def adapter_shapes(
        cls, base_layer: nn.Module, r: int, use_dora: bool = False, lora_bias: bool = False, pooled: int = 0
    ) -> dict[str, tuple[int, ...]]:
        """lora_A [r, in_channels, ...kernel], lora_B [out_channels, r / groups, 1...], a bias [out_channels], and
        DoRA's magnitude [1, out_channels, 1...].

        Raises ValueError for what cannot be: see the class.
        """
        if pooled:
            raise ValueError("use_qalora=True is for linear layers; got a convolution")
        conv: Any = base_layer
        N, ones = conv.out_channels, (1,) * len(conv.kernel_size)
        if conv.padding_mode != "zeros":
            # PEFT pads with zeros beside any base, which no merged weight could do.
            raise ValueError(f'the convolution has padding_mode={conv.padding_mode!r}; expected "zeros"')
        if r % conv.groups:
            raise ValueError(f"the convolution has groups={conv.groups}; expected r to be a multiple; got r={r}")
        if use_dora and conv.groups > 1:
            raise ValueError(f"use_dora=True needs a convolution with groups=1; got groups={conv.groups}")
        return {
            "lora_A.weight": (r, conv.in_channels, *conv.kernel_size),
            "lora_B.weight": (N, r // conv.groups, *ones),
            **({"lora_B.bias": (N,)} if lora_bias else {}),
            **({MAGNITUDE: (1, N, *ones)} if use_dora else {}),
        }

    @classmethod
    def check_adapter(cls, base_layer: nn.Module, config: LoRAConfig) -> None:
        super().check_adapter(base_layer, config)
        start = config.init_lora_weights
        if base_layer.groups != 1 and start not in (True, False, "kaiming", "gaussian"):
            raise ValueError(f"init_lora_weights={start!r} needs groups=1; got groups={base_layer.groups}")

    def _add_parameters(self, name: str, r: int, lora_bias: bool, pooled: int, **factory: Any) -> None:
        base: Any = self.base_layer
        like = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
        skip_init: Any = torch.nn.utils.skip_init
        self.lora_A[name] = skip_init(self.BASE, base.in_channels, r, base.kernel_size, bias=False, **like, **factory)
        self.lora_B[name] = skip_init(self.BASE, r, base.out_channels, 1, groups=base.groups, bias=lora_bias, **factory)

    def _matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flatten(1)

    def _from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.view_as(self.weight)

    def _check_mergeable(self) -> None:
        if self.base_layer.groups != 1:
            raise ValueError(
                f"the base convolution has groups={self.base_layer.groups}: its adapters mix all input channels, "
                "which no grouped weight does, so they cannot be merged"
            )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As the base layer: [B, in_channels, ...] to [B, out_channels, ...], with or without the batch."""
        x = input  # torch's name
        if (ran := self.ran) is not None:  # read once: another thread may end it
            ran.add(self)
        if self.merged:
            self._refuse_training_while_merged()
            return self.base_layer(x)
        scales, base_scale = self._row_scales()
        if base_scale is None:
            y = self.base_layer(x)
        else:
            y = self._scaled_base(x, base_scale)
        for name, row_scale in scales.items():
            y = (y + self._low_rank(x, name, row_scale)).to(y.dtype)
        return y

    def _scaled_base(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        base: Any = self.base_layer
        watched = runs_more_than_forward(base)
        if watched:
            y = base(x)
        else:
            y = scale_product(self._per_channel(scale), lambda x: base._conv_forward(x, base.weight, None), x)
        bias = 0 if base.bias is None else self._per_channel(base.bias).to(y.dtype)
        return (y - bias) * self._per_channel(scale).to(y.dtype) + bias if watched else y + bias

    def _per_channel(self, vector: torch.Tensor) -> torch.Tensor:
        """[out_channels] to be multiplied with an output, batched or not."""
        return vector.view(-1, *(1,) * (self.weight.dim() - 2))

    def _low_rank(self, x: torch.Tensor, name: str, row_scale: torch.Tensor | None) -> torch.Tensor:
        A: Any = self.lora_A[name]
        B: Any = self.lora_B[name]
        adapter = self.adapters[name]
        factor = adapter.scaling if row_scale is None else adapter.scaling * row_scale
        if isinstance(factor, torch.Tensor):
            factor = factor.view(-1, *(1,) * (self.weight.dim() - 1))
        # The scaling goes into B, [out_channels, r], and not into the update, an output's size.
        weight, bias = B.weight * factor, B.bias * adapter.scaling if adapter.lora_bias else None
        dropped = F.dropout(x, adapter.lora_dropout, self.training)
        low = low_rank_dtype(x.dtype)
        s = A._conv_forward(dropped.to(low), A.weight.to(low), None)
        return B._conv_forward(s, weight.to(low), None if bias is None else bias.to(low))

    def extra_repr(self) -> str:
        base: Any = self.base_layer
        return f"{base.in_channels}, {base.out_channels}, kernel_size={base.kernel_size}, {super().extra_repr()}"


class LoRAConv1d(_LoRAConv):
    __doc__ = _LoRAConv.__doc__
    BASE = nn.Conv1d


class LoRAConv2d(_LoRAConv):
    __doc__ = _LoRAConv.__doc__
    BASE = nn.Conv2d


class LoRAConv3d(_LoRAConv):
    __doc__ = _LoRAConv.__doc__
    BASE = nn.Conv3d
