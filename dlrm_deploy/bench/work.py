"""What a sample costs at least: bytes of table rows to gather and operations to compute, and the floor they make.

The floor is a yardstick, not a prediction: rows are gathered at the rate of a loop that does nothing else, operations
run at the rate of a loop in registers. `Floor.sum_ms` does one after the other with rows anywhere in the table;
`Floor.overlap_ms` both at once; `Floor.strict_ms` both at once with the very rows of the batches, which may lie in
small tables or caches. Nothing can be faster than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dlrm_deploy.batch import Batch
from dlrm_deploy.bench.calibration import Calibration
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.formats import RowFormat, row_bytes
from dlrm_deploy.model.keys import DENSE_VECTORS, dense_shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Of one sample, on average over the batches measured."""

    gathered: Mapping[int, float]
    """Bytes gathered, by bytes of a row."""

    flops: float
    """Multiplications and additions of MLPs, cross layers and interaction; pooling is not counted."""

    mlp: str
    """Number format that they run in: fp32, fp16, bf16 or int8."""

    @property
    def bytes(self) -> float:
        """Bytes gathered."""
        return sum(self.gathered.values())


class Floor(NamedTuple):
    """Milliseconds for a batch at the rates of one moment."""

    gather_ms: float
    """At the rate of rows anywhere in the table."""

    compute_ms: float
    replay_ms: float
    """At the rate of the very rows of the batches."""

    @property
    def sum_ms(self) -> float:
        return self.gather_ms + self.compute_ms

    @property
    def overlap_ms(self) -> float:
        return max(self.gather_ms, self.compute_ms)

    @property
    def strict_ms(self) -> float:
        return max(self.replay_ms, self.compute_ms)


def floor_of(work: Work, calibration: Calibration, batch_size: int) -> Floor:
    """The floor of a batch.

    bf16 and int8 run at their AMX rates with all of their operations, those of the interaction too. Where there is no
    AMX they run at the rate of fp32 multiply-adds.
    """

    def gather_ms(rates: Mapping[int, float]) -> float:
        return sum(count / rates[size] for size, count in work.gathered.items()) * batch_size * 1e-6

    amx = {"bf16": calibration.amx_bf16_gflops, "int8": calibration.amx_int8_gops}.get(work.mlp)
    rate = calibration.fma_gflops if amx is None else amx
    return Floor(
        gather_ms=gather_ms(calibration.gather),
        compute_ms=work.flops / rate * batch_size * 1e-6,
        replay_ms=gather_ms(calibration.gather_replayed),
    )


def work_of(config: ModelConfig, formats: Mapping[str, RowFormat], mlp: str, batches: Sequence[Batch]) -> Work:
    """Work of one sample of these batches.

    Args:
        config: the model. Rows of path tables are not counted.
        formats: row format of each table part that is not fp32.
        mlp: number format of the MLPs.
        batches: at least one sample.
    """
    samples = sum(batch.batch_size for batch in batches)
    counts = [np.diff(batch.offsets[:: batch.batch_size].astype(np.int64)) for batch in batches]
    ids_F = np.sum(counts, axis=0) / samples
    gathered: dict[int, float] = {}
    for group in config.groups:
        for slot in group.slots:
            size = row_bytes(formats.get(slot.part.name, "fp32"), group.width)
            gathered[size] = gathered.get(size, 0.0) + float(ids_F[slot.feature]) * size
    return Work(gathered=gathered, flops=flops_per_sample(config), mlp=mlp)


def flops_per_sample(config: ModelConfig) -> float:
    """Two for each weight of every layer, and for each product of two values in the interaction."""
    total = 0.0
    for key, shape in dense_shapes(config).items():
        if len(shape) == 2 and key != DENSE_VECTORS:
            total += 2 * math.prod(shape)
    vectors = len(config.features) + config.has_dense_vector
    if config.interaction == "dot":
        pairs = vectors * (vectors + (1 if config.self_interaction else -1)) // 2
        total += 2 * pairs * config.vector_widths[0]
    elif config.interaction == "projection":
        width = config.vector_widths[0]
        total += 2 * (config.branch1[-1] // width) * (config.branch2[-1] // width) * width
    elif config.interaction == "fm":
        total += 4 * vectors * config.vector_widths[0]
    return total
