"""Batch: dense values and bags of ids for B samples, in the feature-major layout of a KeyedJaggedTensor.

A Batch that exists is well-formed: types, ranks and offsets were checked once, when it was made. Whether it fits a
model (number of features, width of `dense`, fixed pooling factors) is `check_fits`; whether ids are in range is up to
the engine, which follows the model's index policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.config import ModelConfig
from dlrm_deploy.errors import BatchError

FloatArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.int32] | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Inputs of B samples. Shape letters: B samples, D dense values, F sparse features, N ids.

    Arrays are kept as they are where they are contiguous, and copied where they are not.

    Raises:
        BatchError: a wrong type, rank or length, offsets that fall or do not run from 0 to N, or a dense value or
            weight that is NaN or infinite. The message names the first place.
    """

    dense: FloatArray
    """[B, D] float32."""

    indices: IdArray
    """[N] int32 or int64: all ids of feature 0 for all samples, then of feature 1, ..."""

    offsets: IdArray
    """[F * B + 1], of the type of `indices`: bag f * B + b is indices[offsets[f * B + b]:offsets[f * B + b + 1]]."""

    weights: FloatArray | None = None
    """[N] float32, one weight per id; None for an unweighted model."""

    def __post_init__(self) -> None:
        dense = _array("dense", self.dense, 2, (np.float32,))
        indices = _array("indices", self.indices, 1, (np.int32, np.int64))
        offsets = _array("offsets", self.offsets, 1, (np.int32, np.int64))
        if offsets.dtype != indices.dtype:
            raise BatchError(f"offsets are {offsets.dtype} and indices {indices.dtype}: use one type for both.")
        _check_offsets(offsets, indices.size, len(dense))
        _check_finite("dense", dense)
        object.__setattr__(self, "dense", dense)
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "offsets", offsets)
        if self.weights is not None:
            weights = _array("weights", self.weights, 1, (np.float32,))
            if weights.size != indices.size:
                raise BatchError(f"weights has {weights.size} values for {indices.size} ids: give one weight per id.")
            _check_finite("weights", weights)
            object.__setattr__(self, "weights", weights)

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.dense)

    def check_fits(self, config: ModelConfig) -> None:
        """Raise `BatchError` if this batch is not of the model's signature. Ids are not looked at."""
        if self.dense.shape[1] != len(config.dense_features):
            raise BatchError(
                f"dense has {self.dense.shape[1]} columns, but model {config.name!r} has "
                f"{len(config.dense_features)} dense features: {', '.join(config.dense_features[:8])}"
                f"{', ...' if len(config.dense_features) > 8 else ''}."
            )
        expected = len(config.features) * self.batch_size + 1
        if self.offsets.size != expected:
            raise BatchError(
                f"offsets has {self.offsets.size} values, but {len(config.features)} sparse features x "
                f"{self.batch_size} samples + 1 = {expected} are needed. Bags are feature-major: all samples of "
                "feature 0 first."
            )
        if (self.weights is not None) != config.weighted:
            raise BatchError(
                f"model {config.name!r} needs one weight per id, and the batch has none."
                if config.weighted
                else f"model {config.name!r} takes no per-sample weights, but the batch has some."
            )
        if config.pooling_factors is not None:
            self._check_pooling_factors(config)

    def _check_pooling_factors(self, config: ModelConfig) -> None:
        lengths_FB = np.diff(self.offsets).reshape(len(config.features), self.batch_size)
        wrong = lengths_FB != np.array(config.pooling_factors)[:, None]
        if wrong.any():
            f, b = (int(axis[0]) for axis in np.nonzero(wrong))
            feature = config.features[f]
            raise BatchError(
                f"feature {feature.name!r}, sample {b}: the bag holds {lengths_FB[f, b]} ids, but the model was "
                f"exported with a fixed pooling factor of {feature.pooling_factor}. Export it without "
                "pooling_factor to allow bags of any length."
            )

    def rows(self, start: int, stop: int) -> Batch:
        """The samples start .. stop - 1, as a batch of their own."""
        if not 0 <= start <= stop <= self.batch_size:
            raise BatchError(f"rows {start} to {stop} are not within the batch's {self.batch_size} samples.")
        features = (self.offsets.size - 1) // self.batch_size if self.batch_size else 0
        bounds = self.offsets[:-1].reshape(features, self.batch_size) if features else self.offsets[:0].reshape(0, 1)
        ends = self.offsets[1:].reshape(features, self.batch_size) if features else bounds
        pieces = [slice(0, 0)] * features
        if stop > start:
            pieces = [slice(int(bounds[f, start]), int(ends[f, stop - 1])) for f in range(features)]
        offsets = np.zeros(features * (stop - start) + 1, self.offsets.dtype)
        np.cumsum((ends - bounds)[:, start:stop].reshape(-1), out=offsets[1:])
        return Batch(
            dense=self.dense[start:stop],
            indices=np.concatenate([self.indices[piece] for piece in pieces] or [self.indices[:0]]),
            offsets=offsets,
            weights=None
            if self.weights is None
            else np.concatenate([self.weights[piece] for piece in pieces] or [self.weights[:0]]),
        )

    @classmethod
    def from_bags(
        cls,
        dense: npt.ArrayLike,
        bags: Sequence[Sequence[Sequence[int]]],
        weights: Sequence[Sequence[Sequence[float]]] | None = None,
    ) -> Batch:
        """Build from nested lists: `bags[f][b]` are the ids of feature f in sample b. Slow, for small inputs."""
        lengths = [len(bag) for feature in bags for bag in feature]
        return cls(
            dense=np.asarray(dense, np.float32),
            indices=np.array([i for feature in bags for bag in feature for i in bag], np.int64),
            offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
            weights=None
            if weights is None
            else np.array([w for feature in weights for bag in feature for w in bag], np.float32),
        )

    def reduced_ids(self, config: ModelConfig) -> IdArray:
        """`indices` [N] after the modulo of the features that have one."""
        if self.batch_size == 0 or not any(feature.modulo for feature in config.features):
            return self.indices
        counts_F = np.diff(self.offsets[:: self.batch_size])
        moduli_N = np.repeat(np.array([feature.modulo or 0 for feature in config.features]), counts_F)
        return np.where(moduli_N > 0, self.indices % np.maximum(moduli_N, 1), self.indices)

    def explain_bad_ids(self, config: ModelConfig) -> str | None:
        """Name the first id, by position, that is outside its table; None where all are inside. For error messages."""
        F, B = len(config.features), self.batch_size
        if B == 0:
            return None
        counts_F = np.diff(self.offsets[::B]) if B else np.zeros(F, np.int64)
        limits_N = np.repeat(np.array(config.feature_rows, np.int64), counts_F)
        ids_N = self.reduced_ids(config)
        bad = np.flatnonzero((ids_N < 0) | (ids_N >= limits_N))
        if bad.size == 0:
            return None
        position = int(bad[0])
        bag = int(np.searchsorted(self.offsets, position, side="right")) - 1
        f, b = divmod(bag, B)
        return (
            f"feature {config.features[f].name!r}, sample {b}, position {position - int(self.offsets[bag])} of its "
            f"bag: id {self.indices[position]} is outside [0, {config.feature_rows[f]}); {bad.size} of "
            f"{self.indices.size} ids are. "
            "Hash ids to the table size before scoring, or export with --index-policy clamp, modulo or zero."
        )


