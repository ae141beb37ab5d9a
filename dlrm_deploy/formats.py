"""Row formats: how the rows of a table are stored, from float32 down to four bits a value.

A format is chosen per table part. Parts of one table group that share a format lie one after the other in one matrix,
so a group has at most one matrix a format (`GroupLayout`). `encode` and `decode` say what each format holds; every
engine decodes to the same bits. Rows are independent: tables larger than memory are encoded in blocks of rows.

int8 and int4 rows are those of FBGEMM ("FusedNBitRowwiseQuantizedSBHalf"): codes, then scale and bias as float16,
little endian. A value is code * scale + bias, where the product is exact in float32, so that one fused operation and
two separate ones give the same bits. Scale and bias lie behind the codes and not in arrays of their own: a row that is
read at random then costs one or two cache lines and one TLB entry instead of two of each.

Source of the row arithmetic: `FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf` of FBGEMM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from dlrm_deploy.errors import FormatError
from dlrm_deploy.tables import TableGroup, TablePart

RowFormat = Literal["fp32", "fp16", "bf16", "int8", "int4"]

ROW_FORMATS: tuple[RowFormat, ...] = get_args(RowFormat)
"""The position of a format is its value in the operators' attribute `formats`."""

FloatArray = npt.NDArray[np.float32]
StoredArray = npt.NDArray[Any]

_TAIL = 4  # bytes of scale and bias behind the codes
_BLOCK = 1 << 16  # values encoded at a time: what is computed on the way stays in the cache
_DTYPES: dict[RowFormat, np.dtype[Any]] = {
    "fp32": np.dtype("<f4"),
    "fp16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "int8": np.dtype("u1"),
    "int4": np.dtype("u1"),
}


def stored_dtype(format: RowFormat) -> np.dtype[Any]:
    """NumPy's type of a stored matrix; bf16 as uint16 bit patterns."""
    _check_format(format)
    return _DTYPES[format]


def stored_columns(format: RowFormat, width: int) -> int:
    """Columns of a stored matrix of rows of `width` values: values, or bytes in int8 and int4."""
    _check_format(format)
    if format == "int8":
        return width + _TAIL
    if format == "int4":
        return (width + 1) // 2 + _TAIL
    return width


def row_bytes(format: RowFormat, width: int) -> int:
    """Bytes of one row of `width` values."""
    return stored_columns(format, width) * stored_dtype(format).itemsize


def tensor_name(group: str, format: RowFormat) -> str:
    """Name of a matrix of a table group in the ONNX graph."""
    _check_format(format)
    return f"tables_{group}" if format == "fp32" else f"tables_{group}_{format}"


def file_name(group: str, format: RowFormat) -> str:
    """File of a matrix of a table group, relative to the bundle."""
    _check_format(format)
    return f"tables/{group}.bin" if format == "fp32" else f"tables/{group}.{format}.bin"


