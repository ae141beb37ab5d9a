"""Open engines on one bundle, check that they agree, and time them against one another."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

import dlrm_deploy
from dlrm_deploy.batch import Batch
from dlrm_deploy.bench.calibration import Calibration, measure_calibration, median_calibration
from dlrm_deploy.bench.inputs import rotating_batches, touching_batches
from dlrm_deploy.bench.machine import LoadMeter, available_cores, cpu_name, source_commit
from dlrm_deploy.bench.measure import interleave
from dlrm_deploy.bench.rows import BenchReport, BenchRow, Circumstances, NotRun, summarise
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.data.random import DISTRIBUTIONS, Distribution
from dlrm_deploy.engines.engine import Engine
from dlrm_deploy.engines.registry import ENGINE_NAMES, MOST_THREADS, PLAN_ENGINES, missing_package, open_unchecked
from dlrm_deploy.errors import BatchError, ConfigError, EngineError, MissingDependencyError
from dlrm_deploy.model.rounding import derived_limit

REFERENCE = "torch"
"""Outputs are compared with this engine's where it takes part, else with the first float32 one's."""

Progress = Callable[[str], None]


def default_engines() -> tuple[str, ...]:
    """The CPU engines whose packages are installed, PyTorch first."""
    return tuple(n for n in ("torch", "onnxruntime-stock", "onnxruntime") if missing_package(n) is None)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSettings:
    """What to measure.

    Raises:
        ConfigError: unknown or repeated engines, a batch size, thread count, number of rounds or slice that is not
            positive, too many threads, an unknown distribution, or a baseline that is not among the engines.
    """

    engines: tuple[str, ...] = field(default_factory=default_engines)
    batch_sizes: tuple[int, ...] = (1, 128, 2048)
    threads: int = field(default_factory=lambda: min(available_cores(), MOST_THREADS))
    distribution: Distribution = "uniform"
    rounds: int = 7
    slice_ms: float = 60.0
    seed: int = 0
    baseline: str | None = None
    """Ratios are taken to this engine; None for the first one that runs."""

    def __post_init__(self) -> None:
        for name in self.engines:
            if name not in ENGINE_NAMES:
                raise ConfigError(f"no engine is named {name!r}. Engines: {', '.join(ENGINE_NAMES)}.")
        for kind, values in (("engine", self.engines), ("batch size", self.batch_sizes)):
            if not values:
                raise ConfigError(f"give at least one {kind} to measure.")
            if len(set(values)) < len(values):
                raise ConfigError(f"each {kind} is measured once, but one is repeated: {', '.join(map(str, values))}.")
        for kind, least in (("batch size", min(self.batch_sizes)), ("threads", self.threads), ("rounds", self.rounds)):
            if least < 1:
                raise ConfigError(f"{kind} must be at least 1, got {least}.")
        if self.threads > MOST_THREADS:
            raise ConfigError(f"threads must be at most {MOST_THREADS}, got {self.threads}.")
        if not 0 < self.slice_ms <= 60_000:
            raise ConfigError(f"a slice must last between 0 and 60000 ms, got {self.slice_ms}.")
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}.")
        if self.distribution not in DISTRIBUTIONS:
            raise ConfigError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {self.distribution!r}.")
        if self.baseline is not None and self.baseline not in self.engines:
            raise ConfigError(
                f"baseline {self.baseline!r} is not among the engines measured: {', '.join(self.engines)}."
            )

    def command(self, target: Sequence[str], baseline: str) -> str:
        """The command line that repeats this run; `target` is the bundle or the preset's options."""
        options = {
            "--engine": ",".join(self.engines),
            "--batch": ",".join(map(str, self.batch_sizes)),
            "--threads": self.threads,
            "--distribution": self.distribution,
            "--rounds": self.rounds,
            "--slice-ms": f"{self.slice_ms:g}",
            "--seed": self.seed,
            "--baseline": baseline,
        }
        return shlex.join(["dlrm-deploy", "bench", *target, *(str(word) for pair in options.items() for word in pair)])


