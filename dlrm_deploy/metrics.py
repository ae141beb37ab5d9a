"""How good predicted probabilities are: area under the ROC curve, log loss and calibration, in plain NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.errors import DataError

Values = npt.NDArray[Any]

_EPSILON = 1e-7
"""Probabilities are kept this far from 0 and 1, so that one confident error does not make the log loss infinite."""


def auc(labels: Values, scores: Values) -> float:
    """The chance that a positive sample scores above a negative one; equal scores count one half.

    Args:
        labels: [S] of 0 and 1.
        scores: [S] in any monotonic unit.

    Raises:
        DataError: lengths differ, a score is NaN, a label is not 0 or 1, or one of the two classes is absent.
    """
    _check(labels, scores)
    positives = int(np.sum(labels == 1))
    negatives = labels.size - positives
    if positives == 0 or negatives == 0:
        raise DataError(f"AUC needs both classes, got {positives} positive and {negatives} negative samples.")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    midranks = np.cumsum(counts) - (counts - 1) / 2  # the mean rank, from 1, of each group of equal scores
    rank_sum = float(np.sum(midranks[inverse][labels == 1]))
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def log_loss(labels: Values, probabilities: Values) -> float:
    """Mean negative log likelihood, in nats. Arguments and errors as in `auc`, but one class is enough."""
    _check(labels, probabilities)
    p = np.clip(probabilities.astype(np.float64), _EPSILON, 1 - _EPSILON)
    return float(-np.mean(np.where(labels == 1, np.log(p), np.log1p(-p))))


def calibration(labels: Values, probabilities: Values) -> float:
    """Sum of the probabilities over number of positives: 1 is right, above 1 promises too much.

    Raises:
        DataError: as `auc`, or there is no positive sample.
    """
    _check(labels, probabilities)
    positives = float(np.sum(labels, dtype=np.float64))
    if positives == 0:
        raise DataError("calibration needs at least one positive sample.")
    return float(np.sum(probabilities, dtype=np.float64)) / positives


def _check(labels: Values, scores: Values) -> None:
    if labels.shape != scores.shape or labels.ndim != 1 or labels.size == 0:
        raise DataError(f"labels and scores must be lists of one length, got {labels.shape} and {scores.shape}.")
    if np.isnan(scores).any():
        raise DataError(f"score {int(np.argmax(np.isnan(scores)))} is NaN: training diverged.")
    if not np.isin(labels, (0, 1)).all():
        raise DataError("labels must be 0 or 1.")
