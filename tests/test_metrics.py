"""Metrics against their definitions on small samples."""

import math

import numpy as np
import pytest

from dlrm_deploy.errors import DataError
from dlrm_deploy.metrics import auc, calibration, log_loss, paired_differences


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


def two_lists(samples, noise, seed=0):
    """Labels, the probabilities that made them, and the same with noise in the logit; with ties."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(samples).round(1)
    labels = (rng.random(samples) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    noisy = logits + noise * rng.standard_normal(samples)
    return labels, *((1 / (1 + np.exp(-z))).astype(np.float32) for z in (logits, noisy))


def test_paired_differences_are_those_of_the_plain_metrics_on_every_resample():
    labels, first, second = two_lists(200, 0.5)
    differences = paired_differences(labels, first, second, resamples=40, seed=7)
    rng = np.random.default_rng(7)
    positives, negatives = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    drawn = []
    for _ in range(40):
        rows = np.concatenate([part[rng.integers(0, part.size, part.size)] for part in (positives, negatives)])
        drawn.append([m(labels[rows], second[rows]) - m(labels[rows], first[rows]) for m in (auc, log_loss)])
    for metric, found, values in zip((auc, log_loss), differences, np.transpose(drawn), strict=True):
        assert found.value == pytest.approx(metric(labels, second) - metric(labels, first), abs=1e-12)
        assert [found.low, found.high] == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=1e-12)


def test_an_interval_holds_the_true_difference_about_as_often_as_it_says():
    truth = [
        np.mean(values) for values in zip(*(_values(two_lists(20_000, 0.7, 1000 + i)) for i in range(4)), strict=True)
    ]
    inside = np.zeros(2)
    for i in range(60):
        found = paired_differences(*two_lists(400, 0.7, i), resamples=200)
        inside += [d.low <= t <= d.high for d, t in zip(found, truth, strict=True)]
    assert (inside >= 51).all()  # of 60; fewer has a probability below 0.2 % at 95 %


def _values(lists):
    return [difference.value for difference in paired_differences(*lists, resamples=1)]


def test_equal_lists_differ_by_nothing_in_every_resample():
    labels, first, _ = two_lists(100, 0.0)
    for difference in paired_differences(labels, first, first, resamples=30):
        assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_the_same_seed_gives_the_same_interval_and_one_sample_of_each_class_is_enough():
    lists = two_lists(300, 0.3)
    assert paired_differences(*lists, resamples=50, seed=1) == paired_differences(*lists, resamples=50, seed=1)
    assert paired_differences(*lists, resamples=50, seed=1) != paired_differences(*lists, resamples=50, seed=2)
    tiny = np.array([1, 0]), np.array([0.2, 0.6]), np.array([0.7, 0.6])
    assert paired_differences(*tiny, resamples=5)[0].low == 1


def test_differences_need_both_classes_and_a_resample():
    with pytest.raises(DataError, match="2 positive and 0 negative"):
        paired_differences(np.ones(2), np.array([0.1, 0.2]), np.array([0.1, 0.2]))
    with pytest.raises(DataError, match="at least one resample, got 0"):
        paired_differences(np.array([1, 0]), np.array([0.1, 0.2]), np.array([0.1, 0.2]), resamples=0)
