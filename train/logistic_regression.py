"""Logistic regression on the same features and splits as a DLRM: the baseline that a DLRM has to beat.

One weight per dense value and per id, so it knows users and items but no interaction. Fitted with L-BFGS; the L2
penalty is the one with the best validation log loss. Deterministic, and takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dlrm_deploy.config import ModelConfig
from dlrm_deploy.data.dataset import Dataset, Splits
from dlrm_deploy.errors import ConfigError
from dlrm_deploy.metrics import auc, log_loss

PENALTIES = (1e-4, 3e-5, 1e-5)
_ITERATIONS = 100  # five times as many move nothing on MovieLens: it stops by itself

DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LogisticRegression:
    """The result: metrics, and the L2 penalty (of the mean loss) that validation chose."""

    validation_auc: float
    test_auc: float
    test_log_loss: float
    penalty: float


def fit_logistic_regression(
    config: ModelConfig, splits: Splits, penalties: Sequence[float] = PENALTIES
) -> LogisticRegression:
    """Fit one model a penalty on the training split; report the one that validation chose, on the test split.

    Args:
        config: names the features of the data and their poolings; its layers are not used.
        splits: the data.
        penalties: to choose from.

    Raises:
        ConfigError: `penalties` is empty.
    """
    if not penalties:
        raise ConfigError("logistic regression needs at least one penalty.")
    train, validation, test = (_Design(config, data) for data in (splits.train, splits.validation, splits.test))
    weights = np.zeros(train.columns + 1)
    fits = []
    for penalty in sorted(penalties, reverse=True):  # each fit starts from the last one's weights
        weights = _fit(train, penalty, weights)
        fits.append((log_loss(validation.labels, validation.probabilities(weights)), penalty, weights))
    _, penalty, weights = min(fits, key=lambda fit: fit[0])
    probabilities = test.probabilities(weights)
    return LogisticRegression(
        validation_auc=auc(validation.labels, validation.probabilities(weights)),
        test_auc=auc(test.labels, probabilities),
        test_log_loss=log_loss(test.labels, probabilities),
        penalty=penalty,
    )


class _Design:
    """A split as a sparse matrix [S, columns] in (row, column, value) form: dense values, then one column an id."""

    def __init__(self, config: ModelConfig, data: Dataset) -> None:
        batch, labels = data.batch(np.arange(len(data)))
        samples, dense_columns = batch.dense.shape
        first_columns = dense_columns + np.concatenate([[0], np.cumsum(config.feature_rows)])
        lengths_FB = np.diff(batch.offsets).reshape(len(config.features), samples)
        mean = np.array([feature.pooling == "mean" for feature in config.features])
        values_FB = np.where(mean[:, None], 1 / np.maximum(lengths_FB, 1), 1.0)
        each_id = lengths_FB.reshape(-1)
        self.samples, self.columns, self.labels = samples, int(first_columns[-1]), labels
        self._row = np.concatenate(
            [np.repeat(np.arange(samples), dense_columns), np.repeat(np.tile(np.arange(samples), len(mean)), each_id)]
        )
        self._column = np.concatenate(
            [
                np.tile(np.arange(dense_columns), samples),
                batch.indices + np.repeat(first_columns[:-1], lengths_FB.sum(axis=1)),
            ]
        )
        self._value = np.concatenate([batch.dense.reshape(-1), np.repeat(values_FB.reshape(-1), each_id)])

    def logits(self, weights: DoubleArray) -> DoubleArray:
        """[S], from [columns + 1] weights, the last of which is the bias."""
        terms = weights[self._column] * self._value
        logits: DoubleArray = weights[-1] + np.bincount(self._row, terms, minlength=self.samples)
        return logits

    def probabilities(self, weights: DoubleArray) -> DoubleArray:
        return _sigmoid(self.logits(weights))

    def loss_and_gradient(self, weights: DoubleArray) -> tuple[float, DoubleArray]:
        """Mean log loss and its gradient [columns + 1]."""
        logits = self.logits(weights)
        loss = np.mean(np.logaddexp(0, logits) - self.labels * logits)
        error = (_sigmoid(logits) - self.labels) / self.samples
        gradient = np.bincount(self._column, error[self._row] * self._value, minlength=self.columns)
        return float(loss), np.append(gradient, error.sum())


def _sigmoid(x: DoubleArray) -> DoubleArray:
    probabilities: DoubleArray = np.exp(-np.logaddexp(0, -x))
    return probabilities


def _fit(train: _Design, penalty: float, start: DoubleArray) -> DoubleArray:
    weights = torch.from_numpy(start.copy()).requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=_ITERATIONS, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> float:
        w = weights.detach().numpy()
        loss, gradient = train.loss_and_gradient(w)
        penalised = np.append(w[:-1], 0)  # all but the bias
        weights.grad = torch.from_numpy(gradient + penalty * penalised)
        return loss + penalty / 2 * float(penalised @ penalised)

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return weights.detach().numpy()
