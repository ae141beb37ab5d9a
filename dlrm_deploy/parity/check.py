"""Compare an engine with the PyTorch reference on batches that the exporter never saw.

The cases: stored tables and weights against the exporter's checksums; the golden batch of the bundle against its
stored probabilities; ids out of range, which must give the same result or the same refusal; seeded random batches of
several sizes; awkward bags; 32-bit and 64-bit ids; and labelled samples, where there are some. A case that fails does
not hide the others. Where torch is not installed, the random batches are left out, and the report says so.

Main path: `check_parity` -> `_cases` -> `_run` for each. docs/check.md explains the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import REFERENCE, Bundle
from dlrm_deploy.checksums import altered_rows, altered_weights, has_checksums
from dlrm_deploy.data.random import random_batch, with_longer_bags
from dlrm_deploy.engines.engine import Engine
from dlrm_deploy.engines.registry import PLAN_ENGINES, missing_package, open_unchecked
from dlrm_deploy.errors import BatchError, BundleError, DlrmDeployError, EngineError, MissingDependencyError
from dlrm_deploy.parity.batches import awkward_batches, out_of_range_batch
from dlrm_deploy.parity.compare import FloatArray, Limit, OutputParity, compare
from dlrm_deploy.parity.labelled import MAX_AUC_DROP, RESAMPLES, LabelledSamples, compare_labelled
from dlrm_deploy.parity.limits import Limits
from dlrm_deploy.parity.report import LabelledParity, ParityCase, ParityReport

if TYPE_CHECKING:
    from dlrm_deploy.export.sources import Source

SIZES = (0, 1, 2, 37, 2048, 8192)
SEED = 20190531
"""Of the random batches; any other number will do."""

STORED = "stored as exported"
"""Name of the case that compares what is stored with the exporter's checksums."""

GRAPH = "graph as exported"
"""Name of the case that writes the graph again and compares; left out where onnx is not installed."""

SOURCE = "equal to the source"
"""Name of the case that compares it with the source checkpoint."""

_IDS_ROWS = 37


def check_parity(
    bundle: Bundle,
    engine_name: str,
    *,
    sizes: Sequence[int] = SIZES,
    seed: int = SEED,
    atol: float | None = None,
    threads: int | None = None,
    batch: Batch | None = None,
    labelled: LabelledSamples | None = None,
    at_rest: Sequence[ParityCase] | None = None,
    max_auc_drop: float = MAX_AUC_DROP,
    resamples: int = RESAMPLES,
) -> ParityReport:
    """Compare an engine with the reference.

    Args:
        bundle: whose model.
        engine_name: one of `dlrm_deploy.engines.registry.ENGINE_NAMES`.
        sizes: of the random batches.
        seed: of all random values.
        atol: absolute difference of probabilities to accept; None for what `Limits` says of the model, or of the
            batch where that is more. A record made with a larger one does not count (`Bundle.parity_gap`).
        threads: CPU threads of each engine; None for one per core.
        batch: compare this one only.
        labelled: samples to compare AUC, log loss and calibration on.
        at_rest: `stored_cases` of the bundle, to look once for several engines; None to look here, unless `batch` is
            given.
        max_auc_drop: drop in AUC to accept on them.
        resamples: of the bootstrap intervals.

    Raises:
        EngineError: the engine cannot be opened or executed here; nothing was compared.
        MissingDependencyError: a package is missing: the engine's, or torch where `batch` or `labelled` need it.
        BatchError: `batch` does not fit the model.
        DataError: labelled samples do not fit the model, or are of one class.
    """
    no_torch = missing_package(REFERENCE)
    if no_torch and (batch is not None or labelled is not None):
        raise MissingDependencyError(f"only the golden batch can be compared without the reference: {no_torch}")
    if batch is not None:
        batch.check_fits(bundle.config)
    with ExitStack() as stack:
        # Two engines take turns here: threads that spin would slow each other down.
        engine = stack.enter_context(open_unchecked(bundle, engine_name, threads=threads, spin=False))
        reference: Engine | None = None
        if not no_torch:
            reference = stack.enter_context(open_unchecked(bundle, REFERENCE, threads=threads))
        limits = Limits(bundle, engine, reference)
        default_limit = limits.default
        cases = _Cases(bundle, engine, reference, atol, limits)
        if batch is not None:
            if engine_name in PLAN_ENGINES:
                engine.predict(bundle.golden().batch.rows(0, 1))  # raises where it cannot execute here
            attempts = [_run(cases.given(batch))]
        else:
            attempts = [_run(case) for case in cases.all(sizes, seed)]
            if engine_name in PLAN_ENGINES:  # others can execute here, or would not have opened
                _check_executed(attempts)
        found = [attempt.case for attempt in attempts]
        if at_rest is None and batch is None:
            at_rest = stored_cases(bundle)
        found += at_rest or ()
        worth: LabelledParity | None = None
        if labelled is not None and reference is not None:
            case, worth = compare_labelled(
                labelled,
                reference,
                engine,
                limit=cases.limit,
                max_auc_drop=max_auc_drop,
                resamples=resamples,
                seed=seed,
            )
            found.append(case)
        return ParityReport(
            engine=engine_name,
            version=engine.version,
            precision=engine.precision,
            implementations=_implementations(engine),
            reference=reference.version if reference else "golden batch only, torch is not installed",
            limited=reference is None,
            seed=seed,
            limit=default_limit if atol is None else atol,
            default_limit=default_limit,
            random_samples=0 if reference is None or batch is not None else sum(sizes),
            files=bundle.manifest.files_digest(engine_name),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            cases=tuple(found),
            labelled=worth,
        )


