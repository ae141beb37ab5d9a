"""Whether engines compute the same, which is what makes their speeds comparable."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dlrm_deploy.bench.rows import Agreement
from dlrm_deploy.errors import EngineError

FloatArray = npt.NDArray[np.float32]

_FAR, _CORRELATION = 0.02, 0.99
"""Of an engine of lower precision: absolute difference of two probabilities, and least correlation of the logits."""

_COARSE_FAR, _COARSE_CORRELATION = 0.1, 0.9
"""Likewise with int4 tables or int8 MLPs."""

_LEAST_SAMPLES = 32
_LEAST_SPREAD = 1e-3


def compare(output: FloatArray, reference: FloatArray) -> Agreement:
    """Compare probabilities [N]; both are free of NaN."""
    logits, expected = _logits(output), _logits(reference)
    spread = float(expected.std())
    correlation = error = None
    if expected.size >= _LEAST_SAMPLES and spread > _LEAST_SPREAD:
        error = float(np.sqrt(np.mean((logits - expected) ** 2)) / spread)
        # A constant output has no correlation with anything.
        correlation = float(np.corrcoef(logits, expected)[0, 1]) if np.ptp(logits) > 0 else 0.0
    return Agreement(
        max_abs_difference=float(np.abs(output - reference).max(initial=0.0)),
        correlation=correlation,
        spread_error=error,
    )


def check(agreement: Agreement, *, name: str, reference: str, tables: str, mlp: str, batch: int, limit: float) -> None:
    """Raise unless two engines compute the same.

    Two float32 engines may differ by `limit`. An engine of lower precision (tables or MLPs) may differ by 0.02 in a
    probability, and its logits have to follow the reference's with a correlation of 0.99; 0.1 and 0.9 with int4 tables
    or int8 MLPs.

    Args:
        agreement: of outputs on a batch.
        name: of the engine.
        reference: of the other.
        tables: row format of its tables, or auto.
        mlp: number format of its MLPs.
        batch: size of the batch, for the message.
        limit: absolute difference of two float32 probabilities.

    Raises:
        EngineError: they do not.
    """
    remedy = f"See what `dlrm-deploy check --engine {name.partition('[')[0]}` says of this bundle."
    if (tables, mlp) == ("fp32", "fp32"):
        if agreement.max_abs_difference > limit:
            raise EngineError(
                f"{name} differs from {reference} by {agreement.max_abs_difference:.2g} on a batch of {batch}, and at "
                f"most {limit:.2g} is rounding: engines that do not compute the same are not compared. {remedy}"
            )
        return
    coarse = tables == "int4" or mlp == "int8"
    far, least = (_COARSE_FAR, _COARSE_CORRELATION) if coarse else (_FAR, _CORRELATION)
    seen = f"{agreement.max_abs_difference:.2g}"
    if agreement.correlation is not None:
        seen += f", correlation of the logits {agreement.correlation:.4f}"
    if agreement.max_abs_difference > far or (agreement.correlation is not None and agreement.correlation < least):
        raise EngineError(
            f"{name} differs from {reference} by {seen} on a batch of {batch}. With tables in {tables} and MLPs in "
            f"{mlp} at most {far:g}, and a correlation of at least {least:g}, is rounding: engines that do not compute "
            f"the same are not compared. {remedy}"
        )


def _logits(probabilities: FloatArray) -> npt.NDArray[np.float64]:
    inside = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    logits: npt.NDArray[np.float64] = np.log(inside) - np.log1p(-inside)
    return logits
