"""How far one output is from its reference: facts, no verdict words. NaN never passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.errors import EngineError

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class OutputParity:
    """How far an output [B] is from its reference, in the output's own unit."""

    rows: int
    """B."""

    max_abs: float
    """Largest absolute difference over the rows where both are finite; 0 where there are none."""

    max_rel: float
    """Largest difference relative to the reference's size, over the same rows."""

    worst_row: int | None
    """First row that is not finite, else the row of `max_abs`; None where all are equal."""

    nonfinite: int
    """Rows that are NaN or infinite in the output or in the reference."""

    limit: float

    @property
    def passed(self) -> bool:
        return self.nonfinite == 0 and self.max_abs <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every value is finite."""
        return {
            "rows": self.rows,
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "worst_row": self.worst_row,
            "nonfinite": self.nonfinite,
            "limit": self.limit,
        }


def compare(actual: FloatArray, expected: FloatArray, limit: float) -> OutputParity:
    """Compare two outputs [B].

    Args:
        actual: of the engine.
        expected: of the reference.
        limit: absolute difference to accept.

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
    worst: int | None = None
    if not finite.all():
        worst = int(np.argmin(finite))
    elif difference.any():
        worst = int(np.argmax(difference))
    return OutputParity(
        rows=expected.size,
        max_abs=float(difference.max(initial=0.0)),
        max_rel=float(relative.max(initial=0.0)),
        worst_row=worst,
        nonfinite=int((~finite).sum()),
        limit=limit,
    )
