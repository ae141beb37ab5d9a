"""The two operators of docs/operators.md as ONNX functions of standard operators.

A body is specialised to its node: it holds only what the node's form, poolings and index policy need, with the node's
attributes as constants. Every body is right for bags of any length, empty ones too, and for a batch of zero samples.
Additions run in index order, so results equal the kernels' except where fixed bags are summed by ReduceSum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from dlrm_deploy.config import ModelConfig, TableGroup
from dlrm_deploy.export.nodes import DOMAIN, OPSET, Nodes


@dataclass(frozen=True, kw_only=True, slots=True)
class BagAttributes:
    """The attributes of one TableBatchedEmbeddingBag node, as docs/operators.md names them."""

    num_features: int
    features: tuple[int, ...]
    row_starts: tuple[int, ...]
    rows: tuple[int, ...]
    mean: tuple[int, ...]
    pooling_factors: tuple[int, ...] | None
    index_policy: str
    feature_names: tuple[str, ...]
    weighted: bool

    @classmethod
    def of(cls, config: ModelConfig, group: TableGroup) -> BagAttributes:
        """The attributes of the node that pools a table group of a model."""
        features = [config.features[slot] for slot in group.slots]
        ranges = [group.rows_of(feature.table) for feature in features]
        return cls(
            num_features=len(config.features),
            features=group.slots,
            row_starts=tuple(rows.start for rows in ranges),
            rows=tuple(rows.stop - rows.start for rows in ranges),
            mean=tuple(int(feature.pooling == "mean") for feature in features),
            pooling_factors=config.pooling_factors,
            index_policy=config.index_policy,
            feature_names=tuple(feature.name for feature in config.features),
            weighted=config.weighted,
        )

    def node_attributes(self) -> dict[str, object]:
        """As they stand on the node."""
        attributes: dict[str, object] = {
            "num_features": self.num_features,
            "features": self.features,
            "row_starts": self.row_starts,
            "rows": self.rows,
            "mean": self.mean,
            "index_policy": self.index_policy,
            "feature_names": "\n".join(self.feature_names),
        }
        if self.pooling_factors is not None:
            attributes["pooling_factors"] = self.pooling_factors
        return attributes

    def inputs(self) -> list[str]:
        """Input names of the node; an absent optional input is ""."""
        names = ["weights", "indices", "" if self.pooling_factors else "offsets"]
        if self.weighted:
            names.append("per_sample_weights")
        return names if names[-1] else names[:-1]


def embedding_bag_function(attributes: BagAttributes, overload: str) -> onnx.FunctionProto:
    """`TableBatchedEmbeddingBag` for a node with these attributes."""
    n = Nodes()
    if attributes.pooling_factors is None:
        _pool_csr(n, attributes)
    else:
        pool_fixed(
            n, attributes, attributes.pooling_factors,
            ids=_checked_ids(n, attributes, attributes.pooling_factors),
            table="weights", weights="per_sample_weights", output="pooled",
        )  # fmt: skip
    # A formal parameter must have a name, also the one that a fixed node leaves out before per-sample weights.
    inputs = [name or "offsets" for name in attributes.inputs()]
    return helper.make_function(
        DOMAIN, "TableBatchedEmbeddingBag", inputs, ["pooled"], n.nodes, [helper.make_opsetid("", OPSET)],
        attributes=list(attributes.node_attributes()), overload=overload,
    )  # fmt: skip


def dot_interaction_function(slots: int, self_interaction: bool) -> onnx.FunctionProto:
    """`DotInteraction` for `slots` pooled vectors."""
    n = Nodes()
    dot_interaction(n, "dense", "embeddings", slots, self_interaction, output="interactions")
    return helper.make_function(
        DOMAIN, "DotInteraction", ["dense", "embeddings"], ["interactions"], n.nodes,
        [helper.make_opsetid("", OPSET)], attributes=["self_interaction"],
    )  # fmt: skip


def dot_interaction(
    n: Nodes, dense: str, embeddings: str, slots: int, self_interaction: bool, output: str | None = None
) -> str:
    """Standard operators for the dot interaction: all V x V products, then the lower triangle by rows."""
    vectors = slots + 1
    row, column = np.tril_indices(vectors, 0 if self_interaction else -1)  # i ascending, then j: the contract's order
    x_BVD = n.op("Concat", n.op("Unsqueeze", dense, n.constant([1])), embeddings, axis=1)
    dots_BVV = n.op("MatMul", x_BVD, n.op("Transpose", x_BVD, perm=[0, 2, 1]))
    flat = n.op("Reshape", dots_BVV, n.constant([0, vectors * vectors]))
    triangle = n.op("Gather", flat, n.constant(row * vectors + column), axis=1)
    return n.op("Concat", dense, triangle, axis=1, output=output)


def policy_rows(
    n: Nodes,
    ids: str,
    rows: str,
    row_starts: str,
    policy: str,
    total_rows: str,
    dtype: npt.DTypeLike = np.int64,
) -> tuple[str, str | None]:
    """Rows of the group's matrix for ids, under the index policy; and, for policy zero, where the id is out of range.

    Args:
        n: where the nodes go.
        ids: any shape.
        rows: number of rows of each id's table; broadcasts with `ids`.
        row_starts: first row of each id's table; broadcasts with `ids`.
        policy: the index policy.
        total_rows: R. Policy error reads row R for a bad id, which Gather refuses.
        dtype: of ids and all row numbers.
    """
    zero = n.constant(0, dtype)
    if policy == "clamp":
        # Not Min and Max: ONNX Runtime 1.31's int64 ones are wrong for values in [2^31, 2^32).
        last = n.op("Sub", rows, n.constant(1, dtype))
        from_zero = n.op("Where", n.op("Less", ids, zero), zero, ids)
        return n.op("Add", n.op("Where", n.op("Greater", from_zero, last), last, from_zero), row_starts), None
    if policy == "modulo":
        return n.op("Add", n.op("Mod", ids, rows), row_starts), None
    bad = n.op("Or", n.op("Less", ids, zero), n.op("GreaterOrEqual", ids, rows))
    good_rows = n.op("Add", ids, row_starts)
    if policy == "zero":
        return n.op("Where", bad, row_starts, good_rows), bad
    return n.op("Where", bad, total_rows, good_rows), None


def _int64(n: Nodes, name: str) -> str:
    return n.op("Cast", name, to=TensorProto.INT64)


def _zero_unless(n: Nodes, *violations: str) -> str:
    """The number 0; the run fails ("indices element out of data bounds") where any value of a violation is true.

    Standard operators cannot raise an error of their own, so a Gather reads beyond its one element.
    """
    count = n.op("ReduceSum", _int64(n, n.op("Concat", *violations, axis=0)), keepdims=0)
    return n.op("Gather", n.constant([0]), n.op("Min", count, n.constant(1)))


def _starts_and_ends(n: Nodes, offsets: str) -> tuple[str, str]:
    """Where each bag begins and ends in `indices`."""
    starts = n.op("Slice", offsets, n.constant([0]), n.constant([-1]))
    return starts, n.op("Slice", offsets, n.constant([1]), n.constant([np.iinfo(np.int64).max]))


def _checked_ids(n: Nodes, a: BagAttributes, factors: Sequence[int]) -> str:
    """`indices` as int64, after N was seen to be a whole number of samples, with one weight per id.

    Where all features have one pooling factor the Reshape that follows refuses anything else by itself.
    """
    ids = _int64(n, "indices")
    if len(set(factors)) == 1 and len(a.features) == len(factors):
        return ids
    ids_count = n.op("Shape", ids)
    violations = [n.op("Cast", n.op("Mod", ids_count, n.constant([sum(factors)])), to=TensorProto.BOOL)]
    if a.weighted:
        violations.append(n.op("Not", n.op("Equal", n.op("Shape", "per_sample_weights"), ids_count)))
    return n.op("Add", ids, _zero_unless(n, *violations))


def _checked_offsets(n: Nodes, a: BagAttributes) -> str:
    """`offsets` as int64, after they were seen to rise from 0 to N, F * B + 1 of them, with one weight per id."""
    offsets = _int64(n, "offsets")
    starts, ends = _starts_and_ends(n, offsets)
    ids_count = n.op("Shape", "indices")
    violations = [
        n.op("Less", ends, starts),
        n.op("Not", n.op("Equal", n.op("Gather", offsets, n.constant([0])), n.constant([0]))),
        n.op("Not", n.op("Equal", n.op("Gather", offsets, n.constant([-1])), ids_count)),
        n.op("Cast", n.op("Mod", n.op("Shape", starts), n.constant([a.num_features])), to=TensorProto.BOOL),
    ]
    if a.weighted:
        violations.append(n.op("Not", n.op("Equal", n.op("Shape", "per_sample_weights"), ids_count)))
    return n.op("Add", offsets, _zero_unless(n, *violations))


def _pool_csr(n: Nodes, a: BagAttributes) -> None:
    """Gather the row of every id [N, D] and add it to its bag with ScatterElements, which runs in index order.

    Not ScatterND: ONNX Runtime's adds repeated indices from several threads without a lock and loses some.
    Not a padded [bags, longest, D]: one bag of 100,000 ids would cost memory for every bag.
    """
    T = len(a.features)
    ids = _int64(n, "indices")
    starts, ends = _starts_and_ends(n, _checked_offsets(n, a))
    batch = n.op("Div", n.op("Shape", starts), n.constant([a.num_features]))

    # Bag of each id: the number of bags that start at or before it, minus one.
    ids_count = n.op("Shape", ids)
    places = n.op("Expand", n.constant([0]), n.op("Add", ids_count, n.constant([1])))
    ones = n.op("Expand", n.constant([1]), n.op("Shape", starts))
    begun = n.op("CumSum", n.op("ScatterElements", places, starts, ones, axis=0, reduction="add"), n.constant(0))
    bag = n.op("Sub", n.op("Slice", begun, n.constant([0]), ids_count), n.constant([1]))
    # ONNX Runtime refuses a division by zero even of no elements at all.
    feature = n.op("Div", bag, n.op("Max", batch, n.constant([1])))

    # Constants per feature of the batch. Features of other groups pool into a spare slot T, which is cut off.
    slot, rows, row_starts = np.full(a.num_features, T), np.ones(a.num_features), np.zeros(a.num_features)
    slot[list(a.features)], rows[list(a.features)], row_starts[list(a.features)] = (
        range(T),
        a.rows,
        a.row_starts,
    )
    has_spare = a.num_features > T
    rows_N = n.op("Gather", n.constant(rows), feature)
    row_starts_N = n.op("Gather", n.constant(row_starts), feature)
    total = n.op("Gather", n.op("Shape", "weights"), n.constant(0))
    if has_spare:
        in_group = n.op("Less", n.op("Gather", n.constant(slot), feature), n.constant(T))
        ids = n.op("Where", in_group, ids, n.constant(0))
    row_N, bad_N = policy_rows(n, ids, rows_N, row_starts_N, a.index_policy, total)

    gathered = n.op("Gather", "weights", row_N)
    column = n.constant([1])
    if a.weighted:
        gathered = n.op("Mul", n.op("Unsqueeze", "per_sample_weights", column), gathered)
    if bad_N is not None:
        gathered = n.op("Where", n.op("Unsqueeze", bad_N, column), n.constant(0.0, np.float32), gathered)
    bag_of_slot = bag
    if a.features != tuple(range(a.num_features)):
        sample = n.op("Sub", bag, n.op("Mul", feature, batch))
        bag_of_slot = n.op("Add", n.op("Mul", n.op("Gather", n.constant(slot), feature), batch), sample)
    target = n.op("Expand", n.op("Unsqueeze", bag_of_slot, column), n.op("Shape", gathered))
    width = n.op("Shape", "weights", start=1)
    slots = n.constant([T + has_spare])
    zeros = n.op("Expand", n.constant(0.0, np.float32), n.op("Concat", n.op("Mul", slots, batch), width, axis=0))
    summed = n.op("ScatterElements", zeros, target, gathered, axis=0, reduction="add")
    pooled = n.op("Reshape", summed, n.op("Concat", slots, batch, width, axis=0), allowzero=1)
    if has_spare:
        pooled = n.op("Slice", pooled, n.constant([0]), n.constant([T]), n.constant([0]))
    if any(a.mean):
        shape = n.op("Concat", n.constant([a.num_features]), batch, axis=0)
        lengths = n.op("Gather", n.op("Reshape", n.op("Sub", ends, starts), shape, allowzero=1), n.constant(a.features))
        mean = n.constant(np.array(a.mean)[:, None])
        divisor = n.op("Max", n.op("Mul", lengths, mean), n.constant(1))
        pooled = n.op("Div", pooled, n.op("Cast", n.op("Unsqueeze", divisor, n.constant([2])), to=TensorProto.FLOAT))
    n.op("Transpose", pooled, perm=[1, 0, 2], output="pooled")


def pool_fixed(
    n: Nodes,
    a: BagAttributes,
    factors: Sequence[int],
    *,
    ids: str,
    table: str,
    weights: str,
    output: str,
    dtype: npt.DTypeLike = np.int64,
) -> None:
    """Gather [slots, B, L, D] and reduce over L, one gather for all slots of one pooling factor L.

    Args:
        n: where the nodes go.
        a: attributes of the operator.
        factors: its pooling factors, L of each feature.
        ids: name of the ids [N], of `dtype`.
        table: name of the group's matrix [R, D].
        weights: name of the per-sample weights [N], read where the operator is weighted.
        output: name of the result [B, T, D].
        dtype: int32 or int64.
    """
    batch = n.op("Div", n.op("Shape", ids), n.constant([sum(factors)]))
    total = n.op("Gather", n.op("Shape", table), n.constant(0))
    starts = [sum(factors[:feature]) for feature in a.features]  # in units of B
    by_factor: dict[int, list[int]] = {}
    for t, feature in enumerate(a.features):
        by_factor.setdefault(factors[feature], []).append(t)

    pooled, order = [], []
    for factor, slots in by_factor.items():
        shape = n.op("Concat", n.constant([len(slots)]), batch, n.constant([factor]), axis=0)
        select = [_feature_ids(n, ids, batch, a, factors, slots, starts, factor), ""]
        if a.weighted:
            select[1] = _feature_ids(n, weights, batch, a, factors, slots, starts, factor)
        ids_TBL = n.op("Reshape", select[0], shape, allowzero=1)
        rows = n.constant(np.array([a.rows[t] for t in slots])[:, None, None], dtype)
        row_starts = n.constant(np.array([a.row_starts[t] for t in slots])[:, None, None], dtype)
        row_TBL, bad_TBL = policy_rows(n, ids_TBL, rows, row_starts, a.index_policy, total, dtype)
        last = n.constant([3 if factor > 1 else 2])
        if factor == 1:  # one id a bag: no reduction
            row_TBL = n.op("Squeeze", row_TBL, n.constant([2]))
            bad_TBL = n.op("Squeeze", bad_TBL, n.constant([2])) if bad_TBL else None
        gathered = n.op("Gather", table, row_TBL)
        if a.weighted:
            weights_TBL = n.op("Reshape", select[1], shape, allowzero=1)
            if factor > 1:
                weights_TBL = n.op("Unsqueeze", weights_TBL, last)
            gathered = n.op("Mul", weights_TBL, gathered)
        if bad_TBL:
            gathered = n.op("Where", n.op("Unsqueeze", bad_TBL, last), n.constant(0.0, np.float32), gathered)
        if factor > 1:
            gathered = n.op("ReduceSum", gathered, n.constant([2]), keepdims=0)
            divisors = np.array([factor if a.mean[t] else 1 for t in slots], np.float32)
            if any(divisors != 1):
                gathered = n.op("Div", gathered, n.constant(divisors[:, None, None], np.float32))
        pooled.append(gathered)
        order += slots
    pooled_TBD = n.op("Concat", *pooled, axis=0) if len(pooled) > 1 else pooled[0]
    if order != sorted(order):
        pooled_TBD = n.op("Gather", pooled_TBD, n.constant(np.argsort(order)))
    n.op("Transpose", pooled_TBD, perm=[1, 0, 2], output=output)


def _feature_ids(
    n: Nodes,
    values: str,
    batch: str,
    a: BagAttributes,
    factors: Sequence[int],
    slots: Sequence[int],
    starts: Sequence[int],
    factor: int,
) -> str:
    """The part of `values` [N] that belongs to these slots, in their order."""
    if [a.features[t] for t in slots] == list(range(len(factors))):
        return values
    pieces = []
    for t in slots:
        start, stop = starts[t], starts[t] + factor
        bounds = [n.op("Mul", batch, n.constant([bound])) for bound in (start, stop)]
        pieces.append(n.op("Slice", values, *bounds))
    return n.op("Concat", *pieces, axis=0) if len(pieces) > 1 else pieces[0]
