"""Writes the ONNX graph of a DLRM from its ModelConfig.

Not traced: tables stay outside as external data, embedding bags stay one node a table group, and the graph depends on
nothing but the config. Blocks are shared with `tensorrt_graph`, which writes the same model in a form TensorRT builds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

import dlrm_deploy
from dlrm_deploy.bundle import TableGroupRecord, TensorSpec
from dlrm_deploy.config import ModelConfig
from dlrm_deploy.export.blocks import (
    interact,
    mlp,
    other_vectors,
    path_mlps,
    score,
    transformed_dense,
    vectors,
)
from dlrm_deploy.export.function_bodies import bag_of_each_id, dot_interaction_function, embedding_bag_function
from dlrm_deploy.export.nodes import DOMAIN, DOMAIN_VERSION, OPSET, Nodes
from dlrm_deploy.model.keys import bottom_keys
from dlrm_deploy.model.stage_names import path_name, pooled_name
from dlrm_deploy.model.vectors import path_features
from dlrm_deploy.ops.contract import BagAttributes
from dlrm_deploy.tables import TableConfig

IR_VERSION = 10
_ONNX_TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64}


def signature(config: ModelConfig, index_dtype: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of the exported graph."""
    inputs = [TensorSpec(name="indices", dtype=index_dtype, shape=("ids",))]
    if config.dense_features:
        inputs.insert(0, TensorSpec(name="dense", dtype="float32", shape=("batch", len(config.dense_features))))
    if config.pooling_factors is None:
        inputs.append(TensorSpec(name="offsets", dtype=index_dtype, shape=("bags_plus_1",)))
    if config.weighted:
        inputs.append(TensorSpec(name="weights", dtype="float32", shape=("ids",)))
    return tuple(inputs), (TensorSpec(name="probabilities", dtype="float32", shape=("batch",)),)


def write_model(
    config: ModelConfig,
    dense: Mapping[str, npt.NDArray[np.float32]],
    tables: Sequence[TableGroupRecord],
    index_dtype: str,
) -> onnx.ModelProto:
    """The model with function bodies; tables refer to their files, all other weights are inside.

    Args:
        config: the architecture.
        dense: parameters by checkpoint key (`dlrm_deploy.model.keys.dense_shapes`).
        tables: file of each of `config.groups`, relative to the model.
        index_dtype: "int32" or "int64", type of `indices` and `offsets`.
    """
    inputs, outputs = signature(config, index_dtype)
    n = Nodes()
    functions = []
    groups = [group for group in config.groups if group.slots]
    for group in groups:
        attributes = BagAttributes.of(config, group)
        overload = "" if len(groups) == 1 and not path_features(config) else group.name
        _bags(n, attributes, group.name, overload, pooled_name(group.name))
        functions.append(embedding_bag_function(attributes, overload))
    pooled = [pooled_name(group.name) for group in config.groups]
    slots = [len(group.slots) for group in config.groups]
    for feature, table in path_features(config):
        output, bodies = _path(n, config, feature, table, index_dtype)
        pooled.append(output)
        slots.append(1)
        functions += bodies
    dense_values = transformed_dense(n, config)
    x = mlp(n, dense_values, bottom_keys(config), "bottom") if config.dense_features else ""

    def dot(first: str, others: str, output: str | None) -> str:
        functions.append(dot_interaction_function(other_vectors(config), config.self_interaction))
        flag = int(config.self_interaction)
        return n.op("DotInteraction", first, others, output=output, domain=DOMAIN, self_interaction=flag)

    x = interact(n, config, x, vectors(n, config, pooled, slots), dot)
    logits = score(n, config, x, dense_values, pooled)
    n.op("Squeeze", n.op("Sigmoid", logits), n.constant([1]), output="probabilities")

    graph = helper.make_graph(
        n.nodes,
        config.name,
        [value_info(spec) for spec in inputs],
        [value_info(spec) for spec in outputs],
        [
            *(external_table(record) for record in tables),
            *(numpy_helper.from_array(np.ascontiguousarray(array), key) for key, array in dense.items()),
        ],
    )
    return helper.make_model(
        graph,
        functions=functions,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        ir_version=IR_VERSION,
        producer_name="dlrm-deploy",
        producer_version=dlrm_deploy.__version__,
    )


