"""What a trainer needs of data: samples by row number as a `Batch` with labels, three splits, and a schema.

A row number always means the same sample, so order, shuffling and the share of each process are up to the
caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.config import FeatureConfig, ModelConfig, Pooling
from dlrm_deploy.errors import ConfigError, DataError
from dlrm_deploy.schemes import TableScheme

FloatArray = npt.NDArray[np.float32]
LongArray = npt.NDArray[np.int64]


class Dataset(Protocol):
    """S samples, numbered 0 .. S - 1."""

    def __len__(self) -> int: ...

    def batch(self, rows: npt.ArrayLike) -> tuple[Batch, FloatArray]:
        """The samples `rows` [B], in that order, and their labels [B] float32 in {0, 1}."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Bags:
    """The ids of one sparse feature for S samples.

    Raises:
        DataError: offsets that fall or do not run from 0 to N.
    """

    values: LongArray
    """[N] int64."""

    offsets: LongArray
    """[S + 1] int64: sample s owns values[offsets[s]:offsets[s + 1]], possibly none."""

    def __post_init__(self) -> None:
        offsets = self.offsets
        ends = (offsets[0], offsets[-1]) if offsets.size else None
        if ends != (0, self.values.size) or (np.diff(offsets) < 0).any():
            raise DataError(f"offsets of bags must rise from 0 to {self.values.size}, got {offsets}.")

    def __len__(self) -> int:
        return self.offsets.size - 1

    @classmethod
    def single(cls, ids: npt.ArrayLike) -> Bags:
        """One id for each sample."""
        values = np.asarray(ids, np.int64)
        return cls(values, np.arange(values.size + 1))

    @classmethod
    def ranges(cls, values: LongArray, starts: LongArray, lengths: LongArray) -> Bags:
        """The bags values[starts[s]:starts[s] + lengths[s]], which may overlap."""
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return cls(values[_spread(starts, offsets)], offsets)

    def take(self, rows: npt.ArrayLike) -> Bags:
        """The bags of samples `rows`, in that order."""
        rows = np.asarray(rows, np.int64)
        starts = self.offsets[rows]
        return Bags.ranges(self.values, starts, self.offsets[rows + 1] - starts)


def _spread(starts: LongArray, offsets: LongArray) -> LongArray:
    """The positions starts[s], starts[s] + 1, ... of all ranges; their lengths are the steps of `offsets`."""
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], np.diff(offsets))


class ArrayDataset:
    """A dataset held in memory."""

    def __init__(self, dense: FloatArray, features: Sequence[Bags], labels: FloatArray) -> None:
        """Join one `Bags` of S samples per sparse feature with dense values [S, D] and labels [S], both
        float32.

        Raises:
            DataError: numbers of samples that differ, or labels other than 0 and 1.
            BatchError: dense values that are not finite float32 numbers.
        """
        sizes = {len(dense), len(labels), *(len(bags) for bags in features)}
        if len(sizes) > 1 or not features:
            raise DataError(
                f"dense values, labels and each feature must have one entry per sample, got {sorted(sizes)}."
            )
        labels = np.ascontiguousarray(labels, np.float32)
        if not np.isin(labels, (0, 1)).all():
            raise DataError("labels must be 0 or 1.")
        self._samples = _join(dense, features)  # all samples as one batch
        self._features = len(features)
        self.labels: FloatArray = labels

    def __len__(self) -> int:
        return self.labels.size

    @property
    def dense(self) -> FloatArray:
        """[S, D] float32."""
        return self._samples.dense

    def batch(self, rows: npt.ArrayLike) -> tuple[Batch, FloatArray]:
        """The samples `rows` [B], in that order, and their labels [B]. Ids are int64.

        Raises:
            DataError: a row number outside [0, S).
        """
        rows = checked_rows(rows, len(self))
        bags_FB = (np.arange(self._features) * len(self))[:, None] + rows
        taken = Bags(self._samples.indices, self._samples.offsets).take(bags_FB.reshape(-1))  # type: ignore[arg-type]  # int64, by _join
        return Batch(self.dense[rows], taken.values, taken.offsets), self.labels[rows]


def _join(dense: FloatArray, features: Sequence[Bags]) -> Batch:
    lengths = [np.diff(bags.offsets) for bags in features]
    return Batch(
        dense=np.ascontiguousarray(dense, np.float32),
        indices=np.concatenate([bags.values for bags in features]),
        offsets=np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64),
    )


