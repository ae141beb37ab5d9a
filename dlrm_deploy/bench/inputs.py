"""Inputs of a benchmark: seeded batches that differ from call to call, and batches that touch every page of the tables.

One batch repeated would read its rows from the caches. A page of a mapped table costs a fault when it is first read,
which would be charged to whichever small batch comes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from dlrm_deploy.batch import Batch
from dlrm_deploy.config import FeatureConfig, ModelConfig
from dlrm_deploy.data.dataset import LongArray
from dlrm_deploy.data.random import BatchDistribution, random_batch
from dlrm_deploy.data.trace import Trace, TraceStream

GATHERED_BYTES = 256 << 20
"""Bytes of table rows that the batches of one size should read together: more than the caches of most CPUs."""

COMPARED_SAMPLES = 256

MIN_BATCHES = 3
MAX_BATCHES = 4096

_DRAWN_BYTES = 16 << 20
_PAGE_BYTES = 4096
_TOUCH_SAMPLES = 2048


def gathered_bytes(config: ModelConfig, batch: Batch) -> int:
    """Bytes of table rows that scoring the batch reads."""
    ends_F = batch.offsets[batch.batch_size :: batch.batch_size].astype(np.int64)
    ids_F = np.diff(ends_F, prepend=0)
    tables = (config.table(feature.table) for feature in config.features)
    widths_F = np.array([sum(part.width for part in table.parts) + config.wide for table in tables])
    return int((ids_F * widths_F).sum()) * 4


def rotating_batches(
    config: ModelConfig,
    batch_size: int,
    seed: int,
    *,
    distribution: BatchDistribution,
    index_dtype: np.dtype[Any],
    trace: Trace | None = None,
) -> list[Batch]:
    """Distinct batches of one size, the same for the same seed whatever other sizes are measured.

    There are enough to read `GATHERED_BYTES` of rows, within `MIN_BATCHES` and `MAX_BATCHES` and as long as the inputs
    themselves stay within that size too. Of a trace, which goes with distribution "trace", they are one stream.

    Raises:
        DataError: the trace is not of such a model.
    """
    rng = np.random.default_rng([seed, batch_size])
    stream = None if trace is None else TraceStream(trace, config, seed)

    def draw(count: int) -> list[Batch]:
        samples = count * batch_size
        many = random_batch(config, samples, rng, distribution=distribution, trace=stream, index_dtype=index_dtype.type)
        return split(many, batch_size)

    batches = draw(1)
    first = batches[0]
    inputs = first.dense.nbytes + first.indices.nbytes + first.offsets.nbytes
    count = -(-GATHERED_BYTES // max(gathered_bytes(config, first), inputs))
    count = min(max(count, MIN_BATCHES), MAX_BATCHES)
    at_once = max(_DRAWN_BYTES // inputs, 1)  # one large draw takes far less time than many small ones
    while len(batches) < count:
        batches += draw(min(at_once, count - len(batches)))
    return batches


def split(batch: Batch, batch_size: int) -> list[Batch]:
    """Cut a batch into batches of `batch_size` samples; it must hold a multiple of that.

    The same as `batch.rows` for each piece, in one pass over the ids.
    """
    if batch.batch_size == batch_size:
        return [batch]
    pieces = batch.batch_size // batch_size
    features = (batch.offsets.size - 1) // batch.batch_size
    bounds = batch.offsets.astype(np.int64)

    def piece_major(per_bag: LongArray) -> LongArray:
        return per_bag.reshape(features, pieces, batch_size).transpose(1, 0, 2).reshape(-1)

    starts, lengths = piece_major(bounds[:-1]), piece_major(np.diff(bounds))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(batch.indices.size) + np.repeat(starts - offsets[:-1], lengths)
    indices = batch.indices[positions]
    weights = None if batch.weights is None else batch.weights[positions]
    cut = []
    for piece in range(pieces):
        bags = offsets[piece * features * batch_size : (piece + 1) * features * batch_size + 1]
        ids = slice(bags[0], bags[-1])
        cut.append(
            Batch(
                dense=batch.dense[piece * batch_size : (piece + 1) * batch_size],
                indices=indices[ids],
                offsets=(bags - bags[0]).astype(batch.offsets.dtype),
                weights=None if weights is None else weights[ids],
            )
        )
    return cut


def touching_batches(config: ModelConfig, index_dtype: np.dtype[Any]) -> Iterator[Batch]:
    """Batches that together read at least one row in every page of every table."""
    pages_F = [_page_ids(config, feature) for feature in config.features]
    bags_F = [-(-pages.size // f.longest_bag) for pages, f in zip(pages_F, config.features, strict=True)]
    for start in range(0, max(bags_F), _TOUCH_SAMPLES):
        samples = min(_TOUCH_SAMPLES, max(bags_F) - start)
        ids = []
        for pages, feature in zip(pages_F, config.features, strict=True):
            L = feature.longest_bag
            # A small table is read again from its first page. (np.take's own wrapping subtracts its way down.)
            positions = np.arange(start * L, (start + samples) * L) % pages.size
            ids.append(pages[positions])
        lengths = np.repeat([feature.longest_bag for feature in config.features], samples)
        indices = np.concatenate(ids).astype(index_dtype)
        yield Batch(
            dense=np.zeros((samples, len(config.dense_features)), np.float32),
            indices=indices,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(index_dtype),
            weights=np.ones(indices.size, np.float32) if config.weighted else None,
        )


def _page_ids(config: ModelConfig, feature: FeatureConfig) -> LongArray:
    """Ids one page apart, and the last one, which may lie on a page of its own."""
    table = config.table(feature.table)
    part = max(table.parts, key=lambda part: part.rows * part.width)
    step = max(_PAGE_BYTES // (part.width * 4), 1)
    ids = np.arange(0, part.rows, step) * part.divisor
    return np.append(np.minimum(ids, table.rows - 1), table.rows - 1)


class Inputs:
    """The batches of a run. Those of the size in use are kept."""

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        *,
        distribution: BatchDistribution,
        index_dtype: np.dtype[Any],
        trace: Trace | None = None,
    ) -> None:
        self._config = config
        self._draw = partial(
            rotating_batches, config, seed=seed, distribution=distribution, index_dtype=index_dtype, trace=trace
        )
        self._kept: tuple[int, list[Batch]] = (0, [])

    def of_size(self, batch_size: int) -> list[Batch]:
        """As `rotating_batches`."""
        if self._kept[0] != batch_size:
            self._kept = batch_size, self._draw(batch_size)
        return self._kept[1]

    def to_compare(self, batch_size: int) -> list[Batch]:
        """Batches whose outputs are compared: `COMPARED_SAMPLES` samples or all, and the batch with the longest bag.

        A plan takes bags up to some length: what scores the longest bag scores every batch.
        """
        batches = self.of_size(batch_size)
        longest = max(batches, key=lambda batch: int(np.diff(batch.offsets).max(initial=0)))
        return [longest, *batches[: -(-COMPARED_SAMPLES // batch_size)]]