def _array(name: str, value: object, rank: int, dtypes: tuple[type, ...]) -> npt.NDArray[Any]:
    if not isinstance(value, np.ndarray):
        raise BatchError(f"{name} must be a NumPy array, got {type(value).__name__}.")
    if value.dtype not in dtypes:
        wanted = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise BatchError(
            f"{name} must be {wanted}, got {value.dtype}. Convert with .astype(np.{np.dtype(dtypes[-1]).name})."
        )
    if value.ndim != rank:
        raise BatchError(f"{name} must have {rank} dimension{'s' if rank > 1 else ''}, got shape {value.shape}.")
    return np.ascontiguousarray(value)


def _check_offsets(offsets: npt.NDArray[Any], ids: int, samples: int) -> None:
    if offsets.size == 0 or offsets[0] != 0 or offsets[-1] != ids:
        ends = f"run from {offsets[0]} to {offsets[-1]}" if offsets.size else "are empty"
        raise BatchError(f"offsets must run from 0 to the number of ids, {ids}, but {ends}.")
    falls = np.flatnonzero(offsets[1:] < offsets[:-1])
    if falls.size:
        i = int(falls[0])
        raise BatchError(
            f"offsets must not fall, but offsets[{i}] = {offsets[i]} and offsets[{i + 1}] = {offsets[i + 1]}."
        )
    if (offsets.size - 1) % samples if samples else offsets.size != 1:
        raise BatchError(
            f"offsets has {offsets.size} values for {samples} samples: expected features x {samples} + 1 of them."
        )


def _check_finite(name: str, values: npt.NDArray[np.generic]) -> None:
    # One pass without a temporary: a sum of finite float32 values in float64 is finite.
    with np.errstate(invalid="ignore"):  # of infinities of both signs
        total = np.sum(values, dtype=np.float64)
    if np.isfinite(total):
        return
    place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
    at = f"sample {place[0]}, column {place[1]}" if len(place) == 2 else f"position {place[0]}"
    raise BatchError(f"{name} is {values[place]} at {at}: replace missing values before scoring.")
