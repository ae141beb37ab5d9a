"""Logistic regression on the same features and splits as a DLRM: the baseline that a DLRM has to beat.

One weight per dense value and per id, so it knows users and items but no interaction. Fitted to convergence with
L-BFGS; the L2 penalty is the one with the best validation log loss. Deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dlrm_deploy.config import ModelConfig
from dlrm_deploy.data.dataset import Dataset, Splits
from dlrm_deploy.metrics import auc, log_loss

PENALTIES = (3e-6, 1e-5, 3e-5, 1e-4)
_ITERATIONS = 100


@dataclass(frozen=True, slots=True)
class LogisticRegression:
    """The result: scores on validation and test, and the L2 penalty (per sample) that validation chose."""

    validation_auc: float
    test_auc: float
    test_log_loss: float
    penalty: float


def fit_logistic_regression(
    config: ModelConfig, splits: Splits, penalties: Sequence[float] = PENALTIES
) -> LogisticRegression:
    """Fit one model a penalty on the training split, and score the one with the best validation log loss on test.

    `config` names the features of the data; its layers are not used.
    """
    train, validation, test = (_Design(config, data) for data in (splits.train, splits.validation, splits.test))
    best: tuple[float, float, Tensor] | None = None
    weights = torch.zeros(train.columns + 1, dtype=torch.float64)
    for penalty in sorted(penalties, reverse=True):  # each fit starts from the last one's weights
        weights = _fit(train, penalty, weights)
        loss = log_loss(validation.labels, validation.probabilities(weights))
        if best is None or loss < best[0]:
            best = (loss, penalty, weights)
    assert best is not None, "penalties is empty"
    _, penalty, weights = best
    scores = test.probabilities(weights)
    return LogisticRegression(
        validation_auc=auc(validation.labels, validation.probabilities(weights)),
        test_auc=auc(test.labels, scores),
        test_log_loss=log_loss(test.labels, scores),
        penalty=penalty,
    )


class _Design:
    """A split as a sparse matrix [S, columns]: dense values, then one column per id of each feature."""

    def __init__(self, config: ModelConfig, data: Dataset) -> None:
        batch, labels = data.batch(np.arange(len(data)))
        features, rows = config.features, config.feature_rows
        samples, dense_columns = batch.dense.shape
        lengths = np.diff(batch.offsets).reshape(len(features), samples)
        counts = lengths.sum(axis=1)
        first_column = dense_columns + np.concatenate([[0], np.cumsum(rows)])
        mean = np.array([feature.pooling == "mean" for feature in features])
        values = np.where(mean[:, None], 1 / np.maximum(lengths, 1), 1.0)
        sample = np.tile(np.arange(samples), len(features))
        row = np.concatenate([np.repeat(np.arange(samples), dense_columns), np.repeat(sample, lengths.reshape(-1))])
        column = np.concatenate(
            [np.tile(np.arange(dense_columns), samples), batch.indices + np.repeat(first_column[:-1], counts)]
        )
        value = np.concatenate([batch.dense.reshape(-1), np.repeat(values.reshape(-1), lengths.reshape(-1))])
        self.columns = int(first_column[-1])
        self.labels = labels
        self._matrix = _csr(row, column, value, samples, self.columns)
        self._transposed = _csr(column, row, value, self.columns, samples)

    def logits(self, weights: Tensor) -> Tensor:
        return self._matrix @ weights[:-1] + weights[-1]

    def probabilities(self, weights: Tensor) -> np.ndarray:
        return torch.sigmoid(self.logits(weights)).numpy()

    def gradient(self, error: Tensor) -> Tensor:
        """Of the mean loss, from the error p - y of each sample."""
        return torch.cat([self._transposed @ error, error.sum()[None]]) / len(error)


def _csr(row: np.ndarray, column: np.ndarray, value: np.ndarray, rows: int, columns: int) -> Tensor:
    places = torch.from_numpy(np.stack([row, column]))
    matrix = torch.sparse_coo_tensor(places, torch.from_numpy(value.astype(np.float64)), (rows, columns))
    return matrix.coalesce().to_sparse_csr()


def _fit(train: _Design, penalty: float, start: Tensor) -> Tensor:
    weights = start.clone().requires_grad_()
    labels = torch.from_numpy(train.labels.astype(np.float64))
    optimizer = torch.optim.LBFGS([weights], max_iter=_ITERATIONS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        with torch.no_grad():
            logits = train.logits(weights)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
            weights.grad = train.gradient(torch.sigmoid(logits) - labels)
            weights.grad[:-1] += penalty * weights[:-1]
            return loss + penalty / 2 * weights[:-1].square().sum()

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return weights.detach()
