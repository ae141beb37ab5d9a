"""What a conversion costs: a converted bundle against the fp32 one, both scored by the PyTorch engine.

On labelled samples, where there are any, in AUC, log loss and calibration, which have limits; always on the golden
batch and on random samples, in probabilities and logits, which have none: only the model's owner knows what those are
worth. That other engines agree with the PyTorch engine on the stored numbers is `parity.check`'s business.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import REFERENCE, Bundle
from dlrm_deploy.data.random import random_batch, with_longer_bags
from dlrm_deploy.engines.engine import Engine
from dlrm_deploy.engines.registry import open_unchecked
from dlrm_deploy.metrics import CONFIDENCE
from dlrm_deploy.parity.compare import FloatArray, Limit
from dlrm_deploy.parity.labelled import RESAMPLES, LabelledSamples, compare_labelled
from dlrm_deploy.parity.report import LabelledParity, ParityCase

RANDOM_SAMPLES = 8192
SEED = 20190531

_SLICE = 2048
_COSTS = {"fp32": 0.0, "fp16": 5e-4, "bf16": 5e-4, "int8": 5e-4, "int4": 2e-3}
"""Drop in AUC, and rise of log loss, to accept by default for a number format: half of 1e-3, the gain in AUC that
papers on click-through rates call worth having. For int4, which is chosen for its size, four times as much."""


def default_limit(bundle: Bundle) -> float:
    """Drop in AUC, and rise of log loss, to accept by default: that of the coarsest number format of the bundle."""
    manifest = bundle.manifest
    return max(_COSTS[name] for name in (*manifest.table_formats.values(), manifest.mlp_precision))


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far the probabilities of two models are apart on the same samples."""

    samples: int
    max_abs: float
    mean_abs: float
    logit_correlation: float | None
    """Pearson's, of the logits; None where one of the two models gives all samples one logit."""

    nonfinite: int
    """Samples for which the converted model gives NaN, and the fp32 model does not."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyReport:
    """A converted bundle against the fp32 one."""

    golden: Agreement
    random: Agreement
    seed: int
    """Of the random samples."""

    labelled: LabelledParity | None
    """fp32 model as reference; None where there are no labelled samples, or `unscored` says why not."""

    max_log_loss_rise: float
    unscored: str | None
    """Why labelled samples that were given could not be compared."""

    time: str

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not within its limit, or cannot be."""
        found = [
            f"the converted model gives NaN for {seen.nonfinite} of {seen.samples} samples of {name}"
            for name, seen in (("the golden batch", self.golden), ("random inputs", self.random))
            if seen.nonfinite
        ]
        if self.labelled is None:
            return (*found, *([self.unscored] if self.unscored else []))
        if not self.labelled.passed:
            found.append(
                f"AUC drops by {self.labelled.auc_drop.value:.2e}, the limit is {self.labelled.max_auc_drop:.1e}"
            )
        if not (rise := self.labelled.log_loss_rise.value) <= self.max_log_loss_rise:
            found.append(f"log loss rises by {rise:.2e}, the limit is {self.max_log_loss_rise:.1e}")
        return tuple(found)

    @property
    def passed(self) -> bool:
        return not self.problems

    def summary(self) -> tuple[str, ...]:
        """A few lines for people."""
        lines = [
            f"{name}: probabilities differ by {seen.max_abs:.2e} at most, {seen.mean_abs:.2e} on average"
            + (f", logits correlate by {seen.logit_correlation:.6f}" if seen.logit_correlation is not None else "")
            + f" ({seen.samples} samples)"
            for name, seen in (("golden batch", self.golden), ("random inputs", self.random))
        ]
        if (labelled := self.labelled) is None:
            reason = self.unscored or "there are no labelled samples (--data, --recipe)"
            lines.append(f"AUC, log loss and calibration: not compared, {reason}")
            return tuple(lines)
        was, now, drop, rise = labelled.reference, labelled.engine, labelled.auc_drop, labelled.log_loss_rise
        return (
            *lines,
            f"AUC {was.auc:.6f} to {now.auc:.6f}: drop {drop.value:.2e}, {CONFIDENCE:.0%} interval {drop.low:.2e} to "
            f"{drop.high:.2e} (limit {labelled.max_auc_drop:.1e}, {labelled.samples} samples of {labelled.source})",
            f"log loss {was.log_loss:.6f} to {now.log_loss:.6f}: rise {rise.value:.2e}, interval {rise.low:.2e} to "
            f"{rise.high:.2e} (limit {self.max_log_loss_rise:.1e})",
            f"calibration {was.calibration:.6f} to {now.calibration:.6f}",
        )

    def record(self) -> dict[str, Any]:
        """What the manifest keeps."""
        return {
            "passed": self.passed,
            "golden": self.golden.to_dict(),
            "random": {**self.random.to_dict(), "seed": self.seed},
            "labelled": self.labelled.to_dict() if self.labelled else None,
            "max_log_loss_rise": self.max_log_loss_rise,
            "time": self.time,
        }


