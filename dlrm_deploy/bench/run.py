"""Open engines on one bundle and its variants, check that they agree, and time them against one another."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

import dlrm_deploy
from dlrm_deploy.bench import agreement
from dlrm_deploy.bench.inputs import Inputs
from dlrm_deploy.bench.isolate import IsolatedSubject, Job
from dlrm_deploy.bench.limits import Limits
from dlrm_deploy.bench.machine import LoadMeter, cpu_name, source_commit
from dlrm_deploy.bench.measure import interleave
from dlrm_deploy.bench.rows import Agreement, BenchReport, BenchRow, Circumstances, NotRun, over_floor, summarise
from dlrm_deploy.bench.settings import BenchSettings
from dlrm_deploy.bench.subject import Options, Subject, open_subject
from dlrm_deploy.bench.variant import ENGINE, Variant, label_of
from dlrm_deploy.bench.work import floor_of, work_of
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.data.trace import Trace
from dlrm_deploy.errors import BatchError, ConfigError, EngineError, FormatError, MissingDependencyError
from dlrm_deploy.model.rounding import derived_limit

REFERENCE = "torch"
"""Outputs are compared with this engine's where it takes part, else with the first float32 one's."""

Progress = Callable[[str], None]


def run_bench(
    bundle: Bundle,
    settings: BenchSettings,
    *,
    target: Sequence[str] | None = None,
    progress: Progress = lambda step: None,
) -> BenchReport:
    """Measure the engines of `settings` on a bundle, and its variants on converted copies in a temporary folder.

    Each batch size is measured in rounds in which every engine has a slice. An engine that cannot run here is listed,
    with the reason, and does not stop the others.

    Args:
        bundle: an opened bundle.
        settings: what to measure.
        target: how the command line names the bundle, for the command in the report.
        progress: called with a word on each step, `steps(settings)` times if every engine opens.

    Raises:
        EngineError: no engine runs here, nor the baseline, or outputs are NaN or do not agree (`agreement.check`).
        DataError: the trace of `settings` cannot be read, or is not of such a model.
    """
    with ExitStack() as stack:
        trace = None if settings.trace is None else Trace.read(settings.trace)
        connect = partial(
            Inputs,
            bundle.config,
            settings.seed,
            distribution=settings.distribution,
            index_dtype=bundle.manifest.index_dtype,
            trace=trace,
        )
        run = _Run(bundle, settings, connect, inputs=connect(), stack=stack, progress=progress)
        run.open_all()
        for size in settings.batch_sizes:
            run.measure(size)
    circumstances = Circumstances(
        command=settings.command(target or [str(bundle.path)], run.baseline),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        dlrm_deploy_version=dlrm_deploy.__version__,
        commit=source_commit(),
        cpu=cpu_name(),
        threads=settings.threads,
        seed=settings.seed,
        distribution=settings.distribution,
        rounds=settings.rounds,
        slice_ms=settings.slice_ms,
        isolate=settings.isolate,
        prefault=settings.prefault,
        huge_pages=settings.huge_pages,
        table_bytes=bundle.config.table_bytes,
        reference=run.reference(run.subjects),
        omp_wait_policy=os.environ.get("OMP_WAIT_POLICY"),
        calibration_missing=run.limits.missing,
    )
    return BenchReport(circumstances=circumstances, rows=tuple(run.rows), not_run=tuple(run.not_run))


def steps(settings: BenchSettings) -> int:
    """How often `run_bench` reports progress."""
    return len(settings.labels) + settings.rounds * len(settings.batch_sizes)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is opened under a label."""

    label: str
    engine: str
    variant: Variant | None


