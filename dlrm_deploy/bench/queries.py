"""Queries of a load test: one user and the items to be ranked for them, scored as one batch.

Shape letters: Q queries, B pairs of one query.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench import inputs
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.data.random import BatchDistribution, random_batch
from dlrm_deploy.data.trace import Trace, TraceStream

LEAST_QUERIES = 64
MOST_QUERIES = 1024

_DECAY = 2.96
"""Of the truncated exponential distribution of sizes: from 100 to 700 its mean is 270, as in MLPerf's accuracy runs."""


def query_sizes(count: int, least: int, most: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Pairs of each query, [count] int64 in [least, most]: small ones often, large ones seldom.

    MLPerf's sizes run from 100 to 700 with a mean of 270. Ours have the same range and mean.
    """
    u = rng.random(count)
    share = -np.log1p(-u * -np.expm1(-_DECAY)) / _DECAY
    sizes: npt.NDArray[np.int64] = np.clip(np.rint(least + share * (most - least)), least, most).astype(np.int64)
    return sizes


def query_library(
    config: ModelConfig,
    seed: int,
    *,
    least: int,
    most: int,
    distribution: BatchDistribution,
    trace: Path | None,
    index_dtype: np.dtype[Any],
) -> list[Batch]:
    """Queries to draw from, the same for the same seed.

    There are enough to read more bytes of table rows than the caches hold (`inputs.GATHERED_BYTES`), within
    `LEAST_QUERIES` and `MOST_QUERIES`. The pairs of a query are drawn independently, as MLPerf's are: nothing says
    which features of a model belong to the user.

    Raises:
        DataError: the trace cannot be read or is not of such a model.
    """
    rng = np.random.default_rng(seed)
    sizes = query_sizes(MOST_QUERIES, least, most, rng)
    stream = None if trace is None else TraceStream(Trace.read(trace), config, seed)
    queries: list[Batch] = []
    gathered = 0
    for size in sizes:
        if len(queries) >= LEAST_QUERIES and gathered >= inputs.GATHERED_BYTES:
            break
        query = random_batch(
            config, int(size), rng, distribution=distribution, trace=stream, index_dtype=index_dtype.type
        )
        # Long dense inputs count too: the library itself should not fill the memory.
        gathered += max(inputs.gathered_bytes(config, query), query.dense.nbytes + query.indices.nbytes)
        queries.append(query)
    return queries


def merge(batches: Sequence[Batch]) -> Batch:
    """One batch of all samples of several batches of one model, in their order."""
    if len(batches) == 1:
        return batches[0]
    lengths, pieces, weights = [], [], []
    for batch in batches:
        lengths.append(np.diff(batch.offsets).reshape(-1, batch.batch_size))
        ends = batch.offsets[batch.batch_size :: batch.batch_size]
        pieces.append(np.split(batch.indices, ends[:-1]))
        if batch.weights is not None:
            weights.append(np.split(batch.weights, ends[:-1]))
    offsets = np.zeros(sum(each.size for each in lengths) + 1, batches[0].offsets.dtype)
    np.cumsum(np.concatenate(lengths, axis=1).reshape(-1), out=offsets[1:])
    return Batch(
        dense=np.concatenate([batch.dense for batch in batches]),
        indices=np.concatenate([piece for of_feature in zip(*pieces, strict=True) for piece in of_feature]),
        offsets=offsets,
        weights=np.concatenate([piece for of_feature in zip(*weights, strict=True) for piece in of_feature])
        if weights
        else None,
    )
