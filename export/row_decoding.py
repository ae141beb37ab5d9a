"""Standard operators that decode stored rows to float32, bit for bit as `dlrm_deploy.formats.decode` does.

Standard ONNX has no cast of bytes to float16. A float16 of the bytes low and high is a[high] + low * u[high], with a
and u from tables of 256 numbers: products and sum are exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from onnx import TensorProto

from dlrm_deploy.export.nodes import Nodes
from dlrm_deploy.formats import RowFormat, stored_columns

StoredAs = Literal["uint8", "int8", "int32"]
"""Type of the tensor of int8 and int4 rows: bytes, bytes read as signed numbers, or four bytes in a number, the first
one least significant."""

Decode = Callable[[Nodes, RowFormat, str, int], str]
"""Writes what decodes gathered rows: format, rows [..., columns], width D; gives the name of [..., D] float32."""


def decode_rows(n: Nodes, format: RowFormat, gathered: str, width: int, stored_as: StoredAs = "uint8") -> str:
    """The float32 values of gathered rows.

    Args:
        n: where the nodes go.
        format: of the rows.
        gathered: name of the rows [..., columns], of any rank, in float32, float16, bfloat16, or as `stored_as` says.
        width: D.
        stored_as: how int8 and int4 rows are given. As int32 their bytes must be a multiple of 4, and [..., columns]
            is [..., bytes / 4].

    Returns:
        Name of the values [..., D] float32.

    Raises:
        ValueError: rows that are no multiple of 4 bytes cannot be int32.
    """
    if format == "fp32":
        return gathered
    if format in ("fp16", "bf16"):
        return n.op("Cast", gathered, to=TensorProto.FLOAT)
    columns = stored_columns(format, width)
    byte = _bytes(n, gathered, columns, stored_as)
    codes = _columns(n, byte, 0, columns - 4)
    if format == "int4":
        high = n.op("Floor", n.op("Mul", codes, n.constant(1 / 16, np.float32)))
        low = n.op("Sub", codes, n.op("Mul", high, n.constant(16, np.float32)))
        codes = _flatten_last(n, [low, high], gathered, 2 * (columns - 4))
        if width % 2:
            codes = _columns(n, codes, 0, width)
    halves = _halves(n, byte, columns - 4)
    scale, bias = _columns(n, halves, 0, 1), _columns(n, halves, 1, 2)
    return n.op("Add", n.op("Mul", codes, scale), bias)


def _bytes(n: Nodes, gathered: str, columns: int, stored_as: StoredAs) -> str:
    """[..., columns] numbers from 0 to 255, float32."""
    if stored_as == "uint8":
        return n.op("Cast", gathered, to=TensorProto.FLOAT)
    if stored_as == "int8":
        signed = n.op("Cast", gathered, to=TensorProto.FLOAT)
        wrapped = n.op("Add", signed, n.constant(256, np.float32))
        return n.op("Where", n.op("Less", signed, n.constant(0, np.float32)), wrapped, signed)
    if columns % 4:
        raise ValueError(f"rows of {columns} bytes cannot be read as int32")
    step = n.constant(256, np.int32)
    pieces = []
    rest = gathered
    for place in range(4):
        piece = n.op("Mod", rest, step)  # from 0 to 255 for negative numbers too
        pieces.append(n.op("Cast", piece, to=TensorProto.FLOAT))
        if place < 3:
            rest = n.op("Div", n.op("Sub", rest, piece), step)
    return _flatten_last(n, pieces, gathered, columns)


def _flatten_last(n: Nodes, pieces: list[str], like: str, columns: int) -> str:
    """[..., columns] of [..., columns / P] each, element by element in turn; leading dimensions are those of `like`."""
    last = n.constant([-1])
    side_by_side = n.op("Concat", *(n.op("Unsqueeze", piece, last) for piece in pieces), axis=-1)
    shape = n.op("Concat", n.op("Shape", like, end=-1), n.constant([columns]), axis=0)
    return n.op("Reshape", side_by_side, shape, allowzero=1)


def _halves(n: Nodes, byte: str, first: int) -> str:
    """[..., 2]: scale and bias, from the four bytes that begin at column `first`."""
    low = n.op("Gather", byte, n.constant([first, first + 2]), axis=-1)
    high = n.op("Gather", byte, n.constant([first + 1, first + 3]), axis=-1)
    place = n.op("Cast", high, to=TensorProto.INT32)
    offsets, units = _half_tables()
    offset = n.op("Gather", n.constant(offsets, np.float32), place)
    unit = n.op("Gather", n.constant(units, np.float32), place)
    return n.op("Add", n.op("Mul", low, unit), offset)


def _half_tables() -> tuple[np.ndarray[tuple[int], np.dtype[np.float32]], ...]:
    """[256] each, by the high byte: the float16 whose low byte is 0, and what 1 in the low byte adds to it."""
    patterns = np.arange(256, dtype=np.uint16) << 8
    offsets = patterns.view(np.float16).astype(np.float32)
    with np.errstate(invalid="ignore"):  # infinities and NaN, which no encoded row has
        units = (patterns + 1).view(np.float16).astype(np.float32) - offsets
    return offsets, units


def _columns(n: Nodes, x: str, first: int, last: int) -> str:
    return n.op("Slice", x, n.constant([first]), n.constant([last]), n.constant([-1]))