class _Run:
    """One run: what is open, and what was found."""

    def __init__(
        self,
        bundle: Bundle,
        settings: BenchSettings,
        connect: Callable[[], Inputs],
        *,
        inputs: Inputs,
        stack: ExitStack,
        progress: Progress,
    ) -> None:
        self._bundle, self._settings, self._connect, self._inputs = bundle, settings, connect, inputs
        self._stack, self._progress = stack, progress
        self._limit = derived_limit(bundle.config)
        self.subjects: dict[str, Subject] = {}
        self.rows: list[BenchRow] = []
        self.not_run: list[NotRun] = []
        self.limits = Limits(bundle, settings.threads)
        self.baseline = ""

    def reference(self, labels: Sequence[str] | Mapping[str, object]) -> str:
        """The one of these subjects that outputs are compared with."""
        facts = {label: self.subjects[label].facts for label in labels}
        exact = [label for label, f in facts.items() if (f.tables, f.mlp) == ("fp32", "fp32")]
        return REFERENCE if REFERENCE in facts else [*exact, *facts][0]

    def open_all(self) -> None:
        """Open what can execute here.

        Raises:
            EngineError: nothing can, or the baseline cannot.
        """
        settings = self._settings
        precision = self._bundle.manifest.precision
        plans = [_Plan(label_of(name, precision["tables"], precision["mlp"]), name, None) for name in settings.engines]
        plans += [_Plan(variant.label, ENGINE, variant) for variant in settings.variants]
        for plan in plans:
            self._progress(f"opening {plan.label}")
            try:
                self.subjects[plan.label] = self._stack.enter_context(closing(self._open(plan)))
            except (EngineError, BatchError, MissingDependencyError, ConfigError, FormatError) as err:
                self.not_run.append(NotRun(engine=plan.label, batch=None, reason=str(err)))
        reasons = " ".join(f"{n.engine}: {n.reason}" for n in self.not_run)
        if not self.subjects:
            raise EngineError(f"no engine runs here. {reasons}")
        named = settings.baseline
        labels = {plan.engine: plan.label for plan in reversed(plans)} | {plan.label: plan.label for plan in plans}
        self.baseline = next(iter(self.subjects)) if named is None else labels[named]
        if self.baseline not in self.subjects:
            raise EngineError(f"the baseline does not run here, so no ratio can be given. {reasons}")

    def _open(self, plan: _Plan) -> Subject:
        settings = self._settings
        bundle = self._bundle if plan.variant is None else self._convert(plan.variant)
        options = Options(threads=settings.threads, prefault=settings.prefault, huge_pages=settings.huge_pages)
        if not settings.isolate:
            return open_subject(bundle, plan.engine, options, self._inputs, settings.slice_ms)
        return IsolatedSubject(
            Job(
                bundle=bundle.path,
                engine=plan.engine,
                options=options,
                inputs=self._connect,
                slice_ms=settings.slice_ms,
            )
        )

    def _convert(self, variant: Variant) -> Bundle:
        try:
            from dlrm_deploy.export.convert import convert_bundle
        except ImportError as err:
            raise MissingDependencyError(
                f"--variant converts the bundle first, and {err.name} is not installed. Install it with "
                "`pip install 'dlrm-deploy[bench]'`."
            ) from err
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="dlrm-deploy-bench-"))
        made = convert_bundle(self._bundle, Path(folder) / "bundle", tables=variant.tables, mlp=variant.mlp)
        share_files(made, self._bundle)
        return made

    def measure(self, size: int) -> None:
        """Measure every engine at a batch size.

        Raises:
            EngineError: outputs that do not agree, or no baseline.
        """
        settings = self._settings
        agreements = self._compare([label for label in self.subjects if settings.measures(label, size)], size)
        if self.baseline not in agreements:
            reasons = [n.reason for n in self.not_run if (n.engine, n.batch) == (self.baseline, size)]
            reason = reasons[0] if reasons else "it is left out there."
            raise EngineError(f"the baseline {self.baseline} cannot run batches of {size}: {reason}")
        batches = self._inputs.of_size(size)
        facts = {label: self.subjects[label].facts for label in agreements}
        works = {label: work_of(self._bundle.config, f.formats, f.mlp, batches) for label, f in facts.items()}
        self.limits.aim([f.formats for f in facts.values()], batches)

        def before_round(round_number: int) -> None:
            self._progress(f"batch {size}, round {round_number + 1} of {settings.rounds}")
            self.limits.measure()

        ours = [subject.process for subject in self.subjects.values() if subject.process is not None]
        load = LoadMeter(processes=ours)
        rounds = interleave(
            {label: self.subjects[label].slice for label in agreements},
            rounds=settings.rounds,
            before_round=before_round,
        )
        other_load = load.others()
        calibrations, calibration = self.limits.take()
        for label, agreed in agreements.items():
            floors = [floor_of(works[label], moment, size) for moment in calibrations]
            self.rows.append(
                BenchRow(
                    model=self._bundle.config.name,
                    engine=label,
                    tables=facts[label].tables,
                    mlp=facts[label].mlp,
                    engine_version=facts[label].version,
                    implementations=facts[label].implementations,
                    batch=size,
                    timing=summarise(rounds[label], rounds[self.baseline], size),
                    baseline=self.baseline,
                    agreement=agreed,
                    distinct_batches=len(batches),
                    other_load=other_load,
                    calibration=calibration,
                    work=works[label],
                    floor=over_floor(rounds[label], floors) if floors else None,
                    footprint=facts[label].footprint,
                    breakdown=self.subjects[label].breakdown(size) if settings.breakdown else None,
                )
            )

    def _compare(self, labels: Sequence[str], size: int) -> dict[str, Agreement]:
        """Prepare engines for a batch size and see that they agree; those that cannot score it are listed.

        Raises:
            EngineError: an output is NaN, or engines do not agree.
        """
        outputs: dict[str, npt.NDArray[np.float32]] = {}
        for position, label in enumerate(labels):
            subject = self.subjects[label]
            try:
                subject.prepare(size, position / len(labels))
                outputs[label] = subject.outputs(size)
            except (EngineError, BatchError) as err:
                self.not_run.append(NotRun(engine=label, batch=size, reason=str(err)))
                continue
            if np.isnan(outputs[label]).any():
                row = int(np.flatnonzero(np.isnan(outputs[label]))[0]) % size
                raise EngineError(
                    f"{label} gives NaN for sample {row} of a batch of {size}, so its speed means nothing. "
                    f"See what `dlrm-deploy check --engine {subject.facts.engine}` says of this bundle."
                )
        if not outputs:
            reasons = " ".join(f"{n.engine}: {n.reason}" for n in self.not_run if n.batch == size)
            raise EngineError(f"no engine can run batches of {size}. {reasons}")
        reference = self.reference(outputs)
        found = {}
        for label, output in outputs.items():
            facts = self.subjects[label].facts
            found[label] = agreement.compare(output, outputs[reference])
            agreement.check(
                found[label],
                name=label,
                reference=reference,
                tables=facts.tables,
                mlp=facts.mlp,
                batch=size,
                limit=self._limit,
            )
        return found


def share_files(copy: Bundle, original: Bundle) -> None:
    """Make equal table files of two bundles one file, where they lie on one disk: it is then in memory once only."""
    tables = [record.file for record in copy.manifest.table_groups]
    for name in tables:
        if copy.manifest.files[name] == original.manifest.files.get(name):
            link = copy.path / f"{name}.link"
            with suppress(OSError):  # another disk, or one without links
                os.link(original.path / name, link)
                link.replace(copy.path / name)
