"""Which row format a table gets: the one asked for by name, or the one that pays (`auto`).

The rule of `auto`, and the figures behind it, are in docs/precision.md. It measures what a format does to every row of
the table; of a format asked for by name the conversion measures it while it writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from dlrm_deploy.errors import FormatError
from dlrm_deploy.formats import RowFormat, decode, encode, row_bytes
from dlrm_deploy.tables import TablePart

Tables = Literal["fp32", "fp16", "bf16", "int8", "int4", "auto"]
TABLES: tuple[Tables, ...] = get_args(Tables)

LINE = 64
"""Bytes of a cache line: what a random read costs, however few of them are wanted."""

LEAST_SAVING = 1 << 20
"""`auto` leaves a table alone that would give back fewer bytes: it stays in a core's cache anyway."""

MOST_LINES = 0.8
"""`auto` takes a format where its rows touch at most this share of the cache lines that fp32 rows touch."""

MOST_ERROR = 0.01
"""Relative RMS error that `auto` accepts. int8 of evenly spread rows makes 0.4 %, of normal ones 0.6 %."""

AUTO_FORMATS: tuple[RowFormat, ...] = ("int8", "fp16")
"""What `auto` tries, in this order. int4 costs accuracy that only the model's owner can judge: by name only."""

_BLOCK_VALUES = 1 << 20

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TableError:
    """How far stored rows are from the float32 ones."""

    relative_rms: float
    """Root of the mean squared error over that of the mean squared value; 0 where there is no error."""

    max_abs: float


@dataclass(frozen=True, slots=True)
class TableChoice:
    """The format of one table part."""

    format: RowFormat
    error: TableError | None
    """None where nothing is lost, or where it is not measured yet."""

    reason: str

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        error = {"relative_rms": self.error.relative_rms, "max_abs": self.error.max_abs} if self.error else {}
        return {"format": self.format, **error, "reason": self.reason}


class ErrorSum:
    """Adds up the errors of a table block by block."""

    def __init__(self) -> None:
        self._error = self._size = self._largest = 0.0

    def add(self, rows: FloatArray, stored_rows: FloatArray) -> None:
        """The next rows [n, D] and what is stored of them; values that are not finite count nothing."""
        kept = np.isfinite(rows)
        exact = np.where(kept, rows, 0).astype(np.float64)
        difference = np.where(kept, stored_rows, 0) - exact
        self._error += float(np.vdot(difference, difference))
        self._size += float(np.vdot(exact, exact))
        self._largest = max(self._largest, float(np.abs(difference).max(initial=0)))

    def finish(self) -> TableError:
        """Of all rows."""
        relative = math.sqrt(self._error / self._size) if self._error else 0.0
        return TableError(relative, self._largest)


@dataclass(frozen=True, slots=True)
class PartRows:
    """The float32 rows of one table part in a file. Read, not mapped: what was read does not stay in memory."""

    part: TablePart
    path: Path
    row_start: int
    """First row of the part in the file."""

    def blocks(self) -> Iterator[tuple[int, FloatArray]]:
        """First row and rows [n, D] of each block."""
        width = self.part.width
        step = max(1, _BLOCK_VALUES // width)
        with self.path.open("rb") as file:
            file.seek(self.row_start * width * 4)
            for first in range(0, self.part.rows, step):
                count = min(step, self.part.rows - first)
                yield first, np.fromfile(file, "<f4", count * width).reshape(count, width)


def choose(tables: Tables, rows: PartRows) -> TableChoice:
    """The format of a table part.

    Args:
        tables: a format by name, which a row may turn out not to fit, or auto.
        rows: of the part.
    """
    if tables == "auto":
        return _auto(rows)
    if tables == "fp32":
        return TableChoice("fp32", None, "asked for")
    if (reason := no_smaller(tables, rows.part.width)) is not None:
        return TableChoice("fp32", None, reason)
    return TableChoice(tables, None, "asked for")


def no_smaller(kind: RowFormat, width: int) -> str | None:
    """Why a format is of no use at a width; None where it makes rows smaller."""
    was, now = row_bytes("fp32", width), row_bytes(kind, width)
    return None if now < was else f"a row of {kind} takes {now} bytes, of fp32 {was}"


def _auto(rows: PartRows) -> TableChoice:
    part, reasons = rows.part, list[str]()
    for kind in AUTO_FORMATS:
        reason = no_smaller(kind, part.width) or _no_gain(kind, part)
        if reason is None:
            try:
                error = measure(kind, rows)
            except FormatError as err:
                reason = str(err).split(". ")[0]
            else:
                if error.relative_rms <= MOST_ERROR:
                    return TableChoice(kind, error, "; ".join([*reasons, _gain(kind, part)]))
                reason = f"{kind} makes a relative RMS error of {error.relative_rms:.2g}"
        reasons.append(reason)
    return TableChoice("fp32", None, "; ".join(dict.fromkeys(reasons)))


def _no_gain(kind: RowFormat, part: TablePart) -> str | None:
    """Why a format does not pay for a table; None where it does."""
    saved = part.rows * (row_bytes("fp32", part.width) - row_bytes(kind, part.width))
    if saved < LEAST_SAVING:
        return f"{kind} would save {saved} bytes"
    was, now = (lines(row_bytes(name, part.width)) for name in ("fp32", kind))
    return None if now <= MOST_LINES * was else f"a row of {kind} touches {now:.2f} cache lines, of fp32 {was:.2f}"


def _gain(kind: RowFormat, part: TablePart) -> str:
    was, now = (row_bytes(name, part.width) for name in ("fp32", kind))
    return f"{now} bytes a row instead of {was}, {lines(now):.2f} cache lines instead of {lines(was):.2f}"


def lines(size: int) -> float:
    """Cache lines that a row of `size` bytes touches, on average over the rows of a matrix that begins at a line."""
    period = LINE // math.gcd(size, LINE)
    starts = np.arange(period) * size
    return float(np.mean((starts + size - 1) // LINE - starts // LINE + 1))


def measure(kind: RowFormat, rows: PartRows) -> TableError:
    """What a format does to the rows of a table part.

    Raises:
        FormatError: a row cannot be stored.
    """
    total = ErrorSum()
    for first, block in rows.blocks():
        stored = encode(kind, block, f"table {rows.part.name!r}", first)
        total.add(block, decode(kind, stored, rows.part.width))
    return total.finish()
