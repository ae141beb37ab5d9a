"""What the machine can do right now: the limits that engine timings are read against.

On a shared machine the same loops take up to twice as long from one minute to the next, so they run right before each
round, on as many threads as the engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from dlrm_deploy.config import ModelConfig
from dlrm_deploy.engines import library

MILLISECONDS = 30.0
"""Time spent on each of the three loops."""

BUFFER_BYTES = 256 << 20
"""Memory that is read: more than the caches of most CPUs, and filled anew in a fifth of a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Rates of one moment, or their medians over several."""

    fma_gflops: float
    """Fused multiply-adds in float32 registers, two operations each: 1e9 operations a second."""

    stream_gb_per_s: float
    """Reading memory from one end to the other."""

    gather_gb_per_s: float
    """Reading rows of `row_bytes` in random order."""

    row_bytes: int
    """Bytes of one table row of the model."""

    gather_bytes: int
    """Size of the table that the rows lie in: the model's, up to `BUFFER_BYTES`."""


def measure_calibration(config: ModelConfig, threads: int) -> Calibration:
    """Run the three loops of the native library, with rows of the table group that most bytes are read from.

    Raises:
        EngineError: the native library is not there.
    """
    groups = config.groups
    read = [group.width * sum(config.features[slot.feature].longest_bag for slot in group.slots) for group in groups]
    group = groups[read.index(max(read))]
    row_bytes, gather_bytes = group.bytes // group.rows, min(group.bytes, BUFFER_BYTES)
    return Calibration(
        fma_gflops=library.calibrate_fma(threads, MILLISECONDS),
        stream_gb_per_s=library.calibrate_read(BUFFER_BYTES, threads, MILLISECONDS),
        gather_gb_per_s=library.calibrate_gather(row_bytes, gather_bytes, threads, MILLISECONDS),
        row_bytes=row_bytes,
        gather_bytes=gather_bytes,
    )


def median_calibration(calibrations: Sequence[Calibration]) -> Calibration:
    """The median of each rate."""
    return Calibration(
        fma_gflops=median(c.fma_gflops for c in calibrations),
        stream_gb_per_s=median(c.stream_gb_per_s for c in calibrations),
        gather_gb_per_s=median(c.gather_gb_per_s for c in calibrations),
        row_bytes=calibrations[0].row_bytes,
        gather_bytes=calibrations[0].gather_bytes,
    )
