"""Metrics against their definitions on small samples."""

import math

import numpy as np
import pytest

from dlrm_deploy.errors import DataError
from dlrm_deploy.metrics import auc, calibration, log_loss


def test_auc_is_the_share_of_pairs_in_order_and_ties_count_half():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 60)
    scores = rng.integers(0, 8, 60) / 8  # many ties
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    assert auc(labels, scores) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_auc_of_perfect_reversed_and_constant_scores():
    labels = np.array([0, 0, 1, 1])
    assert auc(labels, np.array([1, 2, 3, 4])) == 1
    assert auc(labels, np.array([4, 3, 2, 1])) == 0
    assert auc(labels, np.ones(4)) == 0.5


def test_log_loss_is_the_mean_negative_log_likelihood():
    assert log_loss(np.array([1, 0]), np.array([0.8, 0.4])) == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2)
    assert log_loss(np.array([1]), np.array([0.0])) == pytest.approx(-math.log(1e-7))


def test_calibration_is_promised_over_seen():
    assert calibration(np.array([1, 0, 0, 1]), np.array([1, 0.5, 0.5, 1])) == 1.5


@pytest.mark.parametrize("metric", [auc, log_loss, calibration])
def test_nonsense_is_refused(metric):
    with pytest.raises(DataError, match="one length"):
        metric(np.array([1, 0]), np.array([0.5]))
    with pytest.raises(DataError, match="score 1 is NaN"):
        metric(np.array([1, 0]), np.array([0.5, np.nan]))
    with pytest.raises(DataError, match="labels must be 0 or 1"):
        metric(np.array([1, 2]), np.array([0.5, 0.5]))


def test_metrics_that_need_positives_say_so():
    with pytest.raises(DataError, match="0 positive and 2 negative"):
        auc(np.zeros(2), np.array([0.1, 0.2]))
    with pytest.raises(DataError, match="at least one positive"):
        calibration(np.zeros(2), np.array([0.1, 0.2]))
