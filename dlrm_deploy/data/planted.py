"""A made-up task of the shape of Criteo's, whose best possible AUC is known: what a model misses of it is its own.

13 counts and 26 ids, with as many values as in Criteo's Kaggle data, scaled. The ids of each feature follow a power
law, and no feature tells anything about another. A teacher says how likely each sample is a click: sigmoid(s), where s
adds up

- a slope and a curvature of each standardised dense value,
- an effect of each id,
- for some pairs of features a product of two vectors of `RANK` values, one for each id. It is centred, so that one id
  alone tells nothing about it: a model that adds up effects of single values misses this part.

The parts have fixed shares of the variance of s. Samples are numbered in time, and each is a hash of seed and number,
as in `dlrm_deploy.data.random`: training, validation and test samples follow each other. The task itself does not
change with time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.data.dataset import FloatArray, LongArray, Schema, SparseFeature, Splits, checked_rows
from dlrm_deploy.data.hashed import DoubleArray, scatter, uniform
from dlrm_deploy.errors import DataError
from dlrm_deploy.metrics import auc, log_loss
from dlrm_deploy.presets import preset

RANK = 2
CLICKS = 0.256
"""Share of label 1, that of Criteo's data."""

LEAST_ROWS = 100
"""Tables are not made smaller than this; those that have fewer rows keep them."""

EXPONENT = 1.5
"""Of the power law: the k-th most popular id has probability proportional to k^-1.5."""

MOST_SCALE = 100.0
"""Of the numbers of ids: 100 times Criteo's are a thousand million."""

_DEVIATION = 1.45  # of s: the best possible AUC is then about 0.81
_SHARES = {"dense": 0.25, "ids": 0.35, "pairs": 0.4}  # of the variance of s
_PAIRED = (2, 3, 11, 15, 20, 10, 23, 9)  # features with many ids; each is paired with the next
_CURVATURE = 0.5  # of a dense value, over its slope
_SCALING_SAMPLES = 1 << 14
_SLICE = 1 << 15

# What a number is for: the first word of every hash.
_COUNT, _COUNT_ANGLE, _COUNT_SIZE, _ID, _DENSE_EFFECT, _ID_EFFECT, _PAIR_VECTOR, _LABEL = range(8)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the teacher's own probabilities score on labelled samples: no model can be expected to do better."""

    auc: float
    log_loss: float


class PlantedTask:
    """The endless sequence of samples of one seed, and their teacher."""

    def __init__(self, seed: int = 0, scale_rows: float = 0.0003) -> None:
        """Draw the teacher.

        Args:
            seed: of the teacher and of all samples.
            scale_rows: multiplies the numbers of ids of Criteo's Kaggle data, down to `LEAST_ROWS`.

        Raises:
            DataError: a negative seed, or a scale that is not in (0, `MOST_SCALE`].
        """
        if seed < 0 or not 0 < scale_rows <= MOST_SCALE:
            raise DataError(
                f"a planted task needs a seed of at least 0, and scale_rows above 0 and at most {MOST_SCALE:g}, got "
                f"seed {seed} and scale_rows {scale_rows}."
            )
        kaggle = preset("kaggle")
        self._seed = seed
        self._dense_features = kaggle.dense_features
        self._features = tuple(
            SparseFeature(
                name=feature.name, rows=max(min(rows, LEAST_ROWS), math.ceil(rows * scale_rows)), pooling_factor=1
            )
            for feature, rows in zip(kaggle.features, kaggle.feature_rows, strict=True)
        )
        self._pairs = list(zip(_PAIRED[::2], _PAIRED[1::2], strict=True))
        self._fit_scales()

    @property
    def schema(self) -> Schema:
        """Features `int_0` ... and `cat_0` ..., as in the presets of Criteo's models."""
        return Schema(self._dense_features, self._features)

    def samples(self, first: int, size: int) -> PlantedDataset:
        """Samples `first` to `first + size - 1`.

        Raises:
            DataError: a number below 0.
        """
        return PlantedDataset(self, first, size)

    def draw(self, samples: LongArray) -> tuple[FloatArray, LongArray]:
        """Inputs of the samples of these numbers [B].

        Returns:
            dense values log(1 + count) [B, 13] float32, and ids [26, B] int64.
        """
        columns = np.arange(len(self._dense_features))
        u, angle = (uniform(self._seed, word, samples[:, None], columns) for word in (_COUNT, _COUNT_ANGLE))
        normal = np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * angle)  # Box and Muller's transform
        middle, spread = (uniform(self._seed, _COUNT_SIZE, columns, which) for which in (0, 1))
        counts = np.floor(np.exp(4 * middle + (0.8 + spread) * normal))
        ids = [_popular(uniform(self._seed, _ID, f, samples), one.rows) for f, one in enumerate(self._features)]
        return np.log1p(counts).astype(np.float32), np.stack(ids)

    def probabilities(self, dense: FloatArray, ids: LongArray, *, pairs: bool = True) -> DoubleArray:
        """How likely each sample of `draw` is a click, [B] float64.

        Args:
            dense: [B, 13].
            ids: [26, B].
            pairs: False leaves the products of pairs out: about what the best sum of single effects would say.
        """
        return _sigmoid(self._intercept + self._scores(dense, ids, pairs))

    def labels(self, samples: LongArray, probabilities: DoubleArray) -> FloatArray:
        """[B] float32 in {0, 1}."""
        return (uniform(self._seed, _LABEL, samples) < probabilities).astype(np.float32)

    def _scores(self, dense: FloatArray, ids: LongArray, pairs: bool) -> DoubleArray:
        """s without the intercept, [B]: 0 on average."""
        parts = self._parts(dense, ids)
        names = [name for name in _SHARES if pairs or name != "pairs"]
        return np.asarray(sum(self._factors[name] * (parts[name] - self._means[name]) for name in names))

    def _parts(self, dense: FloatArray, ids: LongArray) -> dict[str, DoubleArray]:
        """What is added up, not scaled yet, each [B]."""
        seed, columns = self._seed, np.arange(dense.shape[1])
        standard = (dense - self._dense_mean) / self._dense_deviation
        slope, curvature = (uniform(seed, _DENSE_EFFECT, columns, which) - 0.5 for which in (0, 1))
        effects = sum(uniform(seed, _ID_EFFECT, f, feature_ids) - 0.5 for f, feature_ids in enumerate(ids))
        products = sum(((self._vectors(a, ids[a]) * self._vectors(b, ids[b])).sum(axis=1)) for a, b in self._pairs)
        return {
            "dense": standard @ slope + standard**2 @ (_CURVATURE * curvature),
            "ids": np.asarray(effects),
            "pairs": np.asarray(products),
        }

    def _vectors(self, feature: int, ids: LongArray) -> DoubleArray:
        """[B, RANK], on average over the samples 0."""
        drawn = uniform(self._seed, _PAIR_VECTOR, feature, ids[:, None], np.arange(RANK))
        return drawn - self._vector_means[feature]

    def _fit_scales(self) -> None:
        """Centre and scale the teacher's parts, on samples that belong to no data set."""
        dense, ids = self.draw(np.arange(-_SCALING_SAMPLES, 0))
        self._dense_mean, self._dense_deviation = dense.mean(axis=0), dense.std(axis=0)
        self._vector_means = dict.fromkeys(_PAIRED, np.zeros(RANK))
        self._vector_means = {f: self._vectors(f, ids[f]).mean(axis=0) for f in _PAIRED}
        parts = self._parts(dense, ids)
        self._means = {name: float(part.mean()) for name, part in parts.items()}
        self._factors = {
            name: _DEVIATION * math.sqrt(_SHARES[name]) / float(part.std()) for name, part in parts.items()
        }
        self._intercept = _intercept(self._scores(dense, ids, pairs=True))