def run_bench(
    bundle: Bundle,
    settings: BenchSettings,
    *,
    target: Sequence[str] | None = None,
    progress: Progress = lambda step: None,
) -> BenchReport:
    """Measure the engines of `settings` on a bundle.

    Each batch size is measured in rounds in which every engine has a slice. An engine that cannot run here is listed,
    with the reason, and does not stop the others.

    Args:
        bundle: an opened bundle.
        settings: what to measure.
        target: how the command line names the bundle, for the command in the report.
        progress: called with a word on each step, `steps(settings)` times if every engine opens.

    Raises:
        EngineError: no engine runs here, nor the baseline, or outputs are NaN or not equal within `derived_limit`.
    """
    with ExitStack() as stack:
        engines, not_run = _open_engines(bundle, settings, stack, progress)
        baseline = settings.baseline or next(iter(engines))
        limits = _Limits(bundle.config, settings.threads)
        rows: list[BenchRow] = []
        for size in settings.batch_sizes:
            size_rows, size_not_run = _measure_size(bundle, engines, size, settings, baseline, limits, progress)
            rows += size_rows
            not_run += size_not_run
    circumstances = Circumstances(
        command=settings.command(target or [str(bundle.path)], baseline),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        dlrm_deploy_version=dlrm_deploy.__version__,
        commit=source_commit(),
        cpu=cpu_name(),
        threads=settings.threads,
        seed=settings.seed,
        distribution=settings.distribution,
        rounds=settings.rounds,
        slice_ms=settings.slice_ms,
        table_bytes=bundle.config.table_bytes,
        reference=_reference(engines),
        omp_wait_policy=os.environ.get("OMP_WAIT_POLICY"),
        calibration_missing=limits.missing,
    )
    return BenchReport(circumstances=circumstances, rows=tuple(rows), not_run=tuple(not_run))


def steps(settings: BenchSettings) -> int:
    """How often `run_bench` reports progress."""
    return len(settings.engines) + settings.rounds * len(settings.batch_sizes)


def _reference(engines: Mapping[str, Engine]) -> str:
    if REFERENCE in engines:
        return REFERENCE
    return next((name for name, engine in engines.items() if engine.precision == "fp32"), next(iter(engines)))


def _open_engines(
    bundle: Bundle, settings: BenchSettings, stack: ExitStack, progress: Progress
) -> tuple[dict[str, Engine], list[NotRun]]:
    """Open what can execute here, and read every page of the tables through each CPU engine's own mapping once."""
    engines: dict[str, Engine] = {}
    not_run = []
    sample = bundle.golden().batch.rows(0, 1)
    for name in settings.engines:
        progress(f"opening {name}")
        try:
            engine = stack.enter_context(open_unchecked(bundle, name, threads=settings.threads, spin=False))
            engine.predict(sample)  # a plan opens without a GPU, and says only here that it cannot execute
        except (EngineError, BatchError, MissingDependencyError) as err:
            not_run.append(NotRun(engine=name, batch=None, reason=str(err)))
            continue
        if name not in PLAN_ENGINES:
            for batch in touching_batches(bundle.config, bundle.manifest.index_dtype):
                engine.predict(batch)
        engines[name] = engine
    reasons = " ".join(f"{n.engine}: {n.reason}" for n in not_run)
    if not engines:
        raise EngineError(f"no engine runs here. {reasons}")
    if settings.baseline is not None and settings.baseline not in engines:
        raise EngineError(f"the baseline does not run here, so no ratio can be given. {reasons}")
    return engines, not_run


