"""What the machine can do right now: the limits that engine timings are read against.

On a shared machine the same loops take up to twice as long from one minute to the next, so they run right before each
round, on as many threads as the engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from dlrm_deploy.bench.gather import GatherRows, at_random, calibrate_gather_rows
from dlrm_deploy.engines import library
from dlrm_deploy.errors import EngineError

MILLISECONDS = 30.0
"""Time spent on each of the loops."""

BUFFER_BYTES = 256 << 20
"""Memory that is streamed: more than the caches of most CPUs, and filled anew in a fifth of a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Rates of one moment, or their medians over several."""

    fma_gflops: float
    """Fused multiply-adds in float32 registers, two operations each: 1e9 operations a second."""

    amx_bf16_gflops: float | None
    """Products of bfloat16 tiles in AMX registers; None where the CPU has no AMX."""

    amx_int8_gops: float | None
    """Products of int8 tiles likewise."""

    stream_gb_per_s: float
    """Reading memory from one end to the other."""

    gather: dict[int, float]
    """By bytes of a row: GB/s of reading rows anywhere in the mapped table of the model."""

    gather_replayed: dict[int, float]
    """The same for the very rows that the batches read: faster where those lie in small tables or come again."""


def measure_calibration(
    threads: int, rows: Sequence[GatherRows], random_rows: Sequence[GatherRows] | None = None
) -> Calibration:
    """Run the loops of the native library.

    Args:
        threads: of each loop.
        rows: what the batches read; of several with as many bytes a row the longest list counts.
        random_rows: `at_random` of each; drawn here if left out.

    Raises:
        EngineError: the native library is not there.
    """
    if random_rows is None:
        random_rows = [at_random(part) for part in rows]

    def gather(parts: Sequence[GatherRows]) -> dict[int, float]:
        by_size = {part.row_bytes: part for part in sorted(parts, key=lambda part: part.rows.size)}
        return {size: calibrate_gather_rows(by_size[size], threads, MILLISECONDS) for size in sorted(by_size)}

    return Calibration(
        fma_gflops=library.calibrate_fma(threads, MILLISECONDS),
        amx_bf16_gflops=_amx("bf16", threads),
        amx_int8_gops=_amx("int8", threads),
        stream_gb_per_s=library.calibrate_read(BUFFER_BYTES, threads, MILLISECONDS),
        gather=gather(random_rows),
        gather_replayed=gather(rows),
    )


def _amx(kind: Literal["bf16", "int8"], threads: int) -> float | None:
    try:
        return library.calibrate_amx(kind, threads, MILLISECONDS)
    except EngineError:
        return None  # no such instructions here


def median_calibration(calibrations: Sequence[Calibration]) -> Calibration:
    """The median of each rate."""

    def amx(values: list[float | None]) -> float | None:
        measured = [value for value in values if value is not None]
        return median(measured) if measured else None

    def gather(rates: Sequence[dict[int, float]]) -> dict[int, float]:
        return {size: median(rate[size] for rate in rates) for size in rates[0]}

    return Calibration(
        fma_gflops=median(c.fma_gflops for c in calibrations),
        amx_bf16_gflops=amx([c.amx_bf16_gflops for c in calibrations]),
        amx_int8_gops=amx([c.amx_int8_gops for c in calibrations]),
        stream_gb_per_s=median(c.stream_gb_per_s for c in calibrations),
        gather=gather([c.gather for c in calibrations]),
        gather_replayed=gather([c.gather_replayed for c in calibrations]),
    )
