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
from dlrm_deploy.engines.registry import open_unchecked
from dlrm_deploy.errors import EngineError
from dlrm_deploy.files import atomic_file, output_errors
from dlrm_deploy.parity.stages import FloatArray, Stage, Stages

SLICE_ROWS = 1024
"""Samples that are looked at together: the stages of a large batch would not fit into memory."""


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

    @property
    def first(self) -> Departure | None:
        """The first departure of the stages at rest, else of those in motion."""
        return self.departures[0] if self.departures else None

    def summary(self) -> str:
        """One line."""
        if self.first is None:
            return (
                f"BISECT  no stage departs: {self.stages} stages give what they should for this batch, within float32 "
                "rounding. What differs is outside of them: the stored expectation, or the batch itself."
            )
        others = f" ({len(self.departures) - 1} more)" if len(self.departures) > 1 else ""
        return f"BISECT  first departure: {self.first.stage}: {self.first.detail}{others}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "engine": self.engine,
            "stages": self.stages,
            "departures": [departure.to_dict() for departure in self.departures],
        }


def bisect(bundle: Bundle, engine_name: str, batch: Batch, *, threads: int | None = None) -> BisectReport:
    """Find the stages that depart, for a batch on which engine and reference differ.

    Args:
        bundle: whose model. Its files may be altered.
        engine_name: an engine whose inner tensors can be seen: onnxruntime or onnxruntime-stock.
        batch: fits the model, ids valid. The first slice of `SLICE_ROWS` samples in which a stage departs is
            reported.
        threads: CPU threads.

    Raises:
        EngineError: the engine cannot be opened, or cannot show its inner tensors.
    """
    at_rest = tuple(_at_rest(bundle))
    stages: list[Stage] = []
    with open_unchecked(bundle, engine_name, threads=threads, spin=False) as engine:
        for first in range(0, max(batch.batch_size, 1), SLICE_ROWS):
            rows = batch.rows(first, min(batch.batch_size, first + SLICE_ROWS))
            stages = list(Stages(bundle, rows))
            seen = engine.stage_outputs(rows, [stage.tensor for stage in stages])
            if missing := sorted({stage.tensor for stage in stages} - set(seen)):
                raise EngineError(
                    f"the graph of {bundle.path} has no tensor {', '.join(missing)}, so its stages cannot be told "
                    "apart. Export the model again."
                )
            known = {"dense": rows.dense, **seen}
            moving = [departure for stage in stages if (departure := _compare(stage, known, rows, first))]
            if moving:
                return BisectReport(engine_name, (*at_rest, *moving), len(stages))
    return BisectReport(engine_name, at_rest, len(stages))


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


def _at_rest(bundle: Bundle) -> Iterator[Departure]:
    for part, first, last in altered_rows(bundle):
        detail = f"rows {first} to {last} are not those that were exported"
        yield Departure(f"table {part}", None, detail)
    for key in altered_weights(bundle):
        yield Departure(f"weight {key}", None, "dense.npz does not hold what was exported")
    held = _graph_weights(bundle)
    for key, weight in bundle.dense_weights().items():
        if key not in held:
            continue
        if held[key].shape != weight.shape:
            detail = f"the graph holds {list(held[key].shape)}, dense.npz {list(weight.shape)}"
        elif np.array_equal(held[key], weight):
            continue
        else:
            detail = _difference(held[key], weight)
        yield Departure(f"weight {key}", None, detail)


def _difference(held: FloatArray, weight: FloatArray) -> str:
    """In what way two arrays of one shape differ."""
    count = int((held != weight).sum())
    if weight.ndim == 2 and weight.shape[0] == weight.shape[1] and np.array_equal(held, weight.T):
        return "the graph holds its transpose"
    if not held.any():
        return "the graph holds zeros"
    if weight.ndim == 2 and np.array_equal(np.sort(held, axis=1), np.sort(weight, axis=1)):
        return "the graph holds its columns in another order"
    return f"{count} of {weight.size} values in the graph are not those of dense.npz"


def _graph_weights(bundle: Bundle) -> dict[str, FloatArray]:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(bundle.model_path, load_external_data=False)
    inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in inside}
