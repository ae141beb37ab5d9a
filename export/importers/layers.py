"""What several importers read off the tensors of MLPs, and the order in which a top MLP takes the pairs of vectors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dlrm_deploy.errors import CheckpointError
from dlrm_deploy.export.importers.common import FloatArray

IntArray = npt.NDArray[np.int64]

Shapes = Mapping[str, tuple[int, ...]]


def mlp_widths(path: Path, shapes: Shapes, template: str) -> tuple[int, ...]:
    """Widths of an MLP, its input first.

    Args:
        path: the checkpoint, for messages.
        shapes: shape of each tensor, by name. Weights are [out, in].
        template: name of the weight of layer `{}`; layers are numbered from 0.

    Returns:
        Empty where there is no layer at all.

    Raises:
        CheckpointError: a number is left out, a weight is no matrix, or two layers do not fit together.
    """
    pattern = re.compile(re.escape(template).replace(r"\{\}", r"(0|[1-9]\d*)"))
    numbers = sorted(int(found[1]) for key in shapes if (found := pattern.fullmatch(key)))
    if numbers != list(range(len(numbers))):
        raise CheckpointError(
            f"{path}: of the layers {template.format('N')} there are N = {', '.join(map(str, numbers))}; expected all "
            f"from 0 to {numbers[-1]}. Is the checkpoint complete?"
        )
    widths: tuple[int, ...] = ()
    for key in map(template.format, numbers):
        shape = shapes[key]
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"{path}: {key} is {list(shape)}, expected a matrix [out, in].")
        if widths and shape[1] != widths[-1]:
            raise CheckpointError(
                f"{path}: {key} is {list(shape)}, but the layer before it gives {widths[-1]} values. The tensors are "
                "of different models."
            )
        widths = (*(widths or (shape[1],)), shape[0])
    return widths


def pair_columns(first: int, pairs: IntArray) -> IntArray:
    """Where our top MLP's input columns are among those of a model that orders its pairs of vectors otherwise.

    Args:
        first: columns in front of the pairs, which keep their place.
        pairs: [P, 2], for each of the other model's pair columns the two vectors in our numbers, in any order; each
            pair of different vectors once.

    Returns:
        [first + P] int64: `weight[:, pair_columns(...)]` has our order, the lower triangle by rows.
    """
    low, high = pairs.min(axis=1), pairs.max(axis=1)
    ours = high * (high - 1) // 2 + low
    columns = np.arange(first + len(pairs))
    columns[first + ours] = first + np.arange(len(pairs))
    return columns


def reordered(columns: IntArray) -> Callable[[FloatArray, int], FloatArray]:
    """For `Stored.adapt`: these columns of a matrix."""
    return lambda values, first: np.ascontiguousarray(values[:, columns])


def dot_width(features: int, vector: int) -> int:
    """How many columns the dot interaction gives with `features` sparse features and vectors of width `vector`."""
    return vector + features * (features + 1) // 2


def features_of_dot(width: int, vector: int) -> int | None:
    """How many sparse features, at least one, make `dot_width` this `width`; None where no number does."""
    pairs = width - vector
    features = (math.isqrt(8 * pairs + 1) - 1) // 2 if pairs > 0 else 0
    return features if features and dot_width(features, vector) == width else None


def upper_triangle(vectors: int) -> IntArray:
    """[V (V - 1) / 2, 2]: the pairs above the diagonal, by rows."""
    return np.stack(np.triu_indices(vectors, 1), axis=1)


def lower_triangle(order: Sequence[int]) -> IntArray:
    """[V (V - 1) / 2, 2]: the pairs below the diagonal, by rows, of vectors that stand in this order."""
    return np.asarray(order, np.int64)[np.stack(np.tril_indices(len(order), -1), axis=1)]
