"""Embedding bags of a plan: standard operators that TensorRT builds, for tables of every row format.

Ids and offsets are int32. Bags of varying length are padded to a length fixed at build time, because TensorRT has no
scatter-add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from dlrm_deploy.bundle import TensorSpec
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.export.blocks import path_mlps
from dlrm_deploy.export.nodes import Nodes
from dlrm_deploy.export.pooling_bodies import policy_rows, pool_fixed
from dlrm_deploy.export.row_decoding import StoredAs, decode_rows
from dlrm_deploy.formats import GroupLayout, RowFormat, row_bytes, stored_columns, tensor_name
from dlrm_deploy.model.stage_names import path_name, pooled_name
from dlrm_deploy.ops.contract import BagAttributes
from dlrm_deploy.tables import TableConfig, TableGroup

_INPUT_TYPES: dict[RowFormat, str] = {
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8", "int4": "int8",
}  # fmt: skip


def table_inputs(config: ModelConfig, table_formats: Mapping[str, RowFormat]) -> list[TensorSpec]:
    """Tables as inputs of the graph: one for each row format of a table group, of the stored matrix's shape.

    Rows of int8 and int4 are bytes, and called int8.
    """
    return [
        TensorSpec(
            name=tensor_name(group.name, matrix.format),
            dtype=_INPUT_TYPES[matrix.format],
            shape=(matrix.rows, stored_columns(matrix.format, group.width)),
        )
        for group in config.groups
        for matrix in GroupLayout.of(group, table_formats).matrices
    ]


def table_constant(name: str, format: RowFormat, stored: npt.NDArray[Any], width: int) -> onnx.TensorProto:
    """A stored matrix (`dlrm_deploy.formats.encode`) as a constant of the graph."""
    values = np.ascontiguousarray(stored)
    if format == "bf16":
        raw = values.astype("<u2").tobytes()
        return TensorProto(name=name, data_type=TensorProto.BFLOAT16, dims=values.shape, raw_data=raw)
    if format in ("int8", "int4") and _stored_as(format, width, as_input=False) == "int32":
        values = values.view("<i4")
    return numpy_helper.from_array(values, name)


def _stored_as(format: RowFormat, width: int, *, as_input: bool) -> StoredAs:
    """What the bytes of int8 and int4 rows are to TensorRT.

    It gathers from int8 inputs, whatever the bytes mean, and from no uint8 ones. As constants it takes int8 for its own
    quantization only, and keeps uint8 in 32 bits a byte: there, rows of whole words are words.
    """
    if as_input:
        return "int8"
    return "uint8" if row_bytes(format, width) % 4 else "int32"


class PlanBags:
    """Writes the embedding bags of a model."""

    def __init__(
        self, n: Nodes, config: ModelConfig, table_formats: Mapping[str, RowFormat], *, max_bag: int, as_inputs: bool
    ) -> None:
        """
        Args:
            n: where the nodes go.
            config: the model.
            table_formats: row format of each table part that is not fp32.
            max_bag: ids that a bag can hold at most; what a longer bag holds beyond it is not read. Without meaning
                where all pooling factors are fixed.
            as_inputs: whether tables are `table_inputs`, rather than constants.
        """
        self._n, self._config, self._formats, self._max_bag = n, config, table_formats, max_bag
        self._as_inputs = as_inputs

    def group(self, group: TableGroup) -> None:
        """The pooled vectors [B, T, D] of a table group, as its `pooled_name`."""
        n = self._n
        a = _never_fails(BagAttributes.of(self._config, group, self._formats))
        if a.pooling_factors is not None:
            self._pool_fixed(a, a.pooling_factors, group.name, "indices", "weights", pooled_name(group.name))
            return
        pieces, order = [], []
        for format in a.used_formats:
            slots = [t for t, other in enumerate(a.slot_formats) if other == format]
            order += slots
            pieces.append(self._pool_padded(_of_slots(a, slots), format, tensor_name(group.name, format)))
        pooled = n.op("Concat", *pieces, axis=0) if len(pieces) > 1 else pieces[0]
        if order != sorted(order):
            pooled = n.op("Gather", pooled, n.constant(np.argsort(order)))
        n.op("Transpose", pooled, perm=[1, 0, 2], output=pooled_name(group.name))

    def path(self, feature: int, table: TableConfig) -> str:
        """The pooled vector [B, 1, W] of a feature of a path table: its ids, padded where bags vary, one by one."""
        n, config = self._n, self._config
        factors, name = config.pooling_factors, config.features[feature].name
        filled = lengths = None
        if factors is None:
            bag = self._max_bag
            starts, ends = (self._bounds((feature,), side) for side in ("first", "last"))  # [1, B, 1]
            places = n.op("Add", starts, n.constant(np.arange(self._max_bag)[None, None], np.int32))
            filled = n.op("Less", places, ends)
            lengths = n.op("Sub", ends, starts)
            places = n.op("Reshape", n.op("Where", filled, places, n.constant(0, np.int32)), n.constant([-1]))
        else:
            bag = factors[feature]
            batch = n.op("Div", n.op("Shape", "indices"), n.constant([sum(factors)]))
            first = n.op("Mul", batch, n.constant([sum(factors[:feature])]))
            last = n.op("Mul", batch, n.constant([sum(factors[: feature + 1])]))

        def of_feature(values: str) -> str:
            return n.op("Gather", values, places) if factors is None else n.op("Slice", values, first, last)

        ids = of_feature("indices")
        rows = []
        for part in table.parts:
            group = next(group for group in config.groups if part in group.parts)
            format, row_start = GroupLayout.of(group, self._formats).place(part.name)
            a = _never_fails(BagAttributes.of_ids(config, feature, part, row_start, format))
            looked_up = f"rows_{name}.{part.name}"
            self._pool_fixed(a, (1,), group.name, ids, "", looked_up)
            rows.append(n.op("Squeeze", looked_up, n.constant([1])))
        x = path_mlps(n, table, rows)
        if config.weighted:
            x = n.op("Mul", x, n.op("Unsqueeze", of_feature("weights"), n.constant([1])))
        x = n.op("Reshape", x, n.constant([-1, bag, table.width]))
        if filled is not None:
            kept = n.op("Unsqueeze", n.op("Squeeze", filled, n.constant([0])), n.constant([2]))
            x = n.op("Where", kept, x, n.constant(0.0, np.float32))
        mean = config.features[feature].pooling == "mean"
        x = n.op("ReduceSum", x, n.constant([1]), keepdims=1, output=None if mean else path_name(name))
        if mean:
            divisor = n.constant(float(bag), np.float32)
            if lengths is not None:
                counted = n.op("Max", n.op("Reshape", lengths, n.constant([-1, 1, 1])), n.constant(1, np.int32))
                divisor = n.op("Cast", counted, to=TensorProto.FLOAT)
            x = n.op("Div", x, divisor, output=path_name(name))
        return x

    def _bounds(self, features: Sequence[int], side: str) -> str:
        """First or last bounds of the bags of some features, [T, B, 1] int32."""
        n, config = self._n, self._config
        if config.dense_features:
            # The batch size comes from `dense`: TensorRT then knows that pooled vectors and dense vectors go together.
            shape = n.op("Concat", n.constant([len(config.features)]), n.op("Shape", "dense", end=1), axis=0)
        else:
            shape = n.constant([len(config.features), -1])
        first, last = (0, -1) if side == "first" else (1, np.iinfo(np.int32).max)
        cut = n.op("Slice", "offsets", n.constant([first]), n.constant([last]), n.constant([0]))
        by_feature = n.op("Reshape", cut, shape)
        if tuple(features) != tuple(range(len(config.features))):
            by_feature = n.op("Gather", by_feature, n.constant(features))
        return n.op("Unsqueeze", by_feature, n.constant([2]))

    def _pool_fixed(
        self, a: BagAttributes, factors: Sequence[int], group: str, ids: str, weights: str, output: str
    ) -> None:
        tables = {format: tensor_name(group, format) for format in a.used_formats}
        pool_fixed(
            self._n, a, factors,
            ids=ids, tables=tables, weights=weights, output=output, dtype=np.int32, decode=self._decode,
        )  # fmt: skip

    def _decode(self, n: Nodes, format: RowFormat, gathered: str, width: int) -> str:
        return decode_rows(n, format, gathered, width, _stored_as(format, width, as_input=self._as_inputs))

    def _pool_padded(self, a: BagAttributes, format: RowFormat, table: str) -> str:
        """Sums or means [T, B, D] of slots of one row format.

        Pad bags to `max_bag` ids, gather [T, B, L, D], drop the padding with Where and sum over L.

        Where rather than a product with a mask: a NaN or an infinity in a row that only pads must not reach the sum.
        """
        n, max_bag, i32 = self._n, self._max_bag, np.int32
        starts, ends = (self._bounds(a.features, side) for side in ("first", "last"))
        places = n.op("Add", starts, n.constant(np.arange(max_bag)[None, None], i32))
        filled = n.op("Less", places, ends)
        places = n.op("Where", filled, places, n.constant(0, i32))
        ids = n.op("Gather", "indices", places)
        # Padding reads whichever id stands first; the policy keeps it inside the table like any other id.
        total = n.op("Gather", n.op("Shape", table), n.constant(0))
        slots = range(len(a.features))
        row_TBL, bad = policy_rows(
            n, ids, a, slots, lambda values: n.constant(values[:, None, None], values.dtype), total, i32
        )
        kept = n.op("And", filled, n.op("Not", bad)) if bad else filled
        gathered = self._decode(n, format, n.op("Gather", table, row_TBL), a.width or 0)
        last = n.constant([3])
        if a.weighted:
            weights = n.op("Unsqueeze", n.op("Gather", "weights", places), last)
            gathered = n.op("Mul", gathered, weights)
        gathered = n.op("Where", n.op("Unsqueeze", kept, last), gathered, n.constant(0.0, np.float32))
        pooled = n.op("ReduceSum", gathered, n.constant([2]), keepdims=0)
        if any(a.mean):
            mean = n.constant(np.array(a.mean)[:, None, None], i32)
            lengths = n.op("Mul", n.op("Sub", ends, starts), mean)
            divisor = n.op("Max", lengths, n.constant(1, i32))
            pooled = n.op("Div", pooled, n.op("Cast", divisor, to=TensorProto.FLOAT))
        return pooled


def _never_fails(attributes: BagAttributes) -> BagAttributes:
    """Without what the host does before: it refuses bad ids, and takes the modulo, in 64 bits."""
    policy = "clamp" if attributes.index_policy == "error" else attributes.index_policy
    return replace(attributes, index_policy=policy, moduli=())


def _of_slots(a: BagAttributes, slots: Sequence[int]) -> BagAttributes:
    """The attributes of some slots."""
    names = ("features", "row_starts", "rows", "ids", "moduli", "divisors", "divisions", "mean", "formats")
    values: dict[str, Any] = {name: tuple(getattr(a, name)[t] for t in slots) for name in names}
    return replace(a, **values)
