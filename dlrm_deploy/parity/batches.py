"""Batches that break embedding-bag code, for any model: awkward bags, and ids that are out of range.

Only batches that the model's signature allows are made: a model with fixed pooling factors has no empty bags.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.data.random import with_longer_bags

SAMPLES = 5

LONG_BAG = 300
"""Ids in a bag that is longer than what kernels unroll, prefetch or hold on the stack."""

LongArray = npt.NDArray[np.int64]

_INT32 = np.iinfo(np.int32)


def awkward_batches(config: ModelConfig, rng: np.random.Generator, most_ids: int | None = None) -> dict[str, Batch]:
    """Valid batches of `SAMPLES` samples, by name.

    Bags that vary hold several ids here, also where the model does not say how many its data holds.

    Args:
        config: the model. All names for bags that vary; the last two for fixed pooling factors.
        rng: of dense values, ids and weights.
        most_ids: ids that the engine takes in a bag; None for any number.
    """
    config = with_longer_bags(config, most=most_ids)
    longest_FB = np.repeat([[feature.longest_bag] for feature in config.features], SAMPLES, axis=1)
    lengths = {"longest bags": longest_FB}
    if config.pooling_factors is None:
        uneven_FB = rng.integers(0, longest_FB + 1)
        uneven_FB[:, 0], uneven_FB[:, -1] = 0, longest_FB[:, -1]
        lengths = {
            "all bags empty": np.zeros_like(longest_FB),
            "one id per bag": np.ones_like(longest_FB),
            "uneven bags": uneven_FB,
            **lengths,
        }
        if most_ids is None or most_ids >= LONG_BAG:
            long_FB = np.ones_like(longest_FB)
            long_FB[:, 1] = LONG_BAG
            lengths[f"bags of {LONG_BAG} ids"] = long_FB
    batches = {name: _batch(config, rng, lengths_FB) for name, lengths_FB in lengths.items()}
    for name, ids in (
        ("one id repeated", _one_id_repeated(config, rng, longest_FB)),
        ("first and last rows", _first_and_last_rows(config, longest_FB)),
    ):
        batches[name] = _batch(config, rng, longest_FB, ids)
    return batches


def out_of_range_batch(config: ModelConfig, rng: np.random.Generator, index_dtype: npt.DTypeLike) -> Batch:
    """Longest bags in which each feature has ids just below and just above its table, and the first one far outside.

    Where ids are int64, the last of several features has some beyond 32 bits too: ONNX Runtime's own operators are not
    all right about them.
    """
    longest_FB = np.repeat([[feature.longest_bag] for feature in config.features], SAMPLES, axis=1)
    batch = _batch(config, rng, longest_FB)
    ids = batch.indices.astype(np.int64)
    ends_F = np.cumsum(longest_FB.sum(axis=1))
    starts_F = ends_F - longest_FB.sum(axis=1)
    # SAMPLES bags of at least one id: the four places of a feature are distinct.
    ids[starts_F] = -1
    ids[ends_F - 1] = np.minimum(config.feature_rows, _INT32.max)
    ids[starts_F[0] + 1], ids[starts_F[0] + 2] = _INT32.max, _INT32.min
    if index_dtype == np.int64 and len(starts_F) > 1:
        ids[starts_F[-1] + 1], ids[starts_F[-1] + 2] = 2**31, 2**32 - 1
    return Batch(batch.dense, ids, batch.offsets, batch.weights)


def _batch(config: ModelConfig, rng: np.random.Generator, lengths_FB: LongArray, ids: LongArray | None = None) -> Batch:
    """A batch whose bag f, b holds lengths_FB[f, b] ids: the given ones, else random ones."""
    if ids is None:
        ids = rng.integers(0, np.repeat(np.array(config.feature_rows), lengths_FB.sum(axis=1)))
    dense = rng.standard_normal((SAMPLES, len(config.dense_features)), np.float32)
    weights = rng.standard_normal(ids.size, np.float32) if config.weighted else None
    offsets = np.concatenate([[0], np.cumsum(lengths_FB)]).astype(np.int64)
    return Batch(dense, ids.astype(np.int64), offsets, weights)


def _one_id_repeated(config: ModelConfig, rng: np.random.Generator, lengths_FB: LongArray) -> LongArray:
    """Each bag holds one id again and again."""
    rows_FB = np.repeat(np.array(config.feature_rows), SAMPLES)
    repeated: LongArray = np.repeat(rng.integers(0, rows_FB), lengths_FB.reshape(-1))
    return repeated


def _first_and_last_rows(config: ModelConfig, lengths_FB: LongArray) -> LongArray:
    """The first and the last row of each table by turns."""
    last_N = np.repeat(np.array(config.feature_rows) - 1, lengths_FB.sum(axis=1))
    return np.where(np.arange(last_N.size) % 2, last_N, 0)
