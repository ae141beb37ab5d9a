"""How far apart two correct float32 engines of a model can be. Free of torch: parity and benchmark use it."""

from __future__ import annotations

import math

import numpy as np

from dlrm_deploy.batch import Batch
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.model.keys import dense_shapes

LEAST_LIMIT = 1e-6


def derived_limit(config: ModelConfig, batch: Batch | None = None) -> float:
    """Absolute difference of two float32 probabilities to accept: `LEAST_LIMIT`, or more where sums are long.

    Two correct engines differ by the order of their float32 sums. A sum of n terms moves by about sqrt(n) * 2^-24 of
    its size, and the sigmoid's slope is at most 1/4: behind sums of n_1, n_2, ... terms a logit of size 1 moves the
    probability by about sqrt(n_1 + n_2 + ...) * 2^-26. That is 6.6e-7 for `kaggle` and 2.1e-6 for `mlperf-v2`.

    Args:
        config: the model; its layers are sums, and its longest bag.
        batch: its longest bag counts where it is longer than the config's: `max_ids` is no limit.
    """
    terms = sum(shape[1] for shape in dense_shapes(config).values() if len(shape) == 2)
    longest = max(feature.longest_bag for feature in config.features)
    if batch is not None:
        longest = max(longest, int(np.max(np.diff(batch.offsets), initial=0)))
    terms += longest
    return max(LEAST_LIMIT, math.sqrt(terms) * 2.0**-26)
