"""The results of a benchmark: frozen rows of facts that can be rerun from themselves (fields: docs/bench.md)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from dlrm_deploy.bench.calibration import Calibration
from dlrm_deploy.bench.measure import Nanoseconds
from dlrm_deploy.bench.work import Floor, Work

QUIET_LOAD = 0.1
"""Share of the machine that other processes may use before numbers are doubtful."""

_NS_PER_MS = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """How fast one engine was at one batch size."""

    median_ms: float
    """Median over rounds of the median time per call: throughput and ratios come from it. Not the mean: one call that
    the machine's other work holds up for 100 ms would decide it; `p99_ms` shows such calls."""

    p50_ms: float
    """Median over all calls."""

    p99_ms: float
    """The call that 99 % of all calls were as fast as; the slowest one where there are fewer than a hundred calls."""

    samples_per_s: float
    calls: int
    ratio: float
    """Times as fast as the baseline: median over rounds of (baseline's median time per call / this engine's)."""

    ratio_min: float
    """The same for the round least favourable to this engine."""

    ratio_max: float


def summarise(rounds: Sequence[Nanoseconds], baseline: Sequence[Nanoseconds], batch_size: int) -> Timing:
    """Condense the calls of one engine; the baseline's rounds are the same rounds."""
    medians_ms = np.array([np.median(calls) for calls in rounds]) / _NS_PER_MS
    baseline_ms = np.array([np.median(calls) for calls in baseline]) / _NS_PER_MS
    all_ms = np.concatenate(rounds) / _NS_PER_MS
    ratios = baseline_ms / medians_ms
    median_ms = float(np.median(medians_ms))
    return Timing(
        median_ms=median_ms,
        p50_ms=float(np.median(all_ms)),
        p99_ms=float(np.quantile(all_ms, 0.99, method="higher")),
        samples_per_s=batch_size / median_ms * 1000,
        calls=all_ms.size,
        ratio=float(np.median(ratios)),
        ratio_min=float(ratios.min()),
        ratio_max=float(ratios.max()),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class OverFloor:
    """How far an engine is from what the machine's limits allow."""

    floor_ms: float
    """Gathering the rows and then computing, at the calibrated rates: median over the rounds."""

    floor_overlap_ms: float
    """The same with both at once: the longer of the two."""

    floor_strict_ms: float
    """Both at once, with the rate of the very rows of the batches instead of rows anywhere in the table."""

    times_floor: float
    """Median over rounds of (the engine's median time per call / `floor_ms` of that round)."""

    times_floor_overlap: float
    times_floor_strict: float


def over_floor(rounds: Sequence[Nanoseconds], floors: Sequence[Floor]) -> OverFloor:
    """Compare the calls of each round with the floor calibrated before it."""
    medians_ms = np.array([np.median(calls) for calls in rounds]) / _NS_PER_MS
    sums, overlaps, stricts = np.array([(floor.sum_ms, floor.overlap_ms, floor.strict_ms) for floor in floors]).T
    return OverFloor(
        floor_ms=float(np.median(sums)),
        floor_overlap_ms=float(np.median(overlaps)),
        floor_strict_ms=float(np.median(stricts)),
        times_floor=float(np.median(medians_ms / sums)),
        times_floor_overlap=float(np.median(medians_ms / overlaps)),
        times_floor_strict=float(np.median(medians_ms / stricts)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How near an engine's probabilities are to the reference's, on batches of the size measured, before timing."""

    max_abs_difference: float
    correlation: float | None
    """Of the logits; None where there are too few samples or they do not vary."""

    spread_error: float | None
    """Root mean square difference of the logits / standard deviation of the reference's. Random weights make all
    probabilities nearly alike, so that a small absolute difference alone proves little."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What an engine takes to be ready."""

    load_seconds: float
    """Opening it, without reading the tables."""

    resident_bytes: int | None
    """Memory of its own after the first call, mapped tables not counted; None where the system does not tell. In one
    process with other engines it is what the process grew by; with --isolate it is exact."""

    stored_table_bytes: int
    """Tables as it stores them, mapped or its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRow:
    """One engine at one batch size."""

    model: str
    engine: str
    """Name of the engine, with number formats in brackets unless both are fp32: `onnxruntime[int8,bf16]`."""

    tables: str
    """Row format of its tables."""

    mlp: str
    """Number format of its MLPs and interaction."""

    engine_version: str
    implementations: dict[str, str]
    """Which implementation each of our operators used."""

    batch: int
    timing: Timing
    baseline: str
    agreement: Agreement
    distinct_batches: int
    other_load: float | None
    """Share of the machine's cores, 0 to 1, that other processes used meanwhile; None where it is unknown."""

    calibration: Calibration | None
    """Medians over the rounds; None where the native library is not there."""

    work: Work
    floor: OverFloor | None
    """None without calibration."""

    footprint: Footprint
    breakdown: dict[str, float] | None
    """Share of the time of all nodes by operator, of ONNX Runtime's engines where it was asked for."""

    def facts(self) -> dict[str, object]:
        """Plain values, all on one level but `implementations`, `calibration` and `breakdown`."""
        nothing = dict.fromkeys(field.name for field in fields(OverFloor))
        return {
            "kind": "throughput",
            "model": self.model,
            "engine": self.engine,
            "tables": self.tables,
            "mlp": self.mlp,
            "engine_version": self.engine_version,
            "implementations": self.implementations,
            "batch": self.batch,
            **asdict(self.timing),
            "baseline": self.baseline,
            **asdict(self.agreement),
            "distinct_batches": self.distinct_batches,
            "other_load": self.other_load,
            "bytes_per_sample": self.work.bytes,
            "flops_per_sample": self.work.flops,
            **(nothing if self.floor is None else asdict(self.floor)),
            **asdict(self.footprint),
            "breakdown": self.breakdown,
            "calibration": None if self.calibration is None else asdict(self.calibration),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class NotRun:
    """An engine that could not run here, at one batch size or (None) at all."""

    engine: str
    batch: int | None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Circumstances:
    """What all rows of a run share. `command` repeats the run."""

    command: str
    time: str
    """UTC, ISO 8601."""

    dlrm_deploy_version: str
    commit: str | None
    """Of dlrm-deploy's own checkout, if it runs from one."""

    cpu: str
    threads: int
    seed: int
    distribution: str
    rounds: int
    slice_ms: float
    isolate: bool
    """Whether each engine ran in a process of its own."""

    prefault: bool
    huge_pages: bool
    """Of ONNX Runtime's engines."""

    table_bytes: int
    """Of the model in fp32."""

    reference: str
    """The engine that outputs were compared with."""

    omp_wait_policy: str | None
    """`OMP_WAIT_POLICY` of the environment: "active" lets torch's idle threads spin on into the slices of others."""

    calibration_missing: str | None
    """Why there is no calibration, or None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchReport:
    """A whole run: rows by batch size, in the order of the engines."""

    circumstances: Circumstances
    rows: tuple[BenchRow, ...]
    not_run: tuple[NotRun, ...]

    def to_json_lines(self) -> str:
        """One JSON object per line, each complete in itself; engines that did not run have `not_run` and no timing."""
        shared = asdict(self.circumstances)
        lines = [{**row.facts(), **shared} for row in self.rows]
        lines += [
            {"kind": "throughput", "engine": n.engine, "batch": n.batch, "not_run": n.reason, **shared}
            for n in self.not_run
        ]
        return "".join(json.dumps(line) + "\n" for line in lines)


def readable_bytes(count: int) -> str:
    """2160000000 as 2.16 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