class PlantedDataset:
    """Some consecutive samples of a task, made when they are asked for."""

    def __init__(self, task: PlantedTask, first: int, size: int) -> None:
        if first < 0 or size < 0:
            raise DataError(f"samples are numbered from 0, got {size} samples from {first} on.")
        self._task, self._first, self._size = task, first, size

    def __len__(self) -> int:
        return self._size

    def batch(self, rows: npt.ArrayLike) -> tuple[Batch, FloatArray]:
        """The samples `rows` [B] and their labels [B]."""
        samples = checked_rows(rows, self._size) + self._first
        dense, ids = self._task.draw(samples)
        batch = Batch(dense, ids.reshape(-1), np.arange(ids.size + 1))
        return batch, self._task.labels(samples, self._task.probabilities(dense, ids))

    def ceiling(self, *, pairs: bool = True) -> Ceiling:
        """What the teacher's probabilities score on these samples.

        Args:
            pairs: False for a teacher that does not know the products of pairs.
        """
        labels, known = [], []
        for start in range(0, self._size, _SLICE):
            samples = np.arange(start, min(start + _SLICE, self._size)) + self._first
            dense, ids = self._task.draw(samples)
            labels.append(self._task.labels(samples, self._task.probabilities(dense, ids)))
            known.append(self._task.probabilities(dense, ids, pairs=pairs))
        seen, probabilities = np.concatenate(labels), np.concatenate(known)
        return Ceiling(auc(seen, probabilities), log_loss(seen, probabilities))


def load(size: int, seed: int = 0, *, scale_rows: float = 0.0003) -> tuple[Schema, Splits]:
    """`size` samples to train on, then a tenth as many (at least one) to validate, then as many to test.

    Raises:
        DataError: as `PlantedTask` and `PlantedTask.samples`.
    """
    task, held_out = PlantedTask(seed, scale_rows), max(1, size // 10)
    train, validation, test = (
        task.samples(first, count) for first, count in ((0, size), (size, held_out), (size + held_out, held_out))
    )
    return task.schema, Splits(train, validation, test)


def _popular(u: DoubleArray, rows: int) -> LongArray:
    """Ids by their popularity, from numbers in [0, 1); popular ones are scattered over the table."""
    # The inverse of the distribution function of a power law on [1, rows + 1), rounded down to a rank.
    power = 1 - EXPONENT
    rank: LongArray = (((rows + 1.0) ** power * u + (1 - u)) ** (1 / power)).astype(np.int64)
    return scatter(np.minimum(rank - 1, rows - 1), rows)


def _intercept(scores: DoubleArray) -> float:
    """What to add to scores so that `CLICKS` of them are clicks."""
    low, high = -10.0, 10.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(middle + scores).mean() < CLICKS else (low, middle)
    return middle


def _sigmoid(x: DoubleArray) -> DoubleArray:
    probabilities: DoubleArray = 1 / (1 + np.exp(-x))
    return probabilities