def stored_cases(bundle: Bundle, source: Source | None = None) -> tuple[ParityCase, ...]:
    """What is stored, against the exporter's checksums where the bundle has some, and against its source if given.

    No engine is asked: engine and reference read the same tables, so an error in those shows only here.
    """
    cases = [_checksum_case(bundle)] if has_checksums(bundle) else []
    if find_spec("onnx") is not None:
        cases.append(_graph_case(bundle))
    if source is not None:
        cases.append(_source_case(bundle, source))
    return tuple(cases)


def _checksum_case(bundle: Bundle) -> ParityCase:
    try:
        altered = [f"table {part}, rows {first} to {last}" for part, first, last in altered_rows(bundle)]
        altered += [f"weight {key}" for key in altered_weights(bundle)]
    except BundleError as err:
        return ParityCase(STORED, problem=str(err))
    problem = f"not what was exported: {'; '.join(altered[:8])}. Export the bundle again." if altered else None
    return ParityCase(STORED, problem=problem)


def _graph_case(bundle: Bundle) -> ParityCase:
    from dlrm_deploy.parity.stored_graph import differences

    try:
        found = [f"{place}: {detail}" for place, detail in differences(bundle)]
    except DlrmDeployError as err:
        return ParityCase(GRAPH, problem=str(err))
    problem = f"not what the exporter writes: {'; '.join(found[:8])}. Export the bundle again." if found else None
    return ParityCase(GRAPH, problem=problem)


def _source_case(bundle: Bundle, source: Source) -> ParityCase:
    from dlrm_deploy.parity.against_source import differences

    found = list(differences(bundle, source))
    problem = f"the bundle differs from its source: {'; '.join(found[:8])}. Export it again." if found else None
    return ParityCase(SOURCE, problem=problem)


def _implementations(engine: Engine) -> dict[str, str]:
    try:
        return engine.implementations()
    except Exception as err:  # it scores a sample to find out, which is what may fail
        return {"operators": f"unknown: {err}"}


@dataclass(frozen=True, slots=True)
class _Case:
    name: str
    batch: Batch
    run: Callable[[], OutputParity | str | None]
    """Gives the comparison, or what is wrong, or None where the engine refused as it should."""


@dataclass(frozen=True, slots=True)
class _Attempt:
    case: ParityCase
    error: Exception | None = None