def _bags(n: Nodes, attributes: BagAttributes, group: str, overload: str, output: str, ids: str = "indices") -> str:
    """One TableBatchedEmbeddingBag node."""
    actual = {"weights": f"tables_{group}", "per_sample_weights": "weights", "indices": ids}
    return n.op(
        "TableBatchedEmbeddingBag", *(actual.get(name, name) for name in attributes.inputs()),
        output=output, domain=DOMAIN, overload=overload, **attributes.node_attributes(),
    )  # fmt: skip


def _path(
    n: Nodes, config: ModelConfig, feature: int, table: TableConfig, index_dtype: str
) -> tuple[str, list[onnx.FunctionProto]]:
    """The pooled vector [B, 1, W] of a feature of a path table, and the bodies of its nodes.

    Its M ids are cut out of the batch and looked up one by one in each part; their vectors are added up by bag with
    ScatterElements, in index order.
    """
    name, factors = config.features[feature].name, config.pooling_factors
    if factors is None:
        offsets = n.op("Cast", "offsets", to=TensorProto.INT64)
        batch = n.op("Div", n.op("Sub", n.op("Shape", offsets), n.constant([1])), n.constant([len(config.features)]))
        first = n.op("Mul", batch, n.constant([feature]))
        stop = n.op("Add", n.op("Add", first, batch), n.constant([1]))
        bounds = n.op("Slice", offsets, first, stop)
        start, end = n.op("Gather", bounds, n.constant([0])), n.op("Gather", bounds, n.constant([-1]))
    else:
        batch = n.op("Div", n.op("Shape", "indices"), n.constant([sum(factors)]))
        start = n.op("Mul", batch, n.constant([sum(factors[:feature])]))
        end = n.op("Mul", batch, n.constant([sum(factors[: feature + 1])]))
    ids = n.op("Slice", "indices", start, end)
    rows, bodies = [], []
    for group in config.groups:
        for part in group.parts:
            if part not in table.parts:
                continue
            attributes = BagAttributes.of_ids(config, feature, part, group.rows_of(part.name).start)
            overload = f"{name}.{part.name}"  # names hold no dots, so no two pairs give one
            looked_up = _bags(n, attributes, group.name, overload, f"rows_{overload}", ids)
            rows.append((table.parts.index(part), n.op("Squeeze", looked_up, n.constant([1]))))
            bodies.append(embedding_bag_function(attributes, overload))
    x = path_mlps(n, table, [row for _, row in sorted(rows)])
    if config.weighted:
        x = n.op("Mul", x, n.op("Unsqueeze", n.op("Slice", "weights", start, end), n.constant([1])))
    mean = config.features[feature].pooling == "mean"
    if factors is not None:
        x = n.op("Reshape", x, n.op("Concat", batch, n.constant([factors[feature], table.width]), axis=0), allowzero=1)
        x = n.op("ReduceMean" if mean else "ReduceSum", x, n.constant([1]), keepdims=1, output=path_name(name))
        return x, bodies
    starts = n.op("Sub", n.op("Slice", bounds, n.constant([0]), batch), start)
    bag = bag_of_each_id(n, starts, n.op("Shape", ids))
    target = n.op("Expand", n.op("Unsqueeze", bag, n.constant([1])), n.op("Shape", x))
    zeros = n.op("Expand", n.constant(0.0, np.float32), n.op("Concat", batch, n.constant([table.width]), axis=0))
    x = n.op("ScatterElements", zeros, target, x, axis=0, reduction="add")
    if mean:
        lengths = n.op("Sub", n.op("Slice", bounds, n.constant([1]), n.constant([np.iinfo(np.int64).max])),
                       n.op("Slice", bounds, n.constant([0]), batch))  # fmt: skip
        divisor = n.op("Cast", n.op("Max", lengths, n.constant([1])), to=TensorProto.FLOAT)
        x = n.op("Div", x, n.op("Unsqueeze", divisor, n.constant([1])))
    return n.op("Unsqueeze", x, n.constant([1]), output=path_name(name)), bodies


def value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, _ONNX_TYPES[spec.dtype], spec.shape)


def external_table(record: TableGroupRecord) -> onnx.TensorProto:
    """An initializer whose values lie in the group's file."""
    tensor = TensorProto(name=f"tables_{record.name}", data_type=TensorProto.FLOAT, dims=(record.rows, record.width))
    tensor.data_location = TensorProto.EXTERNAL
    entries: dict[str, Any] = {"location": record.file, "offset": 0, "length": record.rows * record.width * 4}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
