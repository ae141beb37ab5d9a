"""Turns a batch into the host arrays that a plan takes, and refuses what the plan cannot hold.

A GPU kernel cannot report a bad id, so everything is checked here, before anything runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.errors import BatchError

_INT32 = np.iinfo(np.int32)


def plan_feed(batch: Batch, config: ModelConfig, max_bag: int | None, max_batch: int) -> dict[str, npt.NDArray[Any]]:
    """The inputs of a plan, by name, without its tables.

    Args:
        batch: fits `config` (`Batch.check_fits`), and holds at least one sample.
        config: the model's architecture.
        max_bag: ids that a bag of the plan holds; None for fixed pooling factors.
        max_batch: samples that the plan takes at once.

    Returns:
        dense [B, D] float32, indices [max(N, 1)] int32, and where the model has them offsets [F * B + 1] int32 and
        weights [max(N, 1)] float32. A plan takes no empty input: a batch without ids gets one that no bag owns.

    Raises:
        BatchError: too many samples, a bag that is too long, or under index policy error an id outside its table.
    """
    if batch.batch_size > max_batch:
        raise BatchError(
            f"the batch has {batch.batch_size} samples, and the plan takes at most {max_batch}. Split the batch, or "
            f"build the plan with --max-batch {batch.batch_size}."
        )
    if max_bag is not None:
        _check_bags(batch, config, max_bag)
    indices = _narrow(batch, config)
    feed: dict[str, npt.NDArray[Any]] = {"dense": batch.dense, "indices": _never_empty(indices)}
    if max_bag is not None:
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
    ids = batch.indices
    if config.index_policy == "error":
        bad_ids = batch.explain_bad_ids(config)
        if bad_ids:
            raise BatchError(bad_ids)
    elif ids.size and (ids.min() < _INT32.min or ids.max() > _INT32.max):
        if config.index_policy == "modulo":
            counts = np.diff(batch.offsets[:: batch.batch_size])
            return (ids % np.repeat(np.array(config.feature_rows, np.int64), counts)).astype(np.int32)
        return np.clip(ids, _INT32.min, _INT32.max).astype(np.int32)  # outside every table, as before
    return ids.astype(np.int32, copy=False)


def _never_empty(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values if values.size else np.zeros(1, values.dtype)