def encode(format: RowFormat, rows: FloatArray, where: str = "", first_row: int = 0) -> StoredArray:
    """Store rows in a format; each value and each row on its own, so blocks of rows may be encoded one by one.

    fp16, bf16: the nearest value, ties to even; NaN and infinities stay what they are. int8, int4, with C = 255 or 15:
    bias = float16(least value); scale = float16((largest value - bias) / C), or 1 where that is 0; a code is
    (value - bias) * (1 / scale), rounded to the nearest whole number, ties to even, and limited to [0, C]. All steps in
    float32. A scale below 0 occurs where the bias was rounded up beyond the largest value.

    Args:
        format: one of `ROW_FORMATS`.
        rows: [R, D] float32.
        where: what the rows are, for error messages, such as "table 'user'".
        first_row: number of the first row, for error messages.

    Returns:
        [R, D] float32, float16 or, for bf16, uint16 bit patterns; for int8 and int4 [R, row_bytes] uint8, where
        element 2k of an int4 row is in the low half of byte k. fp32 rows are returned as they are, without a copy.

    Raises:
        FormatError: `rows` is of another type or rank; or a value cannot be stored: NaN or infinity in int8 and int4, a
            finite value beyond the largest of fp16 or bf16, a row whose scale or bias is beyond float16.
    """
    _check_format(format)
    if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] < 1:
        raise FormatError(f"{_prefix(where)}rows must be float32 [R, D], got {rows.dtype} {rows.shape}.")
    if format == "fp32":
        return rows
    stored = np.empty((len(rows), stored_columns(format, rows.shape[1])), stored_dtype(format))
    step = max(1, _BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        _ENCODERS[format](block, stored[start : start + step], _Refusal(format, where, first_row + start))
    return stored


def decode(format: RowFormat, stored: StoredArray, width: int) -> FloatArray:
    """The float32 values [R, `width`] of stored rows: what every engine computes with.

    Args:
        format: one of `ROW_FORMATS`.
        stored: as `encode` returns it.
        width: D; of int4 rows the stored columns alone do not tell it.

    Raises:
        FormatError: `stored` has another type or shape than rows of this format and width have.
    """
    expected = stored_dtype(format)
    columns = stored_columns(format, width)
    if stored.dtype != expected or stored.ndim != 2 or stored.shape[1] != columns:
        raise FormatError(
            f"{format} rows of {width} values are {expected} [R, {columns}], got {stored.dtype} {stored.shape}."
        )
    if format == "fp32":
        return stored
    if format == "fp16":
        return stored.astype(np.float32)
    if format == "bf16":
        return from_bf16(stored)
    codes = stored[:, :-_TAIL]
    if format == "int4":
        halves = np.empty((len(stored), 2 * codes.shape[1]), np.uint8)
        halves[:, 0::2] = codes & 15
        halves[:, 1::2] = codes >> 4
        codes = halves[:, :width]
    tail = np.ascontiguousarray(stored[:, -_TAIL:]).view("<f2").astype(np.float32)
    values = codes.astype(np.float32)
    with np.errstate(invalid="ignore"):  # scale or bias of damaged rows may be infinite or NaN
        values *= tail[:, :1]
        values += tail[:, 1:]
    return values


def to_bf16(values: FloatArray) -> npt.NDArray[np.uint16]:
    """Bit patterns of the nearest bfloat16, ties to even, of any shape but []; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    patterns = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        patterns[nan] = (bits[nan] >> 16) | 0x40
    return patterns


def from_bf16(patterns: npt.NDArray[np.uint16]) -> FloatArray:
    """The float32 values of bfloat16 bit patterns, of any shape."""
    widened = patterns.astype(np.uint32)
    widened <<= 16
    return widened.view(np.float32)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Names the first row that holds a bad value."""

    format: RowFormat
    where: str
    first_row: int

    def __call__(self, bad: npt.NDArray[np.bool_], values: FloatArray, reason: str, what: str = "the value") -> None:
        if not bad.any():
            return
        row, column = divmod(int(np.argmax(bad)), bad.shape[1])
        raise FormatError(
            f"{_prefix(self.where)}row {self.first_row + row}: {self.format} cannot store {what} "
            f"{values[row, column]:.9g}; {reason}. "
            "Keep this table in fp32 (tables `auto` does), or clean the checkpoint."
        )


def _encode_fp16(rows: FloatArray, stored: StoredArray, refuse: _Refusal) -> None:
    with np.errstate(over="ignore"):
        stored[:] = rows
    refuse(np.isinf(stored) & np.isfinite(rows), rows, "its largest value is 65504")


def _encode_bf16(rows: FloatArray, stored: StoredArray, refuse: _Refusal) -> None:
    stored[:] = to_bf16(rows)
    refuse(((stored & 0x7FFF) == 0x7F80) & np.isfinite(rows), rows, "its largest value is 3.3895e38")


def _quantize(rows: FloatArray, stored: StoredArray, refuse: _Refusal, most: int) -> None:
    """Write codes from 0 to `most`, 255 in a byte each or 15 in half a byte, scale and bias."""
    with np.errstate(over="ignore", invalid="ignore"):
        least, largest = _over_columns(np.minimum, rows), _over_columns(np.maximum, rows)
        half_biases = least.astype("<f2")
        biases = half_biases.astype(np.float32)
        ranges = largest - biases
        half_scales = (ranges / np.float32(most)).astype("<f2")
    if not (np.isfinite(half_biases).all() and np.isfinite(half_scales).all()):
        refuse(~np.isfinite(rows), rows, "it stores finite values only")
        refuse(~np.isfinite(half_biases), least, "the least value of a row becomes its bias, a float16")
        refuse(
            ~np.isfinite(half_scales), ranges, f"a row's range over {most} becomes its scale, a float16", "the range"
        )
    half_scales[half_scales == 0] = 1
    scaled = rows - biases
    scaled *= np.float32(1) / half_scales.astype(np.float32)
    np.rint(scaled, out=scaled)
    np.clip(scaled, 0, most, out=scaled)
    if most == 255:
        stored[:, :-_TAIL] = scaled
    else:
        codes = scaled.astype(np.uint8)
        stored[:, :-_TAIL] = codes[:, 0::2]
        stored[:, : codes.shape[1] // 2] |= codes[:, 1::2] << 4
    stored[:, -_TAIL:] = np.concatenate([half_scales, half_biases], axis=1).view(np.uint8)


def _over_columns(reduce: np.ufunc, rows: FloatArray) -> FloatArray:
    """[R, 1]. By halves: NumPy reduces short rows one by one."""
    while (width := rows.shape[1]) > 1:
        half = reduce(rows[:, : width // 2], rows[:, width // 2 : width // 2 * 2])
        if width % 2:
            reduce(half[:, :1], rows[:, -1:], out=half[:, :1])
        rows = half
    return rows


_ENCODERS: dict[RowFormat, Callable[[FloatArray, StoredArray, _Refusal], None]] = {
    "fp16": _encode_fp16,
    "bf16": _encode_bf16,
    "int8": partial(_quantize, most=255),
    "int4": partial(_quantize, most=15),
}


def _prefix(where: str) -> str:
    return f"{where}: " if where else ""


def _check_format(format: str) -> None:
    if format not in ROW_FORMATS:
        raise FormatError(f"row format must be one of {', '.join(ROW_FORMATS)}, got {format!r}.")


@dataclass(frozen=True, slots=True)
class Matrix:
    """One stored matrix of a table group: its parts of one format, one after the other in the group's order."""

    format: RowFormat
    rows: int
    row_bytes: int
    parts: tuple[TablePart, ...]

    @property
    def bytes(self) -> int:
        """Size in memory and on disk."""
        return self.rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """How a table group is stored: in one matrix for each format that its parts have."""

    matrices: tuple[Matrix, ...]
    """In the order of `ROW_FORMATS`, only those that have rows."""

    places: Mapping[str, tuple[RowFormat, int]]
    """Format and first row, in that format's matrix, of each part by its name."""

    @classmethod
    def of(cls, group: TableGroup, formats: Mapping[str, RowFormat] | None = None) -> GroupLayout:
        """The layout of a group whose parts have these formats, by their names; fp32 where one is missing.

        Names of other groups' parts may be among them.

        Raises:
            FormatError: an unknown format.
        """
        chosen = {part.name: (formats or {}).get(part.name, "fp32") for part in group.parts}
        for format in chosen.values():
            _check_format(format)
        matrices = []
        places: dict[str, tuple[RowFormat, int]] = {}
        for format in ROW_FORMATS:
            parts = tuple(part for part in group.parts if chosen[part.name] == format)
            rows = 0
            for part in parts:
                places[part.name] = format, rows
                rows += part.rows
            if parts:
                matrices.append(Matrix(format, rows, row_bytes(format, group.width), parts))
        return cls(tuple(matrices), places)

    def place(self, part: str) -> tuple[RowFormat, int]:
        """Format of a part, and its first row in that format's matrix.

        Raises:
            KeyError: the group has no part of that name.
        """
        return self.places[part]

    @property
    def formats(self) -> tuple[RowFormat, ...]:
        """Formats of the matrices, in their order."""
        return tuple(matrix.format for matrix in self.matrices)

    @property
    def bytes(self) -> int:
        """Size of all matrices."""
        return sum(matrix.bytes for matrix in self.matrices)