def compare_accuracy(
    fp32: Bundle,
    converted: Bundle,
    *,
    labelled: LabelledSamples | None = None,
    max_auc_drop: float | None = None,
    max_log_loss_rise: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    threads: int | None = None,
) -> AccuracyReport:
    """Score the golden batch, random samples and labelled ones with both bundles' PyTorch models.

    Args:
        fp32: the bundle that was converted.
        converted: what it became.
        labelled: samples with labels.
        max_auc_drop: drop in AUC to accept on them; None for `default_limit`.
        max_log_loss_rise: rise of log loss to accept on them; None for `default_limit`.
        resamples: of the bootstrap intervals.
        seed: of random samples and resamples.
        threads: CPU threads; None for one per core.

    Raises:
        DataError: the labelled samples do not fit the model, or are of one class.
        MissingDependencyError: torch is not installed.
    """
    limit = default_limit(converted)
    with ExitStack() as stack:
        was, now = (stack.enter_context(open_unchecked(one, REFERENCE, threads=threads)) for one in (fp32, converted))
        worth: LabelledParity | None = None
        unscored: str | None = None
        if labelled is not None:
            case, worth = compare_labelled(
                labelled,
                was,
                now,
                limit=lambda batch: Limit(float("inf")),
                max_auc_drop=limit if max_auc_drop is None else max_auc_drop,
                resamples=resamples,
                seed=seed,
            )
            unscored = None if worth else _unscored(case)
        return AccuracyReport(
            golden=_agreement(was, now, [converted.golden().batch]),
            random=_agreement(was, now, _random_batches(fp32, seed)),
            seed=seed,
            labelled=worth,
            max_log_loss_rise=limit if max_log_loss_rise is None else max_log_loss_rise,
            unscored=unscored,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _unscored(case: ParityCase) -> str:
    """Why labelled samples have no figures."""
    if case.output is None:
        return f"labelled samples cannot be scored: {case.problem}"
    return f"one of the two models gives NaN for {case.output.nonfinite} of {case.output.rows} labelled samples"


def _random_batches(bundle: Bundle, seed: int) -> list[Batch]:
    rng, config = np.random.default_rng(seed), with_longer_bags(bundle.config)
    return [random_batch(config, _SLICE, rng) for _ in range(RANDOM_SAMPLES // _SLICE)]


def _agreement(was: Engine, now: Engine, batches: list[Batch]) -> Agreement:
    before, after = (np.concatenate([engine.predict(batch) for batch in batches]) for engine in (was, now))
    finite = np.isfinite(before) & np.isfinite(after)
    difference = np.abs(after[finite].astype(np.float64) - before[finite])
    return Agreement(
        samples=before.size,
        max_abs=float(difference.max(initial=0.0)),
        mean_abs=float(difference.mean()) if difference.size else 0.0,
        logit_correlation=_correlation(_logits(before[finite]), _logits(after[finite])),
        nonfinite=int((np.isfinite(before) & ~np.isfinite(after)).sum()),
    )


def _logits(probabilities: FloatArray) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    logits: np.ndarray[tuple[int], np.dtype[np.float64]] = np.log(p / (1 - p))
    return logits


def _correlation(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float | None:
    if a.size < 2 or not (np.ptp(a) and np.ptp(b)):
        return None
    return float(np.corrcoef(a, b)[0, 1])