def _run(case: _Case) -> _Attempt:
    """Do one case; a failed one keeps its batch."""
    try:
        result = case.run()
    except Exception as err:  # whatever an engine throws is a fact about this case only
        return _Attempt(ParityCase(case.name, problem=str(err) or type(err).__name__, batch=case.batch), err)
    if isinstance(result, str):
        return _Attempt(ParityCase(case.name, problem=result, batch=case.batch))
    passed = result is None or result.passed
    return _Attempt(ParityCase(case.name, output=result, batch=None if passed else case.batch))


def _check_executed(attempts: Sequence[_Attempt]) -> None:
    """Raise the engine's own error if it scored nothing: one that cannot execute here still takes an empty batch."""
    if any(attempt.case.output and attempt.case.output.rows for attempt in attempts):
        return
    stopped = next((attempt.error for attempt in attempts if isinstance(attempt.error, EngineError)), None)
    if stopped is not None:
        raise stopped


@dataclass(frozen=True, slots=True)
class _Cases:
    """Makes the cases of one engine, one at a time."""

    bundle: Bundle
    engine: Engine
    reference: Engine | None
    atol: float | None
    limits: Limits

    def limit(self, batch: Batch) -> Limit:
        """Difference of probabilities to accept for this batch."""
        return self.limits.of(batch) if self.atol is None else Limit(self.atol)

    def all(self, sizes: Sequence[int], seed: int) -> Iterator[_Case]:
        config = self.bundle.config
        rng = np.random.default_rng(seed)
        golden = self.bundle.golden()
        yield self._against("golden batch", golden.batch, lambda: golden.probabilities)
        bad = out_of_range_batch(config, rng, self.bundle.manifest.index_dtype)
        refused = config.index_policy == "error" and bad.explain_bad_ids(config) is not None
        if refused:
            # Early in the list: every later case also shows that a refused batch leaves the engine whole.
            yield self._refused("ids out of range: refused", bad)
        if self.reference is None:
            return
        if not refused:
            policy = "modulo of the features" if config.index_policy == "error" else config.index_policy
            yield self._both(f"ids out of range: {policy}", bad)
        drawn = with_longer_bags(config, most=self.engine.most_ids)
        for size in sizes:
            yield self._both(f"{size} random samples", random_batch(drawn, size, rng))
        for name, batch in awkward_batches(config, rng, self.engine.most_ids).items():
            yield self._both(name, batch)
        wide = random_batch(drawn, _IDS_ROWS, rng)
        yield self._both("64-bit ids", wide)
        if max(config.feature_rows) <= np.iinfo(np.int32).max:
            narrow = Batch(wide.dense, wide.indices.astype(np.int32), wide.offsets.astype(np.int32), wide.weights)
            yield self._both("32-bit ids", narrow, told=wide)

    def given(self, batch: Batch) -> _Case:
        """The comparison of one batch, or of its refusal where an id is out of range."""
        config = self.bundle.config
        if config.index_policy == "error" and batch.explain_bad_ids(config) is not None:
            return self._refused("the batch given: refused", batch)
        return self._both("the batch given", batch)

    def _against(self, name: str, batch: Batch, expected: Callable[[], FloatArray]) -> _Case:
        def run() -> OutputParity:
            limit = self.limit(batch)
            return compare(self.engine.predict(batch), expected(), limit.most, limit.rms)

        return _Case(name, batch, run)

    def _both(self, name: str, batch: Batch, told: Batch | None = None) -> _Case:
        """Engine on `batch`, and reference on `told`, which is the same batch in another type."""
        assert self.reference is not None
        reference = self.reference
        return self._against(name, batch, lambda: reference.predict(told or batch))

    def _refused(self, name: str, bad: Batch) -> _Case:
        return _Case(name, bad, lambda: self._refusal_problem(bad))

    def _refusal_problem(self, bad: Batch) -> str | None:
        """Why the engine did not refuse `bad` as the reference does; None where it did."""
        expected = bad.explain_bad_ids(self.bundle.config)
        for who in (self.reference, self.engine):
            if who is None:
                continue
            try:
                who.predict(bad)
            except BatchError as err:
                if str(err) != expected:
                    return f"{who.name} refused with another message: {err} Expected: {expected}"
            else:
                return f"{who.name} scored ids that are out of range. Expected: {expected}"
        return None
