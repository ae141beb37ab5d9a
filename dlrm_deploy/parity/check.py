"""Compare an engine with the PyTorch reference on batches that the exporter never saw.

The cases: the golden batch of the bundle against its stored probabilities; ids out of range, which must give the same
result or the same refusal; seeded random batches of several sizes; awkward bags; 32-bit and 64-bit ids. A case that
fails does not hide the others. Where torch is not installed, the golden batch and the refusal of bad ids remain, and
the report says so.

Main path: `check_parity` -> `_cases` -> `_run` for each. docs/check.md explains the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.data.random import random_batch
from dlrm_deploy.engines.engine import Engine
from dlrm_deploy.engines.registry import missing_package, open_engine
from dlrm_deploy.errors import BatchError, EngineError
from dlrm_deploy.model.rounding import derived_limit
from dlrm_deploy.parity.batches import awkward_batches, out_of_range_batch
from dlrm_deploy.parity.compare import FloatArray, OutputParity, compare

SIZES = (0, 1, 2, 37, 2048)
SEED = 20190531
"""Of the random batches; any other number will do."""

_IDS_ROWS = 37


@dataclass(frozen=True, slots=True)
class ParityCase:
    """One batch: how far the outputs are apart, or why they could not be compared."""

    name: str
    output: OutputParity | None = None
    """None where the engine was to refuse the batch, or did not score it."""

    problem: str | None = None
    """What went wrong other than numbers."""

    @property
    def passed(self) -> bool:
        return self.problem is None and (self.output is None or self.output.passed)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "case": self.name,
            "passed": self.passed,
            **(self.output.to_dict() if self.output else {}),
            **({"problem": self.problem} if self.problem else {}),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """All cases of one engine."""

    engine: str
    version: str
    """Of the library that executed."""

    implementations: dict[str, str]
    """Which implementation each of our operators used."""

    reference: str
    """What the engine was compared with."""

    limited: bool
    """The reference was not there, and only the golden batch could be compared."""

    seed: int
    limit: float
    time: str
    cases: tuple[ParityCase, ...]

    @property
    def passed(self) -> bool:
        return all(case.passed for case in self.cases)

    @property
    def max_abs(self) -> float:
        """Largest absolute difference over all cases."""
        return max((case.output.max_abs for case in self.cases if case.output), default=0.0)

    @property
    def max_rel(self) -> float:
        """Largest relative difference over all cases."""
        return max((case.output.max_rel for case in self.cases if case.output), default=0.0)

    @property
    def rows(self) -> int:
        """Samples compared."""
        return sum(case.output.rows for case in self.cases if case.output)

    @property
    def worst(self) -> ParityCase | None:
        """The first case with a problem or a value that is not finite, else the one with the largest difference."""
        broken = (case for case in self.cases if case.problem or (case.output and case.output.nonfinite))
        compared = [case for case in self.cases if case.output and case.output.rows]
        largest = max(compared, key=lambda case: case.output.max_abs if case.output else 0.0, default=None)
        return next(broken, largest)

    def summary(self) -> str:
        """One line: the verdict, the worst case and what was compared."""
        where = ""
        if (worst := self.worst) is not None:
            row = worst.output.worst_row if worst.output else None
            where = f" in {worst.name}" + ("" if row is None else f" at row {row}")
        return (
            f"{'PASSED' if self.passed else 'FAILED'}  probability: max abs error {self.max_abs:.2e}{where} "
            f"(limit {self.limit:.1e}, {self.rows} rows, against {self.reference})"
        )

    def record(self) -> dict[str, Any]:
        """What the bundle's manifest keeps."""
        worst = self.worst
        return {
            "passed": self.passed,
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "limit": self.limit,
            "rows": self.rows,
            "worst_case": worst.name if worst else None,
            "worst_row": worst.output.worst_row if worst and worst.output else None,
            "failed_cases": [case.name for case in self.cases if not case.passed],
            "cases": [case.name for case in self.cases],
            "seed": self.seed,
            "version": self.version,
            "implementations": self.implementations,
            "reference": self.reference,
            "time": self.time,
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the record with all cases."""
        return {"engine": self.engine, **self.record(), "cases": [case.to_dict() for case in self.cases]}


def check_parity(
    bundle: Bundle,
    engine_name: str,
    *,
    sizes: Sequence[int] = SIZES,
    seed: int = SEED,
    atol: float | None = None,
    threads: int | None = None,
) -> ParityReport:
    """Compare an engine with the reference.

    Args:
        bundle: whose model.
        engine_name: one of `dlrm_deploy.engines.registry.ENGINE_NAMES`.
        sizes: of the random batches.
        seed: of all random values.
        atol: absolute difference of probabilities to accept; None for `derived_limit`.
        threads: CPU threads of each engine; None for one per core.

    Raises:
        EngineError: the engine cannot be opened or executed here; nothing was compared.
    """
    limit = derived_limit(bundle.config) if atol is None else atol
    with ExitStack() as stack:
        # Two engines take turns here: threads that spin would slow each other down.
        engine = stack.enter_context(open_engine(bundle, engine_name, threads=threads, spin=False))
        reference: Engine | None = None
        if missing_package("torch") is None:
            reference = stack.enter_context(open_engine(bundle, "torch", threads=threads))
        attempts = [_run(name, case) for name, case in _cases(bundle, engine, reference, sizes, seed, limit)]
        # An engine that cannot execute here may still answer for no samples, and refuse bad ids.
        if not any(attempt.case.output and attempt.case.output.rows for attempt in attempts):
            stopped = next((attempt.error for attempt in attempts if isinstance(attempt.error, EngineError)), None)
            if stopped is not None:
                raise stopped
        return ParityReport(
            engine=engine_name,
            version=engine.version,
            implementations=engine.implementations(),
            reference=reference.version if reference else "golden batch only, torch is not installed",
            limited=reference is None,
            seed=seed,
            limit=limit,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            cases=tuple(attempt.case for attempt in attempts),
        )


@dataclass(frozen=True, slots=True)
class _Attempt:
    case: ParityCase
    error: Exception | None = None


def _run(name: str, case: Callable[[], OutputParity | str | None]) -> _Attempt:
    """Do one case. It gives the comparison, or what is wrong, or None where the engine refused as it should."""
    try:
        result = case()
    except Exception as err:  # whatever an engine throws is a fact about this case only
        return _Attempt(ParityCase(name, problem=str(err) or type(err).__name__), err)
    if isinstance(result, str):
        return _Attempt(ParityCase(name, problem=result))
    return _Attempt(ParityCase(name, output=result))


def _cases(
    bundle: Bundle, engine: Engine, reference: Engine | None, sizes: Sequence[int], seed: int, limit: float
) -> Iterator[tuple[str, Callable[[], OutputParity | str | None]]]:
    config = bundle.config
    rng = np.random.default_rng(seed)

    def against(batch: Batch, expected: Callable[[], FloatArray]) -> Callable[[], OutputParity]:
        return lambda: compare(engine.predict(batch), expected(), limit)

    golden = bundle.golden()
    yield "golden batch", against(golden.batch, lambda: golden.probabilities)
    bad = out_of_range_batch(config, rng, bundle.manifest.index_dtype)
    if config.index_policy == "error":
        # Early in the list: every later case also shows that a refused batch leaves the engine whole.
        yield "ids out of range: refused", lambda: _refusal_problem(engine, reference, bad)
    if reference is None:
        return

    def both(batch: Batch, told: Batch | None = None) -> Callable[[], OutputParity]:
        return against(batch, lambda: reference.predict(told or batch))

    if config.index_policy != "error":
        yield f"ids out of range: {config.index_policy}", both(bad)
    for size in sizes:
        yield f"{size} random samples", both(random_batch(config, size, rng))
    for name, batch in awkward_batches(config, rng).items():
        yield name, both(batch)
    wide = random_batch(config, _IDS_ROWS, rng)
    yield "64-bit ids", both(wide)
    if max(config.feature_rows) <= np.iinfo(np.int32).max:
        narrow = Batch(wide.dense, wide.indices.astype(np.int32), wide.offsets.astype(np.int32), wide.weights)
        yield "32-bit ids", both(narrow, wide)


def _refusal_problem(engine: Engine, reference: Engine | None, bad: Batch) -> str | None:
    """Why the engine did not refuse `bad` as the reference does; None where it did."""
    expected = bad.explain_bad_ids(engine.bundle.config)
    for who in (reference, engine):
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
