"""Labelled samples: what an engine's differences from the reference are worth in AUC, log loss and calibration.

Samples are scored in slices, so memory holds a few numbers for each and one slice of inputs.

Main path: `LabelledSamples.read` or `.of` -> `compare_labelled` -> `dlrm_deploy.metrics.paired_differences`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.batch_file import read_batch
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.data.dataset import Dataset
from dlrm_deploy.engines.engine import Engine
from dlrm_deploy.errors import BatchError, DataError
from dlrm_deploy.metrics import Difference, auc, calibration, log_loss, paired_differences
from dlrm_deploy.parity.compare import FloatArray, Limit, OutputParity, compare
from dlrm_deploy.parity.report import LabelledParity, ParityCase, Quality

MAX_AUC_DROP = 1e-4
"""A tenth of 1e-3, the gain in AUC that papers on click-through rates call worth having."""

RESAMPLES = 1000
SLICE = 8192

CASE = "labelled samples"


@dataclass(frozen=True, slots=True)
class LabelledSamples:
    """Samples of a model's signature with labels, given out in slices, as often as wanted."""

    source: str
    """For people: where they are from."""

    slices: Callable[[], Iterator[tuple[Batch, FloatArray]]]
    """Batches of up to `SLICE` samples with their labels [B] float32 in {0, 1}."""

    @classmethod
    def read(cls, path: Path, config: ModelConfig) -> LabelledSamples:
        """Read an .npz with the arrays of a batch (`read_batch`) and `labels` [B] of 0 and 1, of any number type.

        Raises:
            DataError: the file is damaged, or is no batch for this model; an id is out of range where the model
                refuses those; labels have another length, are not 0 or 1 (NaN among them), or hold one class only.
        """
        batch, others = read_batch(path)
        if "labels" not in others:
            raise DataError(f"{path} holds no labels: add an array `labels` with 0 or 1 for each sample.")
        labels = _checked_labels(others["labels"], batch.batch_size, path)
        try:
            batch.check_fits(config)
        except BatchError as err:
            raise DataError(f"{path}: {err}") from err
        if config.index_policy == "error" and (bad := batch.explain_bad_ids(config)):
            raise DataError(f"{path}: {bad}")

        def slices() -> Iterator[tuple[Batch, FloatArray]]:
            for first in range(0, labels.size, SLICE):
                last = min(first + SLICE, labels.size)
                yield batch.rows(first, last), labels[first:last]

        return cls(str(path), slices)

    @classmethod
    def of(cls, dataset: Dataset, source: str, made_for: ModelConfig, config: ModelConfig) -> LabelledSamples:
        """The samples of a dataset.

        Args:
            dataset: with samples for `made_for`.
            source: what to call it.
            made_for: the model that dataset and recipe go with.
            config: the model to score with.

        Raises:
            DataError: the two models take other inputs.
        """
        for what, theirs, ours in (
            ("dense features", made_for.dense_features, config.dense_features),
            ("sparse features", _signature(made_for), _signature(config)),
        ):
            if theirs != ours:
                seen, wanted = next(((a, b) for a, b in zip(theirs, ours, strict=False) if a != b), (None, None))
                detail = f"{seen} instead of {wanted}" if seen else f"{len(theirs)} instead of {len(ours)}"
                raise DataError(
                    f"{source} is for model {made_for.name!r}, whose {what} are not those of {config.name!r} "
                    f"({detail}). Give the recipe that this bundle's model was trained with."
                )

        def slices() -> Iterator[tuple[Batch, FloatArray]]:
            for first in range(0, len(dataset), SLICE):
                yield dataset.batch(np.arange(first, min(first + SLICE, len(dataset))))

        return cls(source, slices)


def _signature(config: ModelConfig) -> tuple[str, ...]:
    rows = zip(config.features, config.feature_rows, strict=True)
    return tuple(f"{feature.name!r} with ids below {count}" for feature, count in rows)


