"""Where do engine and reference part? Finds the first stage of the model that does not give what it should.

Two looks. First at rest: are the tables those that were exported, block of rows by block of rows, and does the graph
hold the weights of `dense.npz`? Then in motion: the engine runs with every stage as an output, and each stage is
compared with what it should give for the engine's own inputs to it (`stages`), from the tables to the probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.batch import Batch
from dlrm_deploy.bundle import Bundle
from dlrm_deploy.checksums import altered_rows, altered_weights
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.engines.engine import Engine
from dlrm_deploy.engines.registry import open_unchecked
from dlrm_deploy.errors import DlrmDeployError, EngineError, MissingDependencyError
from dlrm_deploy.files import atomic_file, output_errors
from dlrm_deploy.parity.stages import FloatArray, Stage, Stages

SLICE_ROWS = 1024
"""Samples that are looked at together at most: the stages of a large batch would not fit into memory."""

SLICE_VALUES = 1 << 22
"""Table values that the ids of such samples read, and values of their interaction, at most; a single sample may have
more."""


@dataclass(frozen=True, slots=True)
class Departure:
    """A stage that does not give what it should."""

    stage: str
    row: int | None
    """The sample with the largest error in units of its bound; None where stored values differ."""

    detail: str
    batch: Batch | None = None
    """That sample alone."""

    expected: npt.NDArray[np.float64] | None = None
    actual: FloatArray | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"stage": self.stage, "row": self.row, "detail": self.detail}


@dataclass(frozen=True, slots=True)
class BisectReport:
    """What was found, in the order of the model."""

    engine: str
    departures: tuple[Departure, ...]
    stages: int
    """Stages that were compared."""

    problem: str | None = None
    """Why not everything could be looked at; None where it was."""

    @property
    def first(self) -> Departure | None:
        """The first stage that departs in motion, else the first difference at rest."""
        moving = (departure for departure in self.departures if departure.batch is not None)
        return next(moving, self.departures[0] if self.departures else None)

    def summary(self) -> str:
        """One line."""
        if self.first is None and self.problem:
            return f"BISECT  not possible: {self.problem}"
        if self.first is None:
            return (
                f"BISECT  no stage departs: {self.stages} stages give what they should for this batch, within float32 "
                "rounding. What differs is outside of them (the stored expectation, or the batch itself), or rounding "
                "alone, which many stages add up."
            )
        others = f" ({len(self.departures) - 1} more)" if len(self.departures) > 1 else ""
        return f"BISECT  first departure: {self.first.stage}: {self.first.detail}{others}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "engine": self.engine,
            "stages": self.stages,
            **({"problem": self.problem} if self.problem else {}),
            "departures": [departure.to_dict() for departure in self.departures],
        }


def bisect(bundle: Bundle, engine_name: str, batch: Batch, *, threads: int | None = None) -> BisectReport:
    """Find the stages that depart, for a batch on which engine and reference differ.

    What cannot be looked at hides nothing of the rest: `BisectReport.problem` says why, as where the engine cannot be
    opened or does not show its inner tensors (onnxruntime and onnxruntime-stock do), or onnx is not installed.

    Args:
        bundle: whose model. Its files may be altered.
        engine_name: one of `dlrm_deploy.engines.registry.ENGINE_NAMES`.
        batch: fits the model, ids valid. The first slice of samples (`SLICE_ROWS`, `SLICE_VALUES`) in which a stage
            departs is reported.
        threads: CPU threads.
    """
    found: list[Departure] = []
    problems: list[str] = []
    stages = 0
    for look in (_stored_departures, _graph_departures):
        try:
            found += look(bundle)
        except DlrmDeployError as err:
            problems.append(str(err))
    try:
        stages, moving = _in_motion(bundle, engine_name, batch, threads)
        found += moving
    except DlrmDeployError as err:
        problems.append(str(err))
    return BisectReport(engine_name, tuple(found), stages, " ".join(dict.fromkeys(problems)) or None)


def _in_motion(bundle: Bundle, engine_name: str, batch: Batch, threads: int | None) -> tuple[int, list[Departure]]:
    """How many stages the model has, and which of them depart in the first slice where one does."""
    if bundle.manifest.mlp_precision != "fp32":
        raise EngineError(
            f"the MLPs of {bundle.path} are {bundle.manifest.mlp_precision}, and what a layer gives then depends on "
            "roundings that no bound separates from errors. Bisect the fp32 bundle that it was converted from; with "
            "`dlrm-deploy export FP32_BUNDLE --tables ... --mlp fp32` its tables can be looked at in any format."
        )
    count = 0
    with open_unchecked(bundle, engine_name, threads=threads, spin=False) as engine:
        for first, last in slices(bundle.config, batch):
            rows = batch.rows(first, last)
            stages = list(Stages(bundle, rows))
            count = len(stages)
            try:
                seen = engine.stage_outputs(rows, [stage.tensor for stage in stages])
            except EngineError as err:
                return count, [_failing_stage(engine, stages, rows, first, err)]
            if missing := sorted({stage.tensor for stage in stages} - set(seen)):
                raise EngineError(
                    f"the graph of {bundle.path} has no tensor {', '.join(missing)}, so its stages cannot be told "
                    "apart. Export the model again."
                )
            known = {"dense": rows.dense, **seen}
            departures = [departure for stage in stages if (departure := _compare(stage, known, rows, first))]
            if departures:
                return count, departures
    return count, []


def _failing_stage(engine: Engine, stages: list[Stage], rows: Batch, first: int, error: EngineError) -> Departure:
    """The first stage that the engine cannot even compute.

    Raises:
        EngineError: it is none of them, as for an engine that shows no inner tensors.
    """
    try:
        engine.stage_outputs(rows, [])
    except EngineError:
        raise error from None
    for stage in stages:
        try:
            engine.stage_outputs(rows, [stage.tensor])
        except EngineError as err:
            return Departure(stage.name, first, str(err), rows.rows(0, min(1, rows.batch_size)))
    raise error


def slices(config: ModelConfig, batch: Batch) -> Iterator[tuple[int, int]]:
    """First and last sample (exclusive) of the slices of a batch that are looked at one after the other.

    Of a batch without samples one, which is empty.
    """
    B = batch.batch_size
    widest = max(group.width for group in config.groups)
    lengths_FB = np.diff(batch.offsets).reshape(len(config.features), B)
    values_B = lengths_FB.sum(axis=0, dtype=np.int64) * widest
    # Of one sample: its vectors side by side, and the products of all with all.
    vectors = len(config.features) + len(config.dense_features)
    values_B += max(config.flat_width, config.interaction_width, vectors**2)
    ends_B = np.cumsum(values_B)
    first = 0
    while first < max(B, 1):
        before = int(ends_B[first - 1]) if first else 0
        last = int(np.searchsorted(ends_B, before + SLICE_VALUES, side="right"))
        last = min(B, first + SLICE_ROWS, max(last, first + 1))
        yield first, last
        first = max(last, first + 1)


def save_reproducer(path: Path, sample: Batch, departure: Departure | None = None) -> None:
    """Write the inputs of one sample, with the stage's name and values, as a small .npz file.

    `dlrm-deploy check BUNDLE --batch-file FILE` runs it again.

    Raises:
        OutputError: it cannot be written.
    """
    arrays: dict[str, npt.NDArray[Any]] = {
        "dense": sample.dense,
        "indices": sample.indices,
        "offsets": sample.offsets,
    }
    if sample.weights is not None:
        arrays["weights"] = sample.weights
    if departure is not None:
        arrays["stage"] = np.array(departure.stage)
        if departure.expected is not None and departure.actual is not None:
            arrays["expected"], arrays["actual"] = departure.expected, departure.actual
    with output_errors(path), atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _compare(stage: Stage, seen: dict[str, FloatArray], batch: Batch, first_row: int) -> Departure | None:
    actual = seen[stage.tensor][(slice(None), *stage.part)]
    with np.errstate(all="ignore"):  # values may be NaN or infinite, which is what is looked for
        expected, bound = stage.reference(seen)
    if actual.shape != expected.shape:
        detail = f"the shape is {list(actual.shape)}, expected {list(expected.shape)}"
        return Departure(stage.name, None, detail)
    with np.errstate(all="ignore"):
        error = np.abs(actual - expected)
        # NaN compares as false: a value that is not finite on one side only departs.
        wrong = ~(error <= bound) & ~((actual == expected) | (np.isnan(actual) & np.isnan(expected)))
        # Without a bound (sums may overflow) a finite value may be any, and one that is not stays so in some form.
        wrong &= np.isfinite(bound) | ~(np.isfinite(expected) | ~np.isfinite(actual))
    if not wrong.any():
        return None
    excess = np.where(wrong, np.nan_to_num(error / np.maximum(bound, 1e-45), nan=np.inf, posinf=np.inf), 0)
    row = int(np.argmax(excess.reshape(len(excess), -1).max(axis=1)))
    at = int(np.argmax(excess[row].reshape(-1)))
    got, right, limit = (float(values[row].reshape(-1)[at]) for values in (actual, expected, bound))
    rows = int(wrong.reshape(len(wrong), -1).any(axis=1).sum())
    detail = (
        f"sample {first_row + row}, value {at} is {got:.8g}, expected {right:.8g} within {limit:.1e}; "
        f"{rows} of {len(wrong)} samples depart"
    )
    return Departure(stage.name, first_row + row, detail, batch.rows(row, row + 1), expected[row], actual[row])


def _stored_departures(bundle: Bundle) -> Iterator[Departure]:
    for part, first, last in altered_rows(bundle):
        detail = f"rows {first} to {last} are not those that were exported"
        yield Departure(f"table {part}", None, detail)
    for key in altered_weights(bundle):
        yield Departure(f"weight {key}", None, "dense.npz does not hold what was exported")


def _graph_departures(bundle: Bundle) -> Iterator[Departure]:
    try:
        from dlrm_deploy.parity.stored_graph import differences
    except ImportError as err:
        raise MissingDependencyError(
            "looking into model.onnx needs the package onnx. Install it with `pip install 'dlrm-deploy[export]'`."
        ) from err
    for place, detail in differences(bundle):
        yield Departure(place, None, detail)
