"""The baseline finds the optimum of a small problem that was solved another way."""

import numpy as np
import pytest

from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.data.dataset import ArrayDataset, Bags, Splits
from dlrm_deploy.errors import ConfigError
from dlrm_deploy.metrics import auc, log_loss
from dlrm_deploy.tables import TableConfig
from dlrm_deploy.train.logistic_regression import fit_logistic_regression

CONFIG = ModelConfig(
    name="tiny",
    dense_features=("x", "y"),
    tables=(TableConfig(name="a", rows=3, width=2), TableConfig(name="b", rows=4, width=2)),
    features=(FeatureConfig(name="a", table="a"), FeatureConfig(name="b", table="b", pooling="mean")),
    bottom_mlp=(2,),
    top_mlp=(1,),
)


def make(seed, size=300):
    """Samples, and the same as a plain matrix."""
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(size, 2)).astype(np.float32)
    a, lengths = rng.integers(0, 3, size), rng.integers(0, 4, size)
    b = Bags(rng.integers(0, 4, lengths.sum()), np.concatenate([[0], np.cumsum(lengths)]))
    matrix = np.zeros((size, 10))
    matrix[:, 0], matrix[:, 1:3], matrix[np.arange(size), 3 + a] = 1, dense, 1
    for s in range(size):
        for i in b.values[b.offsets[s] : b.offsets[s + 1]]:
            matrix[s, 6 + i] += 1 / lengths[s]
    effects = np.array([0.3, 1, -2, 1, -1, 0, 2, -2, 0.5, 0])
    labels = (rng.random(size) < 1 / (1 + np.exp(-matrix @ effects))).astype(np.float32)
    return ArrayDataset(dense, [Bags.single(a), b], labels), matrix, labels


def newton(matrix, labels, penalty):
    penalties = np.full(matrix.shape[1], penalty)
    penalties[0] = 0
    weights = np.zeros(matrix.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-matrix @ weights))
        gradient = matrix.T @ (p - labels) / len(labels) + penalties * weights
        hessian = (matrix.T * (p * (1 - p))) @ matrix / len(labels) + np.diag(penalties)
        weights -= np.linalg.solve(hessian, gradient)
    return weights


def test_fit_is_the_optimum_with_the_penalty_that_validation_prefers():
    (train, x, y), (validation, vx, vy), (test, tx, ty) = (make(seed) for seed in (1, 2, 3))
    penalties = (1.0, 0.01, 1e-4)
    result = fit_logistic_regression(CONFIG, Splits(train, validation, test), penalties)

    fits = {penalty: newton(x, y, penalty) for penalty in penalties}
    best = min(penalties, key=lambda penalty: log_loss(vy, 1 / (1 + np.exp(-vx @ fits[penalty]))))
    scores = 1 / (1 + np.exp(-tx @ fits[best]))
    assert result.penalty == best
    assert result.test_auc == pytest.approx(auc(ty, scores), abs=1e-4)
    assert result.test_log_loss == pytest.approx(log_loss(ty, scores), abs=1e-5)
    assert result.validation_auc == pytest.approx(auc(vy, vx @ fits[best]), abs=1e-4)


def test_no_penalties_to_choose_from_is_an_error():
    data, *_ = make(1, size=10)
    with pytest.raises(ConfigError, match="at least one penalty"):
        fit_logistic_regression(CONFIG, Splits(data, data, data), ())
