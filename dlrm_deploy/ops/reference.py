"""The two operators in plain NumPy: the truth that every kernel and PyTorch form is tested against.

Written to be obviously right and exact to the last bit, not fast. Contract and shape letters are in
docs/operators.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.errors import BatchError
from dlrm_deploy.ops.contract import BagAttributes, check_interaction

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


def table_batched_embedding_bag(
    weights: FloatArray,
    indices: npt.NDArray[Any],
    offsets: npt.NDArray[Any] | None,
    *,
    num_features: int,
    features: Sequence[int],
    row_starts: Sequence[int],
    rows: Sequence[int],
    mean: Sequence[int],
    index_policy: str = "error",
    per_sample_weights: FloatArray | None = None,
    pooling_factors: Sequence[int] | None = None,
    feature_names: Sequence[str] | None = None,
) -> FloatArray:
    """Pool all bags of one table group.

    Args:
        weights: [R, D] float32, the tables of the group one after the other.
        indices: [N] int32 or int64, feature-major.
        offsets: [F * B + 1], of the type of `indices`; None in the fixed form.
        num_features: F.
        features: [T] feature that each slot pools.
        row_starts: [T] first row of each slot's table in `weights`.
        rows: [T] rows of each slot's table, at least 1.
        mean: [T] 1 divides the sum by the number of ids in the bag.
        index_policy: error, clamp, modulo or zero.
        per_sample_weights: [N] float32, with sum pooling only.
        pooling_factors: [F] ids per bag; fixed form only.
        feature_names: [F] for error messages.

    Returns:
        [B, T, D] float32. Rows are added in index order, each multiplication and addition rounded once.

    Raises:
        BatchError: an input or attribute breaks the contract, or an id is outside its table under policy
            `error`.
    """
    attributes = BagAttributes(num_features, features, row_starts, rows, mean, pooling_factors, index_policy)
    attributes.check(weights, indices, offsets, per_sample_weights)
    bounds = _bag_bounds(indices, offsets, attributes)  # [F, B + 1]
    ids = indices.astype(np.int64)
    if index_policy == "error":
        _check_ids(ids, bounds, features, rows, feature_names)

    B = bounds.shape[1] - 1
    pooled_BTD = np.zeros((B, len(features), weights.shape[1]), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinities follow IEEE arithmetic
        for t, feature in enumerate(features):
            table = weights[row_starts[t] : row_starts[t] + rows[t]]
            begins_B, ends_B = bounds[feature, :-1], bounds[feature, 1:]
            longest = int(np.max(ends_B - begins_B, initial=0))
            for k in range(longest):  # the k-th id of every bag that has one
                bags = np.flatnonzero(begins_B + k < ends_B)
                positions = begins_B[bags] + k
                read, kept = _apply_policy(ids[positions], rows[t], index_policy)
                values = table[read]
                if per_sample_weights is not None:
                    values = values * per_sample_weights[positions, None]
                values[~kept] = 0.0
                pooled_BTD[bags, t] += values
            if mean[t]:
                pooled_BTD[:, t] /= np.maximum(ends_B - begins_B, 1).astype(np.float32)[:, None]
    return pooled_BTD


def dot_interaction(dense: FloatArray, embeddings: FloatArray, *, self_interaction: bool = False) -> FloatArray:
    """Append the pairwise dot products of the dense vector and the pooled embeddings to the dense vector.

    Args:
        dense: [B, D] float32.
        embeddings: [B, T, D] float32.
        self_interaction: also each vector's product with itself.

    Returns:
        [B, D + P] float32; the order of the P products (i ascending, then j < i, or j <= i) is part of the
        contract.

    Raises:
        BatchError: a wrong type or rank, or widths or batch sizes that differ.
    """
    check_interaction(dense, embeddings)
    x_BVD = np.concatenate([dense[:, None], embeddings], axis=1)
    pieces = [dense]
    for i in range(x_BVD.shape[1]):
        for j in range(i + 1 if self_interaction else i):
            pieces.append(np.sum(x_BVD[:, i] * x_BVD[:, j], axis=1, keepdims=True, dtype=np.float32))
    return np.concatenate(pieces, axis=1)


def _bag_bounds(indices: npt.NDArray[Any], offsets: npt.NDArray[Any] | None, attributes: BagAttributes) -> IntArray:
    """[F, B + 1]: the bag of feature f and sample b owns indices[bounds[f, b]:bounds[f, b + 1]]."""
    bounds: IntArray
    if offsets is None:
        assert attributes.pooling_factors is not None  # one of the two is there
        lengths = np.array(attributes.pooling_factors, np.int64)
        B = indices.size // int(lengths.sum())
        bounds = (B * (np.cumsum(lengths) - lengths))[:, None] + lengths[:, None] * np.arange(B + 1)
    else:
        B = (offsets.size - 1) // attributes.num_features
        bounds = offsets.astype(np.int64)[np.arange(attributes.num_features)[:, None] * B + np.arange(B + 1)]
    return bounds


def _check_ids(
    ids: IntArray,
    bounds: IntArray,
    features: Sequence[int],
    rows: Sequence[int],
    feature_names: Sequence[str] | None,
) -> None:
    """Raise for the bad id of lowest position among the features that some slot pools."""
    bad = []
    for feature, count in zip(features, rows, strict=True):
        begin, end = int(bounds[feature, 0]), int(bounds[feature, -1])
        outside = np.flatnonzero((ids[begin:end] < 0) | (ids[begin:end] >= count))
        if outside.size:
            bad.append((begin + int(outside[0]), feature, count))
    if bad:
        position, feature, count = min(bad)
        sample = int(np.searchsorted(bounds[feature], position, side="right")) - 1
        name = repr(feature_names[feature]) if feature_names else str(feature)
        raise BatchError(
            f"feature {name}, sample {sample}, position {position - bounds[feature, sample]} of its bag: "
            f"id {ids[position]} is outside [0, {count}). Hash ids to the table size before scoring, or "
            "choose the index policy clamp, modulo or zero."
        )


def _apply_policy(ids: IntArray, rows: int, policy: str) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """The rows to read, always inside the table, and which of them count."""
    inside = (ids >= 0) & (ids < rows)
    if policy == "modulo":
        return ids % rows, np.ones_like(inside)  # the remainder has the sign of `rows`
    return np.clip(ids, 0, rows - 1), inside if policy == "zero" else np.ones_like(inside)
