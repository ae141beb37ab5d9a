"""What a layer of an MLP computes in each number format, and how it rounds its input.

Layers take and give float32: what a format rounds is rounded to float32 values of that format. The model holds weights
that are rounded already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from dlrm_deploy.int8_codes import dequantize_weight, quantize_weight
from dlrm_deploy.ops.torch_int8 import code_type, int8_linear, quantize_samples

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A linear layer: input [B, in], weight [out, in] and bias [out] to [B, out], all float32."""

_BF16_DIGITS = 8
"""Bits of a bfloat16 number's significand."""


def to_bf16(x: Tensor) -> Tensor:
    """The nearest bfloat16 numbers, ties to even, as float32."""
    return x.bfloat16().float()


def bf16_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer whose input is rounded to bfloat16, with sums in float32. Its weight is rounded already."""
    return F.linear(to_bf16(x), weight, bias)


class Int8Layer:
    """The layers of `MlpInt8`, bit for bit. Codes and scales are kept beside the weights that they belong to."""

    def __init__(self) -> None:
        self._codes: dict[int, tuple[Tensor, Tensor]] = {}

    def store(self, weight: Tensor, values: npt.NDArray[np.float32], where: str) -> None:
        """Round `values` [N, K] to codes and scales, and put what they stand for into `weight`, to stay there.

        Raises:
            FormatError: values that int8 cannot store; `where` names them.
        """
        codes, scales = quantize_weight(values, where)
        weight.copy_(torch.from_numpy(dequantize_weight(codes, scales)))
        self._codes[weight.data_ptr()] = (
            torch.from_numpy(codes).to(code_type(codes.shape[1])),
            torch.from_numpy(scales),
        )

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return int8_linear(x, *self._codes[weight.data_ptr()], bias)


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a number format rounds the input [B, K] of a layer. Both functions give [B, K] float32."""

    rounded: Callable[[Tensor], Tensor]
    """The values that the layer multiplies."""

    spacing: Callable[[Tensor], Tensor]
    """Distance of the numbers around each value; 0 at 0, where a ReLU puts the values of every engine."""


def _bf16_spacing(x: Tensor) -> Tensor:
    spacing = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - _BF16_DIGITS)
    return torch.where(x == 0, 0, spacing)


def _to_int8(x: Tensor) -> Tensor:
    codes, step = quantize_samples(x)
    return codes * step


def _int8_spacing(x: Tensor) -> Tensor:
    _, step = quantize_samples(x)
    return torch.where(x == 0, 0, step)


ROUNDINGS: Mapping[str, Rounding] = {
    "bf16": Rounding(to_bf16, _bf16_spacing),
    "int8": Rounding(_to_int8, _int8_spacing),
}
"""Of each number format of MLPs but fp32."""