class _Limits:
    """Measures the machine's limits, and remembers why it cannot."""

    def __init__(self, config: ModelConfig, threads: int) -> None:
        self._config = config
        self._threads = threads
        self.missing: str | None = None
        self.measured: list[Calibration] = []

    def measure(self) -> None:
        if self.missing is None:
            try:
                self.measured.append(measure_calibration(self._config, self._threads))
            except EngineError as err:
                self.missing = str(err)

    def take_median(self) -> Calibration | None:
        measured, self.measured = self.measured, []
        return median_calibration(measured) if measured else None


def _measure_size(
    bundle: Bundle,
    engines: dict[str, Engine],
    size: int,
    settings: BenchSettings,
    baseline: str,
    limits: _Limits,
    progress: Progress,
) -> tuple[list[BenchRow], list[NotRun]]:
    batches = rotating_batches(
        bundle.config,
        size,
        settings.seed,
        distribution=settings.distribution,
        index_dtype=bundle.manifest.index_dtype,
    )
    # A plan takes bags up to some length: what scores the longest bag scores every batch.
    batch = max(batches, key=lambda batch: int(np.diff(batch.offsets).max(initial=0)))
    differences, not_run = _compare_outputs(engines, batch, derived_limit(bundle.config))
    if baseline not in differences:
        reason = next(n.reason for n in not_run if n.engine == baseline)
        raise EngineError(f"the baseline {baseline} cannot run batches of {size}: {reason}")

    def before_round(round_number: int) -> None:
        progress(f"batch {size}, round {round_number + 1} of {settings.rounds}")
        limits.measure()

    load = LoadMeter()
    rounds = interleave(
        {name: engines[name].predict for name in differences},
        batches,
        rounds=settings.rounds,
        slice_ms=settings.slice_ms,
        before_round=before_round,
    )
    other_load = load.others()
    calibration = limits.take_median()
    rows = [
        BenchRow(
            model=bundle.config.name,
            engine=name,
            engine_version=engines[name].version,
            implementations=engines[name].implementations(),
            batch=size,
            timing=summarise(rounds[name], rounds[baseline], size),
            baseline=baseline,
            max_abs_difference=difference,
            distinct_batches=len(batches),
            other_load=other_load,
            calibration=calibration,
        )
        for name, difference in differences.items()
    ]
    return rows, not_run


def _compare_outputs(engines: dict[str, Engine], batch: Batch, limit: float) -> tuple[dict[str, float], list[NotRun]]:
    """Largest difference of each engine from the reference, and the engines that cannot score such a batch.

    Raises:
        EngineError: an output is NaN, or a float32 engine's differs from the reference by more than `limit`.
    """
    outputs: dict[str, npt.NDArray[np.float32]] = {}
    not_run = []
    for name, engine in engines.items():
        try:
            outputs[name] = engine.predict(batch)
        except (EngineError, BatchError) as err:
            not_run.append(NotRun(engine=name, batch=batch.batch_size, reason=str(err)))
            continue
        if np.isnan(outputs[name]).any():
            row = int(np.flatnonzero(np.isnan(outputs[name]))[0])
            raise EngineError(
                f"{name} gives NaN for sample {row} of a batch of {batch.batch_size}, so its speed means nothing. "
                f"See what `dlrm-deploy check --engine {name}` says of this bundle."
            )
    if not outputs:
        reasons = " ".join(f"{n.engine}: {n.reason}" for n in not_run)
        raise EngineError(f"no engine can run batches of {batch.batch_size}. {reasons}")
    reference = _reference({name: engines[name] for name in outputs})
    differences = {name: float(np.abs(output - outputs[reference]).max()) for name, output in outputs.items()}
    for name, difference in differences.items():
        if difference > limit and engines[name].precision == "fp32":
            raise EngineError(
                f"{name} differs from {reference} by {difference:.2g} on a batch of {batch.batch_size}, and at most "
                f"{limit:.2g} is rounding: engines that do not compute the same are not compared. See what "
                f"`dlrm-deploy check --engine {name}` says of this bundle."
            )
    return differences, not_run
