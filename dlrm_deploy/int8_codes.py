"""The numbers of int8 MLPs: weights as codes with a scale for each row, inputs as codes with a step for each sample.

A value is code * scale, or code * step, with codes in [-127, 127]: symmetric, so that sums of products need
no correction. docs/operators.md specifies the arithmetic (MlpInt8). Rows of tables in int8 are something else
(`dlrm_deploy.formats`): they have a bias, and a float16 scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.errors import FormatError

FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.int8]

LARGEST_CODE = 127
LEAST_SIZE = float(np.float32(1e-30))
"""Samples whose largest value is below this have codes 0, and rows whose scale is below it have scale 1."""

MOST_INPUTS = 131_072
"""Of a layer: sums of that many products of codes cannot leave int32."""

EXACT_IN_FLOAT32 = 2**24 // LARGEST_CODE**2
"""Inputs of a layer up to which sums of products of codes are exact in float32, in any order; beyond, in float64."""


def quantize_weight(weight: FloatArray, where: str = "") -> tuple[CodeArray, FloatArray]:
    """Codes and scales of a layer's weight.

    scale = largest magnitude of the row / 127, or 1 where that is below `LEAST_SIZE`; a code is weight / scale, rounded
    to the nearest whole number, ties to even, and limited to [-127, 127]. All steps in float32.

    Args:
        weight: [N, K] float32.
        where: what it is, for error messages.

    Returns:
        Codes [N, K] int8 and scales [N] float32.

    Raises:
        FormatError: another type, rank or number of inputs than an int8 layer can have; or NaN or an infinity, named
            with its row.
    """
    name = where or "the weight"
    if weight.dtype != np.float32 or weight.ndim != 2 or not 1 <= weight.shape[1] <= MOST_INPUTS:
        raise FormatError(
            f"{name}: an int8 layer has a float32 weight [N, K] of 1 to {MOST_INPUTS} inputs K, got {weight.dtype} "
            f"{weight.shape}. Keep the MLPs in fp32 or bf16."
        )
    bad: npt.NDArray[np.bool_] = ~np.isfinite(weight)
    if bad.any():
        row, column = divmod(int(np.argmax(bad)), weight.shape[1])
        raise FormatError(
            f"{name}, row {row}: int8 cannot store the value {weight[row, column]:.9g} of input {column}; it stores "
            "finite values only. Keep the MLPs in fp32 or bf16, or clean the checkpoint."
        )
    scales = np.abs(weight).max(axis=1) / np.float32(LARGEST_CODE)
    scales[scales < np.float32(LEAST_SIZE)] = 1
    codes = np.clip(np.rint(weight / scales[:, None]), -LARGEST_CODE, LARGEST_CODE)
    return codes.astype(np.int8), scales


def dequantize_weight(codes: CodeArray, scales: FloatArray) -> FloatArray:
    """The weight [N, K] float32 that codes [N, K] and scales [N] stand for, each value rounded once.

    That of the largest float32 is infinite.
    """
    with np.errstate(over="ignore"):
        values: npt.NDArray[Any] = codes * scales[:, None]
    return values


def quantize_samples(x: FloatArray) -> tuple[CodeArray, FloatArray]:
    """Codes and steps of a layer's input.

    With `largest` the largest magnitude of a sample: step = largest / 127; inverse = 127 / largest, or 0 where largest
    is below `LEAST_SIZE`; a code is x * inverse, rounded to the nearest whole number, ties to even. All steps in
    float32. A sample that holds NaN or an infinity has codes 0 and step NaN.

    Args:
        x: [B, K] float32.

    Returns:
        Codes [B, K] int8 and steps [B] float32.
    """
    finite: npt.NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(x), axis=1, keepdims=True)
    kept = np.where(finite, x, np.float32(0))
    largest: FloatArray = np.abs(kept).max(axis=1, keepdims=True)
    counts = largest >= np.float32(LEAST_SIZE)
    inverse = np.where(counts, np.float32(LARGEST_CODE) / np.where(counts, largest, np.float32(1)), np.float32(0))
    steps = np.where(finite, largest / np.float32(LARGEST_CODE), np.float32(np.nan))
    return np.rint(kept * inverse).astype(np.int8), steps[:, 0]
