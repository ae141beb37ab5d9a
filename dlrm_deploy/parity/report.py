"""What a parity check found, and its verdict. Plain values: nothing here scores."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dlrm_deploy.batch import Batch
from dlrm_deploy.metrics import CONFIDENCE, Difference
from dlrm_deploy.parity.compare import OutputParity

OUTPUT = "probability"
"""The one output of a model."""


@dataclass(frozen=True, slots=True)
class ParityCase:
    """One batch: how far the outputs are apart, or why they could not be compared."""

    name: str
    output: OutputParity | None = None
    """None where the engine was to refuse the batch, or did not score it."""

    problem: str | None = None
    """What went wrong other than numbers."""

    batch: Batch | None = field(default=None, repr=False, compare=False)
    """Of a case that failed: what was scored; of labelled samples, the slice with the worst of them."""

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


@dataclass(frozen=True, slots=True)
class Quality:
    """How good one engine's probabilities are on labelled samples (`dlrm_deploy.metrics`)."""

    auc: float
    log_loss: float
    calibration: float
    """Predicted over observed: 1 is right, above 1 promises too much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledParity:
    """Reference and engine on the same labelled samples."""

    source: str
    """Where the samples are from."""

    samples: int
    positives: int
    reference: Quality
    engine: Quality
    auc_drop: Difference
    """AUC of the reference less the engine's: above 0 the engine ranks worse."""

    log_loss_rise: Difference
    """Log loss of the engine less the reference's: above 0 the engine is worse."""

    max_auc_drop: float
    resamples: int
    seed: int
    """Of the resamples."""

    @property
    def passed(self) -> bool:
        """The drop itself decides, not the ends of its interval: a verdict that hangs on few samples says so."""
        return self.auc_drop.value <= self.max_auc_drop

    @property
    def certain(self) -> bool:
        """The whole interval is on the verdict's side of the limit."""
        return self.auc_drop.high <= self.max_auc_drop if self.passed else self.auc_drop.low > self.max_auc_drop

    def summary(self) -> str:
        """One line: the verdict, the drop and its interval, and whether there are samples enough to tell."""
        drop = self.auc_drop
        doubt = ""
        if not self.certain:
            doubt = "; too few samples to tell: the interval reaches across the limit"
        return (
            f"{'PASSED' if self.passed else 'FAILED'}  AUC: drop {drop.value:.2e}, {CONFIDENCE:.0%} interval "
            f"{drop.low:.2e} to {drop.high:.2e} (limit {self.max_auc_drop:.1e}, {self.samples} samples){doubt}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "confidence": CONFIDENCE, "passed": self.passed, "certain": self.certain}


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """All that was compared of one engine."""

    engine: str
    version: str
    """Of the library that executed."""

    precision: str
    """Number format that the engine computes in."""

    implementations: dict[str, str]
    """Which implementation each of our operators used."""

    reference: str
    """What the engine was compared with."""

    limited: bool
    """The reference was not there, and only the golden batch could be compared."""

    seed: int
    limit: float
    """Absolute difference of probabilities accepted; a case of longer bags than the model's has its own."""

    default_limit: float
    """The model's own limit: `limit`, unless another one was given."""

    random_samples: int
    """Of the random batches."""

    files: str
    """Digest of the files compared (`Manifest.files_digest`)."""

    time: str
    cases: tuple[ParityCase, ...]
    labelled: LabelledParity | None = None
    """None where no labelled samples were given, or the engine did not score them."""

    @property
    def passed(self) -> bool:
        return all(case.passed for case in self.cases) and (self.labelled is None or self.labelled.passed)

    @property
    def outputs(self) -> tuple[OutputParity, ...]:
        """Of the cases that have one."""
        return tuple(case.output for case in self.cases if case.output)

    @property
    def max_abs(self) -> float:
        """Largest absolute difference over all cases."""
        return max((output.max_abs for output in self.outputs), default=0.0)

    @property
    def max_rel(self) -> float:
        """Largest relative difference over all cases."""
        return max((output.max_rel for output in self.outputs), default=0.0)

    @property
    def max_ulp(self) -> int:
        """Largest difference in units in the last place over all cases."""
        return max((output.max_ulp for output in self.outputs), default=0)

    @property
    def mean_ulp(self) -> float:
        """Mean difference in units in the last place over the samples of all cases."""
        rows = sum(output.ulp_rows for output in self.outputs)
        return sum(output.mean_ulp * output.ulp_rows for output in self.outputs) / max(rows, 1)

    @property
    def rows(self) -> int:
        """Samples compared."""
        return sum(output.rows for output in self.outputs)

    @property
    def rms_problems(self) -> tuple[str, ...]:
        """Cases whose samples are off too far on average: the engine rounds in another way, or has other weights."""
        return tuple(
            f"{case.name}: root mean square {output.rms:.2e} (limit {output.rms_limit:.1e})"
            for case in self.cases
            if (output := case.output) and output.rms_limit is not None and not output.rms <= output.rms_limit
        )

    @property
    def worst(self) -> ParityCase | None:
        """The first case with a problem or a value that is not finite, else the one with the largest difference: of
        those over their limit, if any are."""
        broken = (case for case in self.cases if case.problem or (case.output and case.output.nonfinite))
        compared = [case for case in self.cases if case.output and case.output.rows]
        largest = max(
            compared, key=lambda case: (not case.passed, case.output.max_abs if case.output else 0.0), default=None
        )
        return next(broken, largest)

    def summary(self) -> str:
        """One line: the verdict on the cases, the worst of them and what was compared."""
        where, error, limit = "", self.max_abs, self.limit
        if (worst := self.worst) is not None and worst.output:
            row, error, limit = worst.output.worst_row, worst.output.max_abs, worst.output.limit
            where = f" in {worst.name}" + ("" if row is None else f" at row {row}")
        verdict = "PASSED" if all(case.passed for case in self.cases) else "FAILED"
        line = (
            f"{verdict}  {OUTPUT}: max abs error {error:.2e}{where} "
            f"(limit {limit:.1e}, {self.rows} rows, against {self.reference})"
        )
        line += "".join(f"; {problem}" for problem in self.rms_problems)
        problems = [case.name for case in self.cases if case.problem]
        return f"{line}; not passed: {', '.join(problems)}" if problems else line

    def record(self) -> dict[str, Any]:
        """What the bundle's manifest keeps."""
        worst = self.worst
        return {
            "passed": self.passed,
            "output": OUTPUT,
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "max_ulp": self.max_ulp,
            "mean_ulp": self.mean_ulp,
            "limit": self.limit,
            "default_limit": self.default_limit,
            "limited": self.limited,
            "random_samples": self.random_samples,
            "rows": self.rows,
            "worst_case": worst.name if worst else None,
            "worst_row": worst.output.worst_row if worst and worst.output else None,
            "failed_cases": [case.name for case in self.cases if not case.passed],
            "cases": [case.name for case in self.cases],
            "labelled": self.labelled.to_dict() if self.labelled else None,
            "seed": self.seed,
            "version": self.version,
            "precision": self.precision,
            "implementations": self.implementations,
            "reference": self.reference,
            "files": self.files,
            "time": self.time,
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the record with all cases."""
        return {
            "engine": self.engine,
            "compared": True,
            **self.record(),
            "cases": [case.to_dict() for case in self.cases],
        }
