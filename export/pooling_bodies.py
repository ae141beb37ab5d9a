"""Standard operators for the bags of TableBatchedEmbeddingBag: rows from ids, and their sums by bag.

What is written is specialised to its node: it holds only what the node's form, poolings, index policy, row formats and
way from ids to rows need, with the node's attributes as constants. It is right for bags of any length, empty ones too,
and for a batch of zero samples. Additions run in index order, so results equal the kernels' except where fixed bags are
summed by ReduceSum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from dlrm_deploy.errors import EngineError
from dlrm_deploy.export.nodes import Nodes
from dlrm_deploy.export.row_decoding import Decode, decode_rows
from dlrm_deploy.formats import RowFormat
from dlrm_deploy.ops.contract import BagAttributes, matrix_input

Numbers = npt.NDArray[Any]
"""One number per slot: int32, int64 or float32."""


def pool(n: Nodes, attributes: BagAttributes) -> None:
    """Write the body of a node: from the operator's inputs to `pooled` [B, T, D]."""
    if attributes.pooling_factors is None:
        _pool_csr(n, attributes)
        return
    pool_fixed(
        n, attributes, attributes.pooling_factors,
        ids=_checked_ids(n, attributes, attributes.pooling_factors),
        tables={format: matrix_input(format) for format in attributes.used_formats},
        weights="per_sample_weights", output="pooled",
    )  # fmt: skip


def policy_rows(
    n: Nodes,
    ids: str,
    a: BagAttributes,
    slots: Sequence[int],
    spread: Callable[[Numbers], str],
    total_rows: str,
    dtype: npt.DTypeLike = np.int64,
) -> tuple[str, str | None]:
    """Rows of the group's matrix for ids; and, for policy zero, where the id is out of range.

    Only what the slots need is written: of plain ones, the index policy and the first row of the table.

    Args:
        n: where the nodes go.
        ids: any shape.
        a: attributes of the operator.
        slots: positions of the slots that the ids belong to.
        spread: makes a constant of an array [len(slots)] that broadcasts with `ids`, of the array's type.
        total_rows: R. Policy error reads row R for a bad id, which Gather refuses.
        dtype: of ids and all row numbers, int32 or int64.

    Raises:
        EngineError: a number of ids, a modulus or a divisor is beyond `dtype`.
    """
    numbers = _SlotNumbers(a, slots, dtype)
    limit, row_starts = spread(numbers.ids), spread(numbers.row_starts)
    moduli = numbers.moduli
    if moduli.any():
        reduced = n.op("Mod", ids, spread(np.maximum(moduli, 1)))
        if not moduli.all():
            reduced = n.op("Where", n.op("Greater", spread(moduli), n.constant(0, dtype)), reduced, ids)
        ids = reduced
    bad = None
    if a.index_policy == "clamp":
        # Not Min and Max: ONNX Runtime 1.31's int64 ones are wrong for values in [2^31, 2^32).
        zero, last = n.constant(0, dtype), n.op("Sub", limit, n.constant(1, dtype))
        from_zero = n.op("Where", n.op("Less", ids, zero), zero, ids)
        ids = n.op("Where", n.op("Greater", from_zero, last), last, from_zero)
    elif a.index_policy == "modulo":
        ids = n.op("Mod", ids, limit)
    else:
        bad = n.op("Or", n.op("Less", ids, n.constant(0, dtype)), n.op("GreaterOrEqual", ids, limit))
    row = n.op("Add", _quotients(n, ids, numbers, spread), row_starts)
    if bad is None:
        return row, None
    if a.index_policy == "zero":
        return n.op("Where", bad, row_starts, row), bad
    return n.op("Where", bad, total_rows, row), None


