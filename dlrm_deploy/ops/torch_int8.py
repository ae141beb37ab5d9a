"""MlpInt8 for PyTorch, without a gradient. Bit for bit `dlrm_deploy.ops.reference.mlp_int8`.

Sums of products of codes are whole numbers, which a floating-point matrix product gives exactly, in any order, while
they stay below 2^24 in float32 or 2^53 in float64. That is much faster than PyTorch's products of integers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dlrm_deploy.int8_codes import EXACT_IN_FLOAT32, LARGEST_CODE, LEAST_SIZE
from dlrm_deploy.ops.contract import check_mlp_int8


def code_type(inputs: int) -> torch.dtype:
    """The type in which sums over that many products of codes are exact."""
    return torch.float32 if inputs <= EXACT_IN_FLOAT32 else torch.float64


def quantize_samples(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B, K] as float32 and steps [B, 1] of a layer's input [B, K] float32 (`int8_codes.quantize_samples`)."""
    finite = x.isfinite().all(1, keepdim=True)
    x = torch.where(finite, x, 0)
    largest = x.abs().amax(1, keepdim=True)
    inverse = torch.where(largest >= LEAST_SIZE, LARGEST_CODE / largest, 0)
    return (x * inverse).round_(), torch.where(finite, largest / LARGEST_CODE, torch.nan)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """One layer, before its ReLU.

    Args:
        x: [B, K] float32.
        weight: [N, K] codes, of `code_type(K)`.
        scale: [N] float32.
        bias: [N] float32.

    Returns:
        [B, N] float32.
    """
    codes, step = quantize_samples(x)
    sums = F.linear(codes.to(weight.dtype), weight).float()
    return sums * step * scale + bias


def mlp_int8(x: Tensor, layers: Sequence[tuple[Tensor, Tensor, Tensor]], relu_last: bool = True) -> Tensor:
    """A chain of dense layers on int8 inputs and weights; docs/operators.md's MlpInt8.

    Args:
        x: [B, K] float32.
        layers: of each layer the codes of its weight [N, K] int8, their scales [N] and the bias [N] float32.
        relu_last: whether a ReLU stands behind the last layer too.

    Returns:
        [B, N of the last layer] float32.

    Raises:
        BatchError: an input breaks the contract.
    """
    check_mlp_int8(x, layers)
    for number, (weight, scale, bias) in enumerate(layers):
        x = int8_linear(x, weight.to(code_type(weight.shape[1])), scale, bias)
        if relu_last or number < len(layers) - 1:
            x = x.relu()
    return x
