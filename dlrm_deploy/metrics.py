"""How good predicted probabilities are: area under the ROC curve, log loss and calibration, in plain NumPy.

And how far two lists of them differ in that, with bootstrap intervals: `paired_differences`.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    return float(np.mean(_losses(labels, probabilities)))


def _losses(labels: Values, probabilities: Values) -> npt.NDArray[np.float64]:
    p = np.clip(probabilities.astype(np.float64), _EPSILON, 1 - _EPSILON)
    return np.asarray(-np.where(labels == 1, np.log(p), np.log1p(-p)))


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


CONFIDENCE = 0.95
"""Of every interval."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference of two scores on one set of samples, and its bootstrap interval."""

    value: float
    low: float
    high: float


def paired_differences(
    labels: Values, first: Values, second: Values, *, resamples: int = 1000, seed: int = 0
) -> tuple[Difference, Difference]:
    """AUC and log loss of `second` less those of `first`, with percentile intervals of `CONFIDENCE`.

    Samples are drawn with replacement, positives and negatives each among themselves, so that every resample holds
    both classes in their numbers; both lists are scored on the same draw. Each list is sorted once.

    Args:
        labels: [S] of 0 and 1.
        first: [S] probabilities.
        second: [S] probabilities of the same samples.
        resamples: draws; 20,000 samples and 1000 draws take about a second.
        seed: of the draws.

    Raises:
        DataError: as `auc`, for either list, or `resamples` is below 1.
    """
    if resamples < 1:
        raise DataError(f"an interval needs at least one resample, got {resamples}.")
    auc_difference = auc(labels, second) - auc(labels, first)
    change = _losses(labels, second) - _losses(labels, first)
    positive, negative = labels == 1, labels != 1
    change_of_positives, change_of_negatives = change[positive], change[negative]
    ranked = [_Ranked(scores[positive], scores[negative]) for scores in (first, second)]
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, 2))
    for draw in drawn:
        p = rng.integers(0, change_of_positives.size, change_of_positives.size)
        n = rng.integers(0, change_of_negatives.size, change_of_negatives.size)
        draw[0] = ranked[1].auc(p, n) - ranked[0].auc(p, n)
        draw[1] = (change_of_positives[p].sum() + change_of_negatives[n].sum()) / labels.size
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail), axis=0)
    return (
        Difference(auc_difference, float(low[0]), float(high[0])),
        Difference(float(change.mean()), float(low[1]), float(high[1])),
    )


class _Ranked:
    """Scores of positives and negatives, sorted once: the AUC of any draw of them is then a count."""

    def __init__(self, positives: Values, negatives: Values) -> None:
        values, groups = np.unique(np.concatenate([positives, negatives]), return_inverse=True)
        self._groups = values.size  # of equal scores, in rising order
        self._positives, self._negatives = np.split(groups, [positives.size])

    def auc(self, positives: npt.NDArray[np.int64], negatives: npt.NDArray[np.int64]) -> float:
        """AUC of the positives and negatives at these positions, which may repeat."""
        n = np.bincount(self._negatives[negatives], minlength=self._groups)
        below = np.cumsum(n) - n / 2  # negatives below each group, and half of those in it
        return float(below[self._positives[positives]].sum()) / (positives.size * negatives.size)


def _check(labels: Values, scores: Values) -> None:
    if labels.shape != scores.shape or labels.ndim != 1 or labels.size == 0:
        raise DataError(f"labels and scores must be lists of one length, got {labels.shape} and {scores.shape}.")
    if np.isnan(scores).any():
        raise DataError(f"score {int(np.argmax(np.isnan(scores)))} is NaN: training diverged.")
    if not np.isin(labels, (0, 1)).all():
        raise DataError("labels must be 0 or 1.")