class _SlotNumbers:
    """Attributes of some slots as arrays [len(slots)] of one type, or an error where they do not fit."""

    def __init__(self, a: BagAttributes, slots: Sequence[int], dtype: npt.DTypeLike) -> None:
        kind = np.dtype(dtype)
        for name in ("ids", "moduli", "divisors"):
            for t in slots:
                value = getattr(a, name)[t]
                if value > np.iinfo(kind).max:
                    feature = repr(a.feature_names[a.features[t]]) if a.feature_names else str(a.features[t])
                    raise EngineError(
                        f"feature {feature}: {name} of its slot {t} is {value}, but this graph computes rows in "
                        f"{kind.name}. Use engine onnxruntime, or a smaller number."
                    )

        def numbers(values: Sequence[int]) -> Numbers:
            return np.array([values[t] for t in slots], kind)

        self.rows, self.row_starts, self.ids = numbers(a.rows), numbers(a.row_starts), numbers(a.ids)
        self.moduli, self.divisors, self.divisions = numbers(a.moduli), numbers(a.divisors), numbers(a.divisions)


def _quotients(n: Nodes, ids: str, slots: _SlotNumbers, spread: Callable[[Numbers], str]) -> str:
    """Rows of their slot's table part that valid ids read; the ids themselves in plain slots."""
    rows, divisors, divisions = slots.rows, slots.divisors, slots.divisions
    exact = ids
    if not divisions.all():
        if (divisors != 1).any():
            exact = n.op("Div", exact, spread(divisors))
        if ((slots.ids - 1) // divisors >= rows).any():
            exact = n.op("Mod", exact, spread(rows))
        if not divisions.any():
            return exact
    floats = n.op("Cast", ids, to=TensorProto.FLOAT)
    divided = by_reciprocal = ""
    if (divisions == 1).any():
        divided = n.op("Div", floats, spread(divisors.astype(np.float32)))
    if (divisions == 2).any():  # reciprocals are constants: ONNX Runtime makes one division of Div and Mul
        by_reciprocal = n.op("Mul", floats, spread(np.float32(1) / divisors.astype(np.float32)))
    quotients = divided or by_reciprocal
    if divided and by_reciprocal:
        quotients = n.op("Where", n.op("Equal", spread(divisions), n.constant(1, rows.dtype)), divided, by_reciprocal)
    if rows.dtype == np.int32:  # the float32 neighbour of an int32 may be 2^31
        quotients = n.op("Min", quotients, n.constant(np.nextafter(np.float32(2**31), np.float32(0)), np.float32))
    whole, last = n.op("Cast", quotients, to=helper.np_dtype_to_tensor_dtype(rows.dtype)), spread(rows - 1)
    whole = n.op("Where", n.op("Greater", whole, last), last, whole)
    if divisions.all():
        return whole
    return n.op("Where", n.op("Equal", spread(divisions), n.constant(0, rows.dtype)), exact, whole)


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
    if len(set(factors)) == 1 and a.features == tuple(range(len(factors))):
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


def bag_of_each_id(n: Nodes, starts: str, ids_count: str) -> str:
    """[N]: the number of bags that start at or before each id, minus one.

    Args:
        n: where the nodes go.
        starts: first id of each bag, int64, rising.
        ids_count: N, as [1] int64.
    """
    places = n.op("Expand", n.constant([0]), n.op("Add", ids_count, n.constant([1])))
    ones = n.op("Expand", n.constant([1]), n.op("Shape", starts))
    begun = n.op("CumSum", n.op("ScatterElements", places, starts, ones, axis=0, reduction="add"), n.constant(0))
    return n.op("Sub", n.op("Slice", begun, n.constant([0]), ids_count), n.constant([1]))


def _pool_csr(n: Nodes, a: BagAttributes) -> None:
    """Gather the row of every id [N, D] and add it to its bag with ScatterElements, which runs in index order.

    Not ScatterND: ONNX Runtime's adds repeated indices from several threads without a lock and loses some.
    Not a padded [bags, longest, D]: one bag of 100,000 ids would cost memory for every bag.
    """
    ids = _int64(n, "indices")
    starts, ends = _starts_and_ends(n, _checked_offsets(n, a))
    batch = n.op("Div", n.op("Shape", starts), n.constant([a.num_features]))

    bag = bag_of_each_id(n, starts, n.op("Shape", ids))
    # ONNX Runtime refuses a division by zero even of no elements at all.
    feature = n.op("Div", bag, n.op("Max", batch, n.constant([1])))

    passes = _passes(a)
    pooled = [_pool_pass(n, a, format, slots, ids, bag, feature, batch) for format, slots in passes]
    pooled_TBD = _in_slot_order(n, pooled, [slots for _, slots in passes])
    if any(a.mean):
        shape = n.op("Concat", n.constant([a.num_features]), batch, axis=0)
        lengths = n.op("Gather", n.op("Reshape", n.op("Sub", ends, starts), shape, allowzero=1), n.constant(a.features))
        mean = n.constant(np.array(a.mean)[:, None])
        divisor = n.op("Max", n.op("Mul", lengths, mean), n.constant(1))
        pooled_TBD = n.op(
            "Div", pooled_TBD, n.op("Cast", n.op("Unsqueeze", divisor, n.constant([2])), to=TensorProto.FLOAT)
        )
    n.op("Transpose", pooled_TBD, perm=[1, 0, 2], output="pooled")


def _passes(a: BagAttributes) -> list[tuple[RowFormat, list[int]]]:
    """The slots, cut so that those of a list have one row format and no two of them pool one feature."""
    passes: list[tuple[RowFormat, list[int]]] = []
    for t, (feature, format) in enumerate(zip(a.features, a.slot_formats, strict=True)):
        for pass_format, slots in passes:
            if format == pass_format and feature not in (a.features[s] for s in slots):
                slots.append(t)
                break
        else:
            passes.append((format, [t]))
    return passes


def _pool_pass(
    n: Nodes, a: BagAttributes, format: RowFormat, slots: Sequence[int], ids: str, bag: str, feature: str, batch: str
) -> str:
    """The sums [slots, B, D] of some slots with different features; `bag` and `feature` are those of each id."""
    T = len(slots)
    features = [a.features[t] for t in slots]
    per_sample_weights = "per_sample_weights"
    if a.num_features > T:  # only the ids of these features
        pooled_here = np.isin(np.arange(a.num_features), features)
        kept = n.op("Gather", n.constant(pooled_here, np.bool_), feature)
        ids, bag, feature = (n.op("Compress", values, kept, axis=0) for values in (ids, bag, feature))
        if a.weighted:
            per_sample_weights = n.op("Compress", per_sample_weights, kept, axis=0)

    def spread(values: Numbers) -> str:
        by_feature = np.full(a.num_features, values[0])
        by_feature[features] = values
        return n.op("Gather", n.constant(by_feature, values.dtype), feature)

    matrix = matrix_input(format)
    row_N, bad_N = policy_rows(n, ids, a, slots, spread, _row_count(n, matrix))
    gathered = _values(n, a, format, n.op("Gather", matrix, row_N), decode_rows)
    column = n.constant([1])
    if a.weighted:
        gathered = n.op("Mul", n.op("Unsqueeze", per_sample_weights, column), gathered)
    if bad_N is not None:
        gathered = n.op("Where", n.op("Unsqueeze", bad_N, column), n.constant(0.0, np.float32), gathered)
    if features != list(range(a.num_features)):
        slot = np.zeros(a.num_features)
        slot[features] = range(T)
        sample = n.op("Sub", bag, n.op("Mul", feature, batch))
        bag = n.op("Add", n.op("Mul", n.op("Gather", n.constant(slot), feature), batch), sample)
    target = n.op("Expand", n.op("Unsqueeze", bag, column), n.op("Shape", gathered))
    width = n.op("Shape", matrix, start=1) if a.width is None else n.constant([a.width])
    count = n.constant([T])
    zeros = n.op("Expand", n.constant(0.0, np.float32), n.op("Concat", n.op("Mul", count, batch), width, axis=0))
    summed = n.op("ScatterElements", zeros, target, gathered, axis=0, reduction="add")
    return n.op("Reshape", summed, n.op("Concat", count, batch, width, axis=0), allowzero=1)


def _row_count(n: Nodes, matrix: str) -> str:
    return n.op("Gather", n.op("Shape", matrix), n.constant(0))


def _values(n: Nodes, a: BagAttributes, format: RowFormat, gathered: str, decode: Decode) -> str:
    if format == "fp32":
        return gathered
    assert a.width is not None  # there are formats
    return decode(n, format, gathered, a.width)


def _in_slot_order(n: Nodes, pooled: Sequence[str], slots: Sequence[Sequence[int]]) -> str:
    """One [T, B, D] of several [some slots, B, D]."""
    pooled_TBD = n.op("Concat", *pooled, axis=0) if len(pooled) > 1 else pooled[0]
    order = [t for some in slots for t in some]
    if order != sorted(order):
        pooled_TBD = n.op("Gather", pooled_TBD, n.constant(np.argsort(order)))
    return pooled_TBD


def pool_fixed(
    n: Nodes,
    a: BagAttributes,
    factors: Sequence[int],
    *,
    ids: str,
    tables: Mapping[RowFormat, str],
    weights: str,
    output: str,
    dtype: npt.DTypeLike = np.int64,
    decode: Decode = decode_rows,
) -> None:
    """Gather [slots, B, L, D] and reduce over L, one gather for all slots of one pooling factor L and one row format.

    Args:
        n: where the nodes go.
        a: attributes of the operator.
        factors: its pooling factors, L of each feature.
        ids: name of the ids [N], of `dtype`.
        tables: name of the matrix of each row format that a slot reads.
        weights: name of the per-sample weights [N], read where the operator is weighted.
        output: name of the result [B, T, D].
        dtype: int32 or int64.
        decode: decodes gathered rows that are not fp32.
    """

    def column(values: Numbers) -> str:
        return n.constant(values[:, None, None], values.dtype)

    batch = n.op("Div", n.op("Shape", ids), n.constant([sum(factors)]))
    totals = {format: _row_count(n, table) for format, table in tables.items()}
    starts = [sum(factors[:feature]) for feature in a.features]  # in units of B
    alike: dict[tuple[int, RowFormat], list[int]] = {}
    for t, (feature, format) in enumerate(zip(a.features, a.slot_formats, strict=True)):
        alike.setdefault((factors[feature], format), []).append(t)

    pooled = []
    for (factor, format), slots in alike.items():
        shape = n.op("Concat", n.constant([len(slots)]), batch, n.constant([factor]), axis=0)
        select = [_feature_ids(n, ids, batch, a, factors, slots, starts, factor), ""]
        if a.weighted:
            select[1] = _feature_ids(n, weights, batch, a, factors, slots, starts, factor)
        ids_TBL = n.op("Reshape", select[0], shape, allowzero=1)
        row_TBL, bad_TBL = policy_rows(n, ids_TBL, a, slots, column, totals[format], dtype)
        last = n.constant([2 if factor == 1 else 3])
        if factor == 1:  # one id a bag: no reduction
            row_TBL = n.op("Squeeze", row_TBL, n.constant([2]))
            bad_TBL = n.op("Squeeze", bad_TBL, n.constant([2])) if bad_TBL else None
        gathered = _values(n, a, format, n.op("Gather", tables[format], row_TBL), decode)
        if a.weighted:
            weights_TBL = n.op("Reshape", select[1], shape, allowzero=1)
            if factor != 1:
                weights_TBL = n.op("Unsqueeze", weights_TBL, last)
            gathered = n.op("Mul", weights_TBL, gathered)
        if bad_TBL:
            gathered = n.op("Where", n.op("Unsqueeze", bad_TBL, last), n.constant(0.0, np.float32), gathered)
        if factor != 1:  # 0, too: the sum of nothing
            gathered = n.op("ReduceSum", gathered, n.constant([2]), keepdims=0)
            divisors = np.array([max(factor, 1) if a.mean[t] else 1 for t in slots], np.float32)
            if any(divisors != 1):
                gathered = n.op("Div", gathered, n.constant(divisors[:, None, None], np.float32))
        pooled.append(gathered)
    pooled_TBD = _in_slot_order(n, pooled, list(alike.values()))
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
