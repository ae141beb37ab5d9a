"""Random data in the manner of the DLRM paper, with a signal in the labels that training can find.

Every number is a hash of (seed, what it is for, which sample, which position), so sample i is the same in
every batch, process and run, whatever was drawn before it. Unlike the paper's generator, ids of a bag may
repeat, as they do in real traffic, and the bag lengths asked for are the ones that come out.

Distributions of ids over a table of R rows:

- uniform: each row alike.
- gaussian: normal around the middle row, standard deviation R / 10, clipped to the table as in the paper.
- zipf: the k-th most popular row has probability proportional to k^-1.05; popular rows are scattered over the
  table.
- trace, for batches only: ids come again as soon as they do in recorded traffic (`dlrm_deploy.data.trace`). Each
  depends on those before it, so samples have no numbers there.

Labels: 1 with probability sigmoid(s), where s adds up a fixed weight times each centred dense value and, for
each feature, the fixed effects of its ids over the root of the bag's length. The dense part (half of the
variance of s) is learned within a few hundred batches; the ids' part only where ids come again.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.data.dataset import FloatArray, LongArray, Splits, checked_rows
from dlrm_deploy.data.hashed import DoubleArray, scatter, uniform
from dlrm_deploy.data.trace import Trace, TraceStream
from dlrm_deploy.errors import DataError

Distribution = Literal["uniform", "gaussian", "zipf"]
DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)

BatchDistribution = Literal["uniform", "gaussian", "zipf", "trace"]
BATCH_DISTRIBUTIONS: tuple[str, ...] = get_args(BatchDistribution)

ZIPF_EXPONENT = 1.05
_SCORE_DEVIATION = 2.0  # of s: the best possible AUC is then about 0.85

# What a number is for: the first word of every hash.
_DENSE, _LENGTH, _ID, _ID_ANGLE, _WEIGHT, _LABEL, _DENSE_EFFECT, _ID_EFFECT = range(8)


def random_batch(
    config: ModelConfig,
    batch_size: int,
    rng: np.random.Generator,
    *,
    distribution: BatchDistribution = "uniform",
    trace: Trace | TraceStream | None = None,
    index_dtype: type[np.int32] | type[np.int64] = np.int64,
) -> Batch:
    """A batch of the model's signature.

    Args:
        config: bags hold `pooling_factor` ids where that is set, else 0 to `longest_bag` ids, each length
            alike.
        batch_size: B, possibly 0.
        rng: gives the seed of the batch (one draw).
        distribution: of the ids, see the module.
        trace: goes with distribution "trace". A `TraceStream` goes on where the batch before ended; of a `Trace`, a
            new stream is begun.
        index_dtype: int32 or int64.

    Returns:
        dense values uniform in [0, 1), ids in range, and weights uniform in [0, 1) if the model is weighted.

    Raises:
        DataError: an unknown distribution, a trace without "trace" or the reverse, or a trace that is not of such a
            model.
    """
    seed = int(rng.integers(2**63))
    if (distribution == "trace") != (trace is not None):
        raise DataError('distribution "trace" and a trace go together: give both or neither.')
    if isinstance(trace, Trace):
        trace = TraceStream(trace, config, seed)
    return _Generator(config, seed, distribution, trace).batch(np.arange(batch_size), index_dtype)


def with_longer_bags(config: ModelConfig, ids: int = 8, most: int | None = None) -> ModelConfig:
    """The same model for drawing batches with: bags of which it does not say how long they are hold up to `ids` ids.

    Args:
        config: the model.
        ids: length of such bags.
        most: ids that a bag may hold at most; None for any number.
    """
    features = (
        feature
        if feature.pooling_factor
        else replace(feature, max_ids=min(feature.max_ids or ids, most or sys.maxsize))
        for feature in config.features
    )
    return replace(config, features=tuple(features))


class RandomDataset:
    """`size` random samples with labels, made when they are asked for."""

    def __init__(
        self,
        config: ModelConfig,
        size: int,
        seed: int,
        *,
        distribution: Distribution = "uniform",
        first: int = 0,
    ) -> None:
        """Samples `first` to `first + size - 1` of the endless sequence that belongs to `seed`.

        Raises:
            DataError: a negative size or seed, or an unknown distribution.
        """
        if distribution not in DISTRIBUTIONS:
            raise DataError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}.")
        if size < 0 or seed < 0:
            raise DataError(f"random data needs a size and a seed of at least 0, got size {size}, seed {seed}.")
        self._generator = _Generator(config, seed, distribution)
        self._size = size
        self._first = first

    def __len__(self) -> int:
        return self._size

    def batch(self, rows: npt.ArrayLike) -> tuple[Batch, FloatArray]:
        """The samples `rows` [B] and their labels [B]."""
        samples = checked_rows(rows, self._size) + self._first
        batch = self._generator.batch(samples, np.int64)
        return batch, self._generator.labels(samples, batch)


def load(config: ModelConfig, size: int, seed: int, *, distribution: Distribution = "uniform") -> Splits:
    """`size` samples to train on, and a tenth as many (at least one) each for validation and test."""
    held_out = max(1, size // 10)
    train, validation, test = (
        RandomDataset(config, count, seed, distribution=distribution, first=first)
        for first, count in ((0, size), (size, held_out), (size + held_out, held_out))
    )
    return Splits(train, validation, test)


class _Generator:
    """The endless sequence of samples of one seed."""

    def __init__(
        self, config: ModelConfig, seed: int, distribution: BatchDistribution, stream: TraceStream | None = None
    ) -> None:
        if distribution not in BATCH_DISTRIBUTIONS:
            raise DataError(f"distribution must be one of {', '.join(BATCH_DISTRIBUTIONS)}, got {distribution!r}.")
        if stream is not None and not stream.fits(config):
            raise DataError(f"the stream was begun for other features or table sizes than those of {config.name!r}.")
        self._config = config
        self._stream = stream
        self._seed = seed
        self._distribution = distribution
        deviation = _SCORE_DEVIATION / math.sqrt(2)
        columns = np.arange(len(config.dense_features))
        effects = uniform(seed, _DENSE_EFFECT, columns) - 0.5
        # A uniform value has variance 1/12: scaled so that the sum over columns has the wanted deviation.
        self._dense_effects = effects * deviation * math.sqrt(12) / np.linalg.norm(effects)

    def batch(self, samples: LongArray, index_dtype: type[np.int32] | type[np.int64]) -> Batch:
        config, seed = self._config, self._seed
        columns = np.arange(len(config.dense_features))
        dense = uniform(seed, _DENSE, samples[:, None], columns).astype(np.float32)
        # The largest doubles below 1 round up to 1 in float32.
        np.minimum(dense, np.nextafter(np.float32(1), np.float32(0)), out=dense)
        lengths_FB = np.stack([self._lengths(f, samples) for f in range(len(config.features))])
        offsets = np.concatenate([[0], np.cumsum(lengths_FB)]).astype(np.int64)
        ids = [self._ids(f, samples, lengths_B) for f, lengths_B in enumerate(lengths_FB)]
        weights = None
        if config.weighted:
            places = [_places(samples, lengths_B) for lengths_B in lengths_FB]
            drawn = [uniform(seed, _WEIGHT, f, *place) for f, place in enumerate(places)]
            weights = np.concatenate(drawn).astype(np.float32)
        if index_dtype is np.int32:
            return Batch(dense, np.concatenate(ids).astype(np.int32), offsets.astype(np.int32), weights)
        return Batch(dense, np.concatenate(ids), offsets, weights)

    def _lengths(self, f: int, samples: LongArray) -> LongArray:
        feature = self._config.features[f]
        if feature.pooling_factor is not None:
            return np.full(samples.size, feature.pooling_factor, np.int64)
        return _scaled(uniform(self._seed, _LENGTH, f, samples), feature.longest_bag + 1)

    def _ids(self, f: int, samples: LongArray, lengths: LongArray) -> LongArray:
        if self._stream is not None:
            return self._stream.ids(f, int(lengths.sum()))
        rows = self._config.feature_rows[f]
        place = _places(samples, lengths)
        u = uniform(self._seed, _ID, f, *place)
        if self._distribution == "uniform":
            return _scaled(u, rows)
        if self._distribution == "gaussian":  # Box and Muller's transform
            angle = 2 * np.pi * uniform(self._seed, _ID_ANGLE, f, *place)
            normal = np.sqrt(-2 * np.log1p(-u)) * np.cos(angle)
            ids: LongArray = np.rint((rows - 1) / 2 + normal * rows / 10).astype(np.int64)
            return np.clip(ids, 0, rows - 1)
        # The inverse of the distribution function of a power law on [1, rows + 1), rounded down to a rank.
        power = 1 - ZIPF_EXPONENT
        rank: LongArray = (((rows + 1.0) ** power * u + (1 - u)) ** (1 / power)).astype(np.int64)
        return scatter(np.minimum(rank - 1, rows - 1), rows)

    def labels(self, samples: LongArray, batch: Batch) -> FloatArray:
        config = self._config
        scores = (batch.dense - 0.5) @ self._dense_effects
        for f, feature in enumerate(config.features):
            bags = batch.offsets[f * samples.size : (f + 1) * samples.size + 1]
            table = config.tables.index(config.table(feature.table))
            effects = uniform(self._seed, _ID_EFFECT, table, batch.indices[bags[0] : bags[-1]]) - 0.5
            lengths = np.diff(bags)
            # Divided by the root of the length, so that long bags speak as loudly as short ones.
            owner = np.repeat(np.arange(samples.size), lengths)
            sums = np.bincount(owner, weights=effects, minlength=samples.size)
            scale = _SCORE_DEVIATION / math.sqrt(2) * math.sqrt(12 / len(config.features))
            scores += scale * sums / np.sqrt(np.maximum(lengths, 1))
        labels: FloatArray = (uniform(self._seed, _LABEL, samples) < 1 / (1 + np.exp(-scores))).astype(np.float32)
        return labels


def _places(samples: LongArray, lengths: LongArray) -> tuple[LongArray, LongArray]:
    """For each id: its sample, and its position in the bag."""
    starts = np.cumsum(lengths) - lengths
    return np.repeat(samples, lengths), np.arange(lengths.sum()) - np.repeat(starts, lengths)


def _scaled(u: DoubleArray, count: int) -> LongArray:
    """Whole numbers in [0, count) from numbers in [0, 1)."""
    return np.minimum((u * count).astype(np.int64), count - 1)
