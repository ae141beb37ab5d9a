"""The operators in plain NumPy: the truth that every kernel and PyTorch form is tested against.

Written to be obviously right and exact to the last bit, not fast. Contract and shape letters are in
docs/operators.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm_deploy.errors import BatchError
from dlrm_deploy.formats import RowFormat, decode, from_bf16, to_bf16
from dlrm_deploy.int8_codes import quantize_samples
from dlrm_deploy.ops.contract import (
    BagAttributes,
    by_format,
    check_bag_interaction,
    check_interaction,
    check_mlp,
    check_mlp_int8,
)

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Matrices = FloatArray | Mapping[RowFormat, npt.NDArray[Any]]
"""The fp32 matrix of a table group, or its stored matrices by format."""


def table_batched_embedding_bag(
    weights: Matrices,
    indices: npt.NDArray[Any],
    offsets: npt.NDArray[Any] | None,
    *,
    num_features: int,
    features: Sequence[int],
    row_starts: Sequence[int],
    rows: Sequence[int],
    mean: Sequence[int],
    ids: Sequence[int] = (),
    moduli: Sequence[int] = (),
    divisors: Sequence[int] = (),
    divisions: Sequence[int] = (),
    formats: Sequence[int] = (),
    width: int | None = None,
    index_policy: str = "error",
    per_sample_weights: FloatArray | None = None,
    pooling_factors: Sequence[int] | None = None,
    feature_names: Sequence[str] | None = None,
) -> FloatArray:
    """Pool all bags of one table group.

    Args:
        weights: [R, D] float32, the tables of the group one after the other; or a matrix for each format that a slot
            reads, as `dlrm_deploy.formats.encode` returns it.
        indices: [N] int32 or int64, feature-major.
        offsets: [F * B + 1], of the type of `indices`; None in the fixed form.
        num_features: F.
        features: [T] feature that each slot pools.
        row_starts: [T] first row of each slot's table part, in the matrix of its format.
        rows: [T] rows of each slot's table part, at least 1.
        mean: [T] 1 divides the sum by the number of ids in the bag.
        ids: [T] ids in [0, ids) are valid; empty: `rows`.
        moduli: [T] ids are taken modulo this first, unless it is 0; empty: 0.
        divisors: [T] a valid id is divided by this; empty: 1.
        divisions: [T] 0 exact, 1 float32, 2 float32 by the reciprocal; empty: 0.
        formats: [T] row format of each slot, a position in `ROW_FORMATS`; empty: 0, fp32.
        width: D; needed where a slot is not fp32.
        index_policy: error, clamp, modulo or zero.
        per_sample_weights: [N] float32, with sum pooling only.
        pooling_factors: [F] ids per bag; fixed form only.
        feature_names: [F] for error messages.

    Returns:
        [B, T, D] float32. The float32 values of stored rows are added in index order, each multiplication and addition
        rounded once.

    Raises:
        BatchError: an input or attribute breaks the contract, or an id is out of range under policy `error`.
    """
    a = BagAttributes(
        num_features=num_features, features=tuple(features), row_starts=tuple(row_starts), rows=tuple(rows),
        ids=tuple(ids), moduli=tuple(moduli), divisors=tuple(divisors), divisions=tuple(divisions), mean=tuple(mean),
        formats=tuple(formats), width=width,
        pooling_factors=None if pooling_factors is None else tuple(pooling_factors), index_policy=index_policy,
        feature_names=tuple(feature_names or ()),
    )  # fmt: skip
    a.check(weights, indices, offsets, per_sample_weights)
    bounds = _bag_bounds(indices, offsets, a)  # [F, B + 1]
    ids_N = indices.astype(np.int64)
    if index_policy == "error":
        _check_ids(ids_N, bounds, a)

    B = bounds.shape[1] - 1
    D = a.width_of(weights)
    matrices = by_format(weights)
    pooled_BTD = np.zeros((B, len(a.features), D), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinities follow IEEE arithmetic
        for t, feature in enumerate(a.features):
            table = matrices[a.slot_formats[t]][a.row_starts[t] : a.row_starts[t] + a.rows[t]]
            begins_B, ends_B = bounds[feature, :-1], bounds[feature, 1:]
            begin, end = bounds[feature, 0], bounds[feature, -1]
            valid, kept = _valid_ids(ids_N[begin:end], a, t)
            values = decode(a.slot_formats[t], table[_rows_of(valid, a, t)], D)
            if per_sample_weights is not None:
                values = values * per_sample_weights[begin:end, None]
            values[~kept] = 0.0
            longest = int(np.max(ends_B - begins_B, initial=0))
            for k in range(longest):  # the k-th id of every bag that has one
                bags = np.flatnonzero(begins_B + k < ends_B)
                pooled_BTD[bags, t] += values[begins_B[bags] + k - begin]
            if a.mean[t]:
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


def embedding_bag_dot_interaction(
    dense: FloatArray,
    weights: Matrices,
    indices: npt.NDArray[Any],
    offsets: npt.NDArray[Any] | None,
    *,
    self_interaction: bool = False,
    **bags: Any,
) -> tuple[FloatArray, FloatArray]:
    """Pool all bags of one table group, then append the products of all pairs of vectors to the dense one.

    Args:
        dense: [B, D] float32.
        weights: as all that follows, of `table_batched_embedding_bag`.
        indices: as above.
        offsets: as above.
        self_interaction: also each vector's product with itself.
        bags: as above.

    Returns:
        `interactions` [B, D + P] and `pooled` [B, T, D], float32.

    Raises:
        BatchError: an input or attribute breaks the contract, or an id is out of range under policy `error`.
    """
    pooled = table_batched_embedding_bag(weights, indices, offsets, **bags)
    check_bag_interaction(dense, pooled.shape[0], pooled.shape[2])
    return dot_interaction(dense, pooled, self_interaction=self_interaction), pooled


def mlp(
    x: FloatArray, layers: Sequence[tuple[npt.NDArray[np.uint16], FloatArray]], *, relu_last: bool = True
) -> FloatArray:
    """A chain of dense layers with a ReLU behind each, on bfloat16 inputs and weights.

    Args:
        x: [B, K] float32.
        layers: of each layer the weight [N, K], bfloat16 bit patterns, and the bias [N] float32.
        relu_last: whether a ReLU stands behind the last layer too.

    Returns:
        [B, N of the last layer] float32. The inputs of each layer are rounded to bfloat16; products are added to the
        sum of their column one by one with k ascending, each by one fused multiply-add in float32, from zero; then the
        bias is added. Kernels that add in this order agree bit for bit. ReLU keeps NaN.

    Raises:
        BatchError: an input breaks the contract.
    """
    check_mlp(x, layers)
    for number, (patterns, bias) in enumerate(layers):
        x_BK = from_bf16(to_bf16(x)).astype(np.float64)
        weight_KN = from_bf16(patterns.view(np.uint16)).astype(np.float64).T
        sums_BN = np.zeros((len(x), len(bias)), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinities follow IEEE arithmetic
            for k in range(len(weight_KN)):
                # One rounding: the product of two bfloat16 is exact in float64, and where its sum with a float32 is
                # not, one of the two is too small to change the float32 that the other one is.
                sums_BN = (sums_BN + x_BK[:, k, None] * weight_KN[k]).astype(np.float32)
            x = sums_BN + bias
        if relu_last or number < len(layers) - 1:
            x = np.where(x <= 0, np.float32(0), x)
    return x


def mlp_int8(
    x: FloatArray, layers: Sequence[tuple[npt.NDArray[np.int8], FloatArray, FloatArray]], *, relu_last: bool = True
) -> FloatArray:
    """A chain of dense layers with a ReLU behind each, on int8 inputs and weights.

    Args:
        x: [B, K] float32.
        layers: of each layer the codes of its weight [N, K] int8, their scales [N] and the bias [N] float32.
        relu_last: whether a ReLU stands behind the last layer too.

    Returns:
        [B, N of the last layer] float32: sum of products of codes * step * scale + bias, each operation rounded once,
        so that all forms agree bit for bit, apart from the payload of NaN and the sign of zero. ReLU keeps NaN. All
        outputs of a sample are NaN where one of its values is NaN or infinite.

    Raises:
        BatchError: an input breaks the contract.
    """
    check_mlp_int8(x, layers)
    for number, (weight, scale, bias) in enumerate(layers):
        codes, step = quantize_samples(x)
        # Whole numbers below 2^53: exact in any order.
        sums_BN = (codes.astype(np.float64) @ weight.astype(np.float64).T).astype(np.int32)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinities follow IEEE arithmetic
            x = sums_BN.astype(np.float32) * step[:, None] * scale + bias
        if relu_last or number < len(layers) - 1:
            x = np.where(x <= 0, np.float32(0), x)
    return x


def table_rows(ids: IntArray, attributes: BagAttributes, slot: int) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """The row of the group's matrix that each of a slot's ids [M] int64 reads, and whether it counts at all.

    Ids are valid where the index policy is error.
    """
    valid, kept = _valid_ids(ids, attributes, slot)
    return attributes.row_starts[slot] + _rows_of(valid, attributes, slot), kept


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


def _check_ids(ids: IntArray, bounds: IntArray, a: BagAttributes) -> None:
    """Raise for the bad id of lowest position; where slots differ about it, for the one with the fewest ids."""
    bad = []
    for t, feature in enumerate(a.features):
        begin, end = int(bounds[feature, 0]), int(bounds[feature, -1])
        reduced = _reduce(ids[begin:end], a.moduli[t])
        outside = np.flatnonzero((reduced < 0) | (reduced >= a.ids[t]))
        if outside.size:
            bad.append((begin + int(outside[0]), a.ids[t], feature))
    if bad:
        position, limit, feature = min(bad)
        sample = int(np.searchsorted(bounds[feature], position, side="right")) - 1
        name = repr(a.feature_names[feature]) if a.feature_names else str(feature)
        raise BatchError(
            f"feature {name}, sample {sample}, position {position - bounds[feature, sample]} of its bag: "
            f"id {ids[position]} is outside [0, {limit}). Hash ids to the table size before scoring, or "
            "choose the index policy clamp, modulo or zero."
        )


def _reduce(ids: IntArray, modulus: int) -> IntArray:
    return ids % modulus if modulus else ids  # the remainder has the sign of the modulus


def _valid_ids(ids: IntArray, a: BagAttributes, t: int) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Ids of slot t after modulus and index policy, all in [0, ids[t]), and which of them count."""
    limit = a.ids[t]
    ids = _reduce(ids, a.moduli[t])
    inside = (ids >= 0) & (ids < limit)
    if a.index_policy == "modulo":
        return ids % limit, np.ones_like(inside)
    return np.clip(ids, 0, limit - 1), inside if a.index_policy == "zero" else np.ones_like(inside)


def _rows_of(ids: IntArray, a: BagAttributes, t: int) -> IntArray:
    """The rows of slot t's table part that valid ids read, all in [0, rows[t])."""
    rows, divisor = a.rows[t], a.divisors[t]
    if a.divisions[t] == 0:
        return ids // divisor % rows
    rounded = np.array(divisor).astype(np.float32)  # np.float32(divisor) would round to float64 first
    if a.divisions[t] == 1:
        quotients = ids.astype(np.float32) / rounded
    else:
        quotients = ids.astype(np.float32) * (np.float32(1) / rounded)
    return np.minimum(quotients.astype(np.int64), rows - 1)
