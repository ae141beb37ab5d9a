"""How far one output is from its reference: facts, no verdict words. NaN never passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.errors import EngineError
from dlrm_deploy.model.rounding import LEAST_LIMIT

FloatArray = npt.NDArray[np.float32]

ULP_FLOOR = LEAST_LIMIT
"""Units in the last place are counted where the reference is at least this. Two values below it, which no limit tells
apart, can be millions of units apart: an engine whose sigmoid ends at 1e-8 is right, and so far away."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Difference of probabilities to accept."""

    most: float
    """Of any sample."""

    rms: float | None = None
    """Root mean square over a batch; None where any is accepted."""


@dataclass(frozen=True, slots=True)
class OutputParity:
    """How far an output [B] is from its reference, in the output's own unit."""

    rows: int
    """B."""

    max_abs: float
    """Largest absolute difference over the rows where both are finite; 0 where there are none."""

    max_rel: float
    """Largest difference relative to the reference's size, over the same rows."""

    max_ulp: int
    """Largest distance in units in the last place of float32, over the `ulp_rows`."""

    mean_ulp: float
    """Mean of the same."""

    ulp_rows: int
    """Rows where both are finite and the reference is `ULP_FLOOR` or more in size."""

    worst_row: int | None
    """First row that is not finite, else the row of `max_abs`; None where all are equal."""

    nonfinite: int
    """Rows that are NaN or infinite in the output or in the reference."""

    limit: float
    """Of `max_abs`."""

    rms: float = 0.0
    """Root mean square of the differences, over the same rows as `max_abs`."""

    rms_limit: float | None = None
    """Of `rms`; None where any is accepted."""

    @property
    def passed(self) -> bool:
        typical = self.rms_limit is None or self.rms <= self.rms_limit
        return self.nonfinite == 0 and self.max_abs <= self.limit and typical

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every value is finite."""
        return {
            "rows": self.rows,
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "max_ulp": self.max_ulp,
            "mean_ulp": self.mean_ulp,
            "ulp_rows": self.ulp_rows,
            "worst_row": self.worst_row,
            "nonfinite": self.nonfinite,
            "limit": self.limit,
            "rms": self.rms,
            "rms_limit": self.rms_limit,
        }


def compare(actual: FloatArray, expected: FloatArray, limit: float, rms_limit: float | None = None) -> OutputParity:
    """Compare two outputs [B].

    Args:
        actual: of the engine.
        expected: of the reference.
        limit: absolute difference to accept.
        rms_limit: root mean square of the differences to accept; None for any.

    Raises:
        EngineError: the shapes differ, or `actual` is not float32.
    """
    if actual.shape != expected.shape or actual.dtype != np.float32:
        raise EngineError(
            f"the output is {actual.dtype} {actual.shape}, expected float32 {expected.shape}: one value per sample."
        )
    finite = np.isfinite(actual) & np.isfinite(expected)
    # Differences of float32 numbers are exact enough in float64 not to add an error of their own.
    compared = expected[finite].astype(np.float64)
    difference = np.abs(actual[finite] - compared)
    relative = difference / np.maximum(np.abs(compared), np.finfo(np.float32).tiny)
    counted = finite & (np.abs(expected) >= ULP_FLOOR)
    ulp = ulp_distance(actual[counted], expected[counted])
    worst: int | None = None
    if not finite.all():
        worst = int(np.argmin(finite))
    elif difference.any():
        worst = int(np.argmax(difference))
    return OutputParity(
        rows=expected.size,
        max_abs=float(difference.max(initial=0.0)),
        max_rel=float(relative.max(initial=0.0)),
        max_ulp=int(ulp.max(initial=0)),
        mean_ulp=float(ulp.mean()) if ulp.size else 0.0,
        ulp_rows=ulp.size,
        worst_row=worst,
        nonfinite=int((~finite).sum()),
        limit=limit,
        rms=float(np.sqrt(np.mean(difference**2))) if difference.size else 0.0,
        rms_limit=rms_limit,
    )


def ulp_distance(a: FloatArray, b: FloatArray) -> npt.NDArray[np.int64]:
    """How many float32 values lie between `a` and `b`, both finite, counting one end: 0 for equal values and 0.0, -0.0.

    Read as integers, the bits of positive floats are in the order of their values; those of negative ones run
    backwards, and are turned around here.
    """
    distance: npt.NDArray[np.int64] = np.abs(_ordered(a) - _ordered(b))
    return distance


def _ordered(values: FloatArray) -> npt.NDArray[np.int64]:
    bits = np.ascontiguousarray(values).view(np.int32).astype(np.int64)
    return np.asarray(np.where(bits < 0, -(bits & 0x7FFFFFFF), bits))