def checked_rows(rows: npt.ArrayLike, size: int) -> LongArray:
    """Row numbers as int64 [B], or a `DataError` that names the first one outside [0, size)."""
    array = np.asarray(rows, np.int64)
    bad = (array < 0) | (array >= size)
    if array.ndim != 1 or bad.any():
        seen = f"row {array[bad][0]}" if bad.any() else f"shape {array.shape}"
        raise DataError(f"rows must be a list of numbers in [0, {size}), got {seen}.")
    return array


class Selection:
    """Another dataset with some of its sparse features, and with or without its dense values."""

    def __init__(self, data: Dataset, features: Sequence[int], *, dense: bool) -> None:
        """Keep the features at these positions of `data`, in that order, and the dense values if `dense`."""
        self._data = data
        self._features = np.array(features, np.int64)
        self._dense = dense

    def __len__(self) -> int:
        return len(self._data)

    def batch(self, rows: npt.ArrayLike) -> tuple[Batch, FloatArray]:
        """The samples `rows` [B], in that order, and their labels [B]. Ids are int64."""
        batch, labels = self._data.batch(rows)
        bags_FB = self._features[:, None] * batch.batch_size + np.arange(batch.batch_size)
        bags = Bags(batch.indices.astype(np.int64), batch.offsets.astype(np.int64)).take(bags_FB.reshape(-1))
        dense = batch.dense if self._dense else batch.dense[:, :0]
        return Batch(dense, bags.values, bags.offsets), labels


@dataclass(frozen=True, slots=True)
class Splits:
    """Three sets of samples that share none. Choose on `validation`, report on `test`."""

    train: Dataset
    validation: Dataset
    test: Dataset

    def select(self, features: Sequence[int], *, dense: bool = True) -> Splits:
        """Each split as a `Selection`."""
        return Splits(*(Selection(data, features, dense=dense) for data in (self.train, self.validation, self.test)))


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseFeature:
    """One sparse feature of a dataset."""

    name: str
    rows: int
    """Rows of its table: ids are in [0, rows)."""

    table: str = ""
    """Name of its table; the feature's own name where left out. Features may share a table."""

    pooling: Pooling = "sum"
    pooling_factor: int | None = None
    """Ids in each bag where all bags hold the same number."""

    max_ids: int | None = None
    """Longest bag where they vary."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", self.table or self.name)


@dataclass(frozen=True, slots=True)
class Schema:
    """Names and sizes of what a dataset holds; with layer widths it makes a `ModelConfig`."""

    dense_features: tuple[str, ...]
    features: tuple[SparseFeature, ...]
    """In batch order."""

    def positions(self, names: Sequence[str]) -> tuple[int, ...]:
        """Where the features of these names stand in a batch.

        Raises:
            ConfigError: a name that is not among the features, or stands twice.
        """
        known = [feature.name for feature in self.features]
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(f"no feature {', '.join(map(str, unknown))} in the data. Features: {', '.join(known)}.")
        if len(set(names)) < len(names):
            raise ConfigError(f"features must differ, got {', '.join(names)}.")
        return tuple(known.index(name) for name in names)

    def select(self, features: Sequence[str] | None = None, *, dense: bool = True) -> Schema:
        """The schema of a `Selection`.

        Args:
            features: names of the sparse features to keep, in that order; None for all.
            dense: whether to keep the dense features.

        Raises:
            ConfigError: as `positions`.
        """
        kept = self.features if features is None else tuple(self.features[f] for f in self.positions(features))
        return Schema(self.dense_features if dense else (), kept)

    def model_config(
        self,
        name: str,
        width: int,
        bottom_mlp: Sequence[int],
        top_mlp: Sequence[int],
        *,
        tables: TableScheme | None = None,
        **options: Any,
    ) -> ModelConfig:
        """A model for this data with vectors of one width.

        Args:
            name: of the model.
            width: of the features' vectors.
            bottom_mlp: widths of its layers.
            top_mlp: widths of its layers.
            tables: how tables are stored; None for a row for each id.
            options: further fields of `ModelConfig`.

        Raises:
            ConfigError: widths or options that do not fit together.
        """
        rows: dict[str, int] = {}
        for feature in self.features:
            rows[feature.table] = max(feature.rows, rows.get(feature.table, 0))
        return ModelConfig(
            name=name,
            dense_features=self.dense_features,
            tables=(tables or TableScheme()).tables(rows, width),
            features=tuple(
                FeatureConfig(
                    name=feature.name,
                    table=feature.table,
                    pooling=feature.pooling,
                    pooling_factor=feature.pooling_factor,
                    max_ids=feature.max_ids,
                )
                for feature in self.features
            ),
            bottom_mlp=tuple(bottom_mlp),
            top_mlp=tuple(top_mlp),
            **options,
        )