def _checked_labels(labels: npt.NDArray[Any], samples: int, path: Path) -> FloatArray:
    if labels.shape != (samples,) or labels.dtype.kind not in "biuf":
        raise DataError(f"{path}: labels are {labels.dtype} {labels.shape}, expected one number for each of {samples}.")
    wrong = np.flatnonzero(~np.isin(labels, (0, 1)))
    if wrong.size:
        raise DataError(
            f"{path}: label {wrong[0]} is {labels[wrong[0]]}, and {wrong.size} of {samples} are not 0 or 1. Drop "
            "samples without a label."
        )
    positives = int(np.count_nonzero(labels))
    if positives in (0, samples):
        raise DataError(
            f"{path}: labels hold {positives} positive and {samples - positives} negative samples. AUC needs both "
            "classes: give samples of each."
        )
    return labels.astype(np.float32)


def compare_labelled(
    samples: LabelledSamples,
    reference: Engine,
    engine: Engine,
    *,
    limit: Callable[[Batch], Limit],
    max_auc_drop: float = MAX_AUC_DROP,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[ParityCase, LabelledParity | None]:
    """Score samples with both engines.

    Args:
        samples: of both classes.
        reference: the engine to compare with.
        engine: the engine in question.
        limit: difference of probabilities to accept, of a slice; the largest of all slices counts, for any sample.
        max_auc_drop: drop in AUC to accept.
        resamples: of the bootstrap intervals.
        seed: of the resamples.

    Returns:
        How far the probabilities are apart, as a case like all others; and what that is worth, or None where the
        engine failed or gave values that are not finite.

    Raises:
        DataError: the reference refuses the samples, or they are of one class.
    """
    labels: list[FloatArray] = []
    expected: list[FloatArray] = []
    actual: list[FloatArray] = []
    worst: tuple[tuple[int, float], Batch] | None = None
    accepted = 0.0
    for batch, batch_labels in samples.slices():
        try:
            expected.append(reference.predict(batch))
        except BatchError as err:
            raise DataError(f"{samples.source}, from sample {sum(piece.size for piece in labels)} on: {err}") from err
        try:
            actual.append(engine.predict(batch))
            accepted = max(accepted, limit(batch).most)
            badness = _badness(compare(actual[-1], expected[-1], accepted))
        except Exception as err:  # whatever an engine throws is a fact about this case only
            return ParityCase(CASE, problem=str(err) or type(err).__name__, batch=batch), None
        labels.append(batch_labels)
        if worst is None or badness > worst[0]:
            worst = badness, batch
    if worst is None:
        raise DataError(f"{samples.source} holds no samples.")
    seen, promised, scored = (np.concatenate(pieces) for pieces in (labels, expected, actual))
    output = compare(scored, promised, accepted)
    case = ParityCase(CASE, output=output, batch=None if output.passed else worst[1])
    if output.nonfinite:
        return case, None
    auc_rise, log_loss_rise = paired_differences(seen, promised, scored, resamples=resamples, seed=seed)
    return case, LabelledParity(
        source=samples.source,
        samples=seen.size,
        positives=int(np.count_nonzero(seen)),
        reference=_quality(seen, promised),
        engine=_quality(seen, scored),
        auc_drop=_negative(auc_rise),
        log_loss_rise=log_loss_rise,
        max_auc_drop=max_auc_drop,
        resamples=resamples,
        seed=seed,
    )


def _badness(output: OutputParity) -> tuple[int, float]:
    return output.nonfinite, output.max_abs


def _quality(labels: FloatArray, probabilities: FloatArray) -> Quality:
    return Quality(auc(labels, probabilities), log_loss(labels, probabilities), calibration(labels, probabilities))


def _negative(rise: Difference) -> Difference:
    """The drop that a rise is; 0 stays 0."""
    return Difference(0.0 - rise.value, 0.0 - rise.high, 0.0 - rise.low)
