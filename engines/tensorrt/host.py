"""Turns a batch into the host arrays that a plan takes, in pieces where it is large, and refuses what cannot be scored.

A GPU kernel cannot report a bad id, so everything is checked here, before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.errors import BatchError

_INT32 = np.iinfo(np.int32)


def plan_feeds(
    batch: Batch, config: ModelConfig, max_bag: int | None, max_batch: int
) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """The inputs of a plan, by name, without its tables: one feed for each `max_batch` samples, in order.

    The whole batch is checked by the call itself; each feed is made when it is asked for.

    Args:
        batch: fits `config` (`Batch.check_fits`), and holds at least one sample.
        config: the model's architecture.
        max_bag: ids that a bag of the plan holds; None for fixed pooling factors.
        max_batch: samples that the plan takes at once.

    Returns:
        Of B samples with N ids each: dense [B, D] float32, indices [max(N, 1)] int32, and where the model has them
        offsets [F * B + 1] int32 and weights [max(N, 1)] float32. A plan takes no empty input: samples without ids get
        one that no bag owns.

    Raises:
        BatchError: a bag that is too long, or under index policy error an id outside its table.
    """
    if max_bag is not None:
        _check_bags(batch, config, max_bag)
    if config.index_policy == "error" and (bad_ids := batch.explain_bad_ids(config)):
        raise BatchError(bad_ids)
    size = batch.batch_size
    if size <= max_batch:
        return iter((_feed(batch, config, max_bag is not None),))
    pieces = (batch.rows(start, min(start + max_batch, size)) for start in range(0, size, max_batch))
    return (_feed(piece, config, max_bag is not None) for piece in pieces)


def _feed(batch: Batch, config: ModelConfig, ragged: bool) -> dict[str, npt.NDArray[Any]]:
    """The inputs for a batch that was checked and that the plan takes at once."""
    indices = _narrow(batch, config)
    feed: dict[str, npt.NDArray[Any]] = {"indices": _never_empty(indices)}
    if config.dense_features:
        feed["dense"] = batch.dense
    if ragged:
        feed["offsets"] = batch.offsets.astype(np.int32, copy=False)
    if batch.weights is not None:
        feed["weights"] = _never_empty(batch.weights)
    return feed


def _check_bags(batch: Batch, config: ModelConfig, max_bag: int) -> None:
    lengths = np.diff(batch.offsets)
    if int(lengths.max(initial=0)) <= max_bag:
        return
    bag = int(np.argmax(lengths > max_bag))
    f, b = divmod(bag, batch.batch_size)
    raise BatchError(
        f"feature {config.features[f].name!r}, sample {b}: the bag holds {lengths[bag]} ids, and the plan takes at "
        f"most {max_bag}. Shorten the bag, or build the plan with --max-bag {lengths.max()}."
    )


def _narrow(batch: Batch, config: ModelConfig) -> npt.NDArray[np.int32]:
    """Ids as int32 that stand for the same rows under the index policy."""
    ids = batch.reduced_ids(config)  # here, where 64 bits are at hand
    if config.index_policy != "error" and ids.size and (ids.min() < _INT32.min or ids.max() > _INT32.max):
        if config.index_policy == "modulo":
            counts = np.diff(batch.offsets[:: batch.batch_size])
            return (ids % np.repeat(np.array(config.feature_rows, np.int64), counts)).astype(np.int32)
        return np.clip(ids, _INT32.min, _INT32.max).astype(np.int32)  # outside every table, as before
    return ids.astype(np.int32, copy=False)


def _never_empty(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values if values.size else np.zeros(1, values.dtype)
