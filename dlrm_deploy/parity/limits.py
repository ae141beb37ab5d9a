"""The absolute difference of probabilities to accept of an engine, from what its number formats can round away.

Reasons and figures are in docs/check.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.data.random import random_batch, with_longer_bags
from dlrm_deploy.engines.engine import Engine
from dlrm_deploy.engines.registry import PLAN_ENGINES
from dlrm_deploy.int8_codes import LARGEST_CODE
from dlrm_deploy.model.rounding import derived_limit
from dlrm_deploy.parity.compare import Limit

if TYPE_CHECKING:
    from dlrm_deploy.parity.rounding_limit import RoundingLimit  # brings torch

_ROUNDING_UNITS = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 0.5 / LARGEST_CODE}
"""Largest error of a rounded value: of its own size, in int8 of the size of its sample's largest value."""

_SAMPLES = 1024
_SEED = 7


def precision_limit(config: ModelConfig, precision: str, batch: Batch | None = None) -> float:
    """`derived_limit` for an engine that computes in another number format than its reference: larger by the ratio of
    rounding units."""
    return derived_limit(config, batch) * _ROUNDING_UNITS[precision] / _ROUNDING_UNITS["fp32"]


class Limits:
    """Of one engine and one bundle.

    Plans compute in a number format of their own, and are compared with a reference in that of the bundle's MLPs: the
    coarser of the two counts (`precision_limit`). Other engines compute with what the bundle
    stores: they differ by the order of float32 sums (`derived_limit`), whatever the format of the tables, and where the
    MLPs are bfloat16 or int8 by what that changes in roundings (`dlrm_deploy.parity.rounding_limit`).
    """

    def __init__(self, bundle: Bundle, engine: Engine, reference: Engine | None) -> None:
        """Without a reference, for want of torch, bfloat16 and int8 MLPs get the wide limit of a plan."""
        self._config = bundle.config
        plan = engine.name in PLAN_ENGINES
        mlp = bundle.manifest.mlp_precision
        rounds = mlp != "fp32" and not plan
        if plan:
            self._precision = max(engine.precision, mlp, key=_ROUNDING_UNITS.__getitem__)
        else:
            self._precision = mlp if rounds and reference is None else "fp32"
        self._roundings = _roundings(reference) if rounds and reference is not None else None
        self._most = 0.0
        if self._roundings is not None:
            drawn = random_batch(with_longer_bags(bundle.config), _SAMPLES, np.random.default_rng(_SEED))
            self._most = max(self._roundings(batch).most for batch in (bundle.golden().batch, drawn))

    @property
    def default(self) -> float:
        """Of the model: its longest bags, and for roundings the golden batch and random samples."""
        return precision_limit(self._config, self._precision) + self._most

    def of(self, batch: Batch) -> Limit:
        """Of a batch whose ids the model takes: more where its bags are longer or its values larger."""
        sums = precision_limit(self._config, self._precision, batch)
        if self._roundings is None:
            return Limit(sums)
        rounding = self._roundings(batch)
        return Limit(sums + max(self._most, rounding.most), sums + rounding.rms)


def _roundings(reference: Engine) -> Callable[[Batch], RoundingLimit]:
    from dlrm_deploy.engines.torch_eager import TorchEngine
    from dlrm_deploy.parity.rounding_limit import rounding_limit

    assert isinstance(reference, TorchEngine)

    def limit(batch: Batch) -> RoundingLimit:
        return rounding_limit(reference, batch)

    return limit
